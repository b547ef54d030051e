"""Assertions about a state tree, and about what a step changed."""

import fnmatch
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

from ..state import Leaf, State, leaves, select, value
from ..text import near
from ..tree import walk
from .snapshot import Snapshot, all_names, how, same


def assert_hyper(state: State | Leaf, pattern: str = "*", /, **expected: Any) -> None:
    """Every leaf whose path matches the glob has these hyperparameters, as the next update will use them: of a schedule
    its value (see `fluxpy.value`). Numbers may differ by rounding, a part in 10⁹. A pattern that matches nothing fails.

    >>> state = setup(Adam(), torch.nn.Linear(2, 3))
    >>> _ = adjust(state.weight, 3e-4)
    >>> assert_hyper(state, "weight", lr=3e-4, betas=(0.9, 0.999))
    >>> assert_hyper(state, lr=3e-4)
    Traceback (most recent call last):
        ...
    AssertionError: 1 of 2 leaves that match '*' are not as expected:
      'bias' has lr=0.001, not 0.0003
    """
    if not expected:
        raise TypeError("assert_hyper needs a hyperparameter to look at, as assert_hyper(state, 'encoder.*', lr=1e-4)")

    def wrong(leaf: Leaf) -> Iterator[str]:
        for name, want in expected.items():
            try:
                have = value(leaf, name)
            except (AttributeError, ValueError) as error:
                yield str(error)
            else:
                if not _close(have, want):
                    yield f"has {name}={have!r}, not {want!r}"

    _assert_leaves(state, pattern, wrong)


def assert_frozen(state: State | Leaf, pattern: str = "*", *, frozen: bool = True) -> None:
    """Every leaf whose path matches the glob is frozen, or, with `frozen=False`, none is. A pattern that matches
    nothing fails.

    >>> state = setup(Adam(), torch.nn.Linear(2, 3))
    >>> _ = freeze(state.bias)
    >>> assert_frozen(state, "bias"), assert_frozen(state, "weight", frozen=False)
    (None, None)
    """

    def wrong(leaf: Leaf) -> Iterator[str]:
        if leaf.frozen is not frozen:
            yield "is frozen" if leaf.frozen else "is not frozen"

    _assert_leaves(state, pattern, wrong)


def assert_only_changed(before: Any, after: Any, *patterns: str) -> None:
    """Exactly the parameters whose path matches one of the globs changed: each of them did, and of all others not a
    bit. Without a pattern: none changed.

    Each side is a snapshot, a model, or a dict of tensors by name, as `model.state_dict()`; but `before` must be a
    copy. Where one side is a snapshot or a model, buffers in the other's dict are passed by.

    >>> model = torch.nn.Linear(2, 1)
    >>> before = fluxpy.testing.snapshot(model)
    >>> _ = update(setup(Descent(), model), model, {"bias": torch.ones(1)})
    >>> assert_only_changed(before, model, "bias")
    """
    (old, ties), (new, more) = _parameters(before), _parameters(after)
    if names := ties | more:
        old, new = ({path: x for path, x in side.items() if path in names} for side in (old, new))
    if any(0 != x.data_ptr() == new[path].data_ptr() for path, x in old.items() if path in new):
        raise TypeError("before shares memory with after, so they cannot differ; take before = snapshot(model)")
    every = {path: names.get(path, (path,)) for path in old | new}
    bad = [f"{path!r} is {'new' if path in new else 'gone'}" for path in every if (path in old) != (path in new)]
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(name, pattern) for also in every.values() for name in also):
            bad.append(f"the pattern {pattern!r} matches no parameter; {near(pattern, every)}")
    for path in (path for path in old if path in new):
        may = any(fnmatch.fnmatchcase(name, pattern) for name in every[path] for pattern in patterns)
        kept = same(old[path], new[path])
        if may and kept and old[path].numel():
            bad.append(f"{path!r} did not change")
        elif not may and not kept:
            bad.append(f"{path!r} changed {how(old[path], new[path])}")
    if bad:
        wanted = "only " + ", ".join(map(repr, patterns)) if patterns else "nothing"
        raise AssertionError("\n  ".join([f"{wanted} was to change, but", *bad]))


def _parameters(x: Any) -> tuple[dict[str, Tensor], dict[str, tuple[str, ...]]]:
    """Tensors by path, and all names of each; a mapping cannot tell ties, nor buffers from parameters."""
    if isinstance(x, Snapshot):
        taken = {path: entry for path, entry in x.items() if "parameter" in entry}
        return {p: e["parameter"] for p, e in taken.items()}, {p: e.get("names", (p,)) for p, e in taken.items()}
    if isinstance(x, Mapping) and x and all(isinstance(v, Tensor) for v in x.values()):
        return {str(name): v for name, v in x.items()}, {}
    spec, values = walk(x)
    return {path: values[index] for index, path in spec.unique.items()}, all_names(spec)


def _assert_leaves(state: Any, pattern: str, wrong: Callable[[Leaf], Iterable[str]]) -> None:
    try:
        found = list(leaves(select(state, pattern)))
    except ValueError as error:
        raise AssertionError(str(error)) from None
    bad = [(path, notes) for path, leaf in found if (notes := list(wrong(leaf)))]
    if bad:
        lines = [f"{path!r} {'; '.join(notes)}" for path, notes in bad]
        head = f"{len(bad)} of {len(found)} leaves that match {pattern!r} are not as expected:"
        raise AssertionError("\n  ".join([head, *lines]))


def _close(have: Any, want: Any) -> bool:
    if isinstance(have, tuple) and isinstance(want, list | tuple):
        return len(have) == len(want) and all(map(_close, have, want))
    a, b = (v.item() if isinstance(v, Tensor) else v for v in [have, want])
    numbers = isinstance(a, int | float) and isinstance(b, int | float)
    return math.isclose(a, b, rel_tol=1e-9) if numbers else a == b

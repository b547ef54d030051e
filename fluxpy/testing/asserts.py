"""Assertions about a state tree, and about what a step changed."""

import fnmatch
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

from ..leaf import Leaf
from ..state import State, leaves, select, value
from ..text import near_pattern
from ..tree import walk
from .compare import describe_change, same_bits
from .snapshots import Snapshot


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

    def problems(leaf: Leaf) -> Iterator[str]:
        for name, want in expected.items():
            try:
                got = value(leaf, name)
            except (AttributeError, ValueError) as error:
                yield str(error)
            else:
                if not _close(got, want):
                    yield f"has {name}={got!r}, not {want!r}"

    _assert_leaves(state, pattern, problems)


def assert_frozen(state: State | Leaf, pattern: str = "*", *, frozen: bool = True) -> None:
    """Every leaf whose path matches the glob is frozen, or, with `frozen=False`, none is. A pattern that matches
    nothing fails.

    >>> state = setup(Adam(), torch.nn.Linear(2, 3))
    >>> _ = freeze(state.bias)
    >>> assert_frozen(state, "bias"), assert_frozen(state, "weight", frozen=False)
    (None, None)
    """

    def problems(leaf: Leaf) -> Iterator[str]:
        if leaf.frozen is not frozen:
            yield "is frozen" if leaf.frozen else "is not frozen"

    _assert_leaves(state, pattern, problems)


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
    (old, old_names), (new, new_names) = _parameters(before), _parameters(after)
    names = old_names | new_names
    if names:  # one side says what the parameters are
        old = {path: x for path, x in old.items() if path in names}
        new = {path: x for path, x in new.items() if path in names}
    both = [path for path in old if path in new]
    if any(old[path].data_ptr() == new[path].data_ptr() != 0 for path in both):
        raise TypeError("before shares memory with after, so they cannot differ; take before = snapshot(model)")
    names = {path: names.get(path, (path,)) for path in old | new}
    problems = [f"{path!r} is {'new' if path in new else 'gone'}" for path in names if path not in both]
    for pattern in patterns:
        if not any(_matches(paths, pattern) for paths in names.values()):
            problems.append(f"the pattern {pattern!r} matches no parameter; {near_pattern(pattern, names)}")
    for path in both:
        expected = any(_matches(names[path], pattern) for pattern in patterns)
        changed = not same_bits(old[path], new[path])
        if expected and not changed and old[path].numel():
            problems.append(f"{path!r} did not change")
        elif changed and not expected:
            problems.append(f"{path!r} changed {describe_change(old[path], new[path])}")
    if problems:
        wanted = "only " + ", ".join(map(repr, patterns)) if patterns else "nothing"
        raise AssertionError("\n  ".join([f"{wanted} was to change, but", *problems]))


def _matches(names: tuple[str, ...], pattern: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for name in names)


def _parameters(x: Any) -> tuple[dict[str, Tensor], dict[str, tuple[str, ...]]]:
    """Tensors by path, and all names of each; none of a mapping, which has no ties and may have buffers in it."""
    if isinstance(x, Snapshot):
        taken = {path: entry for path, entry in x.items() if "parameter" in entry}
        tensors = {path: entry["parameter"] for path, entry in taken.items()}
        return tensors, {path: entry.get("names", (path,)) for path, entry in taken.items()}
    if isinstance(x, Mapping) and x and all(isinstance(v, Tensor) for v in x.values()):
        return {str(name): v for name, v in x.items()}, {}
    spec, values = walk(x)
    tensors = {path: values[index] for index, path in spec.leaves.items()}
    return tensors, {names[0]: tuple(names) for names in spec.names.values()}


def _assert_leaves(state: Any, pattern: str, problems: Callable[[Leaf], Iterable[str]]) -> None:
    """Raise a line for each leaf that matches the pattern and has problems."""
    try:
        found = list(leaves(select(state, pattern)))
    except ValueError as error:
        raise AssertionError(str(error)) from None
    lines = [f"{path!r} {'; '.join(notes)}" for path, leaf in found if (notes := list(problems(leaf)))]
    if lines:
        head = f"{len(lines)} of {len(found)} leaves that match {pattern!r} are not as expected:"
        raise AssertionError("\n  ".join([head, *lines]))


def _close(got: Any, expected: Any) -> bool:
    """Equal, numbers up to rounding."""
    if isinstance(got, tuple) and isinstance(expected, list | tuple):
        return len(got) == len(expected) and all(map(_close, got, expected))
    a, b = (v.item() if isinstance(v, Tensor) else v for v in (got, expected))
    if isinstance(a, int | float) and isinstance(b, int | float):
        return math.isclose(a, b, rel_tol=1e-9)
    return a == b

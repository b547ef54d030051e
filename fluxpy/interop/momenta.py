"""The states of leaves as `Optimizer.state`: by parameter, then by name."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from ..adjust import reset
from ..leaf import Leaf, replace_leaf
from ..pytree import entries_of, skeleton_of
from ..text import form, names_of
from .groups import Member
from .live import LiveDict


class LeafMomenta(LiveDict):
    """The state of one leaf, its parts by name as in a saved state (`m`, `v`, `t`; of a chain `[1].m`).

    It is read from the leaf each time: the engine may lay the tensors elsewhere at any step.
    """

    def __init__(self, leaf: Leaf) -> None:
        self._leaf = leaf

    def parts(self) -> dict[str, Any]:
        state = self._leaf.state
        return {} if state is None else dict(entries_of(state))

    def __getitem__(self, name: str) -> Any:
        return self.parts()[name]

    def __setitem__(self, name: str, value: Any) -> None:
        self.put({name: value})

    def put(self, values: Mapping[str, Any]) -> None:
        """Replace parts by others of the same kind; ValueError for one that does not fit, and nothing is changed."""
        old = self.parts()
        if unknown := values.keys() - old.keys():
            raise ValueError(f"optimizer.state: no {names_of(sorted(unknown))} here; there is {names_of(old)}")
        for name, value in values.items():
            tensors = [x for x in (value, old[name]) if isinstance(x, Tensor)]
            if tensors and (len(tensors) == 1 or value.shape != old[name].shape):
                raise ValueError(f"optimizer.state: {name!r} is {_kind(old[name])}, but got {_kind(value)}")
        if any(value is not old[name] for name, value in values.items()):
            spec = skeleton_of(self._leaf.state).spec
            replace_leaf(self._leaf, state=spec.build([*{**old, **values}.values()]))

    def __delitem__(self, name: str) -> None:
        raise TypeError("optimizer.state: a part of a state cannot be deleted; fluxpy.reset(leaf) empties all")

    def __iter__(self) -> Iterator[str]:
        return iter(self.parts())

    def __len__(self) -> int:
        return len(self.parts())


def _kind(value: Any) -> str:
    return f"a tensor {form(value.shape, value.dtype)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


class Momenta(LiveDict):
    """`Optimizer.state`: what the leaves hold, by parameter. To delete one resets that leaf."""

    def __init__(self, members: Sequence[Member]) -> None:
        self._leaves = {member.x: member.leaf for member in members}  # a tensor is hashed by identity

    def __getitem__(self, x: Tensor) -> LeafMomenta:
        return LeafMomenta(self._leaves[x])

    def __setitem__(self, x: Tensor, values: Mapping[str, Any]) -> None:
        present = self[x]
        if missing := present.keys() - values.keys():
            raise ValueError(f"optimizer.state: {names_of(sorted(missing))} missing")
        present.put(values)

    def __delitem__(self, x: Tensor) -> None:
        reset(self._leaves[x])

    def clear(self) -> None:
        for leaf in self._leaves.values():
            reset(leaf)

    def __contains__(self, x: object) -> bool:
        return x in self._leaves and bool(self[x])  # pyright: ignore[reportArgumentType]

    def __iter__(self) -> Iterator[Tensor]:
        return iter([x for x in self._leaves if self[x].parts()])

    def __len__(self) -> int:
        return len(list(iter(self)))

"""What the record of a leaf can do where its parameter is spread over processes."""

from typing import Any

import torch
from torch import Tensor

from ..rule import Rule, is_packable, reducing
from .sharding import Sharding, is_dtensor


class SpreadRecord:
    """A record whose `tensors` are local ones. Those marked in `spread_flags` are spread as `sharding` says."""

    __slots__ = ()

    sharding: Sharding | None
    spread_flags: list[bool] | None
    tensors: list[Tensor] | None
    rule: Rule | None
    shape: torch.Size
    numbers: Any  # those of the state, and its skeleton
    copy: Any  # a method

    @property
    def needs_whole(self) -> bool:
        """Whether its parameter must be put together for a step."""
        if self.sharding is None or not self.sharding.dims or self.rule is None:
            return False
        return not is_packable(self.rule) or not all(inner.splittable for inner in reducing(self.rule))

    @property
    def local_shape(self) -> torch.Size:
        """The shape of what this process holds of the parameter."""
        return self.shape if self.sharding is None else self.sharding.local_shape

    def spread_tensors(self) -> list[tuple[Tensor, bool]]:
        """The tensors, and whether each is spread like the parameter."""
        tensors, sharding = self.tensors or [], self.sharding
        if sharding is None:
            return [(t, False) for t in tensors]
        flags = self.spread_flags
        if flags is None or len(flags) != len(tensors):
            flags = map(sharding.is_spread, tensors)
        return list(zip(tensors, flags, strict=True))

    def shown_tensors(self) -> list[Tensor]:
        """The tensors as a user sees them: those that are spread as DTensors."""
        if self.sharding is None:
            return self.tensors or []
        return [self.sharding.show(t) if spread else t for t, spread in self.spread_tensors()]

    @property
    def shown_state(self) -> Any:
        """The state as a user sees it."""
        skeleton = self.numbers.skeleton
        if self.tensors is None or skeleton is None:
            return None
        return skeleton.combine(self.shown_tensors())

    def take_shown(self, tensors: list[Tensor]) -> None:
        """Take over tensors as a user gives them: DTensors, or whole ones."""
        sharding, self.spread_flags, self.tensors = self.sharding, None, tensors
        if sharding is not None:
            self.tensors = self._parts(sharding, tensors)
        elif any(map(is_dtensor, tensors)):
            self.tensors = [t.full_tensor() if is_dtensor(t) else t for t in tensors]  # pyright: ignore[reportAttributeAccessIssue]

    def _parts(self, sharding: Sharding, tensors: list[Tensor]) -> list[Tensor]:
        self.spread_flags = [is_dtensor(t) or sharding.is_whole(t) for t in tensors]
        pairs = zip(tensors, self.spread_flags, strict=True)
        return [sharding.localise(t, "a tensor of the state") if spread else t for t, spread in pairs]

    def put_together(self) -> Any:
        """A copy with whole tensors."""
        assert self.sharding is not None
        tensors = [self.sharding.whole(t) if spread else t for t, spread in self.spread_tensors()]
        other = self.copy(self.numbers.copy(), None if self.tensors is None else tensors)
        other.sharding = other.spread_flags = None
        return other

    def redistribute(self, sharding: Sharding | None) -> bool:
        """Move the state to where the parameter is now. Returns whether it was elsewhere."""
        if sharding == self.sharding:
            self.sharding = sharding  # its parts may be on another device by now
            return False
        if self.tensors is not None:
            tensors = self.tensors if self.sharding is None else self.put_together().tensors or []
            self.sharding = sharding
            self.take_shown(tensors)
        self.sharding = sharding
        return True

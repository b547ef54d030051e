"""The plain path: a rule's `apply`, leaf by leaf. The reference that the others are tested against.

Everything that can fail is worked out first, into new tensors; then it is written, in place or into copies.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..guard import Guard, require_finite
from ..leaf import Leaf, start
from ..pytree import Frame, apart, memory
from ..rule import Ask, Assign, Rule, at


class Plain:
    """One leaf on its way through its rule."""

    def __init__(self, path: str, leaf: Leaf, x: Tensor, dx: Tensor | None, rules: dict[Any, Rule]) -> None:
        assert leaf.rule is not None
        self.path, self.leaf, self.x, self.dx = path, leaf, x, dx
        key = (id(leaf.rule), leaf._count)
        try:
            if key not in rules:
                rules[key] = at(leaf.rule, leaf._count)
        except Exception as error:
            error.add_note(f"in a schedule of the parameter {path!r}, at its count {leaf._count}")
            raise
        self.rule = rules[key]
        self.state = start(leaf.rule, x, leaf._count, path) if leaf.state is None else leaf.state
        if leaf._missed:
            self.state = self.rule.miss(self.state, leaf._missed)
        self.run = self.rule.steps(self.state, x, dx)
        self.asked = 0  # how many totals over the tree it has asked for

    def advance(self, answer: Any, guard: Guard) -> Ask | None:
        """Run to the next question that concerns other leaves too; None at the end."""
        while True:
            try:
                ask = self.run.send(answer)
            except StopIteration as done:
                self.result = done.value
                return None
            except Exception as error:
                error.add_note(f"in the rule {self.rule!r} of the parameter {self.path!r}")
                raise
            if ask.across:
                self.asked += 1
                return ask
            require_finite(ask.part, ask, partial(self.shares, ask), guard)
            answer = ask.part

    def finish(self, guard: Guard, inplace: bool = True) -> None:
        """Work out what is to be written, so that writing it cannot fail."""
        if not (isinstance(self.result, tuple) and len(self.result) == 2):
            raise TypeError(f"{self._who()} must return (state, change), but gave {self.result!r}")
        state, change = self.result
        self.moved = change is not None
        self.value = guard.held(self.x, self._value(change))
        self.result = change = None  # of what was worked out, only what will be written is kept
        (olds, before), (news, self.frame) = Frame.split(self.state), Frame.split(state)
        self.olds = olds if before == self.frame and all(map(_alike, olds, news)) else []
        if any(t.device != self.x.device and t.ndim for t in news):
            raise ValueError(f"{self._who()} gave a state on another device than the parameter's {self.x.device}")
        # Never keep memory that others write to: the parameter, the gradient, or the old state's.
        dx = [] if self.dx is None else [self.dx]
        news = apart(news, [self.x, *dx, *([] if self.olds and inplace else olds)])
        if self.olds:
            mine = set(map(memory, olds)) if inplace else set()  # a rule may let its buffers change places
            news = [t.clone() if memory(t) in mine and t is not old else t for old, t in zip(olds, news, strict=True)]
            news = [guard.held(old, t).to(old.dtype) for old, t in zip(olds, news, strict=True)]
        self.news = news

    def _value(self, change: Any) -> Tensor:
        """What the parameter becomes."""
        value = change.value if isinstance(change, Assign) else self.x if change is None else change
        if not isinstance(value, Tensor) or (value.shape, value.device) != (self.x.shape, self.x.device):
            form = f"shape {tuple(value.shape)} on {value.device}" if isinstance(value, Tensor) else repr(value)
            want = f"it must have the parameter's shape {tuple(self.x.shape)}, on {self.x.device}"
            raise ValueError(f"{self._who()} gave a change of {form}; {want}")
        return value.clone() if value is self.x or isinstance(change, Assign) else (self.x - value).to(self.x.dtype)

    def _who(self) -> str:
        return f"the rule {self.rule!r} of the parameter {self.path!r}"

    def settle(self, leaf: Leaf, inplace: bool) -> None:
        """Give a leaf its new state. In place, each tensor keeps its memory where its shape allows."""
        if inplace and self.olds:
            self.news = [old if old is t else old.copy_(t) for old, t in zip(self.olds, self.news, strict=True)]
        leaf._put(self.frame.join(self.news), leaf._count + self.moved)

    def commit(self, guard: Guard) -> None:
        self.settle(self.leaf, inplace=True)
        if self.moved:
            self.x.copy_(self.value)

    def shares(self, ask: Ask) -> list[tuple[str, Tensor]]:
        """What each leaf gave to a total, by path."""
        return [(self.path, ask.part)]


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.can_cast(b.dtype, a.dtype)

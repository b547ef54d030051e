"""The flat path: a rule's own `apply` on many leaves as one long tensor, in pieces that stay in the cache.

Momenta lie side by side as soon as they are made. Parameters and gradients are read where they lie side by side too,
and are otherwise gathered, which for small tensors costs far less than a call of each operator for each of them.
"""

from collections.abc import Iterator, Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor

from ..guard import Guard, reads_at_once, require_finite
from ..pytree import Frame
from ..rule import Ask, Assign, Rule, Steps, walk
from ..rules.clip import ClipGlobalNorm, ClipNorm
from ..rules.wrap import OptimiserChain
from .group import Group, Member, Misfit
from .slab import SIZE, Scratch, Slab, copy_all, lay, side_by_side, views


class Piece:
    """Neighbours in a group as one long tensor; or, of one large leaf, a part."""

    def __init__(self, group: "Flat", low: int, high: int, start: int = 0, size: int = -1) -> None:
        self.members, self.low, self.high, self.start = group.members[low:high], low, high, start
        params = group.params[low:high]
        self.size = size if size >= 0 else sum(x.numel() for x in params)
        self.x = Slab(params, group.scratch, "x", start, size)
        self.momenta = [
            Slab(row[low:high], group.scratch, f"momenta{i}", start, size) for i, row in enumerate(group.momenta)
        ]
        self.buffer = group.scratch.take("dx", params[0], self.size) if high - low > 1 else params[0]
        self.views = views(self.buffer, params) if high - low > 1 else []
        self.seen: list[Tensor] = []
        self.answers: list[Any] = []
        self.steps: Steps | None = None  # on its way
        self.alone = False  # with the scratch to itself
        self.ready = False  # the scratch holds the gradient
        self.calls: list[Any] = []  # of a kernel, on the native path

    def gradient(self, grads: list[Tensor]) -> Tensor:
        """This piece of the gradient, as one long tensor."""
        if self.high - self.low == 1:
            flat = grads[self.low].contiguous().view(-1)  # a kernel takes no strides
            return flat if self.size == len(flat) else flat[self.start : self.start + self.size]
        mine = grads[self.low : self.high]
        if mine[0].data_ptr() + mine[0].nbytes == mine[1].data_ptr():  # perhaps they lie side by side
            if not (len(mine) == len(self.seen) and all(map(is_, mine, self.seen)) and self.at == pointers(mine)):
                self.seen, self.at, self.flat = mine, pointers(mine), side_by_side(mine)
            if self.flat is not None:
                return self.flat
        copy_all(self.views, mine)
        self.ready = self.alone
        return self.buffer

    def gathered(self, grads: list[Tensor]) -> Tensor:
        """`gradient`, once more; at no cost where the scratch still has it."""
        return self.buffer if self.ready else self.gradient(grads)


def pointers(tensors: Sequence[Tensor]) -> list[int]:
    return [*map(torch.Tensor.data_ptr, tensors)]


def cut(sizes: Sequence[int], split: bool, single: bool) -> Iterator[tuple[int, int, int, int]]:
    """(low, high, start, size) of each piece: small neighbours together, large ones alone and, with `split`, in parts;
    with `single`, each alone and whole. A size of -1 is all."""
    low, taken = 0, 0
    for i, size in enumerate(sizes):
        if i > low and (taken + size > SIZE or single):
            yield low, i, 0, -1
            low, taken = i, 0
        taken += size
        if taken > SIZE and split and not single:
            yield from ((i, i + 1, start, min(SIZE, size - start)) for start in range(0, size, SIZE))
            low, taken = i + 1, 0
    if low < len(sizes):
        yield low, len(sizes), 0, -1


_RULES = OptimiserChain.__module__.removesuffix("wrap")


def ours(rule: Rule) -> bool:
    """Whether the rule is arithmetic that we know: where one piece went well, the others cannot fail."""
    return all(type(inner).__module__.startswith(_RULES) for inner in walk(rule))


class Flat(Group):
    """Leaves of an elementwise rule (clips may stand in it), stepped piece by piece."""

    split = True

    def __init__(self, members: Sequence[Member], scratch: Scratch) -> None:
        super().__init__(members)
        self.scratch = scratch
        self.trusted = ours(self.rule)
        self.asks = sum(isinstance(rule, ClipNorm | ClipGlobalNorm) for rule in walk(self.rule))
        self.asks_first = isinstance(next((r for r in walk(self.rule) if not r.inner), None), ClipNorm | ClipGlobalNorm)
        self.single = any(isinstance(rule, ClipNorm) for rule in walk(self.rule))
        self.quick = self.trusted and not self.asks
        self.results: list[Any] = []
        self.pieces: list[Piece] = []
        self.arrange()

    def arrange(self) -> None:
        """Cut the leaves into pieces."""
        self.lay(self.single)
        sizes = [x.numel() for x in self.params]
        self.pieces = [Piece(self, *where) for where in cut(sizes, self.split, self.single)]
        self.rewrites_views = any(p.x.flat is not None and p.high - p.low > 1 for p in self.pieces)

    def lay(self, single: bool) -> None:
        """Give small neighbours momenta that lie side by side."""
        for low, high, _, _ in cut([x.numel() for x in self.params], False, single):
            rows = [lay(row[low:high]) for row in self.momenta]
            for member, *tensors in zip(self.members[low:high], *rows, strict=True) if rows else ():
                member.leaf._held = self.frame.join(tensors)
            for row, new in zip(self.momenta, rows, strict=True):
                row[low:high] = new

    def begin(self, grads: list[Tensor]) -> None:
        super().begin(grads)
        self.asked = self.turn = 0  # totals over the tree, and all questions
        for piece in self.pieces:
            piece.answers, piece.steps, piece.ready = [], None, False

    def start(self, piece: Piece) -> Steps:
        held = self.frame.join(slab.read() for slab in piece.momenta)
        return self.now.steps(held, piece.x.read(), piece.gradient(self.grads))

    def run(self, piece: Piece) -> Any:
        """The rule on this piece: its (state, change), or the first question that has no answer yet."""
        steps, answers = piece.steps, piece.answers[-1:]
        if steps is None:
            steps, answers = self.start(piece), [None, *piece.answers]
        ask: Any = None
        try:
            for answer in answers:
                ask = steps.send(answer)  # pyright: ignore[reportArgumentType]
        except StopIteration as done:
            return done.value
        except Exception as error:
            raise Misfit from error
        # What waits keeps what it computed, so it may wait only where that is a piece or nothing at all.
        waits = piece.alone or (self.asks_first and self.turn == 1 and not piece.views)
        piece.steps = steps if waits else None
        return ask

    def advance(self, answer: Any, guard: Guard) -> Ask | None:
        """Each piece up to its next question. For the one after, most start over: nothing is kept of them."""
        if answer is not None:
            for piece in self.pieces:
                piece.answers.append(self.known(answer))
        while self.turn < self.asks:
            self.turn += 1
            asks = [(piece, self.run(piece)) for piece in self.pieces]
            first = asks[0][1]
            if not isinstance(first, Ask):  # it stopped before, as while it gathers
                if any(isinstance(ask, Ask) for _, ask in asks) or any(piece.steps for piece in self.pieces):
                    raise Misfit
                self.turn = self.asks
                return None
            if first.across:
                self.asked += 1
                return first._replace(part=first.rule.combine([ask.part for _, ask in asks]))
            for piece, ask in asks:
                require_finite(ask.part, ask, lambda p=piece, a=ask: [(p.members[0].path, a.part)], guard)
                piece.answers.append(self.known(ask.part))
        return None

    def known(self, total: Tensor) -> Any:
        """A total as a number where the host may read it: what a rule then makes of it costs next to nothing."""
        return total.item() if reads_at_once(total) else total

    def shares(self, ask: Ask) -> list[tuple[str, Tensor]]:
        if reads_at_once(ask.part):
            return [(self.members[0].path, ask.part)]  # the plain path says more
        norms = torch._foreach_norm(self.grads, float("inf"))  # pyright: ignore[reportPrivateImportUsage]
        return [(member.path, norm) for member, norm in zip(self.members, norms, strict=True)]

    def finish(self, guard: Guard) -> None:
        if not self.trusted:
            self.results = [self.judged(piece, self.run(piece)) for piece in self.pieces]

    def commit(self, guard: Guard) -> None:
        numbers, moved = self.frame.parts, True
        for i, piece in enumerate(self.pieces):
            news, numbers, change = self.results[i] if self.results else self.parted(self.run(piece))
            moved = change is not None
            if moved:
                x = piece.x.read() if self.results else piece.x.last
                value = change.value if isinstance(change, Assign) else x - change
                piece.x.write(guard.held(x, value))
            for slab, new in zip(piece.momenta, news, strict=True):
                old = slab.read()
                if new is not old:
                    slab.write(guard.held(old, new))
        self.results = []
        self.stepped(numbers, moved)

    def parted(self, result: Any) -> tuple[list[Tensor], list[Any], Any]:
        """The tensors and the numbers of the new state, and the change."""
        tensors, frame = Frame.split(result[0])
        return tensors, frame.parts, result[1]

    def judged(self, piece: Piece, result: Any) -> tuple[list[Tensor], list[Any], Any]:
        """What a rule that we do not know gave, in memory of its own, kept until all pieces are known."""
        unknown = {type(rule) for rule in walk(self.rule) if not ours(rule)}
        if not (isinstance(result, tuple) and len(result) == 2):
            raise Misfit(unknown)
        tensors, frame = Frame.split(result[0])
        change = result[1]
        given = [*tensors, *([] if change is None else [change])]
        fits = all(
            isinstance(t, Tensor) and t.shape == (piece.size,) and t.device == piece.x.read().device for t in given
        )
        kept = all(torch.can_cast(t.dtype, row[0].dtype) for t, row in zip(tensors, self.momenta, strict=False))
        if frame != self.frame or not fits or not kept:
            raise Misfit(unknown)
        fresh = [t.clone() for t in given]
        return fresh[: len(tensors)], frame.parts, None if change is None else fresh[-1]

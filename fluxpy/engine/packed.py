"""Packed units: the rule's own `steps` on many leaves as one long tensor, in chunks that stay in the cache.

An elementwise rule takes leaves of any shapes side by side. A rule that needs whole arrays takes leaves of one shape as
a stack, `torch.func.vmap`ped over them: no second formula either way.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..context import FiniteFlag, reads_at_once, require_all_finite
from ..pytree import Skeleton, partition
from ..rule import Assign, Reduce, ReducingRule, Rule, Steps, at, is_packable, map_inner, reducing, run_alone, title_key
from .chunk import Chunk, shaped_like
from .cohort import Cohort
from .layout import LEAST_RUN, NumberRow, Row, Runs, Scratch, chunks_of, runs
from .step import CohortUnit, FallBack, Prepare, Request
from .tape import is_arithmetic

Start = Callable[[Chunk, Any], Steps]


class Chunks:
    """The chunks of a cohort, and one step on them. `long` is for compiled kernels: each chunk is one long tensor, and
    each total a tensor."""

    def __init__(self, cohort: Cohort, *, split: bool, stack: bool = False, long: bool = False) -> None:
        self.cohort, self.long, x = cohort, long, cohort.params[0]
        # Where each array has a number of its own, leaves of one shape go as a stack: there the number is broadcast.
        found: Runs = []
        if not (stack or long or x.is_complex()) and (any(cohort.numeric) or reducing(cohort.rule, "array")):
            found = runs(cohort.reals) if all(x.is_contiguous() for x in cohort.reals) else []
        breaks = {low for low, _ in found} if LEAST_RUN * len(found) <= len(cohort.sizes) else ()
        cohort.pack_momenta(breaks)
        scratch = Scratch()
        where = list(chunks_of(cohort.sizes, split, breaks))
        self.stack = stack or bool(breaks)
        numeric = [False for _ in cohort.momenta] if stack else cohort.numeric
        self.all = [Chunk(cohort, scratch, numeric, place, self.stack and place[3] < 0) for place in where]
        self.one, self.all_in_runs = len(self.all) == 1, all(chunk.runs is not None for chunk in self.all)
        self.grads: Sequence[Tensor] = ()  # of real tensors with the strides of the parameters
        self.given: Sequence[Tensor] = ()
        self.missing = False
        # Autograd does not see writes through a view of several parameters.
        self.hidden_writes = any(chunk.of_several and chunk.x.flat is not None for chunk in self.all)

    def load(self, grads: Sequence[Tensor]) -> None:
        """Take a step's gradients, in the order of the cohort."""
        if self.given:  # those of a step that fell back
            self.clear()
        self.missing = grads[0] is None  # then all are missing, and the rule accumulates
        self.given = self.grads = grads
        if self.cohort.odd and not self.missing:
            self.given = self.grads = like_parameters(grads, self.cohort)
        if self.cohort.params[0].is_complex() and not self.missing:
            self.grads = [torch.view_as_real(g.resolve_conj()) for g in self.given]

    def clear(self) -> None:
        """Let go of a step's gradients and results."""
        self.given = self.grads = ()
        for chunk in self.all:
            chunk.clear()

    def run(self, start: Start, rule: Rule, totals: int | None = None, others: Sequence[Chunk] = ()) -> Prepare:
        """Run `rule` on the first chunk to its result, getting all totals that it needs on the way; the other chunks
        can then run too, and `others` of the same cohort. With `totals`, stop once so many totals are known."""
        first, count, alike = self.all[0], 0, True
        while count != totals and isinstance(reduce := self.advance(first, start), Reduce):
            count += 1
            parts = self._parts(reduce, start, alike)
            if reduce.rule.over == "tree":
                cohort = self.cohort
                if cohort.model_order is not None:
                    parts = parts[cohort.model_order]
                total = yield Request(rule, reduce, parts, cohort.model_places, cohort.model_paths)
                answer = self._answer(total, reduce)
                for chunk in (*self.all, *others):
                    chunk.answers.append(answer)
            else:
                alike = self.one  # after a total of each array some may have been scaled, and others not
                if self.cohort.context.spread:
                    parts = yield Request(rule, reduce, parts, self.cohort.places, self.cohort.paths)
                else:
                    require_all_finite(parts, reduce, self.cohort.context, self.cohort.paths)
                for chunk in (*self.all, *others):
                    chunk.answers.append(self._repeated(chunk, parts, reduce))
        if totals is None:
            first.result = reduce  # pyright: ignore[reportPossiblyUnboundVariable]

    def advance(self, chunk: Chunk, start: Start) -> Any:
        """The rule on a chunk: its (state, change), or the first total that has no answer yet.

        Several chunks share scratch memory, so each starts over for its next total."""
        steps, answers = chunk.running, chunk.answers[-1:]
        if steps is None:
            dx = None if self.missing else chunk.gradient(self.grads)
            dx = dx.view(chunk.shape) if dx is not None and chunk.stacked else dx
            steps, answers = start(chunk, dx), [None, *chunk.answers]
        try:
            for answer in answers:
                reduce = steps.send(answer)
        except StopIteration as done:
            return done.value
        except Exception as error:
            raise FallBack(title_key(self.cohort.rule)) from error
        if self.one:
            chunk.running = steps
        return reduce  # pyright: ignore[reportPossiblyUnboundVariable]

    def _parts(self, reduce: Reduce, start: Start, alike: bool) -> Tensor:
        """What each leaf gives to a total, however they are grouped. `alike`: the first chunk tells if all have it."""
        first, rule, value = self.all[0], reduce.rule, reduce.tensor()
        known = self._known(value) if alike else None
        if known is not None:
            return rule.parts(known)
        found: list[Tensor] = []
        pieces: list[Tensor] = []  # of a large leaf
        for chunk in self.all:
            if chunk is not first:
                reduce = self.advance(chunk, start)
                if not isinstance(reduce, Reduce):
                    raise FallBack
                value = reduce.tensor()
            if self._is_number(value, chunk):
                if chunk.start == 0:
                    found.append(rule.parts(value.expand(chunk.number_shape).reshape(-1)))
                continue
            value, size = value.reshape(-1).contiguous(), self.cohort.sizes[chunk.low]
            if chunk.size >= size:
                found += [rule.parts(leaves) for leaves in chunk.leaves(value, self.cohort)]
                continue
            x = self.cohort.params[chunk.low]
            split = rule.splittable and not x.is_complex()
            pieces.append(rule.part(value) if split else value.clone())
            if chunk.start + chunk.size == size:
                found.append(_of_pieces(rule, pieces, None if split else x))
                pieces = []
        return torch.cat(found) if len(found) > 1 else found[0]

    def _known(self, value: Tensor) -> Any:
        """The value of each leaf that a total is asked for, where it is there already: a gradient, or a number."""
        first = self.all[0]
        if not (self.all_in_runs or self.missing) and _is_gradient(value, first, self.grads):
            return self.given
        for i, row in enumerate(first.momenta):
            if (
                isinstance(row, NumberRow)
                and value.data_ptr() == row.buffer.data_ptr()
                and len(row.buffer) == value.numel()
            ):
                rows: Any = [chunk.momenta[i] for chunk in self.all if chunk.start == 0]
                return torch.cat([row.numbers() for row in rows])
        return None

    def _is_number(self, value: Tensor, chunk: Chunk) -> bool:
        """Whether a rule asks for a total of what it made of the leaves' numbers."""
        if value.ndim and (value.shape == chunk.shape or value.shape != chunk.number_shape):
            return False
        if not any(self.cohort.numeric):
            raise FallBack(title_key(self.cohort.rule))  # the rule reduced the array itself: it is not elementwise
        return True

    def _repeated(self, chunk: Chunk, parts: Tensor, reduce: Reduce) -> Any:
        """The totals of a chunk's own arrays, for each of its elements."""
        mine = parts[chunk.low : chunk.high]
        if not chunk.of_several:
            return self._answer(mine[0], reduce)
        if chunk.stacked:
            return mine.view(chunk.number_shape)
        if chunk.runs is not None:
            sizes = self.cohort.sizes[chunk.low : chunk.high]
            rows = [mine[low:high].view(-1, 1).expand(-1, sizes[low]).reshape(-1) for low, high in chunk.runs]
            return torch.cat(rows)
        if chunk.sizes is None:
            chunk.sizes = torch.tensor(self.cohort.sizes[chunk.low : chunk.high], device=mine.device)
        return torch.repeat_interleave(mine, chunk.sizes, output_size=chunk.size)

    def _answer(self, total: Tensor, reduce: Reduce) -> Any:
        """A total as a number, where the rule takes one and the host may read it: the rest is then cheaper."""
        number = not self.long and reduce.rule.takes_numbers and not total.ndim and reads_at_once(total)
        return total.item() if number else total


def like_parameters(grads: Sequence[Tensor], cohort: Cohort) -> list[Tensor]:
    """The gradients, copied where their strides are not those of the parameters."""
    found = list(grads)
    for i in cohort.odd:
        found[i] = torch.empty_like(cohort.params[i], requires_grad=False).copy_(found[i])
    return found


def _of_pieces(rule: ReducingRule, pieces: list[Tensor], x: Tensor | None) -> Tensor:
    """What a large leaf gives to a total: from what its pieces give, or where they are put together, for `x`."""
    if x is None:
        return rule.combine(torch.stack(pieces)).unsqueeze(0)
    return rule.parts([shaped_like(torch.cat(pieces), x)])


def _is_gradient(value: Tensor, chunk: Chunk, grads: Sequence[Tensor]) -> bool:
    """Whether a rule asks for a total of the gradients themselves."""
    source = chunk.dx if chunk.of_several and value.data_ptr() == chunk.dx.data_ptr() else grads[chunk.low]
    return value.data_ptr() == source.data_ptr() and value.numel() == chunk.size and value.dtype == source.dtype


class EagerUnit(CohortUnit):
    """A cohort stepped by its rule's own `steps`, chunk by chunk."""

    def __init__(self, cohort: Cohort, stack: bool = False) -> None:
        super().__init__(cohort)
        self.stack = stack
        self.chunks = Chunks(cohort, split=not stack, stack=stack)
        self.trusted = self.chunks.one or (
            not stack and is_arithmetic(cohort.records[0], cohort.reals[0], self.context)
        )

    def prepare(self, grads: Sequence[Any]) -> Prepare:
        rule = rule_now(self.cohort.rule, self.cohort.numbers.count)
        self.rule = batched(rule) if self.stack else rule
        self.chunks.load([grads[place] for place in self.cohort.places])
        yield from self.chunks.run(self._start, self.rule)
        first = self.chunks.all[0]
        self._check(first)
        if not self.trusted:  # another chunk may fail where the first did not
            first.result = _kept(first.result)
            for chunk in self.chunks.all[1:]:
                chunk.result = self.chunks.advance(chunk, self._start)
                self._check(chunk)
                chunk.result = _kept(chunk.result)

    def _start(self, chunk: Chunk, dx: Any) -> Steps:
        momenta = [row.read() for row in chunk.momenta]
        return self.rule.steps(self.cohort.skeleton.combine(momenta), chunk.x.read(), dx)

    def _check(self, chunk: Chunk) -> None:
        chunk.result = outcome_of(chunk.result)
        if not fits(chunk.result, chunk, chunk.momenta, self.cohort.skeleton):
            raise FallBack(title_key(self.cohort.rule))

    def drop(self) -> None:
        self.chunks.clear()

    def commit(self) -> None:
        skeleton, moved = self.cohort.skeleton, True
        for chunk in self.chunks.all:
            if chunk.result is None:
                chunk.result = outcome_of(self.chunks.advance(chunk, self._start))
            elif not self.trusted:
                chunk.x.read()
                for row in chunk.momenta:
                    row.read()
            skeleton, moved = self._write(chunk)
            chunk.clear()
        self.chunks.clear()
        if self.chunks.hidden_writes:
            torch.autograd.graph.increment_version(self.cohort.reals)
        self.cohort.advance(skeleton, moved)

    def _write(self, chunk: Chunk) -> tuple[Any, bool]:
        flag = self.context.flag
        (news, skeleton, change), x = chunk.result, chunk.x.buffer
        news = apart_from_written(chunk, chunk.momenta, news)
        if isinstance(change, Assign):
            chunk.x.write(flag.mask(x, change.value.view(-1)))
        elif change is not None:
            change = change if change.ndim == 1 else change.reshape(-1)
            chunk.x.write(x.sub_(change) if flag.up is None else flag.mask(x, x - change))
        write_state(chunk.momenta, news, flag)
        return skeleton, change is not None


class Outcome(NamedTuple):
    """What a rule made of a chunk: the new state, taken apart, and the change."""

    tensors: list[Tensor]
    skeleton: Skeleton
    change: Any


def outcome_of(result: Any) -> Outcome | None:
    """What a rule returned, taken apart; None where it is no pair."""
    return Outcome(*partition(result[0]), result[1]) if isinstance(result, tuple) and len(result) == 2 else None


def fits(outcome: Outcome | None, chunk: Chunk, rows: Sequence[Row], before: Skeleton) -> bool:
    """Whether the new state is like the one before, and the change like the parameters. Where it is not, the reference
    path says of which leaf."""
    if outcome is None or not outcome.skeleton.fits(before):
        return False
    change = outcome.change.value if isinstance(outcome.change, Assign) else outcome.change
    is_like = isinstance(change, Tensor) and change.is_floating_point() and _is_like(change, chunk.x.shown)
    if change is not None and not is_like:
        return False
    for t, row in zip(outcome.tensors, rows, strict=True):
        # What a number becomes may be one for all leaves, as a total over the tree is.
        alike = _is_like(t, row.shown) or (isinstance(row, NumberRow) and not t.ndim and t.device == row.shown.device)
        if not alike or not (t.dtype == row.shown.dtype or torch.can_cast(t.dtype, row.shown.dtype)):
            return False
    return True


def _is_like(t: Tensor, old: Tensor) -> bool:
    return t.shape == old.shape and t.device == old.device and t.layout == torch.strided


def apart_from_written(chunk: Chunk, rows: Sequence[Row], news: list[Tensor]) -> list[Tensor]:
    """The new states, copied where they lie in memory that will be written to: a rule may swap its buffers.
    One that is its own old state stays as it is."""
    for i, (new, row) in enumerate(zip(news, rows, strict=True)):
        if new.untyped_storage().data_ptr() in chunk.written and new.data_ptr() != row.buffer.data_ptr():
            news[i] = new.clone()
    return news


def write_state(rows: Sequence[Row], news: Sequence[Tensor], flag: FiniteFlag) -> None:
    """Write the new states of a chunk."""
    for row, new in zip(rows, news, strict=True):
        if new.data_ptr() != row.buffer.data_ptr():
            row.write(new if flag.up is None else flag.mask(row.buffer, new.reshape(-1)))


def _kept(outcome: Outcome) -> Outcome:
    """An outcome in memory of its own, until all chunks have theirs."""
    change = outcome.change
    if isinstance(change, Assign):
        change = Assign(change.value.clone())
    elif change is not None:
        change = change.clone()
    return Outcome([t.clone() for t in outcome.tensors], outcome.skeleton, change)


def rule_now(rule: Rule, count: int) -> Rule:
    """A rule at a count. What schedules give must be numbers here."""
    try:
        rule = at(rule, count)
    except Exception as error:
        raise FallBack from error
    if rule.traced:
        raise FallBack
    return rule


class Batched(Rule):
    """A rule that needs whole arrays, run on a stack of them."""

    rule: Rule

    def steps(self, state: Any, x: Tensor, dx: Any) -> Steps:
        tensors, skeleton = partition(state)
        found: list[Any] = []

        def one(tensors: list[Tensor], x: Tensor, dx: Tensor) -> list[Tensor]:
            state, change = run_alone(self.rule, skeleton.combine(tensors), x, dx)
            news, after = partition((state, change))
            found.append(after)
            return news

        news = torch.func.vmap(one)(tensors, x, dx)
        return found[0].combine(news)
        yield  # never reached: it makes this function a generator


def batched(rule: Rule) -> Rule:
    """A rule for stacks: what is elementwise stays as it is, what needs whole arrays is run for each of the stack."""
    if is_packable(rule):
        return rule
    return map_inner(rule, batched) if rule.delegates else Batched(rule)

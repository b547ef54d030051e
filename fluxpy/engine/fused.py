"""Fused units: a chain's last rule run by one of PyTorch's fused kernels, the rules before it by their own `steps`."""

from abc import abstractmethod
from collections.abc import Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..pytree import HOLE, Skeleton, partition, tensors_in
from ..rule import Rule, Steps, rule_key, title_key, value_key
from .chunk import Chunk
from .cohort import Cohort
from .fused_kernels import KERNELS, Launch, Links, Lists, has_front, states_of, takes
from .layout import Row, adjacent, views_like
from .packed import Chunks, apart_from_written, fits, like_parameters, outcome_of, rule_now, write_state
from .step import CohortUnit, FallBack, Prepare
from .tape import inputs_used

_MOST_NUMBERS = 64  # of the state of rules before a kernel, for which it is known what they read


class Call(NamedTuple):
    """A call of the kernel with the gradients at these places of a list (None: all of them), and with the options of
    the rule of leaf number `leaf`."""

    run: Launch
    places: list[int] | None
    leaf: int


class _Fused(CohortUnit):
    """What fused units have in common: the kernel, its options for each rule, and its clock."""

    def __init__(self, cohort: Cohort) -> None:
        super().__init__(cohort)
        before, own = states_of(cohort.rule, cohort.records[0].state)
        self.front_skeleton = partition(before)[1]
        self.links = Links.of(cohort.rule)
        self.kernel = KERNELS[type(self.links.last)]
        self.momenta = cohort.momenta[len(cohort.momenta) - len(tensors_in(own)) :]
        self.x = cohort.params[0] if self.links.master is None else cohort.momenta[0][0]
        self.clock = torch.zeros((), dtype=torch.float32, device=self.x.device)
        self.keys = _first_alike(cohort, cohort.rules())
        self.now: dict[int, dict[str, Any]] = {}  # the options of each call in this step, by its leaf
        self.front = self.links.front  # the rules before the last, as they are in this step
        self.hyper = -1  # of the context, when these were found
        numbers = [i for i, part in enumerate(cohort.skeleton.parts) if type(part) is int]
        counts = "t" in getattr(own, "_fields", ())
        self.counter = numbers[-1] if counts else None

    def take_hyperparameters(self) -> None:
        """Find the options and the front of this step; they stay while no hyperparameter changes."""
        rule, hyper = self.cohort.rule, self.context.hyper
        if self.hyper == hyper and not rule.scheduled:
            return
        found: dict[int, Links] = {}
        for leaf in dict.fromkeys(self.keys):
            own = self.cohort.records[leaf].rule
            assert own is not None
            found[leaf] = Links.of(rule_now(own, self.cohort.numbers.count))
        self.now = {leaf: links.options(self.kernel, self.x) for leaf, links in found.items()}
        self.front, self.hyper = found[0].front, hyper

    def adopt_rules(self, rules: list[Rule]) -> bool:
        x = self.cohort.params[0]
        if not all(takes(rule, x, self.cohort.records[0].tensors or ()) for rule in rules):
            return False
        self.links, keys = Links.of(self.cohort.rule), _first_alike(self.cohort, rules)
        if keys != self.keys:
            self.keys = keys
            self.bind()
        return True

    @abstractmethod
    def bind(self) -> None:
        """Make the calls of the kernel."""

    def calls(self, params: list[Tensor], momenta: Lists, low: int = 0) -> list[Call]:
        """Calls of the kernel on lists of tensors of the leaves from `low` on: one for all that share a rule."""
        places: dict[int, list[int]] = {}
        for i in range(len(params)):
            places.setdefault(self.keys[low + i], []).append(i)
        if len(places) == 1:
            return [Call(self.kernel.bind(params, momenta, [self.clock] * len(params)), None, self.keys[low])]
        calls = []
        for leaf, own in places.items():
            rows = [[row[i] for i in own] for row in momenta]
            run = self.kernel.bind([params[i] for i in own], rows, [self.clock] * len(own))
            calls.append(Call(run, own, leaf))
        return calls

    def tick(self) -> list[Any]:
        """The numbers of the states after the kernel ran; sets its clock."""
        numbers = list(self.cohort.skeleton.parts)
        if self.counter is not None:
            numbers[self.counter] += 1
            self.clock.fill_(numbers[self.counter])
        return numbers

    def masked(self) -> dict[int, dict[str, Any]]:
        """The options with which a kernel does nothing where the finite flag is up."""
        bad = self.context.flag.up
        if bad is None:
            return self.now
        found = {"found_inf": bad.to(self.clock)}
        return {leaf: own | found for leaf, own in self.now.items()}


def _first_alike(cohort: Cohort, rules: list[Rule]) -> list[int]:
    """For each leaf, the first leaf whose rule is equal to its own; `rules` are those of the cohort."""
    if len(rules) == 1:
        return [0] * len(cohort.records)
    ids = [*map(id, map(attrgetter("rule"), cohort.records))]
    first: dict[Any, int] = {}
    alike = {id(rule): first.setdefault(rule_key(rule), ids.index(id(rule))) for rule in rules}
    return list(map(alike.__getitem__, ids))


class FusedListUnit(_Fused):
    """A cohort stepped by a kernel on lists of its tensors as they are.

    After the second step the kernel is given detached parameters. Of these the cohort is a second owner (see `owned`),
    which `torch.utils.swap_tensors` does not allow of a parameter. Not so once one was found elsewhere in memory.
    """

    laid_out = False

    def __init__(self, cohort: Cohort) -> None:
        super().__init__(cohort)
        self.grads: Sequence[Tensor] = ()
        self.whole = cohort.places == list(range(len(cohort.places)))  # whether these are the first of all leaves
        self.stays = True  # whether the parameters were always at one place
        self.bind()

    def bind(self) -> None:
        self.params = self.cohort.reals if self.stays and self.cohort.steps > 1 else self.cohort.params
        self.all_calls = self.calls(self.params, self.momenta)

    def relocated(self) -> None:
        """The parameters are elsewhere in memory."""
        self.stays = False
        self.cohort.forget_reals()
        self.bind()

    def prepare(self, grads: Sequence[Any]) -> Prepare:
        self.take_hyperparameters()
        places = self.cohort.places
        self.grads = grads if self.whole and len(grads) == len(places) else [grads[place] for place in places]
        if self.cohort.odd:  # a kernel would read other strides as if they were the parameter's
            self.grads = like_parameters(self.grads, self.cohort)
        return
        yield  # never reached: it makes this method a generator

    def drop(self) -> None:
        self.grads = ()

    def commit(self) -> None:
        numbers, options = self.tick(), self.masked()
        if self.cohort.steps == 2:
            self.bind()
        for run, places, leaf in self.all_calls:
            run([*self.grads] if places is None else [self.grads[i] for i in places], options[leaf])
        self.grads = ()
        torch.autograd.graph.increment_version(self.params)
        self.cohort.advance(Skeleton(self.cohort.skeleton.spec, numbers), True)


class FusedUnit(_Fused):
    """A cohort in chunks: what is before the last rule by its own `steps`, then the kernel on the chunk."""

    def __init__(self, cohort: Cohort) -> None:
        rule = cohort.rule
        self.chunks = Chunks(cohort, split=has_front(rule) or rule.keeps_master)  # a kernel alone needs no cache
        super().__init__(cohort)
        master = 0 if self.links.master is None else 1
        self.front_rows = slice(master, len(cohort.momenta) - len(self.momenta))
        self.bind()
        self._look_at_front()

    def adopt_rules(self, rules: list[Rule]) -> bool:
        if not super().adopt_rules(rules):
            return False
        self._look_at_front()
        return True

    def _look_at_front(self) -> None:
        """Cache whether the rules before the last do the same at every step (no schedule, no state)."""
        front = self.links.front
        self.front_is_constant = front is not None and not front.scheduled and not self.front_skeleton.parts
        self.front_state = self.front_skeleton.bare()
        self.known_to_fit = False
        self.reading: dict[Any, bool] = {}  # by the numbers of its state, whether the front reads the parameter

    def _reads_x(self, front: Rule) -> bool:
        """Whether the rules before the last read the parameter in this step, which otherwise need not be gathered."""
        if front.scheduled or self.links.master is not None or self.chunks.missing:
            return True
        numbers = self._front_numbers()
        key = () if self.front_is_constant else tuple([p if p is HOLE else value_key(p) for p in numbers.parts])
        if key not in self.reading:
            if len(self.reading) >= _MOST_NUMBERS:  # as of a count that goes on and on
                return True
            x, rows = self.cohort.reals[0], self.cohort.momenta[self.front_rows]
            used = inputs_used(front, numbers, [x, x, *(row[0] for row in rows)])
            self.reading[key] = used is None or 0 in used
        return self.reading[key]

    def bind(self) -> None:
        self.chunk_calls = [self._calls_for(chunk) for chunk in self.chunks.all]

    def _rows(self, chunk: Chunk) -> tuple[Row, list[Row]]:
        """The tensor that the kernel steps (the parameter, or its master copy), and the kernel's momenta."""
        momenta = chunk.momenta[self.front_rows.stop :]
        return (chunk.x if self.links.master is None else chunk.momenta[0]), momenta

    def _calls_for(self, chunk: Chunk) -> tuple[bool, list[Call]]:
        """Whether the kernel takes the chunk as one long tensor, and its calls."""
        target, momenta = self._rows(chunk)
        one_rule = len(set(self.keys[chunk.low : chunk.high])) == 1
        if one_rule and all(row.flat is not None for row in (target, *momenta)):
            rows = [[row.buffer] for row in momenta]
            run = self.kernel.bind([target.buffer], rows, [self.clock])
            return True, [Call(run, None, self.keys[chunk.low])]
        return False, self.calls(target.tensors, [row.tensors for row in momenta], chunk.low)

    def prepare(self, grads: Sequence[Any]) -> Prepare:
        self.take_hyperparameters()
        self.chunks.load([grads[place] for place in self.cohort.places])
        if self.front is not None:
            self.front_reads_x = self._reads_x(self.front)
            yield from self.chunks.run(self._start, self.front)
            first = self.chunks.all[0]
            rows, before = first.momenta[self.front_rows], self.front_skeleton
            if not self.known_to_fit and not fits(outcome_of(first.result), first, rows, before):
                raise FallBack(title_key(self.cohort.rule))
            self.known_to_fit = self.front_is_constant

    def _start(self, chunk: Chunk, dx: Any) -> Steps:
        x, master = chunk.x.read() if self.front_reads_x else chunk.x.buffer, self.links.master
        if master is not None:
            x = master.master_for(chunk.momenta[0].read(), x)
            dx = None if dx is None else dx.to(master.dtype)
        assert self.front is not None
        if self.front_is_constant and not chunk.stacked:
            return self.front.steps(self.front_state, x, dx)
        rows = (row.read() for row in chunk.momenta[self.front_rows])
        return self.front.steps(self._front_numbers().combine(rows), x.view(chunk.shape), dx)

    def _front_numbers(self) -> Skeleton:
        """The state of the rules before the last, without its tensors."""
        first, size = self.front_rows.start, len(self.front_skeleton.parts)
        return Skeleton(self.front_skeleton.spec, self.cohort.skeleton.parts[first : first + size])

    def drop(self) -> None:
        self.chunks.clear()

    def commit(self) -> None:
        options, first = self.masked(), self.front_rows.start
        numbers, moved = self.cohort.skeleton.parts, True
        for i, (chunk, (long, calls)) in enumerate(zip(self.chunks.all, self.chunk_calls, strict=True)):
            front, dx = self._front_result(chunk)
            if i == 0:
                moved = dx is not None
                numbers = self.tick() if moved else list(numbers)
                if front is not None:
                    numbers[first : first + len(front.parts)] = front.parts
            if self.links.master is not None:
                master = chunk.momenta[0]  # which follows the parameter, where somebody wrote to that
                master.write(self.links.master.master_for(master.read(), chunk.x.read()))
            if dx is not None:
                self._run_kernel(chunk, dx, long, calls, options)
            chunk.clear()
        self.chunks.clear()
        torch.autograd.graph.increment_version(self.cohort.reals)
        self.cohort.advance(Skeleton(self.cohort.skeleton.spec, numbers), moved)

    def _front_result(self, chunk: Chunk) -> tuple[Skeleton | None, Tensor | None]:
        """What the rules before the last make of the gradient; writes their state."""
        if self.front is None:
            return None, chunk.gradient(self.chunks.grads)
        if chunk.result is None:
            chunk.result = self.chunks.advance(chunk, self._start)
        state, dx = chunk.result
        dx = dx if dx is None or dx.ndim == 1 else dx.reshape(-1)
        if self.front_is_constant:
            return None, dx
        tensors, skeleton = partition(state)
        rows = chunk.momenta[self.front_rows]
        if rows:
            write_state(rows, apart_from_written(chunk, rows, tensors), self.context.flag)
        return skeleton, dx

    def _run_kernel(
        self, chunk: Chunk, dx: Tensor, long: bool, calls: list[Call], options: dict[int, dict[str, Any]]
    ) -> None:
        master = self.links.master
        dx = dx if master is None else dx.to(master.dtype)
        grads = [dx] if long else self._cut(chunk, dx)
        for run, places, leaf in calls:
            run(grads if places is None else [grads[i] for i in places], options[leaf])
        if master is not None:
            chunk.x.write(chunk.momenta[0].read())

    def _cut(self, chunk: Chunk, dx: Tensor) -> list[Tensor]:
        """A chunk's gradient, in the shapes of its leaves."""
        if dx.dtype != chunk.dx.dtype:
            return views_like(dx, self._rows(chunk)[0].tensors)
        if dx.data_ptr() != chunk.dx.data_ptr():
            chunk.dx.copy_(dx)  # cheaper than new views
        return chunk.dx_views


def fused_unit(cohort: Cohort) -> FusedUnit | FusedListUnit:
    """The unit for a cohort that a kernel of PyTorch's can step."""
    links = Links.of(cohort.rule)
    first = [x.detach() for x in cohort.params[:2]]
    laid_out = len(first) > 1 and adjacent(first) is not None  # as parameters that were made flat
    plain = links.front is None and links.master is None and not first[0].is_complex()
    return FusedListUnit(cohort) if plain and not laid_out else FusedUnit(cohort)

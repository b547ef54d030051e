"""Compiled units: one kernel for a whole chain, the user's own rules included, made by `torch.compile`.

A kernel is made once for what a chain does to tensors of a dtype and device. Sizes are dynamic, and numbers (rates,
bias corrections) are inputs, so that nothing is compiled again for a changed hyperparameter, schedule or count. Leaves
that differ in a rate go together all the same: there the number is a tensor.
"""

import itertools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from ..context import Context, reads_at_once
from ..pytree import HOLE, Skeleton, entries_of, skeleton_of
from ..rule import Assign, Rule, Steps, reducing, replace, rule_key, rules_in, title, title_key
from .chunk import Chunk
from .cohort import Cohort
from .kernels import Recipe, Writes, to_device, wide_dtype
from .layout import SIZE, Row
from .packed import Chunks, rule_now
from .step import CohortUnit, FallBack, Prepare
from .tape import Tape, Traced, drive

_MOST = 32  # kernels of one chain; with more, its numbers are a part of the program and each step would make another


def bucket_key(rule: Rule, context: Context) -> Any:
    """What rules must have in common to go together: everything but real numbers, where a kernel can take one for each
    leaf. It cannot where a rule asks for a total of what others, with such numbers, made of the gradient."""
    members = [inner for inner in rules_in(rule) if not inner.inner]
    asks_later = any(map(reducing, members[1:])) or any(inner.inner for inner in reducing(rule))
    return rule_key(rule, loose=not asks_later and title_key(rule) not in context.not_shared)


class Program(NamedTuple):
    """What a rule does to a chunk with the numbers of one step: a kernel, its first input, and what the state's numbers
    become."""

    kernel: Callable[..., None]
    numbers: Tensor
    skeleton: Skeleton
    moved: bool


class CompiledUnit(CohortUnit):
    """A cohort of elementwise rules that differ in real numbers alone, each chunk stepped by one kernel."""

    def __init__(self, cohort: Cohort) -> None:
        super().__init__(cohort)
        self.chunks = Chunks(cohort, split=False, long=True)
        # Totals are of what the rule's own steps give, for which large leaves are cut.
        cut = bool(reducing(cohort.rule)) and max(cohort.sizes) > SIZE
        self.asking = Chunks(cohort, split=True, long=True) if cut else self.chunks
        self.kernels = set[Any]()
        self.totals = 0
        if self.master is not None:
            self.inner_spec = skeleton_of(cohort.records[0].state.state).spec
        self.programs: dict[bool, Program] = {}
        self.differing: dict[int, Tensor] = {}
        self.key: Any = None
        self.lowered = torch.zeros((), dtype=torch.bool, device=cohort.params[0].device)  # a flag that is not up
        self.adopt_rules(cohort.rules())

    @property
    def master(self) -> Any:
        """The wrapper that keeps a master copy, if there is one: the kernel steps that copy."""
        return self.cohort.rule if self.cohort.rule.keeps_master else None

    def adopt_rules(self, rules: list[Rule]) -> bool:
        """Find the numbers in which the leaves' rules differ, by their place, with the value of each leaf."""
        cohort = self.cohort
        key = rule_key(cohort.rule, loose=True)
        if key != self.key:
            self.key, self.programs = key, {}
        self.differing = {}
        if len(rules) == 1:
            return True
        known = {id(rule): [v for _, v in entries_of(_written(rule)) if type(v) is float] for rule in rules}
        rows = [known[id(record.rule)] for record in cohort.records]
        device, wide = cohort.reals[0].device, wide_dtype([cohort.reals[0], *(row[0] for row in cohort.momenta)])
        for place, column in enumerate(zip(*rows, strict=True)):
            if len(set(column)) > 1:
                self.differing[place] = torch.tensor(column, dtype=wide, device=device)
        self.sizes = torch.tensor(cohort.sizes, device=device)
        return True

    def prepare(self, grads: Sequence[Any]) -> Prepare:
        self.now = rule_now(self.cohort.rule, self.cohort.numbers.count)
        self.chunks.load([grads[place] for place in self.cohort.places])
        first, others = self.chunks.all[0], ()
        if self.asking is not self.chunks:
            self.asking.load(self.chunks.given)
            others = self.chunks.all
        if not self.programs or self.now.accumulates:  # such a rule asks for no total until its window is full
            self.totals = self._count_totals(first)
        yield from self.asking.run(self._start, self.now, self.totals, others)
        # A chunk of each kind: of one leaf, whose own numbers and totals are 0-dim, and of several.
        kinds = {not chunk.of_several: chunk for chunk in self.chunks.all}
        self.programs = {single: self._program(chunk) for single, chunk in kinds.items()}

    def _start(self, chunk: Chunk, dx: Any) -> Steps:
        """The rule's own steps, for the totals that it asks for."""
        momenta = [row.read() for row in chunk.momenta]
        return self.now.steps(self.cohort.skeleton.combine(momenta), chunk.x.read(), dx)

    def _bad(self) -> list[Tensor]:
        """The flag that keeps kernels from writing, if any. On a device there is always one: another cohort may raise
        it after the kernels were made."""
        up = self.context.flag.up
        if up is None:
            return [] if reads_at_once(self.lowered) else [self.lowered]
        return [up.to(self.lowered.device)]

    def _target(self, chunk: Chunk) -> tuple[Row, list[Row], Rule, Skeleton]:
        """What the kernel steps, with which momenta, by which rule, with which numbers in its state."""
        skeleton = self.cohort.skeleton
        if self.master is None:
            return chunk.x, chunk.momenta, self.now, skeleton
        inner = Skeleton(self.inner_spec, skeleton.parts[1:])
        return chunk.momenta[0], chunk.momenta[1:], self.now.rule, inner  # pyright: ignore[reportAttributeAccessIssue]

    def _count_totals(self, chunk: Chunk) -> int:
        row, momenta, rule, skeleton = self._target(chunk)
        tape = Tape([row.buffer, row.buffer, *(m.shown for m in momenta)])
        x, dx, *others = tape.inputs
        try:
            return len(drive(rule.steps(skeleton.combine(others), x, dx))[1])
        except Exception as error:
            self._refuse(error)

    def _program(self, chunk: Chunk) -> Program:
        """Write down what the rule does with this step's numbers, and find or make the kernel for it."""
        row, momenta, rule, before = self._target(chunk)
        held = [m.shown for m in momenta]
        own = [column[:2] if chunk.of_several else column[0] for column in self.differing.values()]
        bad = self._bad()
        tensors = [row.buffer, row.buffer, *held, *chunk.answers, *own, *bad]
        tape = Tape(tensors)
        x, dx, *rest = tape.inputs
        others, rest = rest[: len(held)], rest[len(held) :]
        answers, rest = rest[: len(chunk.answers)], rest[len(chunk.answers) :]
        try:
            if self.differing:
                outer: Any = self.cohort.rule
                inner = outer.rule if self.master is not None else outer
                rule = with_numbers(inner, rule, dict(zip(self.differing, rest, strict=False)))
            state, change = write_down(rule.steps(before.combine(others), x, dx), answers)
            skeleton, writes = _outcome(state, change, x, before)
        except Exception as error:
            self._refuse(error)
        numbers = to_device([*tape.numbers, 1.0], tensors)
        recipe = Recipe(tape, writes, numbers, tensors, bool(bad), chunk.size)
        try:
            if recipe.key not in self.kernels and len(self.kernels) == _MOST:
                raise RuntimeError("its numbers change what it does")
            self.kernels.add(recipe.key)
            kernel = recipe.kernel()
        except Exception as error:
            self._refuse(error)
        return Program(kernel, numbers, skeleton, change is not None)

    def _refuse(self, error: Exception) -> NoReturn:
        """Stop compiling this rule; or, if its leaves differ in a number, stop sharing one kernel between them."""
        context, key = self.context, title_key(self.cohort.rule)
        context.structure += 1
        if self.differing and key not in context.not_shared:
            context.not_shared.add(key)
            raise FallBack from error
        if key not in context.uncompiled:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            warnings.warn(f"{title(self.cohort.rule)} runs without being compiled: {reason}", stacklevel=2)
        context.uncompiled.add(key)
        raise FallBack from error

    def drop(self) -> None:
        self.chunks.clear()
        self.asking.clear()

    def commit(self) -> None:
        program, bad = None, self._bad()
        for chunk in self.chunks.all:
            row, momenta, _, _ = self._target(chunk)
            program = self.programs[not chunk.of_several]
            if self.master is not None:
                row.write(self.master.master_for(row.read(), chunk.x.read()))
            x = row.read()
            dx = chunk.gradient(self.chunks.grads).to(x.dtype)
            own = self._numbers_for(chunk)
            program.kernel(program.numbers, x, dx, *(m.read() for m in momenta), *chunk.answers, *own, *bad)
            row.write(x)
            for m in momenta:
                m.write(m.buffer)
            if self.master is not None and program.moved:
                chunk.x.write(x)
        assert program is not None
        self.drop()
        torch.autograd.graph.increment_version(self.cohort.reals)
        self.cohort.advance(self._whole_skeleton(program.skeleton), program.moved)

    def _whole_skeleton(self, skeleton: Skeleton) -> Skeleton:
        if self.master is None:
            return skeleton
        whole = self.cohort.skeleton
        return Skeleton(whole.spec, [*whole.parts[: len(whole.parts) - len(skeleton.parts)], *skeleton.parts])

    def _numbers_for(self, chunk: Chunk) -> list[Tensor]:
        """The numbers that differ, for each element of a chunk."""
        if not self.differing or not chunk.of_several:
            return [column[chunk.low] for column in self.differing.values()]
        sizes = self.sizes[chunk.low : chunk.high]
        columns = (column[chunk.low : chunk.high] for column in self.differing.values())
        return [torch.repeat_interleave(column, sizes, output_size=chunk.size) for column in columns]


def _outcome(state: Any, change: Any, x: Traced, before: Skeleton) -> tuple[Skeleton, Writes]:
    """The numbers of the new state, and which result is written to which input."""
    skeleton = skeleton_of(state)
    if skeleton.spec != before.spec:
        raise ValueError("its state does not keep its structure")
    value = None
    if change is not None:
        value = change.value if isinstance(change, Assign) else x - change
    news, parts = [value, None], []
    for new, old in zip(skeleton.parts, before.parts, strict=True):
        is_tensor = isinstance(new, Traced)
        if is_tensor != (old is HOLE):
            raise ValueError("its state does not keep its structure")
        parts.append(old if is_tensor else new)
        if is_tensor:
            news.append(new)
    writes = tuple((i, new.index) for i, new in enumerate(news) if new is not None and new.index != i)
    return Skeleton(skeleton.spec, parts), writes


def write_down(steps: Any, answers: list[Traced]) -> Any:
    """Run a rule on stand-ins to its end."""
    try:
        steps.send(None)
        for answer in answers:
            steps.send(answer)
    except StopIteration as done:
        return done.value
    raise ValueError("it asks for another number of totals than before")


def with_numbers(rule: Rule, now: Rule, new: dict[int, Any]) -> Rule:
    """`now`, which is `rule` with its schedules' values, with others for some numbers of `rule`, by place."""
    written, places = iter(_written(rule)), itertools.count()

    def put(v: Any, old: Any) -> Any:
        if isinstance(old, tuple):
            return tuple(map(put, v, old))
        return new.get(next(places), v) if type(old) is float else v

    return replace(now, lambda _rule, _name, v: put(v, next(written)), validate=False)


def _written(rule: Rule) -> list[Any]:
    """The hyperparameters of a rule and those inside it, in the order of `replace`."""
    found: list[Any] = []
    replace(rule, lambda _rule, _name, v: found.append(v), validate=False)
    return found

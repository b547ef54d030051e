"""What a rule does to tensors, written down: the operators it calls, and the numbers it calls them with.

A rule's `apply` is run on `Traced` in place of tensors. Its numbers stay Python's, so counts, bias corrections and
branches on them are worked out by Python, once and not for each element; what reaches a tensor is taken down in order.
The same operators with other numbers are the same program, so one kernel serves all steps and all rates.
"""

import operator
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..context import Context
from ..pytree import HOLE, Skeleton, entries_of, partition
from ..rule import ReducingRule, Rule, Run, Steps, at, reducing, rule_key

# Operators that take a 0-dim tensor where they take a number; elsewhere a number is a part of the program. A power is
# not among them: where its exponent is known it is far faster.
_TAKES_TENSORS = set("add sub mul truediv div divide multiply subtract true_divide radd rsub rmul rtruediv".split())  # noqa: SIM905
_TAKES_TENSORS |= {"where", "clamp", "clip", "clamp_min", "clamp_max", "eq", "ne", "lt", "le", "gt", "ge"}
_ASKS = ("is_", "dim", "ndimension", "numel", "nelement", "size", "element_size", "stride", "get_device")


class Line(NamedTuple):
    """`call(*args, **options)`, with places (`Place`) of earlier results and of numbers."""

    call: Callable[..., Any]
    args: tuple[Any, ...]
    options: tuple[tuple[str, Any], ...]


class Place(NamedTuple):
    """A "result" by its line (inputs come first), or a "number"; a "whole" one stays an integer."""

    kind: str
    at: int


class Tape:
    """The lines so far, and the numbers in them."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        self.lines: list[Line] = []
        self.numbers: list[float] = []
        self.given = inputs
        self.examples: list[Tensor | None] = [None] * len(inputs)

    @property
    def inputs(self) -> list[Any]:
        """Stand-ins for the inputs: to a rule they are tensors. Made anew each time, for they hold the tape."""
        return [Traced(self, i) for i in range(len(self.given))]

    def record(self, call: Callable[..., Any], args: Sequence[Any], options: dict[str, Any]) -> "Traced":
        kind = None
        if getattr(call, "__name__", "").strip("_") in _TAKES_TENSORS:
            kind = "whole" if int in map(type, args) and self._all_whole(args) else "number"
        placed = tuple(self.place(v, kind) for v in args)
        self.lines.append(Line(call, placed, tuple((k, self.place(v, kind)) for k, v in options.items())))
        self.examples.append(None)
        return Traced(self, len(self.examples) - 1)

    def _all_whole(self, args: Sequence[Any]) -> bool:
        """Whether the tensors among these are of integers, which a number as a float would make floats."""
        dtypes = [self.example(v.index).dtype for v in args if isinstance(v, Traced)]
        return not any(dtype.is_floating_point or dtype.is_complex for dtype in dtypes)

    def place(self, v: Any, kind: str | None) -> Any:
        """A value as it stands in a line; a number, where a 0-dim tensor may be in its place, by its place and kind."""
        if isinstance(v, Traced):
            return Place("result", v.index)
        if isinstance(v, tuple | list):
            return tuple(self.place(x, kind) for x in v)
        if kind is None or type(v) not in (float, int) or (kind == "whole" and abs(v) > 1 << 24):
            return v  # a larger one is another in float32, in which a kernel may be given it
        self.numbers.append(float(v))
        return Place(kind if type(v) is int else "number", len(self.numbers) - 1)

    def live(self, outputs: Sequence[int]) -> tuple[Line | None, ...]:
        """The lines that these results need; None in place of the others."""
        needed, found = set(outputs), []
        for i in reversed(range(len(self.lines))):
            line = self.lines[i] if i + len(self.given) in needed or _writes(self.lines[i]) else None
            if line:
                needed |= _used(line)
            found.append(line)
        return tuple(reversed(found))

    def example(self, index: int) -> Tensor:
        """A small tensor like this result, to ask for its dtype and the like."""
        found = self.examples[index]
        if found is None and index < len(self.given):
            found = self.examples[index] = self.given[index].new_ones(min(self.given[index].ndim, 1) * (2,))
        elif found is None:
            line = self.lines[index - len(self.given)]
            found = self.examples[index] = run_line(line, self.numbers, self.example)
        return found


def drive(steps: Steps, answer: Callable[[ReducingRule, Any], Any] | None = None) -> tuple[Any, list[Any]]:
    """What a rule's steps return, and the values that they ask for totals of. A value stands for its own total, but
    where `answer(rule, value)` says what does."""
    run, asked = Run(steps), list[Any]()
    while run.asks is not None:
        rule, value = run.asks.rule, run.asks.tensor()
        asked.append(value)
        run.tell(value if answer is None else answer(rule, value))
    return run.result, asked


def is_arithmetic(record: Any, x: Any, context: Context) -> bool:
    """Whether the rule of a leaf is pure arithmetic, so that if one chunk of a cohort succeeds, the others cannot fail.
    `x` is its parameter as a real tensor."""

    def ask(rule: Rule) -> bool:
        return inputs_used(rule, record.numbers.skeleton, [x, x, *record.tensors]) is not None

    return _known("arithmetic", record, x, context, ask)


def keeps_numbers(record: Any, x: Any, context: Context) -> bool:
    """Whether the numbers (0-dim tensors) in the state of a leaf can be repeated for each element of `x`, its
    parameter as a real tensor: what they become depends on numbers and totals alone, and a total of numbers does not
    depend on how many elements they stand for."""
    return _known("numbers", record, x, context, lambda rule: _keeps_numbers(rule, record.state, x))


def _known(question: str, record: Any, x: Any, context: Context, ask: Callable[[Rule], bool]) -> bool:
    """The answer to a question about a leaf's rule, as it was or is now given."""
    known = context.traceable
    key = question, rule_key(record.rule, loose=True), x.dtype
    if key not in known:
        try:
            rule = at(record.rule, record.numbers.count)
        except Exception:  # a schedule that is wrong now: the step will say so, and name the leaf
            return False
        known[key] = ask(rule)
    return known[key]


def inputs_used(rule: Rule, skeleton: Skeleton, tensors: Sequence[Tensor]) -> set[int] | None:
    """Which of its inputs (parameter, gradient, the tensors of its state) a rule reads; None of one that is not
    arithmetic alone."""
    tape = Tape([t.reshape(-1) for t in tensors])
    x, dx, *momenta = tape.inputs
    try:
        result, asked = drive(rule.steps(skeleton.combine(momenta), x, dx))
        used = {v.index for v in asked} | {v.index for _, v in entries_of(result) if isinstance(v, Traced)}
    except Exception:
        return None
    return used.union(*map(_used, tape.lines))


def _keeps_numbers(rule: Rule, state: Any, x: Tensor) -> bool:
    parts: list[tuple[Rule, Any]] = []
    if rule.delegates:
        rule.map_inner_states(lambda *part: parts.append(part), state)
    if parts and len(parts) == len(rule.inner):  # each of which it may pass by in this step
        return all(_keeps_numbers(*part, x) for part in parts)
    tensors, skeleton = partition(state)
    if not reducing(rule) and all(t.ndim for t in tensors):
        return True
    tape = Tape([t.reshape(-1) if t.ndim else t for t in (x, x, *tensors)])
    stand_in, dx, *momenta = tape.inputs
    totals: set[int] = set()

    def total(rule: ReducingRule, value: Any) -> Traced:
        is_number = not tape.example(value.index).ndim
        if is_number and (value.index not in _of_numbers_alone(tape, totals) or not _counts_once(rule)):
            raise TypeError("a total that depends on how many elements a number stands for")
        found = tape.record(partial(_total, rule), (value,), {})
        totals.add(found.index)
        return found

    try:
        (after, change), _ = drive(rule.steps(skeleton.combine(momenta), stand_in, dx), total)
    except Exception:
        return False
    news = [] if change is None else [v for _, v in entries_of(after)]  # a step not taken says nothing
    alone = _of_numbers_alone(tape, totals)
    kept = [isinstance(v, Traced) and v.index in alone for p, v in zip(skeleton.parts, news, strict=False) if p is HOLE]
    return len(kept) == len(tensors) and all(t.ndim or own for t, own in zip(tensors, kept, strict=True))


def _of_numbers_alone(tape: Tape, totals: set[int]) -> set[int]:
    """The results that depend on numbers and totals alone; none of a rule that writes in place."""
    if any(map(_writes, tape.lines)):
        return set()
    found = {i for i, t in enumerate(tape.given) if not t.ndim}
    for i, line in enumerate(tape.lines, len(tape.given)):
        if i in totals or _used(line) <= found:
            found.add(i)
    return found


def _total(rule: ReducingRule, value: Tensor) -> Tensor:
    return rule.combine(rule.parts([value]))


def _counts_once(rule: ReducingRule) -> bool:
    """Whether a number gives the same to a total however many elements it stands for."""
    number = torch.tensor(0.7, device="cpu")
    return torch.equal(rule.part(number.expand(2)), rule.part(number))


def _writes(line: Line) -> bool:
    """Whether it writes into an earlier result, which then matters even where its own is not used."""
    name = getattr(line.call, "__name__", "")
    return (name.endswith("_") and not name.endswith("__")) or any(key == "out" for key, _ in line.options)


def _used(v: Any) -> set[int]:
    """The results that a line needs, or a part of one."""
    if isinstance(v, Place):
        return {v.at} if v.kind == "result" else set()
    return set[int]().union(*map(_used, v)) if isinstance(v, tuple) else set()


def run_line(line: Line, numbers: Any, result: Callable[[int], Tensor]) -> Tensor:
    def value(v: Any) -> Any:
        if isinstance(v, Place) and v.kind == "whole":
            return numbers[v.at].long() if isinstance(numbers, Tensor) else int(numbers[v.at])
        if isinstance(v, Place):
            return result(v.at) if v.kind == "result" else numbers[v.at]
        return tuple(map(value, v)) if type(v) is tuple else v

    return line.call(*map(value, line.args), **{k: value(v) for k, v in line.options})


class Traced:
    """Stands for a tensor while a rule is written down."""

    def __init__(self, tape: Tape, index: int) -> None:
        self.tape, self.index = tape, index

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _first(args).tape.record(func, args, kwargs or {})

    def __getattr__(self, name: str) -> Any:
        method = getattr(torch.Tensor, name)
        if name in ("dtype", "device") and self.index < len(self.tape.given):
            return getattr(self.tape.given[self.index], name)
        if not callable(method) or name.startswith(_ASKS):
            return getattr(self.tape.example(self.index), name)
        return lambda *args, **options: self.tape.record(method, (self, *args), options)

    def __rtruediv__(self, other: Any) -> Any:
        # That of tensors makes one of its own, which a kernel does not know as an input.
        return self.tape.record(operator.truediv, (other, self), {})

    def __bool__(self) -> bool:
        raise TypeError("an elementwise rule cannot branch on the values of a tensor")


def _first(args: Any) -> Traced:
    for v in args:
        if isinstance(v, Traced):
            return v
        if isinstance(v, tuple | list) and any(isinstance(x, Traced) for x in v):
            return _first(v)
    raise TypeError("no tensor among the arguments")


def _operator(name: str) -> Any:
    method = getattr(torch.Tensor, name)
    return lambda self, *args: self.tape.record(method, (self, *args), {})


_BINARY = "add sub mul truediv pow floordiv mod"
for _name in [f"__{n}__" for n in _BINARY.split()] + [f"__r{n}__" for n in _BINARY.split() if n != "truediv"]:
    setattr(Traced, _name, _operator(_name))
for _name in ["neg", "abs", "eq", "ne", "lt", "le", "gt", "ge", "and", "or", "xor", "invert", "lshift", "rshift"]:
    setattr(Traced, f"__{_name}__", _operator(f"__{_name}__"))

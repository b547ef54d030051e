"""The compiled path: one kernel for a whole chain, the user's own rules included, made by `torch.compile`.

A kernel is made once for what a chain does to tensors of a dtype and device. Sizes are dynamic, and numbers (rates,
bias corrections) are inputs, so that nothing is made anew for a changed hyperparameter, schedule or count. Leaves that
differ in a rate go together all the same: there the number is a tensor.
"""

import itertools
import warnings
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..guard import Guard
from ..pytree import Frame
from ..rule import Assign, Rule, replace, title, walk
from .flat import Flat, Piece
from .group import Member, Misfit, same
from .slab import Scratch
from .tape import Line, Tape, Traced, run_line

_KERNELS: dict[Any, Callable[..., None]] = {}  # for all trees: making one takes seconds
_MOST = 32  # kernels of one chain; with more, its numbers are a part of the program and each step would make another


class Compiled(Flat):
    """Leaves of elementwise rules that differ in numbers alone, each piece stepped by one kernel."""

    split = False

    def __init__(self, members: Sequence[Member], scratch: Scratch) -> None:
        super().__init__(members, scratch)
        self.quick, self.kernels = False, set[Any]()
        self.spread()

    def retune(self) -> bool:
        self.rule = self.members[0].leaf._rule
        self.spread()
        return not self.rule.traced and len({same(m.leaf._rule, loose=True) for m in self.members}) == 1

    def spread(self) -> None:
        """Find the numbers in which the leaves' rules differ, by their place, with the value of each leaf."""
        known = {id(m.leaf._rule): numbers_of(m.leaf._rule) for m in self.members}
        self.differing: dict[int, Tensor] = {}
        if len(known) > 1:
            rows = [known[id(m.leaf._rule)] for m in self.members]
            device, wide = self.params[0].device, _wide([self.params[0], *(row[0] for row in self.momenta)])
            for place, column in enumerate(zip(*rows, strict=True)):
                if len(set(column)) > 1:
                    self.differing[place] = torch.tensor(column, dtype=wide, device=device)
            self.sizes = torch.tensor([x.numel() for x in self.params], device=device)

    def numbers_for(self, piece: Piece) -> list[Tensor]:
        """The numbers that differ, for each element of a piece."""
        if not self.differing or piece.high - piece.low == 1:
            return [column[piece.low] for column in self.differing.values()]
        sizes = self.sizes[piece.low : piece.high]
        columns = (column[piece.low : piece.high] for column in self.differing.values())
        return [torch.repeat_interleave(column, sizes, output_size=piece.size) for column in columns]

    def known(self, total: Tensor) -> Tensor:
        return total  # an input of the kernel, which is one for all values

    def finish(self, guard: Guard) -> None:
        """Write down what the rule does with this step's numbers, and find or make the kernels for it."""
        self.kernel = {single: self.kernel_for(piece, guard) for single, piece in self.kinds().items()}

    def kinds(self) -> dict[bool, Piece]:
        """A piece of each kind: of one leaf, whose numbers are 0-dim, and of several."""
        if not self.differing:
            return {False: self.pieces[0]}
        return {not piece.views: piece for piece in self.pieces}

    def kernel_for(self, piece: Piece, guard: Guard) -> Callable[..., None]:
        held = [slab.last for slab in piece.momenta]
        own = [column[:2] if piece.views else column[0] for column in self.differing.values()]
        extra = [*piece.answers, *own, *([] if guard.bad is None else [guard.bad])]
        tensors = [piece.x.last, piece.x.last, *held, *extra]  # those of the first step, or like them
        tape = Tape(tensors)
        x, dx, *others = tape.inputs
        others, rest = others[: len(held)], others[len(held) :]
        answers, rest = rest[: len(piece.answers)], rest[len(piece.answers) :]
        numbers = dict(zip(self.differing, rest, strict=False))
        try:
            rule = with_numbers(self.rule, self.now, numbers) if numbers else self.now
            before = self.frame.join(others)
            state, change = write_down(rule.steps(before, x, dx), answers)  # pyright: ignore
            frame, parts = Frame(state), Frame(state).parts
            if _form(frame) != _form(Frame(before)):
                raise ValueError("its state does not keep its structure")
            self.numbers = [
                old if isinstance(new, Traced) else new for new, old in zip(parts, self.frame.parts, strict=True)
            ]
            self.moved = change is not None
            value = None if change is None else change.value if isinstance(change, Assign) else x - change
            news = [value, dx, *(part for part in parts if isinstance(part, Traced))]
            writes = tuple(
                (i, new._index) for i, new in enumerate(news) if new is not None and i not in (1, new._index)
            )
        except Exception as error:
            self.refuse(guard, error)
        key = tuple(tape.lines), writes, tuple((t.dtype, t.device, t.ndim) for t in tensors), guard.bad is not None
        self.inputs = _sent([*tape.numbers, 1.0], tensors)
        if key not in _KERNELS:
            self.kernels.add(key)
            try:
                if len(self.kernels) > _MOST:
                    raise RuntimeError("its numbers change what it does")
                lines = tape.live([source for _, source in writes])
                _KERNELS[key] = made(lines, writes, self.inputs, tensors, guard.bad is not None)
            except Exception as error:
                self.refuse(guard, error)
        return _KERNELS[key]

    def refuse(self, guard: Guard, error: Exception) -> NoReturn:
        """This rule is not to be compiled again, or, where nothing differs from leaf to leaf, at all."""
        self.plan.dead = True
        rules = {type(rule) for rule in walk(self.rule)}
        if self.differing and not rules & guard.exact:
            guard.exact |= rules  # perhaps with its own numbers for each
            raise Misfit from error
        if not rules & guard.uncompiled:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            warnings.warn(f"{title(self.rule)} runs without being compiled: {reason}", stacklevel=2)
        guard.uncompiled |= {type(rule) for rule in walk(self.rule) if not rule.inner}
        raise Misfit from error

    def commit(self, guard: Guard) -> None:
        for piece in self.pieces:
            x, momenta = piece.x.read(), [slab.last for slab in piece.momenta]
            kernel = self.kernel[bool(self.differing) and not piece.views]
            held = [] if guard.bad is None else [guard.bad]
            dx = piece.gradient(self.grads)
            kernel(self.inputs, x, dx, *momenta, *piece.answers, *self.numbers_for(piece), *held)
            piece.x.write(x)
        self.stepped(self.numbers, self.moved)


def write_down(steps: Any, answers: list[Traced]) -> Any:
    """A rule to its end."""
    try:
        steps.send(None)
        for answer in answers:
            steps.send(answer)
    except StopIteration as done:
        return done.value
    raise Misfit


def numbers_of(rule: Rule) -> list[float]:
    """All real numbers among the hyperparameters of a rule and those inside it, in one order for all rules alike."""
    return [v for v in Frame(_written(rule)).parts if type(v) is float]


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


def _form(frame: Frame) -> Any:
    return frame.spec, [isinstance(part, Traced) for part in frame.parts]


def _wide(tensors: Sequence[Tensor]) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _sent(numbers: list[float], tensors: Sequence[Tensor]) -> Tensor:
    """Numbers as a tensor beside others, without waiting for the device."""
    device = tensors[0].device
    there = device.type != "cpu"
    sent = torch.tensor(numbers, dtype=_wide(tensors), device="cpu", pin_memory=there)
    return sent.to(device, non_blocking=True) if there else sent


def made(
    lines: tuple[Line | None, ...], writes: Any, numbers: Tensor, like: Sequence[Tensor], held: bool
) -> Callable[..., None]:
    """The kernel of a tape, compiled, and tried on tensors that do not matter."""

    def kernel(numbers: Tensor, *inputs: Tensor) -> None:
        results: list[Any] = list(inputs)
        for line in lines:
            results.append(None if line is None else run_line(line, numbers, results.__getitem__))
        # Times one, where another buffer takes an input over: Inductor drops copies, and reads what was overwritten.
        news = [results[source] * numbers[-1] if source < len(inputs) else results[source] for _, source in writes]
        for (target, _), new in zip(writes, news, strict=True):
            results[target].copy_(torch.where(inputs[-1], results[target], new) if held else new)

    # What torch.compile remembers it remembers by code, so each kernel has code of its own.
    code = kernel.__code__.replace(co_name=f"kernel_{len(_KERNELS)}")
    own = FunctionType(code, kernel.__globals__, code.co_name, None, kernel.__closure__)
    seen: list[tuple[Callable[..., Any], tuple[Any, ...]]] = []

    def backend(graph: Any, examples: Any) -> Callable[..., Any]:
        from torch._inductor.compile_fx import compile_fx

        inner: Any = compile_fx(graph, examples)

        def spy(*args: Any) -> Any:
            seen.append((inner, args))
            return inner(*args)

        return spy

    inputs = [numbers, *(t.new_ones((_LENGTH,) * t.ndim) for t in like)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of the compiler's own code
        torch.compile(own, backend=backend, dynamic=True, fullgraph=True)(*inputs)
    return _direct(*seen[-1], inputs)


_LENGTH = 1013  # of the tensors that a kernel is tried on: no other size is like it


def _direct(inner: Callable[..., Any], args: tuple[Any, ...], inputs: list[Tensor]) -> Callable[..., None]:
    """The compiled program itself, without what looks at each call whether it still fits: it was found by that.

    It takes tensors in an order of its own, and their length as a number.
    """
    known = {id(t): i for i, t in enumerate(inputs)}
    order = [known[id(arg)] if isinstance(arg, Tensor) else None for arg in args]
    fixed = [None if isinstance(arg, Tensor) or int(arg) == _LENGTH else int(arg) for arg in args]

    def run(*tensors: Tensor) -> None:
        length = len(tensors[1])
        inner(
            *[
                tensors[i] if i is not None else length if other is None else other
                for i, other in zip(order, fixed, strict=True)
            ]
        )

    return run

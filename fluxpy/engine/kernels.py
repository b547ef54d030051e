"""Kernels: what was written down on a tape, compiled by `torch.compile` into one function that writes in place."""

import warnings
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .tape import Tape, run_line

Writes: TypeAlias = tuple[tuple[int, int], ...]
_KERNELS: dict[Any, Callable[..., None]] = {}  # for all trees: making one takes seconds

_CASTS = {"to", "type", "half", "bfloat16"}  # operators that round
_ROUNDS_SINCE = "2.13"  # the version from which Inductor rounds where it is told to, on the CPU too

# Sizes at which kernels are traced, unlike any other number in a program. Inductor uses several threads from 2**16
# elements on.
_SHORT, _LONG = 1013, (1 << 16) + 1


class Recipe:
    """All that a kernel depends on. `writes` are pairs (input, result): that input becomes that result; `like` are
    tensors like the inputs; where `masked`, the last input keeps all as it was."""

    def __init__(
        self, tape: Tape, writes: Writes, numbers: Tensor, like: Sequence[Tensor], masked: bool, size: int
    ) -> None:
        self.tape, self.writes, self.numbers, self.like, self.masked = tape, writes, numbers, like, masked
        self.threads = torch.get_num_threads() if size >= _LONG else 1
        self.length = _SHORT if self.threads == 1 else _LONG
        signature = tuple((t.dtype, t.device, t.ndim) for t in like)
        self.key = tuple(tape.lines), writes, signature, masked, self.threads

    def kernel(self) -> Callable[..., None]:
        """The kernel, compiled where no kernel like it was before."""
        if self.key not in _KERNELS:
            casts = any(getattr(line.call, "__name__", "") in _CASTS for line in self.tape.lines)
            if casts and torch.__version__ < _ROUNDS_SINCE:
                raise RuntimeError(f"before PyTorch {_ROUNDS_SINCE} compiled code leaves out the rounding of a cast")
            _KERNELS[self.key] = self._compile()
        return _KERNELS[self.key]

    def _function(self) -> Callable[..., None]:
        lines, writes, masked = self.tape.live([source for _, source in self.writes]), self.writes, self.masked

        def kernel(numbers: Tensor, *inputs: Tensor) -> None:
            results: list[Any] = list(inputs)
            for line in lines:
                results.append(None if line is None else run_line(line, numbers, results.__getitem__))
            # Times one, where an input becomes another: Inductor drops a plain copy, and reads what was overwritten.
            news = [results[source] * numbers[-1] if source < len(inputs) else results[source] for _, source in writes]
            for (target, _), new in zip(writes, news, strict=True):
                old = results[target] if results[target].ndim else results[target].view(1)  # 0-dim: not always written
                old.copy_(torch.where(inputs[-1], old, new) if masked else new)

        # torch.compile keeps what it compiled by the code object, so each kernel has its own.
        code = kernel.__code__.replace(co_name=f"kernel_{len(_KERNELS)}")
        return FunctionType(code, kernel.__globals__, code.co_name, None, kernel.__closure__)

    def _compile(self) -> Callable[..., None]:
        """The kernel, tried on tensors that do not matter."""
        from torch._inductor import config

        seen: list[tuple[Callable[..., Any], tuple[Any, ...]]] = []

        def backend(graph: Any, examples: Any) -> Callable[..., Any]:
            from torch._inductor.compile_fx import compile_fx

            inner: Any = compile_fx(graph, examples)

            def spy(*args: Any) -> Any:
                seen.append((inner, args))
                return inner(*args)

            return spy

        inputs = [self.numbers, *(t.new_ones((self.length,) * t.ndim) for t in self.like)]
        # A rule may rely on its own rounding, which Inductor otherwise leaves out.
        with warnings.catch_warnings(), config.patch(emulate_precision_casts=True):
            warnings.simplefilter("ignore")  # those of the compiler's own code
            torch.compile(self._function(), backend=backend, dynamic=True, fullgraph=True)(*inputs)
        return _direct(*seen[-1], inputs, self.length)


def _direct(inner: Callable[..., Any], args: tuple[Any, ...], inputs: list[Tensor], size: int) -> Callable[..., None]:
    """The compiled program without its guards, which would check the inputs again at each call.

    It takes tensors in an order of its own, and their length as a number.
    """
    known = {id(t): i for i, t in enumerate(inputs)}
    order = [known[id(arg)] if isinstance(arg, Tensor) else None for arg in args]
    fixed = [None if isinstance(arg, Tensor) or int(arg) == size else int(arg) for arg in args]

    def run(*tensors: Tensor) -> None:
        length = len(tensors[1])
        pairs = zip(order, fixed, strict=True)
        inner(*[tensors[i] if i is not None else length if other is None else other for i, other in pairs])

    return run


def wide_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def to_device(numbers: list[float], tensors: Sequence[Tensor]) -> Tensor:
    """Numbers as a tensor beside others, without waiting for the device."""
    device = tensors[0].device
    there = device.type != "cpu"
    sent = torch.tensor(numbers, dtype=wide_dtype(tensors), device="cpu", pin_memory=there)
    return sent.to(device, non_blocking=True) if there else sent

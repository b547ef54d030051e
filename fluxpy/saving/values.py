"""Checks of single values from a file, which may be anything, and the words for them in errors."""

import reprlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ..text import form, names_of

NONE = type(None).__name__  # the "type" of what stands for None in plain data


class _ShortRepr(reprlib.Repr):
    """Tensors by their form, for torch copies some to print them: of an expanded one that may fill the memory."""

    def repr_Tensor(self, x: Tensor, level: int) -> str:
        return form(x.shape, x.dtype)

    repr_Parameter = repr_Tensor


short_repr = _ShortRepr().repr  # for whatever comes from a file


def malformed(place: str, expected: str, got: Any) -> ValueError:
    """The error for a value that no leaf can take."""
    return ValueError(f"{place}: expected {expected}, got {short_repr(got)}")


def is_none(saved: Any) -> bool:
    """Whether this stands for None, which older files have as it is."""
    return saved is None or (isinstance(saved, dict) and saved == {"type": NONE})


def describe_rule(saved: Any) -> str:
    if not isinstance(saved, dict):
        return short_repr(saved)
    name = saved.get("type")
    names = [key for key in saved if not (isinstance(key, str) and key == "type")]
    return f"{name if isinstance(name, str) else short_repr(name)} ({names_in_file(names)})"


def names_in_file(keys: Iterable[Any]) -> str:
    """The names in a file, which may be anything."""
    keys = list(keys)
    return names_of(keys) if all(isinstance(key, str) for key in keys) else short_repr(keys)


def describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)} of {kind_of_number(value)} numbers"
    return "a number" if type(value) in (int, float) else f"a {type(value).__name__}"


def kind_of_number(t: Tensor) -> str:
    if t.is_floating_point():
        return "floating-point"
    return "complex" if t.is_complex() else "whole"


def alike(a: Any, b: Any) -> bool:
    """Tensors of one shape and kind of number, two numbers, or two values of one type."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and kind_of_number(a) == kind_of_number(b)
    return type(a) is type(b) or (type(a) in (int, float) and type(b) in (int, float))


def may_replace(value: Any, known: tuple[Any, ...]) -> bool:
    """Whether a hyperparameter may take a value, if these are known ones. Tensors and schedules go for any."""
    if any(isinstance(v, Tensor | Callable | None) for v in known) or isinstance(value, Tensor | Callable):
        return True
    return any(alike(value, v) for v in known)


def dtype_of(value: Any, place: str) -> torch.dtype:
    dtype = vars(torch).get(value) if isinstance(value, str) else None
    if not isinstance(dtype, torch.dtype):
        raise malformed(place, "the name of a dtype", value)
    return dtype


def require_stored(t: Tensor, place: str) -> None:
    """Refuse a tensor that repeats stored numbers, as an expanded one: a copy of it may be of any size."""
    if t.layout is torch.strided and t.numel() * t.element_size() > t.untyped_storage().nbytes():
        raise ValueError(f"{place}: expected a tensor with all its elements, got an expanded {form(t.shape, t.dtype)}")


def dense_copy(t: Tensor, device: torch.device | None, place: str) -> Tensor:
    if t.layout is not torch.strided or t.is_meta:
        raise malformed(place, "a dense tensor", t)
    return t.detach().to(device or t.device, copy=True)


def tensor_bytes(x: Tensor) -> bytes:
    """To compare: NaNs, too, are equal to themselves this way."""
    return x.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()

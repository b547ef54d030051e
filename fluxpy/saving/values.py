"""Single values from a file, which may be anything, and the words for them in errors."""

import reprlib
from typing import Any

import torch
from torch import Tensor

from ..text import form

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


def describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)} of {kind_of_number(value)} numbers"
    return "a number" if type(value) in (int, float) else f"a {type(value).__name__}"


def kind_of_number(t: Tensor) -> str:
    if t.is_floating_point():
        return "floating-point"
    return "complex" if t.is_complex() else "whole"


def tensor_bytes(x: Tensor) -> bytes:
    """To compare: NaNs, too, are equal to themselves this way."""
    return x.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()

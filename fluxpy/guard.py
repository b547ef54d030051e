"""Numbers that must be finite: on the CPU a bad one raises at once, naming the place."""

from typing import Any

from torch import Tensor

from .rule import Ask


class Skip(Exception):
    """Raised inside an update that is to move nothing."""


def require_finite(total: Tensor, ask: Ask, parts: list[tuple[str, Tensor]]) -> None:
    """Act on a total that is not finite as `ask.nonfinite` says: raise, skip the update, or ignore it."""
    if ask.nonfinite == "ignore" or bool(total.isfinite()):
        return
    if ask.nonfinite == "skip":
        raise Skip
    path = next((path for path, part in parts if not part.isfinite()), None)
    where = f"of the gradient of {path!r}" if path is not None else "over all gradients together"
    raise FloatingPointError(
        f"{type(ask.rule).__name__}: the norm {where} is {total.item()}; "
        'nothing was updated (nonfinite="skip" passes such an update by)'
    )

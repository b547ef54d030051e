"""One update of AdamW, with and without clipping by the global norm, against torch's fused AdamW."""

import torch

from . import sides
from .harness import Column, Contender, Meter, figure, ratios
from .sets import Problem

TITLE = "Update"
NOTE = """Ratios to `torch.optim.AdamW(fused=True)`; with clipping to `clip_grad_norm_` and that. Gradients are new
tensors in `.grad` before each step, which truly clips. Afterwards every contender's parameters are compared with where
that many steps lead."""
COLUMNS = {
    "mlp, 1 thread": ("mlp", 1),
    "gpt, 2 threads": ("gpt", 2),
    "many, 1 thread": ("many", 1),
    "many, 2 threads": ("many", 2),
}
PLAIN = (0.25, 1.0, 0.40, 0.33)
CLIPPED = (0.30, 1.0, 0.45, 0.40)
FLAT = (0.25, 1.0, 0.15, 0.12)
TARGETS: dict[str, tuple[float | None, ...]] = {
    "AdamW": PLAIN,
    "AdamW, gradients as a tree": PLAIN,
    "AdamW, laid out flat": FLAT,
    "clip + AdamW": CLIPPED,
    "clip + AdamW, gradients as a tree": CLIPPED,
    "clip + AdamW, laid out flat": FLAT,
}


def target(targets: dict[str, tuple[float | None, ...]], row: str, column: str) -> float | None:
    """The target of a row in one of the four columns."""
    return targets.get(row, (None,) * 4)[list(COLUMNS).index(column)]


def measure(column: str, meter: Meter) -> Column:
    problem = Problem(COLUMNS[column][0], meter.device)
    found: Column = {}
    for name, clip in (("AdamW", False), ("clip + AdamW", True)):
        base = f"torch, fused {name}"
        contenders: dict[str, Contender | None] = {
            base: sides.of_torch(problem, sides.fused, clip),
            name: sides.of_fluxpy(problem, clip=clip),
            f"{name}, gradients as a tree": sides.of_fluxpy(problem, clip=clip, tree=True),
            f"{name}, laid out flat": sides.of_fluxpy(problem, clip=clip, flat=True),
        }
        if not meter.quick:
            contenders[f"{name}, compiled"] = sides.of_fluxpy(problem, clip=clip, compile=True)
            contenders[f"{name}, compiled and flat"] = sides.of_fluxpy(problem, clip=clip, compile=True, flat=True)
        times = meter.compare(contenders)
        found[base] = figure(times[base], "s")
        for row in times:
            if row != base:
                found[row] = figure(ratios(times[row], times[base]), target=target(TARGETS, row, column))
    return found | _for_reference(problem, meter)


def _for_reference(problem: Problem, meter: Meter) -> Column:
    times = meter.compare(
        {
            "torch, fused AdamW": sides.of_torch(problem, sides.fused),
            "torch, foreach AdamW": sides.of_torch(problem, lambda p: torch.optim.AdamW(p, foreach=True)),
            "torch, loop AdamW": sides.of_torch(problem, lambda p: torch.optim.AdamW(p, foreach=False)),
            "torch's kernel alone": sides.kernel(problem),
            "torch's kernel alone, on one long tensor": sides.kernel(problem, flat=True),
            "copy": sides.copying(problem),
        }
    )
    base, copied = times.pop("torch, fused AdamW"), times.pop("copy")
    found = {name: figure(ratios(seconds, base)) for name, seconds in times.items()}
    floor = [28 / 8 * t for t in copied]  # 28 bytes a number, where a copy moves 8
    return found | {"the bytes that AdamW must move, at the speed of a copy": figure(ratios(floor, base))}

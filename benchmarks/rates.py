"""What it costs that leaves have different rates."""

from . import sides, update
from .harness import Column, Meter, figure, ratios
from .sets import Problem

TITLE = "Different rates"
NOTE = "AdamW with different rates over the leaves: ratios to one rate, on the same path."
COLUMNS = update.COLUMNS
OWN = "every leaf its own"
TARGETS: dict[str, tuple[float | None, ...]] = {
    "8 rates": (1.2, 1.1, 1.2, 1.2),
    OWN: (2.0, 1.1, 2.0, 2.0),
    f"{OWN}, laid out flat": (None, None, 1.2, 1.2),
    f"{OWN}, compiled": (None, None, 1.2, 1.2),
}


def measure(column: str, meter: Meter) -> Column:
    problem = Problem(COLUMNS[column][0], meter.device)
    found: Column = {}
    for suffix, flat, compile in (("", False, False), (", laid out flat", True, False), (", compiled", False, True)):
        if compile and meter.quick:
            continue
        counts = {"one rate": 1, "8 rates": 8, OWN: len(problem.params)}
        times = meter.compare(
            {name + suffix: sides.of_fluxpy(problem, flat=flat, compile=compile, rates=n) for name, n in counts.items()}
        )
        for row in times:
            base = times[f"one rate{suffix}"]
            one = row == f"one rate{suffix}"
            goal = update.target(TARGETS, row, column)
            found[row] = figure(base, "s") if one else figure(ratios(times[row], base), target=goal)
    return found

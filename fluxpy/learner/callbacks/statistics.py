"""StatisticsRecorder: the metrics of each batch or phase. And how rows are gathered without reading the device."""

import math
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from ...pytree import Frame
from ..events import Callback


class Rows(Callback):
    """What makes a row of each batch that was scored, or of each phase, with the running metrics.

    Nothing is read from the device for a row: what `metrics.peek()` gives is gathered, and `keep(rows)`, which
    subclasses give, gets the numbers of many rows after every few batches, at the end of a phase and before a save.
    """

    def __init__(self, each_batch: bool, every: int) -> None:
        if every < 1:
            raise ValueError(f"every={every!r} is not allowed; it is a number of batches, at least 1")
        self.every = every
        self._each_batch = each_batch
        self._learner: Any = None  # while it fits
        self._gathered: list[tuple[int, int, str, list[Any]]] = []
        self._counted = 0  # how many batches the metrics had counted at the last row

    def keep(self, rows: list[dict[str, Any]]) -> None:
        """Take rows: `{"epoch": 0, "batch": 0, "phase": "train", "loss": 0.69, ...}`."""
        raise NotImplementedError

    def on_fit_start(self, learner: Any) -> None:
        self._learner, self._gathered = learner, []

    def on_training_start(self, learner: Any) -> None:
        self._counted = learner.metrics.batches if self._each_batch else 0  # not 0 where a run is resumed

    on_validation_start = on_training_start

    def on_batch_end(self, learner: Any) -> None:
        if self._each_batch:
            self._gather(learner)

    def on_training_end(self, learner: Any) -> None:
        if not self._each_batch and learner.error is None:
            self._gather(learner)
        self._flush(learner)

    on_validation_end = on_training_end

    def on_fit_end(self, learner: Any) -> None:
        self._learner = None

    def state_dict(self) -> dict[str, Any]:
        learner = self._learner
        if learner is not None:
            # A callback that comes before this one may save at an event that this one has not seen yet.
            level = learner._levels[-1]
            if level == "batch" if self._each_batch else level == "training" and learner._at.phase == "validation":
                self._gather(learner)
            self._flush(learner)
        return {}

    def _gather(self, learner: Any) -> None:
        metrics = learner.metrics
        if metrics.batches == self._counted:
            return  # cancelled before it was scored, or gathered before
        if not learner.fitting or not (learner.training or learner._at.phase == "validation"):
            return  # a call of `validate`
        self._counted = metrics.batches
        # What is resumed behind the last batch has no present one.
        batch, phase = (learner._at.batch - 1, "train") if learner.training else (learner.batch_index, "validation")
        self._gathered.append((learner.epoch_index, batch, phase, metrics.peek()))
        if len(self._gathered) >= self.every:
            self._flush(learner)

    def _flush(self, learner: Any) -> None:
        gathered, self._gathered = self._gathered, []
        if gathered:
            peeked = on_host([row[-1] for row in gathered])
            self.keep(
                [
                    {"epoch": epoch, "batch": batch, "phase": phase, **learner.metrics.read(sums)}
                    for (epoch, batch, phase, _), sums in zip(gathered, peeked, strict=True)
                ]
            )

    def _is_past(self, learner: Any, epoch: int, batch: float, phase: str) -> bool:
        """Whether a resumed run will not come to this row again."""
        at = learner._at
        row = epoch, phase == "validation", batch if self._each_batch else math.inf
        return row < (at.epoch, at.phase == "validation", at.batch if at.phase == "training" else 0)


class StatisticsRecorder(Rows):
    """Keeps the metrics of each batch (running values) or of each epoch, in `records`.

    A record is a dict: epoch, batch, phase ("train" or "validation"), then the metrics by name. A batch that was
    cancelled before it was scored has none. A new fit begins anew; a resumed one goes on, each batch once.

    >>> from fluxpy.learner import Learner, StatisticsRecorder
    >>> data, recorder = [(torch.ones(4, 2), torch.ones(4, 1))] * 3, StatisticsRecorder()
    >>> model, loss = torch.nn.Linear(2, 1), torch.nn.functional.mse_loss
    >>> learner = Learner(model, loss, Descent(0.1), callbacks=[recorder], default_callbacks=False)
    >>> history = learner.fit(data)
    >>> len(recorder.values("loss")), list(recorder.records[0])
    (3, ['epoch', 'batch', 'phase', 'loss'])
    """

    def __init__(self, per: str = "batch", every: int = 50) -> None:
        super().__init__(one_of("per", per, ("batch", "epoch")) == "batch", every)
        self.records: list[dict[str, Any]] = []

    def values(self, name: str, phase: str = "train") -> list[Any]:
        """One column: the numbers of a metric in training or in validation."""
        return [row[name] for row in self.records if row["phase"] == one_of("phase", phase, ("train", "validation"))]

    def keep(self, rows: list[dict[str, Any]]) -> None:
        self.records += rows

    def on_fit_start(self, learner: Any) -> None:
        super().on_fit_start(learner)
        past = self.records if learner._saved else []
        self.records = [row for row in past if self._is_past(learner, row["epoch"], row["batch"], row["phase"])]

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"records": self.records}

    def load_state_dict(self, d: dict[str, Any]) -> None:
        self.records = d["records"]


def on_host(tree: Any) -> Any:
    """The tree with its tensors on the CPU, copied together: one wait for each kind of them."""
    tensors, frame = Frame.split(tree)
    if not tensors:
        return tree
    kinds: dict[Any, list[Tensor]] = defaultdict(list)
    for t in tensors:
        kinds[t.device, t.dtype, t.shape].append(t)
    copies = {kind: iter(torch.stack(alike).cpu()) for kind, alike in kinds.items()}
    return frame.join(next(copies[t.device, t.dtype, t.shape]) for t in tensors)


def one_of(name: str, value: str, allowed: tuple[str, ...]) -> str:
    """The value, if it is allowed."""
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is not allowed; it must be {' or '.join(map(repr, allowed))}")
    return value

"""StatisticsRecorder, CSVLogger: the metrics of each batch or phase, gathered without reading the device."""

import csv
import math
import os
from pathlib import Path
from typing import Any, ClassVar

import torch

from ..collection import on_host
from ..events import Callback, require_one_of, require_whole
from ..learner import Learner


class Rows(Callback):
    """What makes a row of each batch that was scored (`per="batch"`) or of each phase (`per="phase"`, or "epoch", which
    means the same), with the running metrics.

    Nothing is read from the device for a row: what `metrics.peek()` gives is gathered, and `keep(rows)`, which
    subclasses give, gets the numbers of many rows after every few batches, at the end of a phase and before a save.
    """

    cancels = False
    phases: ClassVar[tuple[str, ...]] = ("train", "validation")  # those that have rows

    def __init__(self, per: str, every: int) -> None:
        require_whole("every", every)
        require_one_of("per", per, ("batch", "phase", "epoch"))
        self.every, self.per_batch = every, per == "batch"
        self._learner: Learner | None = None  # while it fits
        self._gathered: list[tuple[dict[str, Any], list[Any]]] = []  # rows, and the sums of the metrics
        self._counted = 0  # how many batches the metrics had counted at the last row

    def more(self, learner: Learner) -> dict[str, Any]:
        """What else a row has; tensors in it are read with the metrics."""
        return {}

    def keep(self, learner: Learner, rows: list[dict[str, Any]]) -> None:
        """Take rows: `{"epoch": 0, "batch": 0, "phase": "train", "loss": 0.69, ...}`."""
        raise NotImplementedError

    def on_fit_start(self, learner: Learner) -> None:
        self._learner, self._gathered = learner, []

    def on_training_start(self, learner: Learner) -> None:
        self._counted = learner.metrics.batches if self.per_batch else 0  # not 0 where a run is resumed

    on_validation_start = on_training_start

    def on_batch_end(self, learner: Learner) -> None:
        if self.per_batch:
            self._gather(learner)

    def on_training_end(self, learner: Learner) -> None:
        if not self.per_batch and learner.error is None:
            self._gather(learner)
        self._flush(learner)

    on_validation_end = on_training_end

    def on_fit_end(self, learner: Learner) -> None:
        self._learner = None

    def state_dict(self) -> dict[str, Any]:
        learner = self._learner
        if learner is not None:
            # A callback that comes before this one may save at an event that this one has not seen yet: the end of a
            # batch, or of a phase.
            due = learner.step.loss is not None
            if not self.per_batch:
                due = learner.phase is not None and learner.progress.within == "epoch"
            if due:
                self._gather(learner)
            self._flush(learner)
        return {}

    def _gather(self, learner: Learner) -> None:
        metrics = learner.metrics
        if learner.phase not in self.phases or metrics.batches == self._counted:
            return  # also a call of `validate`; or cancelled before it was scored, or gathered before
        self._counted = metrics.batches
        place = {"epoch": learner.epoch_index, "batch": learner.batch_index, "phase": learner.phase}
        row = place | self.more(learner)
        self._gathered.append((row, metrics.peek()))
        if len(self._gathered) >= self.every:
            self._flush(learner)

    def _flush(self, learner: Learner) -> None:
        gathered, self._gathered = self._gathered, []
        ranks, metrics = learner.ranks, learner.metrics
        if gathered and not ranks.apart:  # what others have of the last rows is lost with them
            every = zip(*ranks.gather(type(self).__name__, on_host(gathered)), strict=True)
            pairs = [tuple(map(list, zip(*of_all, strict=True))) for of_all in every]
            self.keep(learner, [self.join(rows) | metrics.read(metrics.total(sums)) for rows, sums in pairs])

    def join(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Of a row as each of several processes has it, by rank, one of all of them."""
        return rows[0]


class StatisticsRecorder(Rows):
    """Keeps the metrics of each batch (running values) or, with `per="epoch"`, of each phase, in `records`.

    A record is a dict: epoch, batch, phase ("train" or "validation"), then the metrics by name. A batch that was
    cancelled before it was scored has none. A new fit begins anew; a resumed one goes on, each batch once.
    """

    cancels = False

    def __init__(self, per: str = "batch", every: int = 50) -> None:
        super().__init__(per, every)
        self.records: list[dict[str, Any]] = []

    def values(self, name: str, phase: str = "train") -> list[Any]:
        """One column: the numbers of a metric in training or in validation."""
        require_one_of("phase", phase, ("train", "validation"))
        return [row.get(name, math.nan) for row in self.records if row["phase"] == phase]

    def keep(self, learner: Learner, rows: list[dict[str, Any]]) -> None:
        self.records += rows

    def on_fit_start(self, learner: Learner) -> None:
        super().on_fit_start(learner)
        if not learner.progress.resumed:
            self.records = []

    def state_dict(self) -> dict[str, Any]:
        """By column, as tensors: a file has room for very many, and takes them at once."""
        super().state_dict()
        rows = [row | {"phase": row["phase"] == "train"} for row in self.records]
        names = dict.fromkeys(name for row in rows for name in row)  # a resumed run may have other metrics
        columns = {name: [row.get(name, math.nan) for row in rows] for name in names}
        kinds = {float: torch.float64}  # not the default, which has fewer digits
        return {name: torch.tensor(column, dtype=kinds.get(type(column[0]))) for name, column in columns.items()}

    def load_state_dict(self, d: dict[str, Any]) -> None:
        rows = [dict(zip(d, row, strict=True)) for row in zip(*(column.tolist() for column in d.values()), strict=True)]
        self.records = [row | {"phase": "train" if row["phase"] else "validation"} for row in rows]


class CSVLogger(Rows):
    """Writes a CSV file (RFC 4180): epoch, batch, phase, then the metrics, with their running values.

    One row a batch, or with `per="phase"` one at the end of each; with `seconds=True` how long that took is the last
    column. Epochs and batches count from 0. A batch that was cancelled before it was scored has no row. Rows come into
    the file every few batches (`every`), at the end of a phase and when the run is saved.

    A new logger starts the file anew; later fits with it append, and so does a resumed run, after it has cut off the
    rows that it will write again: each batch is there once.
    """

    cancels = False
    written: ClassVar[set[Path]] = set()  # the files of all fits that run

    def __init__(
        self,
        path: str | os.PathLike[str] = "run/log.csv",
        per: str = "batch",
        every: int = 50,
        *,
        seconds: bool = False,
    ) -> None:
        super().__init__(per, every)
        if seconds and self.per_batch:
            raise ValueError('CSVLogger: seconds=True is for per="phase"')
        self.seconds = seconds
        self.path = Path(path)
        self._file: Any = None
        self._columns: list[str] = []
        self._end: int | None = None  # of what is written; of no file yet

    def on_fit_start(self, learner: Learner) -> None:
        super().on_fit_start(learner)
        if not learner.ranks.first:  # which writes
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        columns = ["epoch", "batch", "phase", *learner.metrics.names, *(["seconds"] if self.seconds else [])]
        if (place := self.path.resolve()) in self.written:
            raise ValueError(f"CSVLogger: {str(self.path)!r} is written by another one: give each its own file")
        if self._columns not in ([], columns) and self.path.exists():
            before, now = ", ".join(self._columns), ", ".join(columns)
            raise ValueError(f"CSVLogger: {str(self.path)!r} has the columns {before}; for {now} give another file")
        self._columns = columns
        self._file = open(self.path, "w" if self._end is None else "a", newline="", encoding="utf-8")  # noqa: SIM115
        self.written.add(place)
        if learner.progress.resumed:  # what the old run wrote after it was saved comes again
            self._file.seek(self._file.truncate(min(self._end or 0, self._file.tell())))
        self._write([] if self._file.tell() else [self._columns])

    def more(self, learner: Learner) -> dict[str, Any]:
        return {"seconds": round(learner.seconds, 3)} if self.seconds else {}

    def keep(self, learner: Learner, rows: list[dict[str, Any]]) -> None:
        if self._file is not None:
            self._write([[row[name] for name in self._columns] for row in rows])

    def _write(self, lines: list[list[Any]]) -> None:
        csv.writer(self._file).writerows(lines)
        self._file.flush()
        self._end = self._file.tell()

    def on_fit_end(self, learner: Learner) -> None:
        super().on_fit_end(learner)
        if self._file is not None:
            self._file.close()
            self._file = None  # so that this can be copied
            self.written.discard(self.path.resolve())

    def state_dict(self) -> dict[str, Any]:
        super().state_dict()
        return {"end": self._end, "columns": self._columns}

    def load_state_dict(self, d: dict[str, Any]) -> None:
        self._end = d["end"]
        if self._file is None:  # otherwise this fit has begun with its own
            self._columns = d.get("columns", [])  # older files do not say

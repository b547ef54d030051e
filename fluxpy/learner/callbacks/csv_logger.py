"""CSVLogger: the metrics as a table in a file."""

import csv
import os
from pathlib import Path
from typing import Any

from ..learner import Learner
from .statistics import Rows


class CSVLogger(Rows):
    """Writes a CSV file (RFC 4180): epoch, batch, phase, then the metrics, with their running values.

    One row a batch, or with `per="phase"` one at the end of each; with `seconds=True` how long that took is the last
    column. Epochs and batches count from 0. A batch that was cancelled before it was scored has no row. Rows come into
    the file every few batches (`every`), at the end of a phase and when the run is saved.

    A new logger starts the file anew; later fits with it append, and so does a resumed run, after it has cut off the
    rows that it will write again: each batch is there once.
    """

    cancels = False

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
        self._file = open(self.path, "w" if self._end is None else "a", newline="", encoding="utf-8")  # noqa: SIM115
        if learner.progress.resumed:  # what the old run wrote after it was saved comes again
            self._file.seek(self._file.truncate(min(self._end or 0, self._file.tell())))
        self._columns = ["epoch", "batch", "phase", *learner.metrics.names, *(["seconds"] if self.seconds else [])]
        self._write([] if self._file.tell() else [self._columns])

    def more(self, learner: Learner) -> dict[str, Any]:
        return {"seconds": round(learner.seconds, 3)} if self.seconds else {}

    def keep(self, rows: list[dict[str, Any]]) -> None:
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

    def state_dict(self) -> dict[str, Any]:
        super().state_dict()
        return {"end": self._end}

    def load_state_dict(self, d: dict[str, Any]) -> None:
        self._end = d["end"]

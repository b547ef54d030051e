"""ProgressBar: a line for each phase."""

import math
import os
import sys
import time
from typing import Any, TextIO

from tqdm.auto import tqdm

from ..events import Callback


class ProgressBar(Callback):
    """Shows how a fit gets on, one line a phase, updated in place:

        Epoch 3/12 · train 468/468 [====================] loss 0.4819 accuracy 0.8513

    meanwhile with the pace and the time left. It is redrawn every 0.1 s at most, and only then are the metrics read.
    Where the output is not a terminal (a pipe, a file) a plain line comes at the end of each phase; in notebooks it is
    tqdm's bar. It goes to stderr, or to `file`.
    """

    def __init__(self, file: TextIO | None = None, every: float = 0.1) -> None:
        self.file, self.every = file, every
        self._next = math.inf  # when to draw again
        self._begun = self._first = self._done = self._width = 0
        self._bar: Any = None  # in a notebook

    def on_training_start(self, learner: Any) -> None:
        self._out = out = self.file or sys.stderr
        self._terminal = out is not None and out.isatty()
        self._begun, self._first, self._width = time.monotonic(), learner.batch_index, 0
        self._done, self._next, self._bar = self._first, math.inf, None
        if self.file is None and "ipykernel" in sys.modules:
            self._bar = tqdm(desc=_title(learner), total=learner.batch_count, initial=self._first, unit="batch")
        if self._bar is not None or self._terminal:
            self._draw(learner, learner.running())

    on_validation_start = on_training_start

    def on_batch_end(self, learner: Any) -> None:
        self._done = learner.batch_index + 1
        if time.monotonic() >= self._next:
            self._draw(learner, learner.running())

    def on_training_end(self, learner: Any) -> None:
        if self._bar is not None:
            self._draw(learner, learner.stats)
            self._bar.close()
        elif self._terminal:
            self._draw(learner, learner.stats, last=True)
            print(file=self._out, flush=True)
        elif self._out is not None:
            print(self._line(learner, learner.stats, cells=4), file=self._out, flush=True)

    on_validation_end = on_training_end

    def _draw(self, learner: Any, numbers: dict[str, float], last: bool = False) -> None:
        """Put the present line in place of the one before."""
        if self._bar is not None:
            self._bar.n = self._done
            self._bar.set_postfix_str(_numbers(numbers))
        else:
            columns = _columns(self._out) - 1  # a full line would wrap
            pace = "" if last else self._pace(learner.batch_count)
            tries = ((20, pace), (4, pace), (4, ""), (0, ""))
            lines = [self._line(learner, numbers, cells, pace) for cells, pace in tries]
            line = next((line for line in lines if len(line) <= columns), lines[-1][:columns])
            self._out.write("\r" + line.ljust(min(self._width, columns)))
            self._out.flush()
            self._width = len(line)
        self._next = time.monotonic() + self.every

    def _line(self, learner: Any, numbers: dict[str, float], cells: int, pace: str = "") -> str:
        total, done = learner.batch_count, self._done
        parts = [f"{_title(learner)} {done}" + (f"/{total}" if total else "")]
        if total and cells:
            full = min(cells, cells * done // total)
            parts.append(f"[{'=' * full + '>' * (full < cells):.<{cells}}]")
        line = " ".join(filter(None, [*parts, _numbers(numbers), pace]))
        code = self._out.encoding or "utf-8"
        return line if line.encode(code, "replace").decode(code) == line else line.replace("·", "-")

    def _pace(self, total: int | None) -> str:
        batches, seconds = self._done - self._first, time.monotonic() - self._begun
        if not batches:
            return ""
        rate = batches / max(seconds, 1e-9)
        pace = f"· {rate:.0f} batches/s" if rate >= 10 else f"· {1 / rate:.2g} s/batch"
        return pace + (f" · {tqdm.format_interval(max(0, total - self._done) / rate)} left" if total else "")


def _title(learner: Any) -> str:
    phase = "train" if learner.training else "validation"
    return f"Epoch {learner.epoch_index + 1}/{learner.epoch_count} · {phase}" if learner.fitting else phase.capitalize()


def _numbers(numbers: dict[str, float]) -> str:
    return " ".join(
        f"{name} {x:.4f}" if x == 0 or 1e-3 <= abs(x) < 1e5 else f"{name} {x:.4g}" for name, x in numbers.items()
    )


def _columns(out: Any) -> int:
    try:
        return os.get_terminal_size(out.fileno()).columns or 80
    except (AttributeError, OSError, ValueError):  # no descriptor behind it
        return 80

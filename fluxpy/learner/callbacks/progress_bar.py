"""ProgressBar: a line for each phase."""

import math
import os
import sys
import time
from typing import TYPE_CHECKING, Any, TextIO

from tqdm.auto import tqdm

from ..events import Callback

if TYPE_CHECKING:
    from ..learner import Learner  # which has a ProgressBar by default


class ProgressBar(Callback):
    """Shows how a fit gets on, one line a phase, updated in place:

        Epoch 3/12 · train 468/468 [====================] loss 0.4819 accuracy 0.8513

    meanwhile with the pace and the time left. It is redrawn every 0.1 s at most (`seconds`), and only then are the
    metrics read. Where the output is not a terminal (a pipe, a file) a plain line comes at the end of each phase; in
    notebooks it is tqdm's bar. It goes to stderr, or to `file`.
    """

    def __init__(self, file: TextIO | None = None, seconds: float = 0.1) -> None:
        self.file, self.seconds = file, seconds
        self._out: Any = None  # where the present phase is shown
        self._terminal = False
        self._bar: Any = None  # in a notebook
        self._draw_at = math.inf  # when to draw again
        self._started = 0.0
        self._first = 0  # batches that were done when it started
        self._done = 0
        self._width = 0  # of what is drawn

    def on_training_start(self, learner: "Learner") -> None:
        self._out = self.file or sys.stderr
        self._terminal = self._out is not None and self._out.isatty()
        self._started, self._width, self._draw_at, self._bar = time.monotonic(), 0, math.inf, None
        self._first = self._done = learner.progress.batch if learner.phase else 0
        if self.file is None and "ipykernel" in sys.modules:
            self._bar = tqdm(desc=_title(learner), total=learner.batch_count, initial=self._first, unit="batch")
        if self._bar is not None or self._terminal:
            self._draw(learner, learner.running())

    on_validation_start = on_training_start

    def on_batch_end(self, learner: "Learner") -> None:
        self._done = learner.batch_index + 1
        if time.monotonic() >= self._draw_at:
            self._draw(learner, learner.running())

    def on_training_end(self, learner: "Learner") -> None:
        if self._bar is not None:
            self._draw(learner, learner.stats)
            self._bar.close()
        elif self._terminal:
            self._draw(learner, learner.stats, last=True)
            print(file=self._out, flush=True)
        elif self._out is not None:
            print(self._line(learner, learner.stats, cells=4), file=self._out, flush=True)

    on_validation_end = on_training_end

    def _draw(self, learner: "Learner", numbers: dict[str, float], last: bool = False) -> None:
        """Put the present line in place of the one before."""
        if self._bar is not None:
            self._bar.n = self._done
            self._bar.set_postfix_str(_text(numbers))
        else:
            columns = _columns(self._out) - 1  # a full line would wrap
            pace = "" if last else self._pace(learner.batch_count)
            tries = ((20, pace), (4, pace), (4, ""), (0, ""))
            lines = [self._line(learner, numbers, cells, pace) for cells, pace in tries]
            line = next((line for line in lines if len(line) <= columns), lines[-1][:columns])
            self._out.write("\r" + line.ljust(min(self._width, columns)))
            self._out.flush()
            self._width = len(line)
        self._draw_at = time.monotonic() + self.seconds

    def _line(self, learner: "Learner", numbers: dict[str, float], cells: int, pace: str = "") -> str:
        total, done = learner.batch_count, self._done
        parts = [f"{_title(learner)} {done}" + (f"/{total}" if total else "")]
        if total and cells:
            parts.append(_bar(cells, min(cells, cells * done // total)))
        parts += [_text(numbers), pace]
        line = " ".join(part for part in parts if part)
        code = self._out.encoding or "utf-8"
        return line if line.encode(code, "replace").decode(code) == line else line.replace("·", "-")

    def _pace(self, total: int | None) -> str:
        batches, seconds = self._done - self._first, time.monotonic() - self._started
        if not batches:
            return ""
        rate = batches / max(seconds, 1e-9)
        pace = f"· {rate:.0f} batches/s" if rate >= 10 else f"· {1 / rate:.2g} s/batch"
        return pace + (f" · {tqdm.format_interval(max(0, total - self._done) / rate)} left" if total else "")


def _title(learner: "Learner") -> str:
    phase = "train" if learner.training else "validation"
    return f"Epoch {learner.epoch_index + 1}/{learner.epoch_count} · {phase}" if learner.fitting else phase.capitalize()


def _bar(cells: int, full: int) -> str:
    bar = "=" * cells if full == cells else "=" * full + ">"
    return f"[{bar.ljust(cells, '.')}]"


def _text(numbers: dict[str, float]) -> str:
    return " ".join(f"{name} {_number(x)}" for name, x in numbers.items())


def _number(x: float) -> str:
    return f"{x:.4f}" if x == 0 or 1e-3 <= abs(x) < 1e5 else f"{x:.4g}"


def _columns(out: Any) -> int:
    try:
        return os.get_terminal_size(out.fileno()).columns or 80
    except (AttributeError, OSError, ValueError):  # no descriptor behind it
        return 80

"""ProgressBar: a line for each phase."""

import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from typing import TYPE_CHECKING, Any, TextIO

from tqdm.auto import tqdm

from ..core import is_terminal
from ..events import Callback

if TYPE_CHECKING:
    from ..learner import Learner  # which has a ProgressBar by default


class ProgressBar(Callback):
    """Shows how a fit gets on, one line a phase, updated in place:

        Epoch 3/12 · train 468/468 [====================] loss 0.4819 accuracy 0.8513 · 5.2 s

    meanwhile with the pace and the time left. It is redrawn every 0.1 s at most (`seconds`), and only then are the
    metrics read. In a narrow terminal the bar goes first, then names are cut, then pace and title; no number is. What
    is printed meanwhile has lines of its own. Where the output is not a terminal (a pipe, a file) a plain line comes at
    the end of each phase; a notebook has one bar of tqdm for the fit. It goes to stderr, or to `file`.
    """

    cancels = False

    def __init__(self, file: TextIO | None = None, seconds: float = 0.1) -> None:
        self.file, self.seconds = file, seconds
        self._out: Any = None  # where the present phase is shown
        self._terminal = False
        self._guards = ExitStack()  # of what stands for sys.stdout and sys.stderr while a line is drawn
        self._bar: Any = None  # in a notebook, of the whole fit
        self._draw_at = math.inf  # when to draw again
        self._started = 0.0
        self._first = 0  # batches that were done when it started
        self._done = 0
        self._width = 0  # of what is drawn
        self._in_line = False  # whether what others wrote since has not ended its line

    def on_training_start(self, learner: "Learner") -> None:
        self._out = (self.file or sys.stderr) if learner.ranks.first else None
        self._terminal = is_terminal(self._out)
        self._started, self._width, self._in_line, self._draw_at = time.monotonic(), 0, False, math.inf
        self._first = self._done = learner.progress.batch if learner.phase else 0
        if self._out is not None and self.file is None and "ipykernel" in sys.modules and self._bar is None:
            total, done = (learner.step_count, learner.progress.step) if learner.fitting else (learner.batch_count, 0)
            self._bar = tqdm(desc=_title(learner), total=total, initial=done, unit="batch")
        if self._bar is None and self._terminal:
            self._guard()
        if self._bar is not None or self._terminal:
            self._draw(learner)

    on_validation_start = on_training_start

    def on_batch_end(self, learner: "Learner") -> None:
        self._done = learner.batch_index + 1
        if time.monotonic() >= self._draw_at:
            self._draw(learner)

    def on_training_end(self, learner: "Learner") -> None:
        if self._bar is not None:
            self._draw(learner, last=True)
            if not learner.fitting:
                self._close()
        elif self._terminal:
            try:
                self._draw(learner, last=True)
            finally:
                self._guards.close()
            print(file=self._out, flush=True)
        elif self._out is not None:
            print(self._line(learner, learner.stats, cells=4), file=self._out, flush=True)
        self._out = None  # so that this can be copied

    on_validation_end = on_training_end

    def on_fit_end(self, learner: "Learner") -> None:
        if self._bar is not None:
            self._close()

    def _close(self) -> None:
        self._bar.close()
        self._bar = None

    def _draw(self, learner: "Learner", last: bool = False) -> None:
        """Put the present line in place of the one before, with the numbers so far. Of several processes those are of
        this one, which can tell them without the others."""
        numbers = learner.stats if last else learner.running() if learner.ranks.alone else learner.metrics.here()
        if self._bar is not None:
            self._bar.n = learner.progress.step if learner.fitting else self._done
            self._bar.set_description_str(_title(learner), refresh=False)
            self._bar.set_postfix_str(_text(numbers))
        else:
            columns = _columns(self._out) - 1  # a full line would wrap
            lines = list(self._tries(learner, numbers, last))
            line = next((line for line in lines if len(line) <= columns), lines[-1][:columns])
            start = "\n" if self._in_line else "\r"
            self._out.write(start + line.ljust(min(self._width, columns)))
            self._out.flush()
            self._width, self._in_line = len(line), False
        self._draw_at = time.monotonic() + self.seconds

    def _tries(self, learner: "Learner", numbers: dict[str, float], last: bool) -> Iterator[str]:
        """The line in more and more narrow forms."""
        long, short = [_seconds(learner.seconds)] * 2 if last else self._pace(learner.batch_count)
        for cells, end in ((20, long), (4, long), (4, short), (0, short)):
            yield self._line(learner, numbers, cells, end)
        for end, widths in ((short, () if last else (8, 4, 2)), ("", (99, 8, 4, 2))):
            for width in widths:
                yield self._line(learner, numbers, 0, end, width)
        yield _text(numbers, 2)
        yield " ".join(map(_number, numbers.values()))

    def _line(self, learner: "Learner", numbers: dict[str, float], cells: int, end: str = "", width: int = 99) -> str:
        total, done = learner.batch_count, self._done
        parts = [f"{_title(learner)} {done}" + (f"/{total}" if total else "")]
        if total and cells:
            full = min(cells, cells * done // total)
            parts.append(f"[{('=' * full + '>' * (full < cells)).ljust(cells, '.')}]")
        parts += [_text(numbers, width), end]
        line = " ".join(part for part in parts if part)
        code = getattr(self._out, "encoding", None) or "utf-8"
        return line if line.encode(code, "replace").decode(code) == line else line.replace("·", "-").replace("…", ".")

    def _pace(self, total: int | None) -> tuple[str, str]:
        """The pace and the time left, in words and short."""
        batches, seconds = self._done - self._first, time.monotonic() - self._started
        if not batches:
            return "", ""
        rate = batches / max(seconds, 1e-9)
        left = f" · {tqdm.format_interval(max(0, total - self._done) / rate)} left" if total else ""
        slow = f"{1 / rate:.2g} s/batch"
        long, short = (slow, slow) if rate < 10 else (f"{rate:.0f} batches/s", f"{rate:.0f}/s")
        return f"· {long}{left}", f"· {short}{left}"

    # --- What others print --------------------------------------------------------------------------------------------

    def _guard(self) -> None:
        for redirect, stream in ((redirect_stdout, sys.stdout), (redirect_stderr, sys.stderr)):
            if is_terminal(stream):
                guard: Any = _Guard(stream, self._make_way)
                self._guards.enter_context(redirect(guard))

    def _make_way(self, text: str) -> None:
        """End the line that is drawn, before somebody else writes."""
        if self._width:
            self._out.write("\n")
            self._out.flush()
            self._width = 0
        self._in_line = not text.endswith("\n")


class _Guard:
    """A stream that says what it will write."""

    def __init__(self, stream: Any, say: Callable[[str], None]) -> None:
        self.stream, self._say = stream, say

    def write(self, text: str) -> int:
        if text:
            self._say(text)
        return self.stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def _title(learner: "Learner") -> str:
    phase = "train" if learner.training else "validation"
    return f"Epoch {learner.epoch_index + 1}/{learner.epoch_count} · {phase}" if learner.fitting else phase.capitalize()


def _text(numbers: dict[str, float], width: int = 99) -> str:
    """Names and numbers; longer names are cut."""
    cut = {name: name if len(name) <= width else name[: width - 1] + "…" for name in numbers}
    return " ".join(f"{cut[name]} {_number(x)}" for name, x in numbers.items())


def _number(x: float) -> str:
    return f"{x:.4f}" if x == 0 or 1e-3 <= abs(x) < 1e5 else f"{x:.4g}"


def _seconds(seconds: float) -> str:
    return f"· {seconds:.1f} s" if seconds < 60 else f"· {tqdm.format_interval(seconds)}"


def _columns(out: Any) -> int:
    try:
        return os.get_terminal_size(out.fileno()).columns or 80
    except (AttributeError, OSError, ValueError):  # no descriptor behind it
        return 80

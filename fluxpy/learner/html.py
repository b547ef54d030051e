"""What a notebook shows of a Learner and of a history."""

import html
from collections.abc import Sequence
from typing import Any

from .. import summary
from .core import State, html_table, tree_as_html


def history_as_html(rows: Sequence[dict[str, Any]], stop_reason: str | None) -> str:
    """A table with a row for each epoch, and a column for each metric of each phase."""
    phases = ("train", "validation")
    columns = dict.fromkeys((phase, name) for phase in phases for row in rows for name in row.get(phase, ()))
    header = ["epoch", *(f"{phase} {name}" for phase, name in columns)]
    body = [[row["epoch"], *(_number(row.get(phase, {}).get(name)) for phase, name in columns)] for row in rows]
    return html_table(header, body, "" if stop_reason is None else f"ended early: {stop_reason}")


def learner_as_html(learner: Any) -> str:
    """What it trains and with what, its state as a folded tree, and its history."""
    acting = ", ".join(getattr(c, "__name__", type(c).__name__) for c in learner.callbacks)
    loss = getattr(learner.loss, "__name__", type(learner.loss).__name__)
    about = [
        ("model", type(learner.model).__name__),
        ("loss", loss),
        ("metrics", ", ".join(learner.metrics.names)),
        ("callbacks", acting or "none"),
        ("epochs done", learner.progress.epoch),
    ]
    state = learner.state
    shown = tree_as_html(state) if isinstance(state, State) else f"<pre>{html.escape(summary(state))}</pre>"
    past = history_as_html(learner.history, learner.history.stop_reason) if learner.history else ""
    return html_table(["Learner", ""], about) + shown + past


def _number(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else "" if value is None else str(value)

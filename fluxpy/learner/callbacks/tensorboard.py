"""TensorBoardLogger: a run as charts."""

import json
import os
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from ...rule import hyperparameters, walk
from ...state import fit_of, leaves, spec_of
from ...update import in_order
from ..events import Callback
from .statistics import on_host


class TensorBoardLogger(Callback):
    """Writes what TensorBoard shows, under `path/<time stamp>/train` and `/validation`; the same tags in both, so that
    training and validation share a chart.

    `epoch/<metric>` by epoch; `batch/loss` of each training batch, and `batch/<metric>` over its epoch so far;
    `lr/<subtree>` where it changed; the hyperparameters; rules, model and `config` (text or a mapping) as text. On
    request every so many batches `gradient_norm/<subtree>` and `update_ratio/<subtree>`, the norm of the update over
    that of the weights (`norms=100`), and every so many epochs histograms of the weights (`histograms=1`). Subtrees
    are told apart by the first `depth` parts of their paths. `hyperparameters` are those of yours.

    Numbers are gathered on the device and written every `every` batches, and at the end of a phase. Each fit has a
    directory of its own; a resumed one goes on in that where it was.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] = "run/tensorboard/stats",
        *,
        hyperparameters: Mapping[str, Any] | None = None,
        config: Any = None,
        norms: int = 0,
        histograms: int = 0,
        depth: int = 1,
        every: int = 50,
    ) -> None:
        self.path, self.config, self.hyperparameters = Path(path), config, dict(hyperparameters or {})
        self.norms, self.histograms, self.depth, self.every = norms, histograms, depth, every
        self.directory: Path | None = None  # that of the present run
        self._resumed = False
        self._learner: Any = None  # while it fits
        self._writers: dict[str, Any] = {}
        self._gathered: list[tuple[int, float, Any]] = []
        self._counted, self._before, self._extras = 0, list[Tensor](), dict[str, Any]()
        self._session: list[Any] = []  # hyperparameters, and that the run ended
        self._leaves: dict[str, Any] = {}
        self._known: Any = None  # rules and frozenness of the leaves, as they were when this was worked out:
        self._rates: list[tuple[str, Any, Any]] = []  # name, rate and a leaf of each subtree
        self._rates_written: dict[str, float] = {}

    def on_fit_start(self, learner: Any) -> None:
        if not (self._resumed and self.directory):
            stamp = time.strftime("%Y-%m-%d_%H-%M-%S")
            names = (stamp, *(f"{stamp}-{n}" for n in range(2, 1000)))  # fits may begin in the same second
            self.directory = next(self.path / name for name in names if not (self.path / name).exists())
        self._learner, self._gathered, self._rates_written, self._extras = learner, [], {}, {}
        self._leaves, self._known = dict(leaves(learner.state)), None
        # What the old run wrote after it was saved is not shown.
        at = learner._at
        self._purge = {"train": at.step, "validation": at.epoch} if self._resumed else {}
        groups: dict[str, list[int]] = defaultdict(list)
        for place, path in enumerate(spec_of(learner.state).unique.values()):
            groups[self._subtree(path)].append(place)
        self._subtrees = dict(groups)
        if not self._resumed:
            self._describe(learner, self._writer("train"))

    def on_training_start(self, learner: Any) -> None:
        self._counted = learner.metrics.batches  # not 0 where a run is resumed

    def on_update_start(self, learner: Any) -> None:
        if self.norms and learner.step_index % self.norms == 0:
            grads = in_order(fit_of(learner.state, learner.model), learner.step.grads)
            self._before = [x.detach().clone() for x in self._params(learner)]
            self._extras = {
                f"gradient_norm/{name}": _norm([grads[i] for i in at]) for name, at in self._subtrees.items()
            }

    def on_batch_end(self, learner: Any) -> None:
        if not learner.training or learner.metrics.batches == self._counted:
            return  # cancelled before it was scored
        self._counted = learner.metrics.batches
        extras, self._extras = self._extras, {}
        if self._before:
            for name, places in self._subtrees.items():
                now, old = self._params(learner), self._before
                moved = _norm([now[i].detach() - old[i] for i in places])
                extras[f"update_ratio/{name}"] = moved / _norm([old[i] for i in places])
            self._before = []
        rates = {tag: rate for tag, rate in self._present_rates() if self._rates_written.get(tag) != rate}
        self._rates_written |= rates
        row = learner.step.loss.detach(), learner.metrics.peek(), extras | rates
        self._gathered.append((learner.step_index, time.time(), row))
        if len(self._gathered) >= self.every:
            self._flush()

    def on_training_end(self, learner: Any) -> None:
        self._flush()
        if learner._at.phase == "validation" and learner.error is None:  # not one that was cut and will go on
            self._epoch("train", learner)
            if self.histograms and learner.epoch_index % self.histograms == 0:
                for path, x in zip(spec_of(learner.state).unique.values(), self._params(learner), strict=True):
                    if (finite := x.detach()[x.isfinite()]).numel() and not x.is_complex():
                        self._writers["train"].add_histogram(f"weights/{path}", finite, learner.epoch_index)

    def on_validation_end(self, learner: Any) -> None:
        if self._learner is not None and learner._at.phase == "validation" and learner.error is None:
            self._epoch("validation", learner)

    def on_fit_end(self, learner: Any) -> None:
        if self._learner is not None:
            if learner.error is None and self._session and not self._resumed:
                self._writers["train"].file_writer.add_summary(self._session[1])
            for writer in self._writers.values():
                writer.close()
        self._learner, self._writers, self._resumed = None, {}, False

    def state_dict(self) -> dict[str, Any]:
        self._flush()
        return {"directory": None if self.directory is None else str(self.directory)}

    def load_state_dict(self, d: dict[str, Any]) -> None:
        self.directory = None if d["directory"] is None else Path(d["directory"])
        self._resumed = self.directory is not None

    def _flush(self) -> None:
        gathered, self._gathered = self._gathered, []
        rows = on_host([row for _, _, row in gathered])
        for (step, moment, _), (loss, sums, extras) in zip(gathered, rows, strict=True):
            numbers = {f"batch/{name}": v for name, v in self._learner.metrics.read(sums).items()}
            for tag, number in (numbers | {"batch/loss": loss} | extras).items():
                self._writer("train").add_scalar(tag, float(number), step, moment)

    def _epoch(self, phase: str, learner: Any) -> None:
        for name, number in learner.stats.items():
            self._writer(phase).add_scalar(f"epoch/{name}", number, learner.epoch_index)

    def _writer(self, phase: str) -> Any:
        if phase not in self._writers:
            from torch.utils.tensorboard import SummaryWriter

            assert self.directory is not None
            self._writers[phase] = SummaryWriter(str(self.directory / phase), purge_step=self._purge.get(phase))
        return self._writers[phase]

    def _describe(self, learner: Any, writer: Any) -> None:
        from torch.utils.tensorboard.summary import hparams

        rules = [leaf.rule for _, leaf in leaves(learner.state) if leaf.rule is not None]
        found: dict[str, dict[Any, None]] = defaultdict(dict)
        for rule in (inner for whole in rules for inner in walk(whole)):
            for name, value in hyperparameters(rule).items():
                found[f"{type(rule).__name__}.{name}"][_plain(value)] = None
        numbers = {name: next(iter(v)) if len(v) == 1 else ", ".join(map(str, v)) for name, v in found.items()}
        loss = getattr(learner.loss, "__name__", type(learner.loss).__name__)
        numbers |= {"loss": loss, "epochs": learner.epoch_count}
        numbers |= {name: _plain(value) for name, value in self.hyperparameters.items()}
        start, *self._session = hparams(numbers, {f"epoch/{name}": 0 for name in learner.metrics.names})
        writer.file_writer.add_summary(start)
        writer.file_writer.add_summary(self._session[0])
        texts = {"config": self.config, "model": repr(learner.model), "state": repr(learner.state)}
        for tag, text in texts.items():
            if text is not None:
                text = text if isinstance(text, str) else json.dumps(text, indent=2, default=str)
                writer.add_text(tag, "    " + text.replace("\n", "\n    "))  # as code in Markdown

    def _present_rates(self) -> list[tuple[str, float]]:
        """The learning rate of each subtree, or of each leaf in it where they differ."""
        key = [(leaf._rule, leaf._frozen) for leaf in self._leaves.values()]
        known = self._known
        if known is None or any(a is not c or b is not d for (a, b), (c, d) in zip(key, known, strict=True)):
            groups: dict[str, list[tuple[str, Any, Any]]] = defaultdict(list)
            for path, leaf in self._leaves.items():
                own = [hyperparameters(rule) for rule in walk(leaf.rule)] if leaf.rule and not leaf.frozen else []
                if rates := [values["lr"] for values in own if "lr" in values]:
                    groups[self._subtree(path)].append((path, rates[-1], leaf))
            self._known, self._rates = key, []
            for name, held in groups.items():
                _, first, leaf = held[0]
                alike = all(rate is first or rate == first for _, rate, _ in held)
                self._rates += [(name, first, leaf)] if alike else held
        # After the update: the rate it used is that of the count before.
        now = [(name, rate(max(leaf._count - 1, 0)) if callable(rate) else rate) for name, rate, leaf in self._rates]
        return [(f"lr/{name}", float(cast(Any, rate))) for name, rate in now]

    def _subtree(self, path: str) -> str:
        return ".".join(path.split(".")[: self.depth]) or "model"

    def _params(self, learner: Any) -> list[Tensor]:
        return fit_of(learner.state, learner.model).params


def _norm(tensors: list[Any]) -> Tensor:
    """The norm of all of them together, not read from the device."""
    norms = [torch.linalg.vector_norm(t.detach()).float() for t in tensors if t is not None]
    return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())


def _plain(value: Any) -> Any:
    """As TensorBoard takes a hyperparameter."""
    return value if type(value) in (bool, int, float, str) else float(value) if isinstance(value, float) else str(value)

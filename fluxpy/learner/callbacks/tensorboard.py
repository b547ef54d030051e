"""TensorBoardLogger: a run as charts."""

import json
import os
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ... import leaves
from ..core import Leaf, bind, hyperparameters, in_order, rates, rules_in, whole_tensor
from ..events import name_of
from ..learner import Learner
from .records import Rows


class TensorBoardLogger(Rows):
    """Writes what TensorBoard shows, under `path/<time stamp>/train` and `/validation`; the same tags in both, so that
    training and validation share a chart.

    `epoch/<metric>` by epoch; `batch/loss` of each training batch, and `batch/<metric>` over its epoch so far;
    `lr/<subtree>` where it changed; the hyperparameters; rules, model and `config` (text or a mapping) as text. On
    request every so many batches `gradient_norm/<subtree>` and `update_ratio/<subtree>`, the norm of the update over
    that of the weights (`norms=100`), and every so many epochs histograms of the weights (`histograms=1`).

    Subtrees are modules, told apart by the first `depth` parts of their paths: `depth=3` is one chart for each
    `encoder.layer.0`. Where rates differ within one, its parts have charts of their own, as deep as they must. Of a
    hyperparameter that differs between subtrees HPARAMS has a column for each. `hyperparameters` are yours.

    Numbers are gathered on the device and written every `every` batches, and at the end of a phase. Each fit has a
    directory of its own; a resumed one goes on in that where it was.
    """

    cancels = False
    phases = ("train",)

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
        super().__init__("batch", every)
        self.path, self.config, self.hyperparameters = Path(path), config, dict(hyperparameters or {})
        self.norms, self.histograms, self.depth = norms, histograms, depth
        self.directory: Path | None = None  # that of the present run
        self._writers: dict[str, Any] = {}
        self._purge: dict[str, int] = {}  # from where on what is in the files already is not shown
        self._session_end: Any = None  # the record that the run ended
        self._subtrees: dict[str, list[int]] = {}  # the places of their parameters
        self._before: list[Tensor] = []  # the weights before an update whose norm is wanted
        self._norms: dict[str, Tensor] = {}
        self._rates = Rates(depth)

    def on_fit_start(self, learner: Learner) -> None:
        super().on_fit_start(learner)
        goes_on = learner.progress.resumed and self.directory is not None
        if learner.ranks.first and not goes_on:
            stamp = time.strftime("%Y-%m-%d_%H-%M-%S")
            names = (stamp, *(f"{stamp}-{n}" for n in range(2, 1000)))  # fits may begin in the same second
            self.directory = next(self.path / name for name in names if not (self.path / name).exists())
        self._rates, self._purge = Rates(self.depth), {}
        self._subtrees = defaultdict(list)
        for place, (path, _) in enumerate(leaves(learner.state)):
            self._subtrees[_subtree(path, self.depth)].append(place)
        if goes_on:  # what the old run wrote after it was saved is not shown
            self._purge = {"train": learner.progress.step, "validation": learner.progress.epoch}
        elif learner.ranks.first:
            self._describe(learner, self._writer("train"))

    def on_update_start(self, learner: Learner) -> None:
        self._before, self._norms = [], {}
        if self.norms and learner.step_index % self.norms < learner.accumulate:
            grads = in_order(bind(learner.state, learner.model), learner.step.grads)
            self._before = [x.detach().clone() for x in bind(learner.state, learner.model).params]
            for name, places in self._subtrees.items():
                self._norms[f"gradient_norm/{name}"] = _norm([grads[i] for i in places])

    def more(self, learner: Learner) -> dict[str, Any]:
        now, old = bind(learner.state, learner.model).params, self._before
        for name, places in self._subtrees.items() if old else ():
            moved = _norm([now[i].detach() - old[i] for i in places])
            self._norms[f"update_ratio/{name}"] = moved / _norm([old[i] for i in places])
        self._before = []
        tags = {"batch/loss": learner.step.loss.detach(), **self._norms, **self._rates.changed(learner.state)}
        self._norms = {}
        return {"tensorboard": (learner.step_index, time.time(), tags, learner.step.samples)}

    def join(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        step, moment, tags, _ = rows[0]["tensorboard"]
        pairs = [(float(tags["batch/loss"]), samples) for *_, tags, samples in (row["tensorboard"] for row in rows)]
        samples = sum(n for _, n in pairs)
        mean = sum(loss * n for loss, n in pairs) / max(samples, 1)
        return rows[0] | {"tensorboard": (step, moment, tags | {"batch/loss": mean}, samples)}

    def keep(self, learner: Learner, rows: list[dict[str, Any]]) -> None:
        for row in rows if learner.ranks.first else ():
            step, moment, tags, _ = row["tensorboard"]
            for tag, number in ({f"batch/{name}": row[name] for name in learner.metrics.names} | tags).items():
                self._writer("train").add_scalar(tag, float(number), step, moment)

    def on_training_end(self, learner: Learner) -> None:
        super().on_training_end(learner)
        if learner.progress.phase == "validation" and learner.error is None:  # not one that was cut and will go on
            self._epoch("train", learner)
            if self.histograms and learner.epoch_index % self.histograms == 0:
                self._write_histograms(learner)

    def on_validation_end(self, learner: Learner) -> None:
        if learner.phase is not None and learner.error is None:
            self._epoch("validation", learner)

    def on_fit_end(self, learner: Learner) -> None:
        super().on_fit_end(learner)
        if self._session_end is not None and learner.error is None:
            self._writer("train").file_writer.add_summary(self._session_end)
        for writer in self._writers.values():
            writer.close()
        self._writers, self._session_end = {}, None

    def state_dict(self) -> dict[str, Any]:
        super().state_dict()
        return {"directory": None if self.directory is None else str(self.directory)}

    def load_state_dict(self, d: dict[str, Any]) -> None:
        self.directory = None if d["directory"] is None else Path(d["directory"])

    def _write_histograms(self, learner: Learner) -> None:
        for (path, _), x in zip(leaves(learner.state), bind(learner.state, learner.model).params, strict=True):
            weights = learner.ranks.whole(x.detach())
            finite = weights[weights.isfinite()]
            if learner.ranks.first and finite.numel() and not x.is_complex():
                self._writer("train").add_histogram(f"weights/{path}", finite, learner.epoch_index)

    def _epoch(self, phase: str, learner: Learner) -> None:
        for name, number in learner.stats.items() if learner.ranks.first else ():
            self._writer(phase).add_scalar(f"epoch/{name}", number, learner.epoch_index)

    def _writer(self, phase: str) -> Any:
        if phase not in self._writers:
            from torch.utils.tensorboard import SummaryWriter

            assert self.directory is not None
            self._writers[phase] = SummaryWriter(str(self.directory / phase), purge_step=self._purge.get(phase))
        return self._writers[phase]

    def _describe(self, learner: Learner, writer: Any) -> None:
        from torch.utils.tensorboard.summary import hparams

        found: dict[str, dict[str, Any]] = defaultdict(dict)  # the value at each path
        for path, leaf in leaves(learner.state):
            for place, rule in enumerate(rules_in(leaf.rule) if leaf.rule is not None else ()):
                for name, value in hyperparameters(rule).items():
                    key = f"{type(rule).__name__}.{name}"
                    key = key if path not in found[key] else f"[{place}]{key}"
                    found[key][path] = _plain(value)
        numbers = {
            f"{name}/{subtree}" if subtree else name: next(iter(values.values()))
            for name, by_path in found.items()
            for subtree, values in alike(by_path, 0).items()
        }
        numbers |= {"loss": name_of(learner.loss), "epochs": learner.epoch_count}
        numbers |= {name: _plain(value) for name, value in self.hyperparameters.items()}
        metrics = {f"epoch/{name}": 0 for name in learner.metrics.names}
        experiment, session_start, self._session_end = hparams(numbers, metrics)
        writer.file_writer.add_summary(experiment)
        writer.file_writer.add_summary(session_start)
        texts = {"config": self.config, "model": repr(learner.model), "state": repr(learner.state)}
        for tag, text in texts.items():
            if text is not None:
                text = text if isinstance(text, str) else json.dumps(text, indent=2, default=str)
                writer.add_text(tag, "    " + text.replace("\n", "\n    "))  # as code in Markdown


class Rates:
    """The learning rates of the last update, by subtree; of each leaf in a subtree where they differ."""

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self.known: list[tuple[Any, bool]] = []  # rule and frozenness of each leaf, when `named` was worked out
        self.named: list[tuple[str, Any, Leaf]] = []  # tag of a subtree or path, its rate, and a leaf that has it
        self.written: dict[str, float] = {}

    def changed(self, state: Any) -> dict[str, float]:
        """Those that are not what they were, by tag."""
        found = dict(leaves(state))
        now = [(leaf.rule, leaf.frozen) for leaf in found.values()]
        if now != self.known:
            own = {path: rates(leaf)[-1] for path, leaf in found.items() if not leaf.frozen and rates(leaf)}
            first = {name: next(iter(subtree)) for name, subtree in alike(own, self.depth).items()}
            self.known, self.named = now, [(f"lr/{name}", own[path], found[path]) for name, path in first.items()]
        used: dict[str, float] = {}
        for tag, rate, leaf in self.named:
            # After the update: the rate it used is that of the count before.
            value: Any = rate(max(leaf.count - 1, 0)) if callable(rate) else rate
            used[tag] = float(value)
        changed = {tag: rate for tag, rate in used.items() if self.written.get(tag) != rate}
        self.written |= changed
        return changed


def alike(values: Mapping[str, Any], depth: int) -> dict[str, dict[str, Any]]:
    """Values by path, by subtree of so many parts; by more where they differ within one."""
    subtrees: dict[str, dict[str, Any]] = defaultdict(dict)
    for path, value in values.items():
        subtrees[_subtree(path, depth) if depth else ""][path] = value
    found: dict[str, dict[str, Any]] = {}
    for name, subtree in subtrees.items():
        first = next(iter(subtree.values()))
        if all(value == first for value in subtree.values()):
            found[name] = subtree
        elif len(subtree) == 1 or all(depth >= len(path.split(".")) for path in subtree):
            found |= {path: {path: value} for path, value in subtree.items()}
        else:
            found |= alike(subtree, depth + 1)
    return found


def _subtree(path: str, depth: int) -> str:
    """The module, or a part of it that holds the parameter. The parameter itself only where nothing else tells it."""
    parts = path.split(".")
    return ".".join(parts[: min(depth, max(len(parts) - 1, 1))]) or "model"


def _norm(tensors: list[Any]) -> Tensor:
    """The norm of all of them together, not read from the device."""
    norms = [whole_tensor(torch.linalg.vector_norm(t.detach()), keep=True).float() for t in tensors if t is not None]
    return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())


def _plain(value: Any) -> Any:
    """As TensorBoard takes a hyperparameter."""
    return value if type(value) in (bool, int, float, str) else float(value) if isinstance(value, float) else str(value)

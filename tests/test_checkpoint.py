"""save and load: what comes back is what went in, bit for bit; what does not fit is refused whole."""

import os
import socket
import stat
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import fluxpy
from fluxpy import (
    AccumGrad,
    Adam,
    AdamW,
    MixedPrecision,
    Momentum,
    adjust,
    freeze,
    load,
    save,
    schedules,
    setup,
    update,
)

FORMATS = ["run.flux", "run.safetensors"]


class Net(nn.Module):
    """A tie, a buffer, an integer buffer, a buffer that is not to be saved, two layers of one shape."""

    def __init__(self, width=4, dtype=None):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width), nn.Linear(width, width))
        self.decoder = nn.Linear(width, width, bias=False)
        self.decoder.weight = self.encoder[0].weight
        self.register_buffer("cache", torch.zeros(3), persistent=False)
        self.to(dtype)

    def forward(self, x):
        return self.decoder(self.encoder(x))


def train(model, state, steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    dtype = model.decoder.weight.dtype
    for _ in range(steps):
        x = torch.randn(8, 4, generator=generator).to(dtype)
        update(state, model, fluxpy.gradient(lambda m, x=x: m(x).square().mean(), model))


def bits(model, state):
    """All tensors, and all that is saved of leaves besides them."""
    tensors = model.state_dict() | {f"state.{i}": t for i, t in enumerate(torch.utils._pytree.tree_leaves(state))}
    values = {name: t.flatten().view(torch.uint8).tolist() for name, t in tensors.items()}
    entries = fluxpy.state_dict(state)["leaves"]
    return values, repr({path: entry | {"state": None} for path, entry in entries.items()})


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    "rule, dtype",
    [
        (AdamW(schedules.warmup_cosine(1e-2, 3, 20)), torch.float32),
        (fluxpy.OptimiserChain(fluxpy.ClipGlobalNorm(1.0), AccumGrad(3), Momentum(0.1)), torch.float32),
        (MixedPrecision(Adam(1e-2)), torch.bfloat16),
    ],
)
def test_a_resumed_run_is_the_same_run(tmp_path, name, rule, dtype):
    """In a wrapper, with a frozen leaf, half-way through a window; the file is read into a fresh model and state."""
    model = Net(dtype=dtype)
    state = setup(rule, model)
    freeze(state.encoder[2])
    train(model, state, 4)
    model.cache.fill_(1)
    random = torch.get_rng_state()
    save(tmp_path / name, model=torch.nn.DataParallel(model), state=state, epoch=4, random=random)
    train(model, state, 4, seed=1)

    other = Net(dtype=dtype)
    fresh = setup(rule, other)
    extra = load(tmp_path / name, model=other, state=fresh)
    assert extra["epoch"] == 4 and torch.equal(extra["random"], random) and not other.cache.any()
    assert other.decoder.weight is other.encoder[0].weight
    other.cache.fill_(1)
    train(other, fresh, 4, seed=1)
    assert bits(other, fresh) == bits(model, state)


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text() | st.integers(), inner),
    max_leaves=10,
)


@pytest.mark.parametrize("name", FORMATS)
@given(value=plain)
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_extra_comes_back_as_it_was(tmp_path, name, value):
    """By repr, which tells 1 from True and 1.0, a tuple from a list, and knows NaN and -0.0."""
    save(tmp_path / name, value=value)
    assert repr(load(tmp_path / name)) == repr({"value": value})


@pytest.mark.parametrize("suffix", [".flux", ".safetensors"])
def test_the_state_dict_of_another_module_is_plain_data(tmp_path, suffix):
    """An OrderedDict, as `nn.Module.state_dict` gives; it comes back as a dict."""
    other = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    save(tmp_path / f"run{suffix}", other=other.state_dict())
    found = load(tmp_path / f"run{suffix}")["other"]
    assert type(found) is dict and list(found) == list(other.state_dict())
    fresh = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    fresh.load_state_dict(found)
    assert torch.equal(fresh[0].weight, other[0].weight)


@pytest.mark.parametrize("name", FORMATS)
def test_pytrees_and_odd_names(tmp_path, name):
    """Any tensor of a pytree, whole numbers too; empty ones, views, ties, other strides, every kind of name."""
    base = torch.arange(24.0).reshape(4, 6)
    tied = torch.randn(2)
    model = {
        "": torch.ones(0),
        "model": {"tensor": torch.tensor(2j)},
        "a b\n\"'\\\x00é🙂": [torch.tensor(3), (base[1:2, ::2], base.T), {7: torch.tensor([True])}],
        "tied": [tied, tied],
        "one memory": [base, base.view(-1)],
        "sha256": torch.ones((), dtype=torch.bfloat16),
    }
    strange = {
        "\n": {"tensor": torch.ones(2, dtype=torch.int8), "tuple": 2, -1: (), "type": "x"},
        "sha256": '"sha256":"',
    }
    save(tmp_path / name, model=model, **strange)
    other = torch.utils._pytree.tree_map(torch.zeros_like, model | {"tied": ()}) | {"tied": [torch.zeros(2)] * 2}
    assert repr(load(tmp_path / name, model=other)) == repr(strange)
    came, went = (torch.utils._pytree.tree_leaves(tree) for tree in (other, model))
    assert len(came) == len(went) and all(map(torch.equal, came, went))


def test_all_or_nothing(tmp_path):
    model, path = Net(), tmp_path / "run.flux"
    state = setup(Adam(0.1), model)
    train(model, state, 2)
    save(path, model=model, state=state)

    class Untied(Net):
        def __init__(self):
            super().__init__()
            self.decoder.weight = nn.Parameter(torch.zeros(4, 4))
            self.more = nn.Linear(1, 1)

    for other, rule, error in [
        (Net(5), Adam(), r"'encoder.0.weight': expected float32\[5, 5\], got float32\[4, 4\]"),
        (Net().double(), Adam(), "expected float64"),
        (Untied(), Adam(), "missing: 'more.bias', 'more.weight'"),
        (Net().encoder, Adam(), "unexpected"),
        (Net(), Momentum(), "'encoder.0.weight', .*: expected Momentum .* got Adam"),
    ]:
        fresh = setup(rule, other)
        before = bits(other, fresh)
        with pytest.raises(ValueError, match=error) as raised:
            load(path, model=other, state=fresh)
        assert "run.flux" in str(raised.value)
        assert bits(other, fresh) == before

    untied = Untied()
    with pytest.warns(UserWarning, match="missing: 'more.bias', 'more.weight'"):
        load(path, model=untied, strict=False)
    assert torch.equal(untied.decoder.weight, model.decoder.weight)
    save(path, model=Untied())
    with pytest.raises(ValueError, match="'decoder.weight': expected one tied tensor, got a tensor of its own"):
        load(path, model=Net())
    with pytest.raises(ValueError, match="holds no state"):
        load(path, state=state)
    save(path, state=adjust(state, 0.5))
    fresh = setup(Adam(0.2), model)
    assert load(path, state=fresh, hyperparameters="keep") == {} and fresh.decoder.weight.rule.lr == 0.2


@pytest.mark.parametrize("name", FORMATS)
def test_what_cannot_be_saved_is_refused_and_the_old_file_kept(tmp_path, name):
    save(tmp_path / name, epoch=1)
    loop = []
    loop.append(loop)
    stateful = type("Stateful", (nn.Linear,), {"get_extra_state": lambda self: {}})
    for given_, error, kind in [
        ({"when": [1, {"x": object()}]}, r"""extra "when\[1\]\['x'\]" is <object""", ValueError),
        ({"f": len}, "extra 'f' is <built-in", ValueError),
        ({"loop": loop}, "deeper than 100 levels", ValueError),
        ({"keys": {(1, 2): 3}}, "extra 'keys'", ValueError),
        ({"meta": torch.ones(2, device="meta")}, "extra 'meta' must be a dense tensor", ValueError),
        ({"model": {"w": torch.eye(2).to_sparse()}}, "model 'w' must be a dense tensor", ValueError),
        ({"model": {1: torch.ones(1), "1": torch.ones(1)}}, "one path, '1'", ValueError),
        ({"model": nn.LazyLinear(2)}, "'weight' of the model is lazy", ValueError),
        ({"model": nn.Sequential(stateful(1, 1))}, "'0' has a get_extra_state", ValueError),
        ({"model": setup(Adam(), nn.Linear(1, 1))}, "model= takes a module", TypeError),
        ({"state": nn.Linear(1, 1)}, "state_dict takes the state tree", TypeError),
    ]:
        with pytest.raises(kind, match=error):
            save(tmp_path / name, **given_)
        assert load(tmp_path / name) == {"epoch": 1} and os.listdir(tmp_path) == [name]


def test_the_file_is_an_ordinary_one(tmp_path, monkeypatch):
    """Its permissions are those of the umask, a link to it stays a link, a view saves its own numbers only."""
    path, link = tmp_path / "run.flux", tmp_path / "last"
    link.symlink_to(path)
    save(link, x=torch.arange(1_000_000)[:2])
    assert link.is_symlink() and path.stat().st_size < 10_000
    old = os.umask(0)
    os.umask(old)
    assert path.stat().st_mode & 0o777 == 0o666 & ~old
    monkeypatch.chdir(tmp_path)
    save("here.flux", x=1)
    assert load("here.flux") == load(Path("here.flux")) == {"x": 1}


@pytest.mark.parametrize("mode", [0o600, 0o444, 0o666])
@pytest.mark.parametrize("name", FORMATS)
def test_a_file_that_is_replaced_keeps_its_mode(tmp_path, monkeypatch, name, mode):
    """Also by a link to it; and while it is written, nobody else may read it."""
    path, link, modes = tmp_path / name, tmp_path / f"last{name}", []
    path.touch()
    path.chmod(mode)
    link.symlink_to(path)
    flush = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: modes.append(os.fstat(fd).st_mode) or flush(fd))
    for place in (path, link):
        save(place, epoch=1)
        assert load(path) == {"epoch": 1} and stat.S_IMODE(path.stat().st_mode) == mode and link.is_symlink()
    assert [stat.S_IMODE(m) for m in modes if stat.S_ISREG(m)] == [mode, mode]


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"No such file or directory: '.*run\.flux'$"):
        save(tmp_path / "gone" / "run.flux", n=1)


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_no_regular_file_is_not_replaced(tmp_path, name):
    path, link = tmp_path / name, tmp_path / f"last{name}"
    link.symlink_to(path)
    os.mkfifo(path)
    for place in (path, link):
        with pytest.raises(
            ValueError, match=f"save: '.*{name}' is a pipe; save replaces the file, so it must be a reg"
        ):
            save(place, epoch=1)
    assert stat.S_ISFIFO(path.stat().st_mode) and len(os.listdir(tmp_path)) == 2
    path.unlink()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        with pytest.raises(ValueError, match="is a socket"):
            save(path, epoch=1)
    assert stat.S_ISSOCK(path.stat().st_mode)


def test_other_files_are_named_for_what_they_are(tmp_path, monkeypatch):
    path = tmp_path / "run.pt"
    torch.save({"epoch": 1}, path)
    with pytest.raises(ValueError, match=r"run.pt' is no checkpoint of fluxpy; torch.save writes such files"):
        load(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="run.pt' is truncated: it has 0 bytes"):
        load(path)
    monkeypatch.setattr("fluxpy.saving.file.VERSION", 2)
    for name in FORMATS:
        save(tmp_path / name, epoch=1)
    monkeypatch.undo()
    for name in FORMATS:
        with pytest.raises(ValueError, match=f"{name}' was written by a newer fluxpy, as version 2; this one reads 1"):
            load(tmp_path / name)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match="pip install safetensors"):
        save(tmp_path / "run.safetensors")

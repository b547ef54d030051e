"""What may go wrong around a run: kills, full disks, damaged and hostile files, deep and wide trees, wild arguments.

Every test prints how often it tried; the counts of `FLUXPY_NIGHTLY=1` stand in docs/saving.md.
"""

import builtins
import contextlib
import io
import json
import os
import pickle
import random
import signal
import struct
import tempfile
import threading
import time
import warnings
from pathlib import Path

import pytest
import rule_table
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fluxpy
from fluxpy import (
    Adam,
    ClipGlobalNorm,
    ClipNorm,
    Descent,
    OptimiserChain,
    adjust,
    freeze,
    leaves,
    load,
    save,
    select,
    setup,
    state_dict,
    update,
)
from fluxpy.saving import file

resource = pytest.importorskip(
    "resource"
)  # and os.fork: where there is no such thing, neither are most of these faults
pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
NIGHTLY = os.environ.get("FLUXPY_NIGHTLY") == "1"
FORMATS = ["run.flux", "run.safetensors"]


def tried(what, count, more=""):
    print(f"tried: {what}: {count:,} {more}")


def run(width=2):
    """A small model and its state after one step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width))
    state = setup(Adam(0.1), model)
    update(state, model, {name: torch.ones_like(p) for name, p in model.named_parameters()})
    return model, state


def image(model, state):
    """All that a failed call must leave as it was."""
    tensors = [*model.state_dict().values(), *torch.utils._pytree.tree_leaves(state)]
    rest = [(path, leaf.rule, leaf.frozen, leaf.count) for path, leaf in leaves(state)]
    return [t.numpy().tobytes() for t in tensors], repr(rest)


# --- Writing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_killed_while_saving(tmp_path, name):
    """SIGKILL at a random moment: the file is the last that was finished, or the next one, and whole."""
    path, chance = tmp_path / name, random.Random(0)
    times = 100 if NIGHTLY else 10
    big, torn, fresh = torch.zeros(200_000, dtype=torch.int64), 0, 0

    def child(pipe, first):
        for n in range(first, first + 10_000):
            save(path, model={"w": big.fill_(n)}, n=n)
            os.write(pipe, struct.pack("<q", n))

    save(path, model={"w": big}, n=0)
    last = 0
    for _ in range(times):
        reader, writer = os.pipe()
        if (pid := os.fork()) == 0:
            with contextlib.suppress(BaseException):
                child(writer, last + 1)
            os._exit(1)
        os.close(writer)
        os.read(reader, 8)  # it runs
        time.sleep(chance.uniform(0, 0.02))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        reports = b""
        while more := os.read(reader, 1 << 16):
            reports += more
        os.close(reader)
        done = struct.unpack("<q", reports[-8:])[0] if reports else last + 1
        model = {"w": torch.zeros_like(big)}
        last = load(path, model=model)["n"]
        assert last in (done, done + 1) and bool((model["w"] == last).all())
        left = list(tmp_path.glob(".fluxpy-*.tmp"))
        torn, fresh = torn + bool(left), fresh + (last == done + 1)
        for temporary in left:
            temporary.unlink()
        assert os.listdir(tmp_path) == [name]
    tried(f"SIGKILL during save, {name}", times, f"({torn} within the writing, {fresh} between renaming and return)")


@pytest.mark.parametrize("name", FORMATS)
def test_full_disk(tmp_path, name):
    """A limit on the size of files stands for it. The error has the path, the old file is whole, nothing is left."""
    path, limits = tmp_path / name, resource.getrlimit(resource.RLIMIT_FSIZE)
    save(path, n=1)
    chance = random.Random(0)
    sizes = [0, 1, 8, 52, 53, 4096, *(chance.randrange(400_000) for _ in range(100 if NIGHTLY else 20))]
    for size in sizes:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        try:
            with pytest.raises(OSError, match="too large") as error:
                save(path, w=torch.zeros(100_000))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert error.value.filename == str(path) and load(path) == {"n": 1} and os.listdir(tmp_path) == [name]
    tried(f"full disk, {name}", len(sizes))


@pytest.mark.parametrize("call", ["open", "fsync", "replace", "fsync of the folder"])
def test_each_call_to_the_system_may_fail(tmp_path, monkeypatch, call):
    """Also by Ctrl-C. The file is the old one until it was renamed, and the new one from then on."""
    path = tmp_path / "run.flux"
    for error in (OSError(5, "Input/output error"), KeyboardInterrupt()):
        save(path, n=1)
        calls = []

        def fail(*args, error=error, calls=calls, **kwargs):
            calls.append(args)
            if call == "fsync of the folder" and len(calls) == 1:
                return
            raise error

        with monkeypatch.context() as patch:
            target = {"open": builtins, "replace": os}.get(call, os)
            patch.setattr(target, call.split()[0], fail)
            with pytest.raises(type(error)) as raised:
                save(path, n=2)
        assert load(path) == {"n": 2 if "folder" in call else 1} and os.listdir(tmp_path) == ["run.flux"]
        assert isinstance(raised.value, KeyboardInterrupt) or raised.value.filename == str(path)


def test_no_permission_and_no_such_place():
    """As root, who may do anything, this is tried as somebody else."""
    root = os.geteuid() == 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save(folder / "run.flux", n=1)
        (folder / "closed.flux").touch(mode=0)
        folder.chmod(0o555)
        if root:
            os.seteuid(65534)
        try:
            for act, place in ((save, "run.flux"), (save, "new.flux"), (load, "closed.flux")):
                with pytest.raises(PermissionError) as error:
                    act(folder / place)
                assert error.value.filename in (str(folder / place), os.path.realpath(folder / place))
            assert load(folder / "run.flux") == {"n": 1}
        finally:
            if root:
                os.seteuid(0)
            folder.chmod(0o755)
        for act, place, kind in (
            (save, "none/run.flux", FileNotFoundError),
            (load, "none/run.flux", FileNotFoundError),
            (save, "run.flux/run.flux", NotADirectoryError),
            (save, ".", IsADirectoryError),
        ):
            with pytest.raises(kind, match="none|run.flux|tmp"):
                act(folder / place)
        assert sorted(os.listdir(folder)) == ["closed.flux", "run.flux"]


@pytest.mark.parametrize("ending", [".flux", ".safetensors"])
def test_odd_paths(tmp_path, ending):
    names = ["a b", "ü🙂", "new\nline", "quo'\"te", "-rf", "%s{0}", "*?[x]", "\\", "x" * 200, "\udcff", " "]
    for name in names:
        path = tmp_path / (name + ending)
        save(path, name=name)
        save(path, name=name)
        assert load(path) == {"name": name}
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(ValueError) as error:
            load(path)
        assert repr(str(path)) in str(error.value)
    with pytest.raises(ValueError, match="null"):
        save(str(tmp_path / "\0"), n=1)
    tried(f"odd paths, {ending}", len(names))


# --- Reading ------------------------------------------------------------------------------------------------------


def boundaries(raw):
    """Where a part of the file begins: fields of the header, records of the zip archive, tensors."""
    if raw[:8] == file.MAGIC:
        marks = [raw.find(b"PK", i) for i in range(len(raw)) if raw[i : i + 2] == b"PK"]
        return {0, 8, 12, 20, 52, *marks, len(raw)}
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    offsets = [8 + size + end for key, t in header.items() if key != "__metadata__" for end in t["data_offsets"]]
    return {0, 8, 8 + size, raw.index(file.DIGEST_KEY), *offsets}


@pytest.mark.parametrize("name", FORMATS)
def test_truncated_and_altered_files(tmp_path, name):
    """Each is refused by name, and neither model nor state has changed."""
    path, chance = tmp_path / name, random.Random(0)
    model, state = run()
    save(path, model=model, state=state, epoch=3)
    raw, before = path.read_bytes(), image(model, state)
    ends = {at + d for at in boundaries(raw) for d in (-1, 0, 1) if 0 <= at + d < len(raw)}
    random_ends = [chance.randrange(len(raw)) for _ in range(250)]
    damaged = [raw[:end] for end in (*ends, *random_ends)]
    for at in [*(at for at in boundaries(raw) if at < len(raw)), *(chance.randrange(len(raw)) for _ in range(500))]:
        damaged.append(raw[:at] + bytes([raw[at] ^ 1 << chance.randrange(8)]) + raw[at + 1 :])
    damaged += [raw + b"\0", raw + raw, raw[8:], bytes(len(raw)), b""]
    for data in damaged:
        path.write_bytes(data)
        with pytest.raises(ValueError) as error:
            load(path, model=model, state=state)
        assert name in str(error.value)
    assert image(model, state) == before
    path.write_bytes(raw)
    assert load(path, model=model, state=state) == {"epoch": 3}
    tried(f"damaged files, {name}", len(damaged), f"({len(ends) + 250} truncated)")


def seal(name, content, path):
    """A file whose checksum is right, whatever it holds."""
    if name == "run.flux":
        head = file.HEADER.pack(file.MAGIC, 1, len(content), b"")[:-32]
        path.write_bytes(head + file.digest(head, content) + content)
    else:
        at = content.find(file.DIGEST_KEY) + len(file.DIGEST_KEY)
        zero = content[:at] + b"0" * 64 + content[at + 64 :]
        path.write_bytes(zero[:at] + file.digest(zero).hex().encode() + zero[at + 64 :])


@pytest.mark.parametrize("name", FORMATS)
def test_altered_behind_the_checksum(tmp_path, name):
    """Somebody who can make checksums can make numbers, but nothing other than ValueErrors, and never half a load."""
    path, chance = tmp_path / name, random.Random(0)
    model, state = run()
    save(path, model=model, state=state, epoch=3)
    raw = path.read_bytes()
    content = raw[file.HEADER.size :] if name == "run.flux" else raw
    held, refused, times = image(model, state), 0, 2000 if NIGHTLY else 200
    reach = min(len(content), 8 + int.from_bytes(raw[:8], "little")) if name != "run.flux" else len(content)
    for _ in range(times):
        at = chance.randrange(reach)
        altered = content[:at] + bytes([chance.randrange(256)]) + content[at + 1 :]
        seal(name, altered, path)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", ".*set up with other rules")
                load(path, model=model, state=state)
        except ValueError:
            refused += 1
            assert image(model, state) == held
        held = image(model, state)
    tried(f"altered with a right checksum, {name}", times, f"({refused} refused, the others only held other values)")


class Hostile:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_hostile_files(tmp_path):
    """Code in a file does not run, and what is no checkpoint inside a right wrapper is refused."""
    path, marker = tmp_path / "run.flux", tmp_path / "ran"
    model, state = run()
    before = image(model, state)
    bad = Hostile(f"touch {marker}")
    sound = {"model": None, "state": state_dict(state), "extra": {}}
    data = [bad, {**sound, "extra": {"x": bad}}, {**sound, "model": {"0.weight": bad}}, {**sound, "state": bad}]
    contents = [pickle.dumps(d, protocol) for d in data for protocol in range(6)]
    contents += [
        b"cos\nsystem\n(S'touch " + str(marker).encode() + b"'\ntR.",
        b"c__builtin__\neval\n(S'1'\ntR.",
        b"",
        b".",
    ]
    contents += [b"]" * 100_000 + b"a" * 99_999 + b"."]
    data += [5, {}, {**sound, "model": 5}, {**sound, "model": {"0.weight": 1}}, {**sound, "extra": 1}, [1]]
    data += [{**sound, "model": {name: torch.ones(1), "x": torch.ones(1)}} for name in (1, None, torch.ones(1))]
    data += [{**sound, "state": wrong} for wrong in (1, [], {}, {"version": 1, "leaves": {"0.weight": {}}})]
    for d in data:
        buffer = io.BytesIO()
        torch.save(d, buffer)
        contents.append(buffer.getvalue())
    for content in contents:
        seal("run.flux", content, path)
        with pytest.raises(ValueError, match="run.flux"):
            load(path, model=model, state=state)
    assert not marker.exists() and image(model, state) == before
    tried("hostile files", len(contents))


def test_crafted_safetensors_headers(tmp_path):
    """JSON of wrong kinds, under a right checksum."""
    path, zeros = tmp_path / "run.safetensors", "0" * 64
    headers = [[{"sha256": zeros}], ["__metadata__", {"sha256": zeros}], {"sha256": zeros}, {"__metadata__": []}]
    headers += [{"__metadata__": [{"fluxpy": "{}", "sha256": zeros}]}]
    held = ["[]", "[1]", "null", "5", '"x"', "{}", "", "[" * 100_000, '{"version": [1]}', '{"version": 1}']
    held += [f'{{"version": 1, "data": {data}}}' for data in ("[]", "5", '{"extra": {"dict": 5}}', '{"extra": [{}]}')]
    headers += [{"__metadata__": {"fluxpy": text, "sha256": zeros}} for text in held]
    for header in headers:
        text = json.dumps(header, separators=(",", ":")).encode()
        seal(path.name, struct.pack("<Q", len(text)) + text, path)
        with pytest.raises(ValueError, match="run.safetensors"):
            load(path)
    tried("crafted safetensors headers", len(headers))


# --- Trees --------------------------------------------------------------------------------------------------------


def nested(kind, depth):
    x = nn.Linear(1, 1) if kind == "modules" else torch.ones(1)
    for i in range(depth):
        x = nn.Sequential(x) if kind == "modules" else [x] if i % 2 else {"k": x}
    return x


@pytest.mark.parametrize("kind, depth", [("modules", 500), ("containers", 900)])
def test_deep_trees(tmp_path, kind, depth):
    model, other = nested(kind, depth), nested(kind, depth)
    state, fresh = setup(Adam(), model), setup(Adam(), other)
    update(state, model, {path: torch.ones(leaf.shape) for path, leaf in leaves(state)})
    freeze(state)
    for name in FORMATS:
        save(tmp_path / name, model=model, state=state)
        load(tmp_path / name, model=other, state=fresh)
        assert [leaf.frozen for _, leaf in leaves(fresh)] == [True for _ in leaves(state)]
        came, went = (torch.utils._pytree.tree_leaves([leaf for _, leaf in leaves(s)]) for s in (fresh, state))
        assert len(went) > 1 and all(map(torch.equal, came, went))
    deeper = nested("containers", 950)
    for act in (lambda: setup(Adam(), deeper), lambda: save(tmp_path / "run.flux", model=deeper)):
        with pytest.raises(ValueError, match="deeper than 900 levels"):
            act()


def test_wide_trees(tmp_path):
    count = 100_000 if NIGHTLY else 2_000
    model, other = ([torch.full((1,), float(i)) for i in range(count)] for _ in range(2))
    grads, times = [torch.ones(1)] * count, {}

    def timed(name, act):
        begin = time.perf_counter()
        out = act()
        times[name] = time.perf_counter() - begin
        return out

    state = timed("setup", lambda: setup(Adam(0.1), model))
    timed("update", lambda: update(state, model, grads))
    timed("freeze", lambda: freeze(state))
    timed("state_dict", lambda: state_dict(state))
    fresh = adjust(setup(Adam(0.1), other), 0.3)
    for name in FORMATS:
        timed(f"save {name}", lambda name=name: save(tmp_path / name, model=model, state=state))
        timed(f"load {name}", lambda name=name: load(tmp_path / name, model=other, state=fresh))
        assert all(map(torch.equal, other, model)) and fresh[count - 1].rule.lr == 0.1
        assert len({id(leaf.rule) for _, leaf in leaves(fresh)}) == 1  # one rule stays one object
    tried("leaves of a wide tree", count, ", ".join(f"{k} {v:.1f} s" for k, v in times.items()))
    assert sum(times.values()) < 5e-3 * count


# --- Numbers ------------------------------------------------------------------------------------------------------


def test_numbers_that_are_not_finite(tmp_path):
    """In parameters and gradients they are data like other data; as hyperparameters they are refused."""
    bad = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 1e-40])
    for row in rule_table.ROWS.values():
        shape = row.fit((5,))
        model = {"w": bad.clone().view(shape), "v": torch.ones(shape)}
        grads = {"w": torch.ones(shape), "v": bad.clone().view(shape)}
        state = setup(row.rule, model)
        with contextlib.suppress(FloatingPointError):  # of the rules that clip
            for _ in range(row.window + 1):
                update(state, model, grads)
        for name in FORMATS:
            save(tmp_path / name, model=model, state=state)
            other = {"w": torch.zeros(shape), "v": torch.zeros(shape)}
            fresh = setup(row.rule, other)
            load(tmp_path / name, model=other, state=fresh)
            held, came = (
                [t for _, leaf in leaves(s) for t in torch.utils._pytree.tree_leaves(leaf)] for s in (state, fresh)
            )
            for a, b in zip([*model.values(), *held], [*other.values(), *came], strict=True):
                a, b = (t.view(torch.int16) if t.dtype == torch.bfloat16 else t for t in (a, b))
                assert a.dtype == b.dtype and a.numpy().tobytes() == b.numpy().tobytes()
        for name, old in row.adjusted.items():
            if isinstance(old, float):
                before = repr([leaf for _, leaf in leaves(state)])
                with pytest.raises(ValueError, match=name):
                    adjust(state, **{name: float("nan")})
                assert repr([leaf for _, leaf in leaves(state)]) == before
    tried("rules with NaN and Inf", len(rule_table.ROWS))


def test_a_schedule_that_gives_nan_changes_nothing():
    model, state = run()
    adjust(state, lambda count: 0.1 if count < 2 else float("nan"))
    grads = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    update(state, model, grads)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match="nan"):
        update(state, model, grads)
    assert all(map(torch.equal, before, model.parameters())) and state[0].weight.count == 2


def test_float16_that_overflows():
    """Sums and squares are beyond float16; norms and master copies are not."""
    x, dx = torch.ones(1000, dtype=torch.float16), torch.full((1000,), 6e4, dtype=torch.float16)
    for rule in (ClipNorm(1.0), ClipGlobalNorm(1.0)):
        model = {"w": x.clone()}
        update(setup(OptimiserChain(rule, Descent(1.0)), model), model, {"w": dx})
        torch.testing.assert_close(model["w"].float(), torch.full((1000,), 1 - 1000**-0.5), atol=1e-3, rtol=0)
    model = {"w": x.clone()}
    update(setup(fluxpy.MixedPrecision(Adam(0.5)), model), model, {"w": dx})
    assert bool((model["w"] == 0.5).all())


# --- Threads and processes ----------------------------------------------------------------------------------------


def steps(model, state, times):
    generator = torch.Generator().manual_seed(1)
    for _ in range(times):
        x = torch.randn(4, 2, generator=generator)
        update(state, model, fluxpy.gradient(lambda m, x=x: m(x).square().sum(), model))


def test_two_threads_update_two_models():
    times = 1000 if NIGHTLY else 100
    alone, pair = run(), [run(), run()]
    steps(*alone, times)
    errors = []

    def work(model, state):
        try:
            steps(model, state, times)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=one) for one in pair]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and all(image(*one) == image(*alone) for one in pair)
    tried("steps in two threads", 2 * times)


def test_a_fork_after_setup(tmp_path):
    """Child and parent go on from the same state, each on its own."""
    (model, state), path = run(), tmp_path / "child.flux"
    if (pid := os.fork()) == 0:
        try:
            steps(model, state, 5)
            save(path, model=model, state=state)
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0
    other = run()
    load(path, model=other[0], state=other[1])
    assert image(*other) != image(model, state)
    steps(model, state, 5)
    assert image(*other) == image(model, state)


# --- Wild arguments -----------------------------------------------------------------------------------------------

names = st.sampled_from(
    ["0", "1", "0.weight", "1.bias", "weight", "lr", "betas", "eps", "*", "0.*", "[", "[!a]*", "?", "."]
)
words = names | st.lists(names, max_size=4).map(".".join) | st.text(max_size=8)
numbers = st.none() | st.booleans() | st.integers() | st.floats() | st.just(torch.tensor(0.1)) | st.just(len)
several = st.lists(numbers, max_size=3) | st.tuples(numbers, numbers)
values = numbers | words | several | st.builds(fluxpy.scale, numbers)
rules = st.sampled_from([None, 3, Adam, Adam(), [Adam()], Descent(0.1), "Adam", {}])
ERRORS = {
    "setup": (ValueError, TypeError),
    "path": (KeyError, IndexError, TypeError),
    "attribute": AttributeError,
    "select": (ValueError, TypeError),
    "adjust": (ValueError, TypeError),
}


@pytest.mark.parametrize("verb", ERRORS)
def test_wild_arguments(verb):
    """Nothing but the documented errors, with a message, and the state is as before after each."""
    refused = 0

    @given(data=st.data())
    @settings(max_examples=2000 if NIGHTLY else 100, deadline=None, database=None)
    def trial(data):
        nonlocal refused
        model, state = run()
        adjust(state[1], 0.2)
        before = image(model, state)
        try:
            if verb == "setup":
                setup(data.draw(rules | st.dictionaries(words | numbers, rules, max_size=4)), model)
            elif verb == "path":
                state[data.draw(words | st.integers() | st.slices(3) | numbers)]
            elif verb == "attribute":
                getattr(state, data.draw(words))
            elif verb == "select":
                select(state, data.draw(words | numbers))
            else:
                adjust(state, **data.draw(st.dictionaries(words, values, max_size=2)))
                return
        except ERRORS[verb] as error:
            assert str(error)
            refused += 1
        assert image(model, state) == before

    trial()
    tried(f"wild arguments, {verb}", 2000 if NIGHTLY else 100, f"({refused} refused)")

"""state_dict and load_state_dict: what was saved goes on bit for bit, by name; what does not fit changes nothing."""

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optree
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rule_table import ROWS
from scripts import run_script
from torch import Tensor, nn

import fluxpy
from fluxpy import Adam, Descent, OptimiserChain, load_state_dict, schedules, setup, state_dict, update
from fluxpy.rule import Rule
from fluxpy.schedules import Segment

CHAINS = {
    "gathering": OptimiserChain(fluxpy.AccumGrad(3), fluxpy.ClipNorm(1.0), fluxpy.NAdam()),
    "clipped": OptimiserChain(fluxpy.ClipGlobalNorm(0.5), fluxpy.SignDecay(), fluxpy.OAdam()),
    "master": fluxpy.MixedPrecision(OptimiserChain(fluxpy.WeightDecay(), fluxpy.AccumGrad(2), fluxpy.AMSGrad())),
    "scheduled": OptimiserChain(
        fluxpy.AccumGrad(2), fluxpy.ClipNorm(1.0), fluxpy.AdamW(schedules.warmup_cosine(0.1, 2, 20))
    ),
    "centered": OptimiserChain(fluxpy.ClipGrad(0.1), fluxpy.RMSProp(centered=True), fluxpy.Momentum()),
}
RULES: dict[str, Rule] = {name: row.rule for name, row in ROWS.items()} | CHAINS
SCHEDULES: list[Any] = [
    schedules.constant(0.1),
    schedules.linear(0.1, 0.0, 20),
    schedules.polynomial(0.1, 0.0, 20, power=2.0),
    schedules.exponential(0.1, 0.9),
    schedules.step_decay(0.1, 0.5, every=2),
    schedules.warmup_cosine(0.1, 3, 20),
    schedules.one_cycle(0.1, 20, pct_start=0.25),
    schedules.cosine_restarts(0.1, 0.0, 2, grow=2),
    schedules.join([schedules.cosine(0.1, 0.0, 3), schedules.shifted(schedules.linear(0.1, 0.2, 9), 2)], [4]),
    schedules.scaled(schedules.segments([Segment("cosine", end=0.1, steps=3), Segment("linear", end=0.0)], 9), 0.5),
]
NAMES = ("a", "b", "frozen", "idle")


def model(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(1)
    return {name: torch.randn(3, 2, generator=rng).to(dtype) for name in NAMES}


def step(state: Any, model: Any, first: int, count: int) -> None:
    """Updates with the gradients of a longer run; `idle` has none in the odd ones."""
    for i in range(first, first + count):
        rng = torch.Generator().manual_seed(i)
        grads = {name: torch.randn(3, 2, generator=rng).to(model[name].dtype) for name in NAMES}
        update(state, model, {k: g for k, g in grads.items() if k != "idle" or i % 2})


def through_file(d: Any) -> Any:
    file = io.BytesIO()
    torch.save(d, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def contents(tree: Any) -> list[Any]:
    """All of a state, tensors by their bits, to compare."""
    parts = optree.tree_leaves(tree if isinstance(tree, dict) else state_dict(tree), none_is_leaf=True)
    return [(p.dtype, p.shape, p.flatten().view(torch.uint8).tolist()) if isinstance(p, Tensor) else p for p in parts]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_a_resumed_run_is_the_run_that_went_on(rule: Rule, dtype: torch.dtype) -> None:
    """With a frozen leaf, one without some gradients, and half-way through every window."""
    for updates in (5, 8):
        ours = model(dtype)
        state = fluxpy.setup(rule, ours)
        fluxpy.freeze(state["frozen"])
        step(state, ours, 0, updates)
        saved = state_dict(state)
        file, then = through_file(saved), contents(saved)
        again, fresh = copy.deepcopy(ours), setup(rule, model(dtype))
        report = load_state_dict(fresh, file)
        assert report.loaded == list(NAMES) and not any(report[1:])
        assert contents(fresh) == contents(state)
        for tree, params in ((state, ours), (fresh, again)):
            step(tree, params, updates, 2)
            fluxpy.thaw(tree)
            step(tree, params, updates + 2, 3)
        assert contents(again) == contents(ours) and contents(fresh) == contents(state)
        assert contents(saved) == then  # training on changed no saved tensor, nor did the other run
        assert all(leaf.rule is fresh["a"].rule for _, leaf in fluxpy.leaves(fresh))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_schedules_are_saved_whole(schedule: Any) -> None:
    rule = Adam(schedule, betas=(schedules.linear(0.8, 0.9, 4), 0.99))
    ours, state = model(), setup(rule, model())
    step(state, ours, 0, 3)
    fresh = setup(Adam(), model())
    again = copy.deepcopy(ours)
    load_state_dict(fresh, through_file(state_dict(state)))
    assert fresh["a"].rule == rule
    step(state, ours, 3, 4)
    step(fresh, again, 3, 4)
    assert contents(again) == contents(ours) and contents(fresh) == contents(state)


def old_form(value: Any) -> Any:
    """What version 2 had: None as it is."""
    if isinstance(value, dict):
        return None if value == {"type": "NoneType"} else {key: old_form(v) for key, v in value.items()}
    return [old_form(v) for v in value] if isinstance(value, list) else value


def test_a_state_dict_holds_plain_data_without_none_which_older_files_have() -> None:
    nones = fluxpy.Adafactor(schedules.segments([Segment("linear", end=1.0)], total=9))
    for rule in (*RULES.values(), nones):
        params = model()
        state = setup({"idle": None, "*": rule}, params)
        fluxpy.freeze(state["frozen"])
        step(state, params, 0, 1)
        d = state_dict(state)
        assert {type(part) for part in optree.tree_leaves(d, none_is_leaf=True)} <= {Tensor, int, float, str, bool}
        older = old_form(d) | {"version": 2}
        for entry in older["leaves"].values():
            entry |= {key: entry.get(key) for key in ("state", "pending")}
        other = setup({"idle": None, "*": rule}, params)
        report = load_state_dict(other, older)
        assert contents(other) == contents(state) and not report.changed


def test_a_callable_stays_that_of_the_target_and_is_reported() -> None:
    def decay(count: int) -> float:
        return 0.1 / (1 + count)

    def other(count: int) -> float:
        return 0.2 / (1 + count)

    state = fluxpy.adjust(setup(Adam(decay), model()), fluxpy.scale(0.5))
    file = through_file(state_dict(state))
    fresh = setup(Adam(other), model())
    report = load_state_dict(fresh, file)
    assert list(report.schedules) == list(NAMES) and "decay" in str(report)
    assert fresh["a"].rule.lr == schedules.scaled(other, 0.5)
    with pytest.raises(ValueError, match="'b', .*: .*'rule'.*lr.schedule was .*decay.* give setup that callable"):
        load_state_dict(setup(Adam(), model()), file)
    number = setup(Adam(0.3), model())
    assert list(load_state_dict(number, file, strict=False).rule) == list(NAMES)
    assert not load_state_dict(number, file, hyperparameters="keep").schedules
    linear = setup(Adam(schedules.linear(0.1, 0.0, 5)), model())
    load_state_dict(linear, through_file(state_dict(setup(Adam(decay), model()))))
    assert linear["a"].rule.lr == schedules.linear(0.1, 0.0, 5)


def test_what_leaves_share_they_share_again() -> None:
    """Global clips with one tensor as their norm are one clip: its identity says so."""
    norm = torch.tensor(0.5)
    rules = {
        "[ab]": OptimiserChain(fluxpy.ClipGlobalNorm(norm), Descent()),
        "*": OptimiserChain(fluxpy.ClipGlobalNorm(norm), Descent(0.5)),
    }
    ours, state = model(), setup(rules, model())
    fresh, again = setup(rules, model()), model()
    load_state_dict(fresh, through_file(state_dict(state)))
    held = {id(leaf.rule.max_norm) for _, leaf in fluxpy.leaves(fresh)}
    assert len(held) == 1 and held != {id(norm)}
    step(state, ours, 0, 3)
    step(fresh, again, 0, 3)
    assert contents(again) == contents(ours)


def test_each_momentum_keeps_its_own_dtype() -> None:
    state = setup(Adam(), model(torch.bfloat16))
    wide = optree.tree_map(lambda t: t.float() + 1 / 3, state, namespace="fluxpy")
    fresh = setup(Adam(), model(torch.bfloat16))
    load_state_dict(fresh, through_file(state_dict(wide)))
    assert fresh["a"].state.m.dtype == torch.float32 and contents(fresh) == contents(wide)


def test_numbers_that_became_tensors_and_complex_parameters() -> None:
    x = {"x": torch.tensor([1 + 2j, 3 - 1j])}
    state = setup(fluxpy.NAdam(betas=(torch.tensor(0.9), 0.99)), x)
    update(state, x, {"x": torch.tensor([0.5 + 1j, 1j])})
    fresh = setup(fluxpy.NAdam(betas=(torch.tensor(0.5), 0.5)), x)
    load_state_dict(fresh, through_file(state_dict(state)))
    assert contents(fresh) == contents(state) and isinstance(fresh.x.state.mu_product, Tensor)


def test_a_tensor_as_hyperparameter_may_be_as_large_as_the_parameter() -> None:
    x = {"x": torch.ones(70_000)}
    state, fresh = setup(Descent(torch.rand(70_000)), x), setup(Descent(), x)
    load_state_dict(fresh, through_file(state_dict(state)))
    assert torch.equal(fresh.x.rule.lr, state.x.rule.lr)


class Pair(nn.Module):
    def __init__(self, *order: str, tied: bool = False) -> None:
        super().__init__()
        for name in order:
            setattr(self, name, nn.Linear(2, 2, bias=False))
        if tied:
            self.second.weight = self.first.weight


def advanced(model: nn.Module, rule: Any = None) -> Any:
    state = setup(rule or Adam(), model)
    for i in range(3):
        update(state, model, {n: torch.full_like(p, i + len(n)) for n, p in model.named_parameters()})
    return state


def test_order_does_not_matter() -> None:
    state = advanced(Pair("first", "second"))
    fresh = setup(Adam(), Pair("second", "first"))
    load_state_dict(fresh, state_dict(state))
    for path, leaf in fluxpy.leaves(state):
        assert torch.equal(leaf.state.m, fresh[path].state.m)
    assert not torch.equal(fresh.first.weight.state.m, fresh.second.weight.state.m)


def test_ties_that_changed() -> None:
    tied = advanced(Pair("first", "second", tied=True))
    saved = through_file(state_dict(tied))
    assert [entry["names"] for entry in saved["leaves"].values()] == [["first.weight", "second.weight"]]
    apart = setup(Adam(), Pair("first", "second"))
    load_state_dict(apart, saved)
    first, second = apart.first.weight.state.m, apart.second.weight.state.m
    assert torch.equal(first, tied.first.weight.state.m) and torch.equal(first, second)
    assert first.data_ptr() != second.data_ptr()
    load_state_dict(setup(Adam(), Pair("second")), saved)  # by its second name
    load_state_dict(setup(Adam(), Pair("second", "first", tied=True)), saved)
    fresh = setup(Adam(), Pair("first", "second", tied=True))
    with pytest.raises(ValueError, match="expected one tied parameter, got several: 'first.weight', 'second"):
        load_state_dict(fresh, state_dict(apart))
    report = load_state_dict(fresh, state_dict(apart), strict=False)
    assert (report.loaded, list(report.ties)) == ([], ["first.weight"])


def test_keep_leaves_hyperparameters_and_loads_the_rest() -> None:
    state = fluxpy.freeze(advanced(Pair("first"), Adam(0.1)))
    fresh = setup(Adam(0.7, betas=(0.5, 0.6)), Pair("first"))
    load_state_dict(fresh, state_dict(state), hyperparameters="keep")
    leaf = fresh.first.weight
    assert leaf.rule == Adam(0.7, betas=(0.5, 0.6)) and leaf.frozen and leaf.count == leaf.state.t == 3
    saved = state_dict(setup(fluxpy.RMSProp(centered=True), Pair("first")))
    with pytest.raises(ValueError, match="expected centered=False, got centered=True, and it shapes the state"):
        load_state_dict(setup(fluxpy.RMSProp(), Pair("first")), saved, hyperparameters="keep")
    load_state_dict(fresh := setup(fluxpy.RMSProp(), Pair("first")), saved)
    assert fresh.first.weight.rule.centered and fresh.first.weight.state._fields == ("v", "m")


def test_names_that_changed_and_views() -> None:
    whole = nn.ModuleDict({"encoder": Pair("first", "second"), "head": nn.Linear(2, 2)})
    state = advanced(whole)
    saved = state_dict(state)
    renamed = setup(Adam(), nn.ModuleDict({"backbone": Pair("one", "second"), "head": nn.Linear(2, 2)}))
    load_state_dict(renamed, saved, rename={"encoder": "backbone", "encoder.first": "backbone.one"})
    assert torch.equal(renamed.backbone.one.weight.state.m, state.encoder.first.weight.state.m)
    inner = setup(Adam(), Pair("first", "second"))
    assert load_state_dict(inner, saved, prefix="encoder.").loaded == ["first.weight", "second.weight"]
    assert contents(inner) == contents(state.encoder)
    outer = setup(Adam(), nn.ModuleDict({"encoder": Pair("first", "second")}))
    load_state_dict(outer.encoder, state_dict(state.encoder))
    load_state_dict(outer, state_dict(state.encoder), rename={"": "encoder"})
    load_state_dict(outer.encoder.first.weight, saved, prefix="encoder.first.weight")
    assert contents(outer.encoder) == contents(inner)
    with pytest.raises(ValueError, match="both have the name 'x.weight'"):
        load_state_dict(inner, saved, prefix="encoder", rename={"first": "x", "second": "x"})


def test_one_template_serves_all_leaves_of_a_rule_shape_and_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    """Making one costs more than loading a leaf: a tree of 100,000 leaves may not make 100,000."""
    ours: list[Tensor] = [torch.randn(3) for _ in range(20)]
    ours += [torch.randn(2) for _ in range(20)] + [torch.randn(3).double() for _ in range(20)]
    rules = {"1": Adam(0.5), "*": Adam()}
    state = setup(rules, ours)
    update(state, ours, [torch.randn_like(x) for x in ours])
    fresh, made = setup(rules, ours), []
    original = fluxpy.saving.decode.state_template
    monkeypatch.setattr(fluxpy.saving.decode, "state_template", lambda *args: made.append(args) or original(*args))
    load_state_dict(fresh, state_dict(state))
    assert contents(fresh) == contents(state) and fresh[1].rule.lr == 0.5
    assert len(made) == 4


def test_strict_lists_everything_and_otherwise_what_fits_is_loaded() -> None:
    ours = {name: torch.ones(2) for name in ("same", "gone", "wide", "other", "half", "bare", "chain")}
    state = setup({"bare": None, "*": Adam(0.5)}, ours)
    here = ours | {"new": torch.ones(2), "wide": torch.ones(3), "half": torch.ones(2).half()}
    del here["gone"]
    rules = {"other": Descent(), "chain": OptimiserChain(Adam()), "*": Adam(0.1)}
    fresh = setup(rules, here)
    before = contents(fresh)
    with pytest.raises(ValueError) as raised:
        load_state_dict(fresh, state_dict(state))
    assert contents(fresh) == before
    for part in (
        "missing: 'new'",
        "unexpected: 'gone'",
        "shape: 'wide': expected float32[3], got float32[2]",
        "shape: 'half': expected float16[2], got float32[2]",
        "rule: 'other': expected Descent ('lr'), got Adam ('lr', 'betas', 'eps')",
        "rule: 'chain': expected OptimiserChain ('rules'), got Adam ('lr', 'betas', 'eps')",
        "rule: 'bare': expected a rule, got none (None)",
        "0 leaves loaded",
    ):
        assert part in str(raised.value)
    report = load_state_dict(fresh, state_dict(state), strict=False)
    assert (report.loaded, report.missing, report.unexpected) == (["same"], ["new"], ["gone"])
    assert (list(report.shape), list(report.rule)) == (["half", "wide"], ["bare", "chain", "other"])
    assert fresh.same.rule.lr == 0.5 and fresh.wide.rule.lr == 0.1 and str(report).startswith("1 leaves loaded")


def test_leaves_that_do_not_fit_for_one_reason_are_told_together() -> None:
    model = {f"w{i}": torch.ones(2) for i in range(50)}
    with pytest.raises(ValueError, match=r"rule: 'w0', 'w1', .* \(50 in all\): expected Descent") as raised:
        load_state_dict(setup(Descent(), model), state_dict(setup(Adam(), model)))
    assert len(str(raised.value)) < 400


def put(*path: Any, to: Any) -> Callable[[Any], Any]:
    def change(d: Any) -> Any:
        *above, last = path
        for key in above:
            d = d[key]
        d[last] = to

    return change


LEAF, NAN = ("leaves", "a"), float("nan")
deep: Any = 1.0
for _ in range(5000):
    deep = [deep]
BAD = {
    "newer": (put("version", to=4), "of version 3 and no newer"),
    "bool version": (put("version", to=True), "what state_dict returns"),
    "leaves": (put("leaves", to=[]), "what state_dict returns"),
    "entry": (put(*LEAF, to=None), r"leaves\['a'\]: expected a dict of names"),
    "extra": (put(*LEAF, "more", to=1), r"leaves\['a'\]: expected a dict of names"),
    "negative count": (put(*LEAF, "count", to=-1), r"leaves\['a'\]\['count'\]: expected a whole number"),
    "bool count": (put(*LEAF, "count", to=False), r"leaves\['a'\]\['count'\]: expected a whole number"),
    "frozen": (put(*LEAF, "frozen", to=1), r"leaves\['a'\]\['frozen'\]"),
    "names": (put(*LEAF, "names", to=[["a"]]), r"leaves\['a'\]\['names'\]"),
    "other names": (put(*LEAF, "names", to=["a", "b"]), "both have the name 'b'"),
    "nan": (put(*LEAF, "rule", "lr", to=NAN), r"leaves\['a'\]: Adam: lr=nan is not allowed"),
    "range": (put(*LEAF, "rule", "betas", to=[0.9, 1.0]), r"leaves\['a'\]: Adam: betas=\(0.9, 1.0\)"),
    "word": (put(*LEAF, "rule", "lr", to="fast"), r"leaves\['a'\]: \['rule'\].lr: expected a value like"),
    "class": (put(*LEAF, "rule", "type", to=7), "expected Adam .*, got 7 .'lr', 'betas', 'eps'."),
    "schedule": (
        put(*LEAF, "rule", "lr", to={"type": "system", "command": "rm"}),
        r"\['rule'\].lr: expected .*schedule",
    ),
    "base": (put(*LEAF, "rule", "lr", to={"type": "Schedule"}), r"\['rule'\].lr: expected .*schedule"),
    "arguments": (put(*LEAF, "rule", "lr", to={"type": "linear", "start": 1.0, "stop": 3}), "unexpected keyword"),
    "steps": (put(*LEAF, "rule", "lr", to={"type": "linear", "start": 1, "end": 0, "steps": 0}), "linear: steps=0"),
    "values": (put(*LEAF, "rule", "lr", to={"type": "constant", "value": -1.0}), "Adam: lr=-1.0 is not allowed"),
    "large": (
        put(*LEAF, "rule", "lr", to=torch.ones(70_000)),
        r"\['rule'\].lr: expected a tensor of at most 65,536 el",
    ),
    "expanded": (
        put(*LEAF, "rule", "lr", to=torch.ones(1).expand(1000)),
        r"\['rule'\].lr: .*got an expanded float32\[1000",
    ),
    "expanded in a list": (
        put(*LEAF, "rule", "betas", to=[0.9, torch.ones(1).expand(70_000)]),
        r"\['rule'\].betas\[1\]: expected a tensor of at most 65,536 elements, got float32\[70000\]",
    ),
    "expanded in a schedule": (
        put(*LEAF, "rule", "lr", to={"type": "constant", "value": torch.ones(1).expand(1000)}),
        r"\['rule'\].lr.value: expected a tensor with all its elements, got an expanded float32\[1000\]",
    ),
    "a tensor as count": (
        put(*LEAF, "count", to=torch.ones(1).expand(70_000)),
        r"a whole number, got float32\[70000\]$",
    ),
    "a tensor in the shape": (
        put(*LEAF, "shape", to=[torch.ones(3), 2]),
        r"\['shape'\]: expected a list of whole numbers, got \[float32\[3\], 2",
    ),
    "a tensor in a list": (
        put(*LEAF, "names", to=[torch.ones(3)]),
        r"list of strings, 'a' among them, got \[float32\[3\]\]",
    ),
    "a tensor as key": (put("leaves", torch.ones(3), to=None), r"expected a string as name, got float32\[3\]"),
    "a tensor as class": (
        put(*LEAF, "rule", "type", to=torch.ones(3)),
        r"expected Adam .*got float32\[3\] .'lr'",
    ),
    "a callable": (put(*LEAF, "rule", "lr", to={"callable": torch.ones(3)}), r"\.lr: expected .*, got .*float32\[3\]"),
    "momenta": (put(*LEAF, "state", to={torch.ones(3): 0}), r"the momenta 'm', 'v', 't', got \[float32\[3\]\]"),
    "deep": (put(*LEAF, "rule", "lr", to=deep), r"leaves\['a'\]: .*recursion"),
    "momentum": (put(*LEAF, "state", "m", to=3), r"\['state'\]\['m'\]: expected a tensor"),
    "integers": (
        put(*LEAF, "state", "m", to=torch.ones(3, 2, dtype=torch.int8)),
        "momentum 'm': .*got .* of whole numbers",
    ),
    "ill-shaped": (put(*LEAF, "state", "v", to=torch.ones(2, 3)), r"expected a tensor \[3, 2\].*got a tensor \[2, 3\]"),
    "sparse": (put(*LEAF, "state", "v", to=torch.ones(3, 2).to_sparse()), "expected a dense tensor"),
    "steps taken": (put(*LEAF, "state", "t", to="3"), r"\['state'\]\['t'\]: expected a number"),
    "no momentum": (
        put(*LEAF, "state", to={"m": torch.ones(3, 2)}),
        "expected the momenta 'm', 'v', 't', got 'm'",
    ),
}


@pytest.mark.parametrize(("change", "match"), BAD.values(), ids=BAD.keys())
def test_what_is_malformed_is_named_and_changes_nothing(change: Any, match: str) -> None:
    state = setup(Adam(), model())
    other = setup(Adam(), model())
    step(other, model(), 0, 2)
    saved = state_dict(fluxpy.adjust(fluxpy.freeze(other), 0.5))
    change(saved)
    before = contents(state), [leaf.rule for _, leaf in fluxpy.leaves(state)]
    with pytest.raises(ValueError, match=match):
        load_state_dict(state, saved)
    assert (contents(state), [leaf.rule for _, leaf in fluxpy.leaves(state)]) == before


MIX = OptimiserChain(fluxpy.AccumGrad(2), fluxpy.ClipNorm(torch.tensor(2.0)), Adam(SCHEDULES[-2], betas=(0.8, 0.9)))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 2**70) | st.floats() | st.text(max_size=3) | st.just(torch.ones(2)),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["type", "callable", "lr", "x", 1]), inner, max_size=3)
        | st.fixed_dictionaries({"type": st.sampled_from([*vars(schedules), "Adam"]), "start": inner, "end": inner})
    ),
    max_leaves=5,
)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_whatever_a_file_holds_it_is_loaded_or_refused_with_a_value_error(data: st.DataObject) -> None:
    rules = {"a": MIX, "b": fluxpy.MixedPrecision(fluxpy.NAdam()), "idle": None, "*": fluxpy.RMSProp(centered=True)}
    params = model()
    state = setup(rules, params)
    step(state, params, 0, 1)
    saved = copy.deepcopy(state_dict(state))
    for _ in range(data.draw(st.integers(1, 3))):
        place = saved
        while True:
            key = data.draw(st.sampled_from(list(place) if isinstance(place, dict) else range(len(place))))
            if not (isinstance(place[key], dict | list) and place[key] and data.draw(st.integers(0, 5))):
                break
            place = place[key]
        if data.draw(st.booleans()):
            place[key] = data.draw(JSON)
        else:
            del place[key]
        if not saved:
            break
    before = contents(state)
    options = {"strict": data.draw(st.booleans()), "hyperparameters": data.draw(st.sampled_from(["load", "keep"]))}
    try:
        load_state_dict(state, saved, **options)
    except ValueError:
        assert contents(state) == before
    state_dict(state)


def test_a_rule_that_reads_its_parameter_and_what_cannot_be_saved() -> None:
    class Sized(Rule):
        kind: Any = None

        def init(self, x: Tensor) -> Any:
            return {"norm": x.norm().item(), "last": None}

        def apply(self, state: Any, x: Tensor, dx: Tensor) -> Any:
            return {"norm": state["norm"], "last": dx}, state["norm"] * dx

    ours, state = model(), setup(Sized(), model())
    step(state, ours, 0, 2)
    fresh = setup(Sized(), {name: 2 * x for name, x in model().items()})
    load_state_dict(fresh, through_file(state_dict(state)))
    assert contents(fresh) == contents(state)
    saved = through_file(state_dict(state))
    saved["leaves"]["a"]["state"]["['last']"] = torch.ones(1).expand(1000)
    with pytest.raises(ValueError, match=r"leaves\['a'\].*\['last'\].*expanded float32\[1000\]"):
        load_state_dict(setup(Sized(), model()), saved)
    for bad in ({1, 2}, object()):
        with pytest.raises(ValueError, match="state_dict: the leaf 'a': .* cannot be saved"):
            state_dict(setup(Sized(bad), ours))
    with pytest.raises(TypeError, match="load_state_dict takes the state tree"):
        load_state_dict(Adam(), {})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must be 'load' or 'keep'"):
        load_state_dict(state, state_dict(state), hyperparameters="merge")  # type: ignore[arg-type]


SCRIPT = """
import sys, torch, fluxpy
torch.set_num_threads(1)
tests, folder, first, last = *sys.argv[1:3], int(sys.argv[3]), int(sys.argv[4])
sys.path.insert(0, tests)
from test_state_dict import RULES, model, step
for name, rule in RULES.items():
    for dtype in (torch.float32, torch.bfloat16):
        ours, path = model(dtype), f"{folder}/{name} {dtype}"
        state = fluxpy.setup(rule, ours)
        fluxpy.freeze(state["frozen"])
        if first:
            fluxpy.load(path, model=ours, state=state)
        step(state, ours, first, last - first)
        fluxpy.save(path, model=ours, state=state)
"""


def test_a_new_process_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """For every rule and chain: 7 steps, save, a new process, load, 7 steps are 14 steps."""
    for name, first, last in (("whole", 0, 14), ("parts", 0, 7), ("parts", 7, 14)):
        (tmp_path / name).mkdir(exist_ok=True)
        code, _, err = run_script(SCRIPT, Path(__file__).parent, tmp_path / name, first, last)
        assert code == 0, err
    for name, rule in RULES.items():
        for dtype in (torch.float32, torch.bfloat16):
            runs = []
            for part in ("whole", "parts"):
                ours = model(dtype)
                fluxpy.load(tmp_path / part / f"{name} {dtype}", model=ours, state=(state := setup(rule, ours)))
                runs.append((contents(ours), contents(state)))
            assert runs[0] == runs[1]
            assert dtype == torch.bfloat16 or runs[0][0] != contents(model(dtype))  # where small steps round to none


def test_an_adjusted_schedule_can_be_loaded():
    """What `setup` was given need not be what counts by now."""
    model = {"a": torch.zeros(2), "b": torch.zeros(2)}
    state = setup(fluxpy.AdamW(lambda count: 0.1 / (1 + count)), model)
    fluxpy.adjust(state["a"], lr=0.05)
    update(state, model, {"a": torch.ones(2), "b": torch.ones(2)})
    fluxpy.load_state_dict(state, fluxpy.state_dict(state))
    assert state["a"].rule.lr == 0.05


def test_a_callable_that_was_replaced_by_a_number_need_not_be_there():
    """What the run was set up with is for information; what counts now are numbers."""
    model = {"w": torch.zeros(2), "b": torch.zeros(2)}
    state = setup(fluxpy.AdamW(lambda count: 0.1 / (1 + count)), model)
    fluxpy.adjust(state, 0.02)
    now = setup(fluxpy.AdamW(0.5), model)
    report = load_state_dict(now, state_dict(state))
    assert now["w"].rule == fluxpy.AdamW(0.02) and "lr was <function" in report.changed["w"]
    assert not load_state_dict(setup(fluxpy.AdamW(0.5), model), state_dict(now)).changed

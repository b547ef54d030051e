"""What every rule keeps to, found by introspection: a rule without a row in the table fails here."""

import copy
import dataclasses
import re
from pathlib import Path
from typing import Any

import optree
import pytest
import torch
from rule_table import ROWS, Row, values
from torch import Tensor

import fluxpy
from fluxpy.rule import Rule, rules_in
from fluxpy.testing import check_rule

UPDATES = 8  # more than any window
SHAPES = {"matrix": (3, 4), "scalar": (), "nothing": (0, 3)}
FIELDS = {key: [f for r in rules_in(row.rule) for f in dataclasses.fields(r)] for key, row in ROWS.items()}
HYPERS = {key: [f for f in fields if f.metadata] for key, fields in FIELDS.items()}
BAD = {
    float: (-1.0, float("nan"), float("-inf"), "0.1", True, None, (0.1,)),
    int: (0, -1, 2.5, float("nan"), "3", True),
    str: ("loud", 0, True),
    bool: (1, "yes", None),
    torch.dtype: (torch.int32, torch.complex64, "float32"),
    tuple: ((0.5,), (0.5, 1.2, 1.2), (-0.5, 1.2), (0.5, float("nan")), (0.5, "1"), (True, 1.2), "ab", 0.5),
}

each_row = pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())


def draw(row: Row, dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    drawn = {name: 20 * torch.randn(row.fit(shape), dtype=dtype, generator=rng) for name, shape in SHAPES.items()}
    drawn["matrix"][0] = 0  # as of a unit that never fires
    return drawn


def tensors(tree: Any) -> list[Tensor]:
    return [t for t in optree.tree_leaves(tree, namespace="fluxpy") if isinstance(t, Tensor)]


def bits(tree: Any) -> list[bytes]:
    return [t.detach().clone().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for t in tensors(tree)]


def begin(row: Row, dtype: torch.dtype = torch.float64, updates: int = 2) -> tuple[Any, Any]:
    model = draw(row, dtype)
    state = fluxpy.setup(row.rule, model)
    for i in range(updates):
        fluxpy.update(state, model, draw(row, dtype, i + 1))
    return state, model


def test_every_rule_has_a_row_that_names_all_its_hyperparameters() -> None:
    public = {n for n, v in vars(fluxpy).items() if isinstance(v, type) and issubclass(v, Rule)}
    assert public - {"Rule"} == ROWS.keys()
    for name, row in ROWS.items():
        assert name in [type(rule).__name__ for rule in rules_in(row.rule)]
        fixed = {f.name for f in HYPERS[name] if f.metadata["fixed"]}
        assert (set(row.fixed), set(row.adjusted)) == (fixed, {f.name for f in HYPERS[name]} - fixed)
        assert all(v != values(row.rule)[n] for n, v in (row.adjusted | row.fixed).items())
        assert {f.name for f in FIELDS[name]} - {f.name for f in HYPERS[name]} <= {"rule", "rules"}
        first, *rest = dataclasses.fields(getattr(fluxpy, name))
        assert not first.kw_only and all(f.kw_only != (f.name in ("betas", "momentum", "decay")) for f in rest)


def test_the_docs_say_what_each_rule_costs() -> None:
    """Bytes for each number of a float32 matrix, and whether the rule is elementwise."""
    page = (Path(__file__).parent.parent / "docs" / "rules.md").read_text("utf-8")
    table = page.split("### What they cost")[1].split("\n## ")[0]
    told = {}
    for names, cost, kind in re.findall(r"^\| (`.*) \| (.*) \| (.*) \|$", table, re.MULTILINE):
        told |= dict.fromkeys(re.findall(r"`(\w+)`", names), (cost, kind))
    assert told.keys() >= ROWS.keys()
    x = torch.zeros(64, 64)
    for name, row in ROWS.items():
        cost, kind = told[name]
        rule = row.given({"dtype": torch.float32})
        if kind != "as the rule":
            arrays = [t for t in tensors(rule.init(x)) if t.ndim]
            each = sum(t.nbytes for t in arrays) / (128 if name == "Adafactor" else x.numel())
            assert float(cost.split()[0]) == each, name
            assert kind.startswith("yes") == rule.elementwise, name


@each_row
def test_every_rule_keeps_the_contract(row: Row) -> None:
    check_rule(row.rule, adjusted=row.adjusted)


@pytest.mark.parametrize("row", [r for r in ROWS.values() if not r.rule.elementwise], ids=lambda r: str(r.rule))
def test_rules_that_are_not_elementwise_take_complex_parameters_too(row: Row) -> None:
    """But for those that say so."""
    if isinstance(row.rule, fluxpy.MixedPrecision | fluxpy.Muon | fluxpy.Adafactor):
        with pytest.raises(ValueError, match=f"{type(row.rule).__name__} takes .*real .*complex"):
            fluxpy.setup(row.rule, draw(row, torch.complex64))
        return
    state, model = begin(row, torch.complex64, updates=UPDATES)
    assert all(t.isfinite().all() for t in tensors((state, model)))
    assert all(x.dtype == torch.complex64 for x in model.values())


@pytest.mark.parametrize("row", [r for r in ROWS.values() if r.rule.elementwise], ids=lambda r: str(r.rule))
def test_complex_parameters_are_pairs_of_real_ones_to_elementwise_rules(row: Row) -> None:
    state, model = begin(row, torch.complex64, updates=UPDATES)
    real = {name: torch.view_as_real(x) for name, x in draw(row, torch.complex64).items()}
    twin = fluxpy.setup(row.rule, real)
    for i in range(UPDATES):
        fluxpy.update(
            twin, real, {name: torch.view_as_real(g) for name, g in draw(row, torch.complex64, i + 1).items()}
        )
    for (path, a), (_, b) in zip(fluxpy.leaves(state), fluxpy.leaves(twin), strict=True):
        assert a.count == b.count, path
    for x, y in zip(
        optree.tree_leaves((state, model), namespace="fluxpy"),
        optree.tree_leaves((twin, real), namespace="fluxpy"),
        strict=True,
    ):
        torch.testing.assert_close(torch.view_as_real(x) if x.is_complex() else x, y)


def test_a_window_counts_updates_alike_for_all_leaves() -> None:
    """One without a gradient adds zero, and one that was frozen is in step when it thaws."""
    model = {name: torch.zeros(()) for name in ("full", "half", "frozen")}
    state = fluxpy.setup(fluxpy.OptimiserChain(fluxpy.AccumGrad(2), fluxpy.Descent(1.0)), model)
    fluxpy.freeze(state["frozen"])
    fluxpy.update(state, model, dict.fromkeys(model, torch.tensor(8.0)))
    fluxpy.thaw(state)
    fluxpy.update(state, model, {"full": torch.tensor(4.0), "half": None, "frozen": torch.tensor(4.0)})
    assert [x.item() for x in model.values()] == [-6.0, -4.0, -2.0]


FIXED = [(key, name) for key, row in ROWS.items() for name in row.fixed]


@pytest.mark.parametrize(("key", "name"), FIXED)
def test_what_shapes_the_state_cannot_be_adjusted(key: str, name: str) -> None:
    state, _ = begin(ROWS[key])
    with pytest.raises(ValueError, match=name):
        fluxpy.adjust(state, **{name: ROWS[key].fixed[name]})
    assert state["matrix"].rule == ROWS[key].rule


@each_row
def test_what_is_out_of_range_is_refused(row: Row) -> None:
    """By the rule when it is made and by adjust, with name, value and range; nothing is changed."""
    state, _ = begin(row)
    for name, value in (row.adjusted | row.fixed).items():
        usual = values(row.rule)[name]
        for bad in [bad for bad in BAD[type(value)] if (type(bad), bad) != (type(usual), usual)]:
            bad = -bad if name == "beta2_decay" and type(bad) is float else bad  # that is below zero
            with pytest.raises(ValueError, match=rf"\b{name}=.*; .*(must|cannot)") as caught:
                row.given({name: bad})
            assert repr(bad) in str(caught.value)
            with pytest.raises(ValueError, match=name):
                fluxpy.adjust(state, **{name: bad})
    assert state["matrix"].rule == row.rule


@pytest.mark.parametrize(
    "bad", [{"etas": (1.1, 1.2)}, {"etas": (0.5, 0.9)}, {"step_sizes": (1.0, 0.5)}, {"lr": lambda count: 0.1}]
)
def test_rprop_refuses_what_cannot_work(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"Rprop: {next(iter(bad))}="):
        fluxpy.Rprop(**bad)


@each_row
def test_tensors_may_stand_for_hyperparameters_and_no_rule_reads_them(row: Row) -> None:
    """On the meta device there is nothing to read: a rule that tries raises."""

    def to_tensor(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(to_tensor, value))
        return torch.tensor(value, device="meta") if type(value) is float else value

    given = {n: to_tensor(v) for n, v in values(row.rule).items() if n != "norm_type"}
    rule = row.given(given | ({"nonfinite": "ignore"} if "nonfinite" in given else {}))
    for dtype in (torch.float64, torch.float16):
        x = torch.zeros(row.fit((3,)), dtype=dtype, device="meta")
        state = rule.init_any(x)
        for _ in range(UPDATES):
            state, change = rule.apply(state, x, torch.ones_like(x))
            assert change is None or getattr(change, "value", change).dtype == dtype


@each_row
def test_one_can_differentiate_by_every_hyperparameter(row: Row) -> None:
    numbers = {n: v for n, v in row.adjusted.items() if isinstance(v, float | tuple) and n != "norm_type"}
    tensors = {n: torch.tensor(v, dtype=torch.float64, requires_grad=True) for n, v in numbers.items()}
    start = {"matrix": draw(row)["matrix"]}
    state = fluxpy.setup(row.given({n: tuple(t) if t.ndim else t for n, t in tensors.items()}), start)
    plain, same, model = fluxpy.setup(row.given(numbers), start), copy.deepcopy(start), start
    for i in range(UPDATES):
        slope = draw(row, seed=i + 1)["matrix"]
        state, model = fluxpy.update(state, model, {"matrix": slope * model["matrix"]}, inplace=False)
        fluxpy.update(plain, same, {"matrix": slope * same["matrix"]})
    room = 1e-6 if row.rule.keeps_master else 1e-12  # the master copy is in float32
    torch.testing.assert_close(model["matrix"].detach(), same["matrix"], rtol=room, atol=0)
    leaf = state["matrix"]
    evaluated = leaf.rule.evaluation(leaf.state, model["matrix"])
    slopes = torch.autograd.grad((model["matrix"] + evaluated).sum(), list(tensors.values()))
    for name, slope in zip(tensors, slopes, strict=True):
        assert slope.isfinite().all(), name

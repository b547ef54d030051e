"""Lookahead and Cautious: around every kind of rule, on every path, and what they refuse."""

from typing import Any

import pytest
import torch
from helpers import SHAPES, Own, Run, Whole, needs_compiler, since_2_13, transposed, without
from test_engine import Pair, paths_of

import fluxpy
from fluxpy import (
    AccumGrad,
    Adam,
    AdamW,
    Cautious,
    ClipGlobalNorm,
    ClipNorm,
    Descent,
    Lion,
    Lookahead,
    MixedPrecision,
    Momentum,
    OptimiserChain,
)  # fmt: skip
from fluxpy.testing.tree_promises import leaf_by_leaf

CASES: dict[str, tuple[Any, set[str]]] = {
    "lookahead": (Lookahead(Adam(0.02), k=3), {"Shadow"}),
    "lookahead, clipped inside": (Lookahead(OptimiserChain(ClipGlobalNorm(0.5), AdamW(0.02)), k=2), {"Shadow"}),
    "lookahead, gathering inside": (Lookahead(OptimiserChain(AccumGrad(2), Momentum(0.1)), k=2), {"Shadow"}),
    "lookahead in a chain": (OptimiserChain(ClipNorm(0.5), Lookahead(Momentum(0.1), k=2)), {"Shadow"}),
    "lookahead of whole arrays": (Lookahead(Whole(), k=2), set()),
    "cautious": (Cautious(Momentum(0.1)), {"Eager"}),
    "cautious in a chain": (OptimiserChain(ClipGlobalNorm(0.5), Cautious(Lion(0.1)), Descent(0.1)), {"Fused"}),
    "gathering, cautious": (OptimiserChain(AccumGrad(2), Cautious(Adam(0.01))), {"Eager"}),
    "cautious, clipped inside": (Cautious(OptimiserChain(ClipNorm(0.5), ClipGlobalNorm(0.9), Adam(0.02))), {"Eager"}),
    "cautious of whole arrays": (Cautious(Whole()), set()),
    "lookahead of what no kernel steps": (Lookahead(Own(), k=2), {"Eager"}),
    "lookahead, cautious": (Lookahead(Cautious(Own()), k=2), {"Eager"}),
    "master": (MixedPrecision(Lookahead(Cautious(Adam(0.02)), k=3)), {"Eager"}),
}
each_case = pytest.mark.parametrize("rule, paths", CASES.values(), ids=CASES.keys())


@each_case
@pytest.mark.parametrize("column", ["apart", "flat"])
def test_every_path_has_the_plain_paths_numbers(rule: Any, paths: set[str], column: str) -> None:
    pair = Pair(rule, column).step(7).check(1e-6 if isinstance(rule, MixedPrecision) else 1e-12)
    assert paths_of(pair.state) - {"Reference"} == paths
    pair.both(fluxpy.freeze, "1").step(2).both(fluxpy.adjust, "0", lr=0.03).step(2).both(fluxpy.thaw).step(2)
    pair.both(fluxpy.reset, "3").both(fluxpy.adjust, lr=fluxpy.scale(0.5)).step(4)
    pair.check(1e-6 if isinstance(rule, MixedPrecision) else 1e-12)


@pytest.mark.parametrize("layout", ["apart", "flat"])
def test_a_kernel_and_the_slow_weights_beside_it(layout: str) -> None:
    """The numbers of the rule's own `apply`, through all that happens to leaves; of a large one in pieces."""
    rule = OptimiserChain(ClipGlobalNorm(0.5), Lookahead(AdamW(0.02), k=3, alpha=0.4))
    shapes: dict[str, Any] = SHAPES | {"f": (300, 500), "g": (2,), "h": (1000, 2)}
    run, plain = Run(rule, layout, shapes), Run(rule, layout, shapes)
    for turn in range(16):
        for one in (run, plain):
            if turn == 3:
                fluxpy.freeze(one.state.b)
                fluxpy.adjust(one.state.d, lr=0.05)
            if turn == 5:
                fluxpy.adjust(fluxpy.thaw(one.state), k=uneven)
            if turn == 7:
                fluxpy.adjust(one.state.a, alpha=0.9)
            if turn == 9:
                fluxpy.reset(one.state.c)
            if turn == 11:
                one.state, one.model = fluxpy.update(one.state, one.model, one.grads(), inplace=False)
        leaf_by_leaf(plain.state, rule)
        change = without("e") if turn == 4 else transposed_all if turn == 6 else lambda grads: grads
        run.step(1, change), plain.step(1, change)
        run.equals(plain, room=1e-11)
        assert paths_of(run.state) - {"Reference"} == {"Shadow"}
    assert {run.state[name].state[1].steps for name in "bce"} != {0}


def uneven(count: int) -> int:
    return 2 + count % 2


def transposed_all(grads: dict[str, Any]) -> dict[str, Any]:
    return {name: transposed(dx) for name, dx in grads.items()}


@pytest.mark.filterwarnings("ignore:.*Profiler clears events")  # of PyTorch before 2.13
def test_within_a_window_only_the_kernel_runs() -> None:
    """No pass over the slow weights, nor over the parameters."""
    model = {str(i): torch.randn(40, 40) for i in range(20)}
    state = fluxpy.setup(Lookahead(AdamW(0.01), k=6), model)
    grads = {name: torch.randn(40, 40) for name in model}
    plain = fluxpy.setup(AdamW(0.01), model)
    for _ in range(3):  # in the first steps more is called, to be kept
        fluxpy.update(state, model, grads)
        fluxpy.update(plain, model, grads)
    calls = [operators(lambda s=s: fluxpy.update(s, model, grads)) for s in (plain, state, state, state, plain)]
    assert calls[0] == calls[1] == calls[2] == calls[4] and len(calls[3]) > len(calls[0])


def operators(step: Any) -> list[str]:
    """The names of PyTorch's operators that it calls."""
    with torch.profiler.profile() as profile:
        step()
    return [event.name for event in profile.events() if event.name.startswith("aten::")]


@needs_compiler
@since_2_13
def test_compiled() -> None:
    """Also with rates that differ, of which none may change another's share."""
    pair = Pair(CASES["lookahead, cautious"][0], "compiled", [(4, 3), (7,), (5, 2)]).step(5).check(1e-11)
    assert paths_of(pair.state) == {"Compiled"}
    pair.both(fluxpy.adjust, "0", lr=0.5).step(4).check(1e-11)


@needs_compiler
def test_what_goes_before_a_cautious_rule_counts_for_its_share() -> None:
    """Leaves whose numbers differ before a total cannot share one kernel."""
    rule = OptimiserChain(fluxpy.WeightDecay(0.1), Cautious(Momentum(0.1)))
    pair = Pair(rule, "compiled", [(4, 3), (7,), (5, 2)])
    pair.both(fluxpy.adjust, "0", weight_decay=3.0).both(fluxpy.adjust, "1", weight_decay=1.0).step(8).check(1e-11)


@pytest.mark.parametrize("rule", [Lookahead(Adam(0.02), k=2), Cautious(Adam(0.02)), Lookahead(Whole(), k=2)])
def test_complex_parameters_are_pairs(rule: Any) -> None:
    model = {"w": torch.randn(4, 3, dtype=torch.complex128), "v": torch.randn(5, dtype=torch.complex128)}
    pairs = {name: torch.view_as_real(x).clone() for name, x in model.items()}
    states = fluxpy.setup(rule, model), fluxpy.setup(rule, pairs)
    for _ in range(5):
        grads = {name: torch.randn_like(x) for name, x in model.items()}
        fluxpy.update(states[0], model, grads)
        fluxpy.update(states[1], pairs, {name: torch.view_as_real(dx) for name, dx in grads.items()})
    for name, x in model.items():
        torch.testing.assert_close(torch.view_as_real(x), pairs[name])


def test_verbs_reach_the_rule_inside_and_its_own_numbers() -> None:
    model = {"w": torch.zeros(3)}
    rule = OptimiserChain(ClipGlobalNorm(1.0), Lookahead(Cautious(Adam(0.1)), k=4))
    state = fluxpy.setup(rule, model)
    assert (rule.lr, rule.k, rule.alpha, rule[1].lr) == (0.1, 4, 0.5, 0.1)
    fluxpy.adjust(fluxpy.adjust(state, 0.3), k=2, alpha=0.25, betas=(0.5, 0.6))
    expected = Lookahead(Cautious(Adam(0.3, (0.5, 0.6))), k=2, alpha=0.25)
    assert state["w"].rule[1] == expected and fluxpy.value(state["w"], "k") == 2
    with pytest.raises(ValueError, match="has no hyperparameter 'sync'"):
        fluxpy.adjust(state, sync=3)
    with pytest.raises(ValueError, match="Lookahead: k=0"):
        fluxpy.adjust(state, k=0)


def test_a_new_k_acts_at_once() -> None:
    model = {"w": torch.zeros(1)}
    state = fluxpy.setup(Lookahead(Descent(1.0), k=10), model)
    for _ in range(3):
        fluxpy.update(state, model, {"w": -torch.ones(1)})
    fluxpy.adjust(state, k=2)
    fluxpy.update(state, model, {"w": -torch.ones(1)})
    assert model["w"].item() == 2.0  # half of the way from 0 to 4


def test_the_slow_weights_are_those_to_evaluate_with() -> None:
    for dtype in (torch.float64, torch.complex128):
        model = {"w": torch.randn(3, dtype=dtype)}
        start = model["w"].clone()
        state = fluxpy.setup(Lookahead(Descent(0.1), k=2), model)
        for i in range(3):
            rule, x = state["w"].rule, model["w"]
            slow = rule.evaluation(state["w"].state, x)
            assert torch.equal(slow, start if i < 2 else x) and slow.dtype == dtype
            fluxpy.update(state, model, {"w": torch.randn(3, dtype=dtype)})


def test_what_cannot_be_inside_is_refused() -> None:
    for wrapper in (Lookahead, Cautious):
        with pytest.raises(TypeError, match=f"{wrapper.__name__} takes a rule, but got 0.1"):
            wrapper(0.1)
        with pytest.raises(ValueError, match=rf"write MixedPrecision\({wrapper.__name__}\(...\)\)"):
            wrapper(MixedPrecision(Adam()))
    for inner in (Lookahead(Adam()), OptimiserChain(Lookahead(Adam()))):
        with pytest.raises(ValueError, match="Lookahead must be last in its chain"):
            OptimiserChain(inner, ClipGlobalNorm())
    with pytest.raises(ValueError, match=r"OptimiserChain\(AccumGrad\(n\), Cautious\(...\)\)"):
        Cautious(OptimiserChain(AccumGrad(2), Adam()))


@pytest.mark.parametrize("around", [Lookahead, Cautious])
@pytest.mark.parametrize("inside", [fluxpy.Averaged(Own()), Lookahead(Own()), fluxpy.ScheduleFreeSGD()], ids=str)
def test_weights_to_evaluate_with_are_not_hidden(around: Any, inside: Any) -> None:
    with pytest.raises(ValueError, match="weights of its own to evaluate with"):
        around(inside)

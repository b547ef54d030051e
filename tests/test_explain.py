"""explain: each member in order, and a warning for what is likely a mistake."""

import pytest
import torch

from fluxpy import (
    AccumGrad,
    Adam,
    AdamW,
    ClipGlobalNorm,
    ClipGrad,
    ClipNorm,
    Lookahead,
    MixedPrecision,
    Momentum,
    OptimiserChain,
    RMSProp,
    Rule,
    SignDecay,
    WeightDecay,
    explain,
    setup,
)

GOOD = [
    Adam(),
    OptimiserChain(AccumGrad(4), ClipGlobalNorm(1.0), WeightDecay(1e-4), Adam()),
    OptimiserChain(OptimiserChain(AccumGrad(2), ClipGrad(1.0)), AdamW()),
    MixedPrecision(OptimiserChain(ClipGlobalNorm(1.0), AdamW())),
]


def warnings_of(rule: Rule) -> list[str]:
    return [line for line in explain(rule).splitlines() if line.startswith("warning: ")]


@pytest.mark.parametrize("rule", GOOD, ids=str)
def test_a_good_chain_has_no_warning(rule: Rule) -> None:
    assert warnings_of(rule) == []


@pytest.mark.parametrize(
    "rule, words",
    [
        (OptimiserChain(Adam(), WeightDecay()), "WeightDecay stands behind Adam"),
        (OptimiserChain(Adam(), SignDecay()), "SignDecay stands behind Adam"),
        (OptimiserChain(Adam(), ClipGlobalNorm()), "bounds the step and not the gradient"),
        (OptimiserChain(ClipGlobalNorm(), AccumGrad(2), Adam()), "AccumGrad is not first"),
        (OptimiserChain(ClipNorm(1.0), Adam()), "clips each array by itself"),
        (OptimiserChain(RMSProp(1.0), Momentum(0.01)), "both have a rate"),
        (OptimiserChain(ClipGrad(1.0)), "no member has a rate"),
    ],
    ids=str,
)
def test_what_is_likely_a_mistake(rule: Rule, words: str) -> None:
    assert len(warnings_of(rule)) == 1
    assert words in warnings_of(rule)[0]


def test_members_in_order_with_their_values() -> None:
    lines = explain(OptimiserChain(AccumGrad(4), OptimiserChain(ClipGlobalNorm(2.0)), Momentum(0.5))).splitlines()
    assert lines[0] == "1. AccumGrad(n=4)"
    assert lines[2].startswith("2. ClipGlobalNorm(max_norm=2.0")
    assert lines[4] == "3. Momentum(lr=0.5, momentum=0.9)"
    assert "`v = momentum · v + dx`" in lines[5]


def test_a_sentence_does_not_end_in_a_name() -> None:
    assert "[Zhang et al. 2019]: `k` steps" in explain(Lookahead(Adam()))


def test_a_rule_of_ones_own() -> None:
    class Sign(Rule):
        """`lr · sign(dx)`: the sign alone. More of no use here."""

        lr: float = 0.1

    class Bare(Rule):
        pass

    Bare.__doc__ = None
    assert "`lr · sign(dx)`: the sign alone." in explain(Sign())
    assert "More" not in explain(Sign())
    assert "no docstring" in explain(Bare())


def test_no_rule() -> None:
    with pytest.raises(TypeError, match=r"explain\(leaf.rule\)"):
        explain(setup(Adam(), torch.zeros(2)))

"""One row for each rule: an instance, other values for all that can be adjusted, and who says what it must do."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import oracles
import prodigyopt
import schedulefree
import torch

import fluxpy
from fluxpy.rule import Rule, hyperparameters, replace, rules_in


@dataclass(frozen=True)
class Row:
    """`adjusted` has another legal value for every adjustable hyperparameter, `fixed` for every one that is not.

    Either `twin` is the optimiser of `torch.optim` (or of the rule's own package), which takes the rule's
    hyperparameters by their names, or `oracle` makes a step from the paper in NumPy. A rule for `matrices` alone gets
    those in place of scalars and vectors.
    """

    rule: Rule
    adjusted: dict[str, Any]
    fixed: dict[str, Any] = field(default_factory=dict)
    twin: Callable[..., torch.optim.Optimizer] | None = None
    oracle: Callable[[], oracles.Step] | None = None
    window: int = 1  # updates in one application
    matrices: bool = False

    def fit(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """A shape that the rule takes: the given one, or a matrix of as many elements."""
        return (*shape, *[1] * (2 - len(shape))) if self.matrices else shape

    def given(self, values: dict[str, Any]) -> Rule:
        return replace(self.rule, lambda _, name, old: values.get(name, old))


def values(rule: Rule) -> dict[str, Any]:
    """All hyperparameters of a rule and the rules in it."""
    return {name: v for inner in rules_in(rule) for name, v in hyperparameters(inner).items()}


def torch_row(rule: Rule, twin: Any, adjusted: dict[str, Any], fixed: dict[str, Any] | None = None) -> Row:
    return Row(rule, {**adjusted}, fixed or {}, twin=partial(twin, foreach=False))


def paper_row(rule: Rule, oracle: Callable[[], oracles.Step], adjusted: dict[str, Any]) -> Row:
    return Row(rule, adjusted, oracle=oracle)


def schedule_free(kind: Any) -> Callable[..., torch.optim.Optimizer]:
    """An optimiser of the package, in the mode in which it steps."""

    def make(params: Any, **values: Any) -> torch.optim.Optimizer:
        optimizer = kind(params, foreach=False, **values)
        optimizer.train()
        return optimizer

    return make


opt = torch.optim
ADAM = {"lr": 3e-2, "betas": (0.7, 0.95), "eps": 1e-3}
SCHEDULE_FREE = {"weight_decay": 0.3, "warmup_steps": 7, "r": 0.5, "weight_lr_power": 1.0}
NORM = {"max_norm": 0.5, "norm_type": 3.0, "nonfinite": "ignore"}

ROWS: dict[str, Row] = {
    "Descent": torch_row(fluxpy.Descent(), opt.SGD, {"lr": 0.3}),
    "Momentum": torch_row(fluxpy.Momentum(), opt.SGD, {"lr": 0.3, "momentum": 0.5}),
    "Nesterov": torch_row(fluxpy.Nesterov(), partial(opt.SGD, nesterov=True), {"lr": 0.3, "momentum": 0.5}),
    "RMSProp": torch_row(fluxpy.RMSProp(), opt.RMSprop, {"lr": 3e-2, "alpha": 0.8, "eps": 1e-3}, {"centered": True}),
    "Rprop": torch_row(fluxpy.Rprop(), opt.Rprop, {"etas": (0.3, 1.5), "step_sizes": (4e-3, 2e-2)}, {"lr": 1.5e-2}),
    "Adam": torch_row(fluxpy.Adam(), opt.Adam, ADAM),
    "AdamW": torch_row(fluxpy.AdamW(), opt.AdamW, {**ADAM, "weight_decay": 0.3}),
    "AMSGrad": torch_row(fluxpy.AMSGrad(), partial(opt.Adam, amsgrad=True), ADAM),
    "NAdam": torch_row(fluxpy.NAdam(), opt.NAdam, {**ADAM, "momentum_decay": 0.1}),
    "RAdam": torch_row(fluxpy.RAdam(), opt.RAdam, ADAM),
    "AdaMax": torch_row(fluxpy.AdaMax(), opt.Adamax, ADAM),
    "AdaGrad": torch_row(fluxpy.AdaGrad(), opt.Adagrad, {"lr": 0.3, "eps": 1e-3}),
    "AdaDelta": torch_row(fluxpy.AdaDelta(), opt.Adadelta, {"lr": 0.3, "rho": 0.7, "eps": 1e-3}),
    "Lion": paper_row(fluxpy.Lion(), oracles.lion, {"lr": 1e-2, "betas": (0.6, 0.95)}),
    "OAdam": paper_row(fluxpy.OAdam(), oracles.oadam, ADAM),
    "AdaBelief": paper_row(fluxpy.AdaBelief(), oracles.adabelief, ADAM),
    "AdEMAMix": paper_row(
        fluxpy.AdEMAMix(),
        oracles.ademamix,
        {**ADAM, "betas": (0.7, 0.95, 0.99), "alpha": 2.0, "weight_decay": 0.3},
    ),
    # An eps above the gradients that check_rule gives, or it would not show.
    "ADOPT": paper_row(fluxpy.ADOPT(), oracles.adopt, {**ADAM, "eps": 60.0}),
    "ScheduleFreeSGD": Row(
        fluxpy.ScheduleFreeSGD(0.5),  # of a rate of 1 no power shows
        {"lr": 0.3, "momentum": 0.6, **SCHEDULE_FREE},
        twin=schedule_free(schedulefree.SGDScheduleFree),
    ),
    "ScheduleFreeAdamW": Row(
        fluxpy.ScheduleFreeAdamW(), {**ADAM, **SCHEDULE_FREE}, twin=schedule_free(schedulefree.AdamWScheduleFree)
    ),
    "Muon": Row(
        fluxpy.Muon(),
        {
            "lr": 3e-2,
            "momentum": 0.6,
            "weight_decay": 0.3,
            "nesterov": False,
            "ns_steps": 3,
            "adjust_lr_fn": "match_rms_adamw",
        },
        twin=opt.Muon,
        matrices=True,
    ),
    "Adafactor": torch_row(
        fluxpy.Adafactor(),
        opt.Adafactor,
        # An eps above the numbers that check_rule gives, or it would not show.
        {"lr": 0.3, "beta2_decay": -0.5, "eps": (20.0, 30.0), "d": 1.5, "weight_decay": 0.3},
    ),
    "Prodigy": Row(
        fluxpy.Prodigy(d0=1e-3),  # first steps well above the rounding of the parameters
        {**ADAM, "weight_decay": 0.3, "d_coef": 2.0},
        {"d0": 1e-2},
        twin=prodigyopt.Prodigy,
    ),
    "WeightDecay": paper_row(fluxpy.WeightDecay(), oracles.weight_decay, {"weight_decay": 0.3}),
    "SignDecay": paper_row(fluxpy.SignDecay(), oracles.sign_decay, {"sign_decay": 0.3}),
    "ClipGrad": paper_row(fluxpy.ClipGrad(), oracles.clip_grad, {"clip_value": 0.01}),
    "ClipNorm": paper_row(fluxpy.ClipNorm(), oracles.clip_norm, NORM),
    "ClipGlobalNorm": paper_row(fluxpy.ClipGlobalNorm(), oracles.clip_global_norm, NORM),
    "OptimiserChain": torch_row(
        fluxpy.OptimiserChain(fluxpy.WeightDecay(0.42), fluxpy.Adam(0.1)), opt.Adam, {**ADAM, "weight_decay": 0.05}
    ),
    "AccumGrad": Row(
        fluxpy.OptimiserChain(fluxpy.AccumGrad(7), fluxpy.Momentum()),
        {"n": 2, "lr": 0.3, "momentum": 0.5},
        oracle=oracles.accumulated_momentum,
        window=7,
    ),
    "Averaged": paper_row(
        fluxpy.Averaged(fluxpy.Momentum()), oracles.averaged_momentum, {"decay": 0.5, "lr": 0.3, "momentum": 0.5}
    ),
    "Lowered": torch_row(
        fluxpy.Lowered(fluxpy.AdamW()), opt.AdamW, {**ADAM, "weight_decay": 0.3}, {"dtype": torch.float64}
    ),
    # Of bfloat16, which alone it rounds, see tests/test_rounding.py.
    "StochasticRounding": torch_row(
        fluxpy.StochasticRounding(fluxpy.AdamW()), opt.AdamW, {**ADAM, "weight_decay": 0.3}
    ),
    "Lookahead": paper_row(fluxpy.Lookahead(fluxpy.Adam()), oracles.lookahead, {**ADAM, "k": 3, "alpha": 0.8}),
    "Cautious": paper_row(fluxpy.Cautious(fluxpy.Adam()), oracles.cautious, ADAM),
    "MixedPrecision": torch_row(
        fluxpy.MixedPrecision(fluxpy.AdamW()), opt.AdamW, {**ADAM, "weight_decay": 0.3}, {"dtype": torch.float64}
    ),
}

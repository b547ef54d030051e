"""TorchOptimizer gives torch's numbers on the cases by which torch tests its own optimisers (`optim_db`)."""

import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fluxpy
from fluxpy import OptimiserChain, Rule, WeightDecay
from fluxpy.interop import TorchOptimizer

# Run by itself: what tests of torch import changes global settings. Their base class for tests is not needed here.
READ_CASES = """
import sys, types, unittest, warnings
warnings.simplefilter("ignore")
sys.modules.setdefault("expecttest", types.SimpleNamespace(TestCase=unittest.TestCase))
import torch
from torch.testing._internal.common_optimizers import optim_db
torch.save([(info.name, case.kwargs, case.desc) for info in optim_db for case in info.optim_inputs_func("cpu")], {!r})
"""
Case = tuple[str, dict[str, Any], str]

# The algorithms that have a rule, in all modes that can be written as a chain.
RULES: dict[str, Any] = {
    "Adadelta": fluxpy.AdaDelta,
    "Adafactor": fluxpy.Adafactor,
    "Adagrad": fluxpy.AdaGrad,
    "Adam": fluxpy.Adam,
    "Adamax": fluxpy.AdaMax,
    "AdamW": fluxpy.AdamW,
    "Muon": fluxpy.Muon,
    "NAdam": fluxpy.NAdam,
    "RAdam": fluxpy.RAdam,
    "RMSprop": fluxpy.RMSProp,
    "Rprop": fluxpy.Rprop,
    "SGD": fluxpy.Descent,
}
# What has none: another algorithm, or another kind of gradient.
OTHERS = {"ASGD", "LBFGS", "SparseAdam"}
# What no chain of rules does.
FAILING = {
    "SGD: dampening": "the first gradient enters the average whole, later ones with a factor 1 - dampening",
    "Muon: passing alternative ns_coefficients": "the coefficients are those of the algorithm",
}


class Ascend(Rule):
    """What `maximize` is: a rule of a user's own, in front of the others."""

    elementwise = True

    def apply(self, state: Any, x: Tensor, dx: Tensor) -> tuple[Any, Any]:
        return state, -dx


def rule_for(name: str, given: dict[str, Any]) -> Rule:
    """A case as one writes it here."""
    options = dict(given)
    maximize, penalty, start = options.pop("maximize", False), options.pop("weight_decay", 0), []
    options.pop("initial_accumulator_value", None)
    options.pop("ns_coefficients", None)
    rule, after = RULES[name], []
    if name in ("Adafactor", "Muon") and penalty:  # theirs is beside the step, as AdamW's
        rule, penalty = partial(rule, weight_decay=penalty), 0
    if name == "AdamW":
        decoupled, penalty = penalty or 1e-2, 0
        if options.pop("amsgrad", False):
            after = [WeightDecay(1e-3 * decoupled)]  # beside the step and not in front of it: decoupled
            rule = fluxpy.AMSGrad
        else:
            rule = partial(rule, weight_decay=decoupled)
    elif options.pop("decoupled_weight_decay", False):
        after, penalty = [WeightDecay(rule().lr * penalty)], 0
    if options.pop("amsgrad", False):
        rule = fluxpy.AMSGrad
    if decay := options.pop("lr_decay", 0):
        rate = options["lr"]
        options["lr"] = lambda count: rate / (1 + count * decay)
    if name == "SGD":
        options.setdefault("lr", 1e-3)
        if "momentum" in options:
            rule = fluxpy.Nesterov if options.pop("nesterov", False) else fluxpy.Momentum
            options.pop("dampening", None)
    elif name == "RMSprop" and "momentum" in options:
        rule, after = partial(rule, lr=1.0), [fluxpy.Momentum(1e-2, options.pop("momentum"))]
    start += [Ascend()] if maximize else []
    start += [WeightDecay(penalty)] if penalty else []
    return OptimiserChain(*start, rule(**options), *after)


def parameters(name: str) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    shapes = [(3, 4), (4, 2), (1, 5)] if name == "Muon" else [(3, 4), (4,), (2, 2, 2), (1, 5)]
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def step(params: list[nn.Parameter], optimizer: torch.optim.Optimizer, turn: int) -> None:
    """A gradient that depends on the parameters; one of them has none every third time."""
    optimizer.zero_grad()
    loss = sum((x - (i + 1) * 0.3).pow(2).sum() + (x * (turn + 1)).sin().sum() for i, x in enumerate(params))
    loss.backward()
    if turn % 3 == 1:
        params[1].grad = None
    optimizer.step()


def difference(name: str, given: dict[str, Any], loaded_at: int | None) -> float:
    """The largest difference of the changes in 20 steps, in units of the largest change."""
    theirs, ours = parameters(name), parameters(name)
    one_by_one = {} if name == "Muon" else {"foreach": False}
    twin = getattr(torch.optim, name)(theirs, **one_by_one, **given)
    start = [x.detach().clone() for x in theirs]
    optimizer = TorchOptimizer(rule_for(name, given), ours)
    if "initial_accumulator_value" in given:
        optimizer.load_state_dict(twin.state_dict())
    for turn in range(20):
        if turn == loaded_at:
            optimizer.load_state_dict(twin.state_dict())
            for x, y in zip(ours, theirs, strict=True):
                x.data.copy_(y)
        step(theirs, twin, turn)
        if loaded_at is None or turn >= loaded_at:
            step(ours, optimizer, turn)
    size = max((x - x0).abs().max().item() for x, x0 in zip(theirs, start, strict=True))
    assert size > 1e-4
    return max((x - y).abs().max().item() for x, y in zip(ours, theirs, strict=True)) / size


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> list[Case]:
    file = tmp_path_factory.mktemp("optim_db") / "cases.pt"
    done = subprocess.run([sys.executable, "-c", READ_CASES.format(str(file))], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = torch.load(file, weights_only=True)
    # Rates that are tensors in the dtype of the runs: a float32 rate is rounded where it is multiplied.
    return [(name, {k: x.double() if isinstance(x, Tensor) else x for k, x in v.items()}, w) for name, v, w in found]


@pytest.fixture
def float64() -> Iterator[None]:
    """Also of the numbers that torch keeps as tensors (`mu_product`)."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_the_cases_are_those_of_all_algorithms(cases: list[Case]) -> None:
    assert {name for name, _, _ in cases} == RULES.keys() | OTHERS


@pytest.mark.usefixtures("float64")
def test_torchs_numbers(cases: list[Case]) -> None:
    known = [case for case in cases if case[0] in RULES]
    failing = {f"{name}: {what}" for name, given, what in known if not difference(name, given, None) < 1e-12}
    assert failing == FAILING.keys()
    assert len(failing) <= 0.05 * len(known)


def plain(given: dict[str, Any]) -> bool:
    """Whether a state dict of torch can be loaded: its options are those of a rule, and a penalty before it."""
    odd = {"maximize", "dampening", "lr_decay", "decoupled_weight_decay", "ns_coefficients"}
    return not odd & given.keys() and not ("centered" in given and "momentum" in given)


@pytest.mark.usefixtures("float64")
def test_a_state_dict_of_torch_goes_on_in_mid_run(cases: list[Case]) -> None:
    known = [case for case in cases if case[0] in RULES and plain(case[1])]
    known = [case for case in known if not (case[0] == "AdamW" and "amsgrad" in case[1])]
    assert len(known) > 40
    failing = {f"{name}: {what}" for name, given, what in known if not difference(name, given, 7) < 1e-12}
    assert failing == set()


@pytest.mark.usefixtures("float64")
def test_what_no_rule_does_is_refused_by_name(cases: list[Case]) -> None:
    for name, given, _ in cases:
        if name in RULES and not plain(given):
            params = parameters(name)
            twin = getattr(torch.optim, name)(params, **given)
            odd = {"maximize", "dampening", "lr_decay", "decoupled_weight_decay", "momentum", "ns_coefficients"}
            odd &= given.keys()
            with pytest.raises(ValueError, match="|".join(odd)):
                fluxpy.interop.from_torch(twin, params)

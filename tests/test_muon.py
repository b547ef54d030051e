"""Muon beside torch.optim.Muon: matrices, batches of them, convolutions, and a setup with another rule for the rest."""

import copy
import inspect
import io
from typing import Any

import pytest
import torch
from helpers import Run, assert_close, grads_of, model_of, values_of
from torch import Tensor, nn

import fluxpy
from fluxpy import AccumGrad, AdamW, ClipGlobalNorm, MixedPrecision, Muon, OptimiserChain
from fluxpy.engine.packed import EagerUnit
from fluxpy.state import tree_bindings

# Of smaller ones PyTorch multiplies many otherwise than one, in the last bit of a bfloat16.
MATRICES = {f"w{i}": (8, 12) for i in range(10)} | {"tall": (7, 2), "row": (1, 5), "none": (0, 3)}
HYPER: dict[str, Any] = {"lr": 0.05, "weight_decay": 0.2}


def torch_muon(slices: list[Tensor], grads: list[list[Tensor]], **values: Any) -> None:
    """Steps these matrices in place, which may be parts of a larger tensor, by torch's own."""
    params = [nn.Parameter(x) for x in slices]
    optimizer = torch.optim.Muon(params, **values)
    for gs in grads:
        for p, g in zip(params, gs, strict=True):
            p.grad = g.clone()
        optimizer.step()
    for x, p in zip(slices, params, strict=True):
        x.copy_(p.detach())


def stacked(state: Any) -> int:
    """How many leaves stepped as a stack last."""
    (binding,) = tree_bindings(state).values()
    return sum(len(unit.cohort.records) for unit in binding.plan.route.units if isinstance(unit, EagerUnit))


def test_the_defaults_are_torchs() -> None:
    theirs = {key: p.default for key, p in inspect.signature(torch.optim.Muon).parameters.items()}
    assert all(theirs[key] == value for key, value in vars(Muon()).items())


@pytest.mark.parametrize("adjust_lr_fn", [None, "match_rms_adamw"])
@pytest.mark.parametrize("shape", [(5, 3, 4), (6, 2, 3, 3), (3, 2, 2, 2, 2)], ids=str)
def test_batches_and_convolutions(shape: tuple[int, ...], adjust_lr_fn: Any) -> None:
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=rng, dtype=torch.float64)
    grads = [torch.randn(shape, generator=rng, dtype=torch.float64) for _ in range(10)]
    ours, theirs = {"x": x.clone()}, x.clone()
    values = HYPER | {"adjust_lr_fn": adjust_lr_fn}
    state = fluxpy.setup(Muon(**values), ours)
    for dx in grads:
        fluxpy.update(state, ours, {"x": dx})
    slices = list(theirs) if len(shape) == 3 else [theirs.flatten(1)]
    torch_muon(slices, [list(dx) if len(shape) == 3 else [dx.flatten(1)] for dx in grads], **values)
    torch.testing.assert_close(ours["x"] - x, theirs - x, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype, room", [(torch.float64, 1e-12), (torch.float32, 0.01), (torch.bfloat16, 0.3)])
def test_stacks_of_all_dtypes_take_torchs_steps(dtype: torch.dtype, room: float) -> None:
    """Inside it is bfloat16: where the momentum rounds otherwise, so may that, and an iteration makes more of it."""
    model = model_of(MATRICES, dtype)
    start, twin = values_of(model), values_of(model)
    state = fluxpy.setup(Muon(**HYPER), model)
    grads = [grads_of(model, i) for i in range(20)]
    for dx in grads:
        fluxpy.update(state, model, dx)
    torch_muon([*twin.values()], [[*dx.values()] for dx in grads], **HYPER)
    assert stacked(state) == 10
    for name, x in model.items():
        way, theirs = (t.detach().double() - start[name].double() for t in (x, twin[name]))
        if x.numel():
            assert (way - theirs).norm() <= room * theirs.norm(), (name, (way - theirs).norm() / theirs.norm())


def test_a_stack_has_the_numbers_of_each_alone_bit_for_bit() -> None:
    """So freezing one of eight changes nothing for the others."""
    model = model_of({f"w{i}": (8, 12) for i in range(8)}, torch.float32)
    state = fluxpy.setup(Muon(**HYPER), model)
    alone, others = copy.deepcopy(model), copy.deepcopy(state)
    fluxpy.freeze(others["w3"])
    for i in range(5):
        grads = grads_of(model, i)
        fluxpy.update(state, model, grads)
        fluxpy.update(others, alone, grads)
        assert stacked(state) == 8 and stacked(others) == 0
    assert all(torch.equal(model[name], alone[name]) for name in model if name != "w3")


@pytest.mark.parametrize(
    "rule",
    [
        OptimiserChain(ClipGlobalNorm(0.5), Muon(**HYPER)),
        OptimiserChain(AccumGrad(2), Muon(**HYPER)),
        MixedPrecision(Muon(**HYPER), dtype=torch.float64),
        Muon(**HYPER | {"lr": fluxpy.schedules.linear(0.1, 0.0, 10)}),
    ],
    ids=["clipped", "gathering", "master", "scheduled"],
)
def test_in_chains_in_place_and_not(rule: Any) -> None:
    run = Run(rule, shapes=MATRICES)
    state, model = fluxpy.setup(rule, run.model), run.model
    for i in range(6):
        state, model = fluxpy.update(state, model, grads_of(model, i), inplace=False)
    run.step(6)
    assert_close(run.model, model, 1e-12)


def test_what_is_no_matrix_is_refused_and_told_what_to_write() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r'1 dimension: .*setup\(\{.*: Muon\(0.02\), "\*": AdamW') as caught:
        fluxpy.setup(Muon(), model)
    assert "1.bias" in str(caught.value.__notes__)
    for x in (torch.zeros(()), torch.zeros(1, 1, 1, 1, 1, 1), torch.zeros(2, 2, dtype=torch.complex64)):
        with pytest.raises(ValueError, match="Muon takes matrices of real numbers, but this parameter"):
            fluxpy.setup(Muon(), {"x": x})


def test_beside_adamw_from_one_mapping() -> None:
    """Each part goes as with an optimiser of its own; rates are shown, scaled, frozen, saved and resumed."""

    def made() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Embedding(7, 6), nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 7)).double()

    def loss(model: nn.Module) -> Tensor:
        x = torch.arange(7)
        return nn.functional.cross_entropy(model(x), (x + 1) % 7)

    model, twin = made(), made()
    state = fluxpy.setup({"1.weight": Muon(0.02), "*": AdamW(3e-3)}, model)
    muon = torch.optim.Muon([twin[1].weight], lr=0.02)
    adamw = torch.optim.AdamW([p for p in twin.parameters() if p is not twin[1].weight], lr=3e-3)
    for i in range(10):
        if i == 5:
            fluxpy.adjust(state, fluxpy.scale(0.1))
            for group in (*muon.param_groups, *adamw.param_groups):
                group["lr"] *= 0.1
        fluxpy.trainstep(loss, model, (), state)
        loss(twin).backward()
        muon.step(), adamw.step(), twin.zero_grad()
    assert_close(model, twin, 1e-10)
    text = str(fluxpy.summary(state))
    assert "Muon" in text and "AdamW" in text and " 0.002 " in text and " 0.0003 " in text
    file = io.BytesIO()
    torch.save(fluxpy.state_dict(state), file)
    file.seek(0)
    other = copy.deepcopy(model)
    resumed = fluxpy.setup({"1.weight": Muon(), "*": AdamW()}, other)
    fluxpy.load_state_dict(resumed, torch.load(file, weights_only=True))
    fluxpy.freeze(state[1]), fluxpy.freeze(resumed[1])
    for _ in range(3):
        fluxpy.trainstep(loss, model, (), state), fluxpy.trainstep(loss, other, (), resumed)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def test_many_models_at_once_and_slopes_through_steps() -> None:
    models = torch.randn(3, 4, 5, dtype=torch.float64)
    slopes = torch.randn(3, 4, 5, dtype=torch.float64)

    def two_steps(x: Tensor, dx: Tensor) -> Tensor:
        state, model = fluxpy.setup(Muon(**HYPER), {"x": torch.zeros(4, 5, dtype=torch.float64)}), {"x": x}
        for i in range(2):
            state, model = fluxpy.update(state, model, {"x": dx * (1 + i * x)}, inplace=False)
        return model["x"]

    each = torch.stack([two_steps(x, dx) for x, dx in zip(models, slopes, strict=True)])
    assert torch.equal(torch.func.vmap(two_steps)(models, slopes), each)
    one = torch.func.grad(lambda x: two_steps(x, slopes[0]).square().sum())(models[0])
    all_of_them = torch.func.vmap(torch.func.grad(lambda x, dx: two_steps(x, dx).square().sum()))(models, slopes)
    x = models[0].clone().requires_grad_()
    (usual,) = torch.autograd.grad(two_steps(x, slopes[0]).square().sum(), x)
    torch.testing.assert_close(one, usual)
    assert one.isfinite().all() and (all_of_them[0] - one).abs().max() < 0.1 * one.abs().max()

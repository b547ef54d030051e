"""On a CUDA device: the CPU's numbers, and nothing read by the host during a step."""

from contextlib import contextmanager

import pytest
import torch
from rule_table import ROWS
from torch import nn

import fluxpy
from fluxpy import ClipGlobalNorm, ClipNorm, OptimiserChain, check_finite, setup, trainables, trainstep, update

pytestmark = pytest.mark.cuda
SHAPES = [(4, 3), (7,), (), (0,)]


@contextmanager
def no_synchronisation():
    """PyTorch's detector of synchronisation: an error where the host waits for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


# bfloat16 matrices multiplied on a device round otherwise.
@pytest.mark.parametrize("name", [name for name in ROWS if name != "Muon"])
def test_every_rule_gives_the_cpus_numbers_without_reading_the_device(name):
    """Ten updates under PyTorch's detector of synchronisation."""
    g = torch.Generator().manual_seed(0)
    here = [torch.randn(shape, generator=g, dtype=torch.float64) for shape in SHAPES]
    there = [x.cuda() for x in here]
    states = setup(ROWS[name].rule, here), setup(ROWS[name].rule, there)
    for _ in range(10):
        grads = [torch.randn(shape, generator=g, dtype=torch.float64) for shape in SHAPES]
        update(states[0], here, grads)
        on_device = [x.cuda() for x in grads]
        with no_synchronisation():
            update(states[1], there, on_device)
    check_finite(states[1])
    for x, y in zip(here, there, strict=True):
        torch.testing.assert_close(x, y.cpu(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("clip", [ClipNorm(1.0), ClipGlobalNorm(1.0)])
def test_a_bad_number_holds_updates_back_until_it_is_read(clip):
    model = nn.Linear(3, 2).cuda()
    state = setup(OptimiserChain(clip, fluxpy.Adam()), model)
    x = torch.ones(4, 3, device="cuda")
    with no_synchronisation():
        trainstep(lambda m, x: m(x).square().mean(), model, x, state)
        kept = [p.detach().clone() for p in trainables(model)]
        trainstep(lambda m, x: (m(x) * float("nan")).mean(), model, x, state)
        trainstep(lambda m, x: m(x).square().mean(), model, x, state)
    assert all(torch.equal(a, b) for a, b in zip(kept, trainables(model), strict=True))
    with pytest.raises(FloatingPointError, match="the loss is not finite, in update 1"):
        check_finite(state)
    trainstep(lambda m, x: m(x).square().mean(), model, x, state)
    assert not torch.equal(kept[0], model.weight)


@pytest.mark.parametrize("rule", [fluxpy.Adam(0.1), fluxpy.Lion(0.1), fluxpy.MixedPrecision(fluxpy.Adam(0.1))])
def test_a_skip_is_known_late(rule):
    """The host waits for no stream, but for the norm of the update before."""
    chain = OptimiserChain(ClipGlobalNorm(1.0, nonfinite="skip"), rule)
    if isinstance(rule, fluxpy.MixedPrecision):
        chain = fluxpy.MixedPrecision(OptimiserChain(ClipGlobalNorm(1.0, nonfinite="skip"), rule.rule))
    here = [torch.ones(4, 3), torch.ones(7)]
    there = [x.cuda() for x in here]
    states = setup(chain, here), setup(chain, there)
    for turn in range(8):
        grads = [torch.full_like(x, float("nan") if turn in (0, 3, 4) else turn + 1.0) for x in here]
        update(states[0], here, grads)
        on_device = [x.cuda() for x in grads]
        with no_synchronisation():
            update(states[1], there, on_device)
    assert states[1][0].count == states[0][0].count == 5
    for x, y in zip(here, there, strict=True):
        torch.testing.assert_close(x, y.cpu())


def test_rows_given_on_the_device_or_not():
    ends = []
    for device in ("cpu", "cuda"):
        model = {"w": torch.arange(12.0, device=device).view(4, 3)}
        state = setup(fluxpy.Adam(0.1), model)
        update(state, model, {"w": torch.ones(4, 3, device=device)})
        fluxpy.surgery.reset(state, rows=torch.tensor([True, False, False, True], device=device))
        fluxpy.surgery.reset(state, rows=torch.tensor([1], device=device))
        fluxpy.surgery.take(state, model, torch.tensor([3, 2], device=device))
        ends.append([t.cpu() for t in (model["w"], *state["w"].state[:2])])
    for x, y in zip(*ends, strict=True):
        torch.testing.assert_close(x, y)


def test_train_moves_batches():
    model = nn.Linear(3, 2).cuda()
    data = fluxpy.DataLoader((torch.randn(8, 3), torch.randn(8, 2)), batch_size=4)
    losses = fluxpy.train(lambda m, x, y: (m(x) - y).square().mean(), model, data, setup(fluxpy.Adam(), model))
    assert len(losses) == 2

"""Weights to evaluate with: `Averaged`, rules of one's own, and `averaged`, which puts them into the model."""

import contextlib
import copy
import io
import pickle

import pytest
import torch
from helpers import (
    CHAINS,
    FEW,
    SHAPES,
    Own,
    Run,
    Scaled,
    assert_alike,
    every_layout,
    grads_of,
    model_of,
    needs_compiler,
    transposed,
    values_of,
    without,
)
from torch import nn
from torch.nn.functional import mse_loss

import fluxpy
from fluxpy import (
    AccumGrad,
    Adam,
    AdamW,
    Averaged,
    ClipGlobalNorm,
    Descent,
    Learner,
    MixedPrecision,
    Momentum,
    OptimiserChain,
    Rule,
    WeightDecay,
    averaged,
    freeze,
    load,
    reset,
    save,
    setup,
    thaw,
    train,
    trainstep,
    update,
)
from fluxpy.engine.shadow import ShadowUnit
from fluxpy.learner import Checkpoint
from fluxpy.rules import Assign
from fluxpy.testing.tree_promises import leaf_by_leaf


class Between(Rule):
    """A rule of a test's own, as ScheduleFree is: the weights to evaluate with lie between the parameter and another
    point, which its state has."""

    lr: float = 0.1
    share: float = 0.9
    elementwise = True

    def init(self, x):
        return x.clone()

    def apply(self, z, x, dx):
        new = z - self.lr * dx
        return new, x - (self.share * x + (1 - self.share) * new)

    def evaluation(self, z, x):
        return (x - (1 - self.share) * z) / self.share


class Doubling(Rule):
    """A rule that assigns."""

    elementwise = True

    def apply(self, state, x, dx):
        return state, Assign(2 * x + dx)


def recursion(trace, decays):
    """By the definition: the first weights, then `decay · average + (1 - decay) · x`, each decay given."""
    found = dict(trace[0])
    for x, decay in zip(trace[1:], decays, strict=True):
        found = {name: decay * old + (1 - decay) * x[name] for name, old in found.items()}
    return found


def moving_average(trace, decay):
    return recursion(trace, [decay] * (len(trace) - 1))


def evaluated(state, model):
    with averaged(state, model):
        return values_of(model)


def assert_same(one, other, room=0.0):
    for name, x in one.items():
        torch.testing.assert_close(x, other[name], rtol=room, atol=room, msg=name)


def wrapped(rule, decay):
    if isinstance(rule, MixedPrecision):
        return MixedPrecision(Averaged(rule.rule, decay), dtype=rule.dtype)
    return Averaged(rule, decay)


RULES = {**{name: CHAINS[name] for name in FEW}, "assigns": Doubling(), "scaled": Scaled(Descent(0.1))}
each_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())

# --- The average --------------------------------------------------------------------------------------------------


@every_layout
@each_rule
@pytest.mark.parametrize("decay", [0.7, 1.0, 0.0])
def test_the_average_is_that_of_the_parameter_after_each_step(rule, layout, decay):
    """And the steps are those of the rule alone."""
    run, alone = Run(wrapped(rule, decay), layout), Run(rule, layout)
    trace, counts = [], [0]
    for _ in range(8):
        run.step(), alone.step()
        assert_same(values_of(run.model), values_of(alone.model), room=1e-11)
        if run.state.a.count > counts[-1]:
            trace.append(values_of(run.model))
            counts.append(run.state.a.count)
    assert_same(evaluated(run.state, run.model), moving_average(trace, decay), room=1e-11)


@needs_compiler
def test_compiled():
    rule = Averaged(OptimiserChain(ClipGlobalNorm(0.5), Own()), 0.7)
    Run(rule).step(6).equals(Run(rule, compile=True).step(6), room=1e-10)


def test_pure_updates_and_complex_parameters():
    for dtype in (torch.float64, torch.complex128):
        run, pure = Run(Averaged(Momentum(0.1), 0.7), dtype=dtype), Run(Averaged(Momentum(0.1), 0.7), dtype=dtype)
        trace = []
        for turn in range(6):
            run.step()
            trace.append(values_of(run.model))
            pure.state, pure.model = update(pure.state, pure.model, grads_of(pure.model, turn), inplace=False)
        run.equals(pure, room=1e-12)
        assert_same(evaluated(run.state, run.model), moving_average(trace, 0.7), room=1e-12)


@pytest.mark.parametrize("decay", [lambda count: 0.5 if count < 3 else 0.9, lambda count: count / (1 + count)])
def test_a_schedule_of_the_decay(decay):
    run, trace = Run(Averaged(Descent(0.1), decay=decay)), []
    for _ in range(6):
        run.step()
        trace.append(values_of(run.model))
    assert_same(evaluated(run.state, run.model), recursion(trace, map(decay, range(1, 6))), room=1e-12)


def test_a_decay_that_counts_gives_the_mean_of_all_steps():
    run, trace = Run(Averaged(Descent(0.1), decay=lambda count: count / (1 + count))), []
    for _ in range(6):
        run.step()
        trace.append(values_of(run.model))
    mean = {name: sum(x[name] for x in trace) / 6 for name in trace[0]}
    assert_same(evaluated(run.state, run.model), mean, room=1e-12)


def test_the_numbers_of_torch():
    """Of its class that averages models, over many steps."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    state = setup(Averaged(Adam(0.05), decay=0.9), model)
    theirs = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    for turn in range(30):
        x = torch.randn(8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(turn))
        update(state, model, fluxpy.gradient(lambda m, x: m(x).square().mean(), model, x))
        theirs.update_parameters(model)
        with averaged(state, model):
            for ours, other in zip(model.parameters(), theirs.module.parameters(), strict=True):
                torch.testing.assert_close(ours, other, rtol=0, atol=1e-12)


def test_what_makes_no_step_does_not_count():
    run = Run(Averaged(OptimiserChain(AccumGrad(3), Descent(0.1)), 0.5))
    start = values_of(run.model)
    run.step(2)
    assert_same(evaluated(run.state, run.model), start)
    trace = [values_of(run.step(n).model) for n in (1, 3, 3)]
    run.step(2)
    assert_same(evaluated(run.state, run.model), moving_average(trace, 0.5), room=1e-12)
    fluxpy.flush(run.state, run.model)
    assert_same(evaluated(run.state, run.model), moving_average([*trace, values_of(run.model)], 0.5), room=1e-12)


def test_the_average_of_low_precision_is_kept_in_float32():
    """In bfloat16 a thousandth of the difference would be lost to rounding."""
    model = {"w": torch.ones(3, dtype=torch.bfloat16)}
    state = setup(Averaged(Descent(2**-6), 0.999), model)
    trace = []
    for _ in range(60):
        update(state, model, {"w": torch.ones(3, dtype=torch.bfloat16)})
        trace.append({"w": model["w"].double()})
    assert state["w"].state.x.dtype == torch.float32
    torch.testing.assert_close(state["w"].state.x.double(), moving_average(trace, 0.999)["w"], rtol=1e-6, atol=1e-6)
    with averaged(state, model):
        assert torch.equal(model["w"], state["w"].state.x.bfloat16())


def test_a_master_copy_is_averaged_as_it_is():
    model = model_of(dtype=torch.bfloat16)
    state = setup(MixedPrecision(Averaged(Descent(1e-3), 0.9)), model)
    trace = []
    for turn in range(10):
        update(state, model, grads_of(model, turn))
        trace.append({name: state[name].state.x.double() for name in SHAPES})
    expected = moving_average(trace, 0.9)
    for name in SHAPES:
        torch.testing.assert_close(state[name].state.state.x.double(), expected[name], rtol=1e-5, atol=1e-6)
    with averaged(state, model):
        for name in SHAPES:
            assert torch.equal(model[name], state[name].state.state.x.bfloat16())


def test_what_averaged_refuses():
    with pytest.raises(TypeError, match="Averaged takes a rule, but got"):
        Averaged(Adam)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"write MixedPrecision\(Averaged"):
        Averaged(MixedPrecision(Adam()))
    with pytest.raises(ValueError, match="has weights of its own to evaluate with"):
        Averaged(Between())
    with pytest.raises(ValueError, match="Averaged must be last in its chain"):
        OptimiserChain(Averaged(Adam()), WeightDecay())
    assert OptimiserChain(WeightDecay(), Averaged(Adam(0.5), 0.9)).decay == 0.9


def test_the_average_through_saving_copying_adjusting_and_resetting(tmp_path):
    rule = OptimiserChain(ClipGlobalNorm(1.0), Averaged(AdamW(0.1), 0.9))
    run = Run(rule).step(5)
    twin = Run(rule)
    save(tmp_path / "run", model=run.model, state=run.state)
    load(tmp_path / "run", model=twin.model, state=twin.state)
    twin.turn = run.turn
    run.equals(twin)
    for state in (run.state, twin.state):
        fluxpy.adjust(state, decay=0.5)
    run.step(3).equals(twin.step(3))
    assert fluxpy.value(run.state.a, "decay") == 0.5
    for make in (copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))):
        assert_same(evaluated(make(run.state), run.model), evaluated(run.state, run.model))
    reset(run.state)
    assert_same(evaluated(run.state, run.model), values_of(run.model))
    run.step()
    assert_same(evaluated(run.state, run.model), values_of(run.model))


SHADOWED = {
    "AdamW": Averaged(AdamW(0.02), 0.7),
    "chain": OptimiserChain(ClipGlobalNorm(0.5), Averaged(Adam(0.02), 0.7)),
    "inside": Averaged(OptimiserChain(ClipGlobalNorm(0.5), WeightDecay(0.1), Adam(0.02)), 0.7),
    "gathers": OptimiserChain(AccumGrad(2), WeightDecay(0.1), Averaged(Momentum(0.1), 0.7)),
}


@every_layout
@pytest.mark.parametrize("rule", SHADOWED.values(), ids=SHADOWED.keys())
def test_a_kernel_and_an_average_beside_it(rule, layout, monkeypatch):
    """The numbers of the rule's own `apply`, through all that happens to leaves."""
    used = []
    commit = ShadowUnit.commit
    monkeypatch.setattr(ShadowUnit, "commit", lambda unit: (used.append(len(unit.cohort.records)), commit(unit)))
    shapes = SHAPES | {"f": (300, 500), "g": (2,), "h": (1000, 2)}
    run, plain = Run(rule, layout, shapes), Run(rule, layout, shapes)
    for turn in range(14):
        for one in (run, plain):
            if turn == 3:
                freeze(one.state.b)
                fluxpy.adjust(one.state.d, 0.05)
            if turn == 5:
                fluxpy.adjust(thaw(one.state), decay=rising)
            if turn == 7:
                fluxpy.adjust(one.state.a, decay=0.6)
            if turn == 9:
                reset(one.state.c)
            if turn == 10:
                one.state, one.model = update(one.state, one.model, one.grads(), inplace=False)
        leaf_by_leaf(plain.state, rule)
        change = without("e") if turn == 4 else transposed_all if turn == 6 else lambda grads: grads
        run.step(1, change), plain.step(1, change)
        run.equals(plain, room=1e-11)
    assert used[0] == len(shapes) and len(used) >= 14
    restored = pickle.loads(pickle.dumps(run.state))
    update(restored, copy.deepcopy(run.model), run.grads())


def rising(count):
    return 0.5 + 0.01 * count


def transposed_all(grads):
    return {name: transposed(dx) for name, dx in grads.items()}


# --- averaged -----------------------------------------------------------------------------------------------------

EVALUATES = {
    "Averaged": Averaged(Adam(0.1), 0.5),
    "chain": OptimiserChain(ClipGlobalNorm(0.5), Averaged(Momentum(0.1), 0.5)),
    "gathers": OptimiserChain(AccumGrad(2), Averaged(Momentum(0.1), 0.5)),
    "master": MixedPrecision(Averaged(Adam(0.1), 0.5), dtype=torch.float64),
    "own": Between(),
    "own, in a chain": OptimiserChain(WeightDecay(0.1), Between()),
    "own, master": MixedPrecision(Between(), dtype=torch.float64),
}
evaluates = pytest.mark.parametrize("rule", EVALUATES.values(), ids=EVALUATES.keys())


@every_layout
@evaluates
def test_the_training_weights_come_back_bit_for_bit(rule, layout):
    run = Run(rule, layout, dtype=torch.float32 if isinstance(rule, MixedPrecision) else torch.float64).step(4)
    with torch.no_grad():
        run.model["b"][2] = -0.0
        run.model["b"][3] = torch.nan
    for ends in (None, RuntimeError, KeyboardInterrupt):
        before = {name: x.detach().clone().view(torch.uint8) for name, x in run.model.items() if x.ndim}
        objects = [id(x) for x in run.model.values()]
        try:
            with averaged(run.state, run.model) as paths:
                assert paths == [*SHAPES]
                assert [id(x) for x in run.model.values()] == objects
                assert not torch.equal(run.model["a"].view(torch.uint8), before["a"])
                if ends is not None:
                    raise ends
        except (RuntimeError, KeyboardInterrupt):
            pass
        for name, bits in before.items():
            assert torch.equal(run.model[name].detach().view(torch.uint8), bits), name


@evaluates
def test_training_goes_on_as_if_nothing_had_been(rule):
    run, twin = Run(rule), Run(rule)
    for _ in range(4):
        run.step()
        with averaged(run.state, run.model):
            pass
    run.equals(twin.step(4))


def test_a_rule_of_ones_own_gives_the_point_that_it_names():
    run = Run(Between()).step(3)
    expected = {name: (run.model[name] - 0.1 * run.state[name].state) / 0.9 for name in SHAPES}
    assert_same(evaluated(run.state, run.model), expected, room=1e-15)
    twin = Run(Between(), dtype=torch.complex128).step(3)
    inside = evaluated(twin.state, twin.model)
    for name in SHAPES:
        z = torch.view_as_complex(twin.state[name].state)
        torch.testing.assert_close(inside[name], ((twin.model[name] - 0.1 * z) / 0.9).detach())


def test_rules_without_it_change_nothing_and_cost_nothing(monkeypatch):
    run = Run(Adam(0.1)).step(2)
    versions = [x._version for x in run.model.values()]
    with averaged(run.state, run.model) as paths:
        run.step()
    assert paths == [] and run.state.a.count == 3
    assert [x._version - v for x, v in zip(run.model.values(), versions, strict=True)] == [1] * 5


def test_frozen_and_never_stepped_leaves_keep_their_weights():
    run = Run({"e": None, "*": Averaged(Descent(0.1), 0.5)})
    freeze(run.state.b)
    run.step(3, without("c"))
    freeze(run.state.d)
    own = values_of(run.model)
    with averaged(run.state, run.model) as paths:
        assert paths == ["a"]
        for name in "bcde":
            assert torch.equal(run.model[name], own[name]), name
    thaw(run.state.d)
    with averaged(run.state, run.model) as paths:
        assert paths == ["a", "d"]


def test_tied_parameters_once_and_branches():
    shared = nn.Linear(3, 3)
    model = nn.ModuleDict({"one": shared, "two": shared, "three": nn.Linear(3, 2)})
    state = setup(Averaged(Descent(0.1), 0.5), model)
    for turn in range(3):
        update(state, model, grads_of(model, turn))
    own = values_of(model)
    with averaged(state.two, model.two) as paths:
        assert paths == ["weight", "bias"]
        assert not torch.equal(model.one.weight, own["one.weight"])
        assert torch.equal(model.three.weight, own["three.weight"])
        with averaged(state, model) as rest:  # what is left
            assert rest == ["three.weight", "three.bias"]
            assert not torch.equal(model.three.weight, own["three.weight"])
            inside = values_of(model)
            with averaged(state, model) as none:
                assert none == []
            assert_same(values_of(model), inside)
        assert torch.equal(model.three.weight, own["three.weight"])
        assert not torch.equal(model.one.weight, own["one.weight"])
        update(state.three, model.three, grads_of(model.three))  # which holds its training weights
    assert torch.equal(model.one.weight, own["one.weight"])


def test_what_is_refused_inside(tmp_path):
    model = nn.Linear(2, 1)
    state = setup(Averaged(Adam(0.1)), model)
    batch = torch.ones(4, 2), torch.zeros(4, 1)
    loss = lambda m, x, y: mse_loss(m(x), y)  # noqa: E731
    train(loss, model, [batch] * 3, state)
    save(tmp_path / "outside", model=model, state=state)
    own, saved = values_of(model), fluxpy.state_dict(state)
    grads = fluxpy.gradient(loss, model, *batch)
    with averaged(state, model):
        inside = values_of(model)
        for what, attempt in {
            "update": lambda: update(state, model, grads),
            "update.": lambda: update(state, model, grads, inplace=False),
            "trainstep": lambda: trainstep(loss, model, batch, state),
            "trainstep.": lambda: train(loss, model, [batch], state),
            "flush": lambda: fluxpy.flush(state, model),
            "setup": lambda: setup(Adam(), model, keep=state),
            "save": lambda: save(tmp_path / "inside", model=model, state=state),
            "load_state_dict": lambda: fluxpy.load_state_dict(state, saved),
            "load_state_dict.": lambda: load(tmp_path / "outside", model=model, state=state),
        }.items():
            with pytest.raises(RuntimeError, match=rf"{what.strip('.')}.* is refused within fluxpy.averaged"):
                attempt()
        assert_same(values_of(model), inside)
        save(tmp_path / "weights", model=model)  # the weights alone
        fluxpy.state_dict(state), io.BytesIO(pickle.dumps(state)), copy.deepcopy(state)
    assert_same(values_of(model), own)
    load(tmp_path / "weights", model=model)
    assert_same(values_of(model), inside)
    update(state, model, grads)


def test_what_is_written_inside_is_lost_with_a_warning():
    run = Run(Averaged(Descent(0.1), 0.5)).step(2)
    own = values_of(run.model)
    lost = pytest.warns(UserWarning, match="written to 'b' within fluxpy.averaged is lost")
    with lost, torch.no_grad(), averaged(run.state, run.model):
        run.model["b"].zero_()
    assert_same(values_of(run.model), own)


class Faulty(Between):
    wrong: str = "shape"

    def evaluation(self, z, x):
        if z.numel() != 6:
            return z
        if self.wrong == "raises":
            raise ZeroDivisionError("nothing to divide")
        return z[0] if self.wrong == "shape" else None


@pytest.mark.parametrize(
    "wrong, error, message",
    [
        ("shape", ValueError, "of the parameter 'e' gave float64.*must be like the parameter"),
        ("none", ValueError, "'e' gave None"),
        ("raises", ZeroDivisionError, "nothing to divide"),
    ],
)
def test_an_evaluation_that_fails_changes_nothing(wrong, error, message):
    run = Run(Faulty(wrong=wrong)).step(2)
    before = run.image()
    with pytest.raises(error, match=message), averaged(run.state, run.model):
        pass
    assert_alike(before, run.image())
    run.step()


def test_a_wrapper_that_hides_an_evaluation_is_refused():
    run = Run(Scaled(Averaged(Descent(0.1)))).step()
    refused = pytest.raises(NotImplementedError, match=r"Scaled holds Averaged\(Descent\).*define evaluation")
    with refused, averaged(run.state, run.model):
        pass
    with pytest.raises(TypeError, match="averaged takes"), averaged(run.model, run.state):
        pass


@pytest.mark.filterwarnings("ignore:.*Profiler clears events")  # of PyTorch before 2.13
def test_one_copy_at_most():
    """Counted by what the allocator is asked for."""
    model = nn.ParameterList([nn.Parameter(torch.randn(50_000)) for _ in range(8)])
    state = setup(Averaged(Descent(0.1)), model)
    for turn in range(2):
        update(state, model, grads_of(model, turn))
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True) as profile, averaged(state, model):
        pass
    asked = sum(max(event.self_cpu_memory_usage, 0) for event in profile.key_averages())
    assert 8 * 50_000 * 4 <= asked <= 9 * 50_000 * 4


def test_an_autocast_around_it_casts_the_other_weights():
    model = nn.Linear(4, 4, bias=False)
    state, x = setup(Averaged(Descent(1.0), 1.0), model), torch.randn(2, 4)
    for turn in range(3):
        update(state, model, grads_of(model, turn))
    with torch.autocast("cpu", torch.bfloat16):
        before = model(x)
        with averaged(state, model):
            assert not torch.equal(model(x), before)
        assert torch.equal(model(x), before)


# --- The Learner --------------------------------------------------------------------------------------------------


def problem():
    torch.manual_seed(0)
    x = torch.randn(64, 3)
    data = [(x[i : i + 8], x[i : i + 8].sum(1, keepdim=True)) for i in range(0, 64, 8)]
    return nn.Linear(3, 1), data


def test_the_learner_validates_and_predicts_with_them():
    model, data = problem()
    learner = Learner(model, mse_loss, Averaged(Descent(0.3), 0.9), default_callbacks=False)
    history = learner.fit(data, data, epochs=1)
    own, found = values_of(model), learner.validate(data)["loss"]
    assert found == history[0]["validation"]["loss"]
    assert_same(values_of(model), own)
    predicted = learner.predict(data)
    with averaged(learner.state, model):
        by_hand = sum(mse_loss(model(x), y).item() for x, y in data) / len(data)
        assert torch.equal(predicted, torch.cat([model(x) for x, _ in data]))
        assert learner.validate(data)["loss"] == found
    assert found == pytest.approx(by_hand, rel=1e-6)
    assert found != pytest.approx(sum(mse_loss(model(x), y).item() for x, y in data) / len(data), rel=1e-3)


def test_a_run_saved_in_validation_has_the_training_weights():
    model, data = problem()
    saved = []

    def keep(learner, event):
        if learner.phase == "validation" and event == "batch_end":
            saved.append((values_of(model), learner.state_dict()))

    learner = Learner(model, mse_loss, Averaged(Descent(0.3), 0.9), callbacks=[keep], default_callbacks=False)
    learner.fit(data, data, epochs=1)
    for inside, run in saved:
        assert_same({name: run["model"][name] for name in inside}, values_of(model))
        assert not torch.equal(inside["weight"], model.weight)


@pytest.mark.parametrize("rule", [Averaged(Adam(0.1), 0.9), Between(), Adam(0.1)], ids=["Averaged", "own", "plain"])
def test_a_checkpoint_says_which_weights_it_holds(rule, tmp_path):
    """Best files those that were scored, the last one those that are trained on; and a resume is exact."""
    model, data = problem()
    learner = Learner(model, mse_loss, rule, callbacks=[Checkpoint(tmp_path / "a")], default_callbacks=False)
    history = learner.fit(data, data, epochs=3)
    score, path = learner.callbacks[0].best[0]
    best, last = nn.Linear(3, 1), nn.Linear(3, 1)
    extra = load(path, model=best)
    assert extra["weights"] == ("evaluation" if rule.evaluates else "training")
    assert sum(mse_loss(best(x), y).item() for x, y in data) / len(data) == pytest.approx(score, rel=1e-6)
    assert score == min(row["validation"]["loss"] for row in history)
    state = setup(rule, last)
    if rule.evaluates:
        with pytest.raises(ValueError, match="holds no state"):
            load(path, model=last, state=state)
    assert load(tmp_path / "a" / "last.flux", model=last, state=state)["weights"] == "training"
    assert_same(values_of(last), values_of(model))

    def stop(learner, event):
        if event == "batch_end" and learner.epoch_index == 1 and learner.batch_index == (4 if learner.training else 5):
            raise Stop

    for training in (True, False):
        other, _ = problem()
        for callbacks in ([Checkpoint(tmp_path / str(training), every=1), only(stop, training)], []):
            learner = Learner(other, mse_loss, rule, default_callbacks=False)
            callbacks = callbacks or [Checkpoint(tmp_path / str(training), every=1)]
            with pytest.raises(Stop) if len(callbacks) > 1 else contextlib.nullcontext():
                learner.fit(data, data, epochs=3, callbacks=callbacks)
        assert_same(values_of(other), values_of(model))


class Stop(Exception):
    pass


def only(callback, training):
    return lambda learner, event: callback(learner, event) if learner.training == training else None


def test_an_average_is_there_after_the_count_was_set_to_zero():
    run = Run(Averaged(Descent(0.1), 0.5)).step(3)
    fluxpy.freeze(run.state)
    fluxpy.thaw(run.state, count=0)
    with averaged(run.state, run.model) as paths:
        assert len(paths) == len(SHAPES)

"""update: four forms of gradients, in place and pure, ties, totals over the tree, all or nothing."""

import copy

import optree
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fluxpy
from fluxpy import (
    AccumGrad,
    Adam,
    AdamW,
    ClipGlobalNorm,
    ClipNorm,
    Descent,
    MixedPrecision,
    Momentum,
    OptimiserChain,
    Rule,
    WeightDecay,
    adjust,
    freeze,
    gradient,
    leaves,
    setup,
    thaw,
    trainables,
    update,
    value,
    withgradient,
)  # fmt: skip
from fluxpy.state import Leaf


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Linear(3, 3)
        self.norm = nn.BatchNorm1d(3)
        self.decoder = nn.Linear(3, 3)
        self.decoder.weight = self.encoder.weight

    def forward(self, x):
        return self.decoder(self.norm(self.encoder(x)).tanh())


def loss(model):
    return model(torch.linspace(-1, 1, 12).reshape(4, 3)).square().sum()


def everything(state, model):
    """Every bit of a state and a model: parameters, momenta, counts, flags."""
    held = [(p, leaf.rule, leaf.frozen, leaf.count) for p, leaf in leaves(state)]
    tensors = [t.clone() for t in optree.tree_leaves(state, namespace="fluxpy")]
    return held, tensors, [x.detach().clone() for x in trainables(model)]


def same(a, b):
    return a[0] == b[0] and all(torch.equal(x, y) for i in (1, 2) for x, y in zip(a[i], b[i], strict=True))


def close(a, b):
    """The same but for a few roundings: a pure update runs the plain path, one in place the fastest that fits."""
    pairs = [(x, y) for i in (1, 2) for x, y in zip(a[i], b[i], strict=True)]
    rooms = [max(1e-6, 8 * torch.finfo(x.dtype).eps) for x, _ in pairs]
    return a[0] == b[0] and all(torch.allclose(x, y, rtol=r, atol=r) for (x, y), r in zip(pairs, rooms, strict=True))


@pytest.mark.parametrize("rule", [Adam(0.1), OptimiserChain(WeightDecay(0.1), ClipGlobalNorm(0.5), Momentum(0.1))])
def test_all_forms_of_gradients_give_one_result(rule):
    """A gradient tree, a dict by names (the second name of a tie too), .grad, a module of gradients, a nested dict."""
    results = []
    for form in ("tree", "names", "other name", "grad", "module", "nested", "pure"):
        model = Tied()
        state = setup(rule, model)
        grads = gradient(loss, model)
        named = {name: grads[name] for name, _ in model.named_parameters()}
        if form == "names":
            grads = named
        elif form == "other name":
            grads = {("decoder.weight" if k == "encoder.weight" else k): v for k, v in named.items()}
        elif form == "grad":
            loss(model).backward()
            grads = None
        elif form == "module":
            grads = copy.deepcopy(model)
            for name, p in grads.named_parameters():
                p.data = named[name]
        elif form == "nested":
            grads = {"encoder": {"weight": named["encoder.weight"]}, "encoder.bias": named["encoder.bias"]}
            grads |= {
                "norm": {k: named[f"norm.{k}"] for k in ("weight", "bias")},
                "decoder": {"bias": named["decoder.bias"]},
            }
        new_state, new = update(state, model, grads, inplace=form != "pure")
        assert (new is model and new_state is state) == (form != "pure")
        assert new.decoder.weight is new.encoder.weight and isinstance(new.decoder.weight, nn.Parameter)
        results.append(everything(new_state, new))
    assert all(close(results[0], other) for other in results[1:])


def test_in_place_keeps_every_object_and_pure_changes_none():
    model = Tied()
    state = setup(Adam(), model)
    grads = gradient(loss, model)
    before = everything(state, model)
    versions = [g._version for g in optree.tree_leaves(grads, namespace="fluxpy")]
    pure_state, pure = update(state, model, grads, inplace=False)
    assert same(before, everything(state, model))
    assert pure.norm.running_mean is not model.norm.running_mean and type(pure) is Tied
    shared = {x.data_ptr() for x in (*before[1], *model.buffers(), *trainables(model))}
    shared |= {t.data_ptr() for t in optree.tree_leaves((state, grads), namespace="fluxpy")}
    assert not shared & {t.data_ptr() for t in (*trainables(pure), *optree.tree_leaves(pure_state, namespace="fluxpy"))}
    ids = [id(x) for x in (*trainables(model), *optree.tree_leaves(state, namespace="fluxpy"))]
    update(state, model, grads)
    assert ids == [id(x) for x in (*trainables(model), *optree.tree_leaves(state, namespace="fluxpy"))]
    assert close(everything(state, model), everything(pure_state, pure))
    assert versions == [g._version for g in optree.tree_leaves(grads, namespace="fluxpy")]


def test_a_branch_goes_with_the_matching_branch():
    whole, part = Tied(), Tied()
    whole_state, part_state = (setup(Adam(0.1), m) for m in (whole, part))
    grads = gradient(loss, whole)
    update(whole_state, whole, {k: grads[k] for k in ("encoder.weight", "encoder.bias")})
    update(part_state.encoder, part.encoder, grads.encoder)
    assert same(everything(whole_state, whole), everything(part_state, part))
    new_state, new = update(part_state.decoder, part.decoder, grads.decoder, inplace=False)
    assert new_state.weight.state.t == 2 and part_state.decoder.weight.state.t == 1 and new.weight.shape == (3, 3)
    for view in (fluxpy.select(whole_state, "*bias"), setup(Adam(), nn.Sequential(whole))[:1]):
        with pytest.raises(ValueError, match="slice or a selection"):
            update(view, whole, grads)


def test_missing_and_frozen_leaves_do_not_move():
    model = Tied()
    state = setup(OptimiserChain(WeightDecay(0.5), Momentum(0.1)), model)
    update(state, model, gradient(loss, model))
    freeze(state.norm)
    before = everything(state, model)
    grads = gradient(loss, model)
    update(state, model, {"norm.weight": grads.norm.weight, "encoder": None, "decoder.bias": None})
    assert same(before, everything(state, model))


class Faulty(Rule):
    """Raises at its k-th application."""

    left = [0]

    def init(self, x):
        return torch.zeros_like(x)

    def apply(self, state, x, dx):
        self.left[0] -= 1
        if self.left[0] == 0:
            raise ArithmeticError("fault")
        return state + dx, dx + state


@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("where", ["rule", "schedule", "shape", "norm", "global norm"])
def test_a_fault_at_any_leaf_changes_nothing(where, inplace):
    for k in range(1, 6):
        model = Tied()
        rule = OptimiserChain(Momentum(0.1), Faulty())
        Faulty.left[0] = 0
        if where.endswith("norm"):
            rule = OptimiserChain(Adam(), ClipNorm(1.0) if where == "norm" else ClipGlobalNorm(1.0))
        state = setup(rule, model)
        grads = gradient(loss, model)
        update(state, model, grads)
        target = list(leaves(state))[k - 1]
        if where == "rule":
            Faulty.left[0] = k
        elif where == "schedule":
            adjust(target[1], lr=lambda count: "none")
        elif where == "shape":
            grads = {name: grads[name] for name, _ in leaves(state)} | {target[0]: torch.ones(7)}
        else:
            grads = {name: grads[name].clone() for name, _ in leaves(state)}
            grads[target[0]].view(-1)[0] = float("nan")
        before = everything(state, model)
        with pytest.raises((ArithmeticError, ValueError)) as error:
            update(state, model, grads, inplace=inplace)
        assert target[0] in str(error.value) + "".join(getattr(error.value, "__notes__", []))
        assert same(before, everything(state, model))


def refuse(change):
    """A model of linear layers, its state, and gradients that `change` spoils."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    grads = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    return change(setup(Adam(), model), model, grads)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda s, m, g: update(s, m[0], g), "at the top the state has children '0', '1', the model children 'weight'"),
        (lambda s, m, g: update(s, nn.Sequential(m[0], nn.ReLU()), g), "at '1' the state has children"),
        (lambda s, m, g: update(s, nn.Sequential(m[0], nn.Linear(2, 2)), g), r"'1.weight' was float32\[1, 2\]"),
        (lambda s, m, g: update(s, m.double(), g), "'0.weight' was float32.* now float64"),
        (lambda s, m, g: update(s, m, g | {"0.wait": g["0.weight"]}), "unknown name '0.wait'; did you mean '0.weight'"),
        (lambda s, m, g: update(s, m, g | {"0.weight": torch.ones(2)}), r"'0.weight' does not fit.*\[2, 2\].*\[2\]"),
        (lambda s, m, g: update(s, m, g | {"0.weight": g["0.weight"].double()}), "float32.* gradient float64"),
        (lambda s, m, g: update(s, m, g | {"0.weight": g["0.weight"].to("meta")}), "on cpu, the gradient .* on meta"),
        (lambda s, m, g: update(s, m, g | {"0.weight": g["0.weight"].to_sparse()}), "'0.weight' is sparse"),
        (lambda s, m, g: update(s, m, g | {"0.weight": 1.0}), "must be a tensor or None, but got float"),
        (lambda s, m, g: update(s, m, gradient(lambda n: n(torch.ones(1, 2)).sum(), m[0])), "gradients do not fit"),
        (lambda s, m, g: update(s, m, [g["0.weight"]]), "do not fit"),
        (lambda s, m, g: update(s, m), "no gradients"),
        (lambda s, m, g: update(s, torch.nn.Sequential(m[0], m[0]), g), "the model does not fit|tied"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_place(change, match):
    with pytest.raises(ValueError, match=match):
        refuse(change)


def test_gradients_of_a_tied_parameter():
    w = torch.ones(2)
    model = {"a": w, "b": w, "c": torch.ones(1)}
    g = torch.tensor([1.0, 2.0])
    for grads in ({"a": g, "b": g}, {"a": None, "b": g}, {"b": g}):
        m = {"a": (x := w.clone()), "b": x, "c": torch.ones(1)}
        update(setup(Descent(1.0), m), m, grads)
        assert m["a"].tolist() == [0, -1] and m["a"] is m["b"]
    with pytest.raises(ValueError, match="two different gradients for one tied parameter, the second at 'b'"):
        update(setup(Descent(), model), model, {"a": g, "b": 2 * g})
    with pytest.raises(ValueError, match="tied"):
        update(setup(Descent(), model), {"a": w, "b": w.clone(), "c": torch.ones(1)}, {"c": torch.ones(1)})


def test_one_global_norm_over_the_leaves_that_step():
    """Frozen leaves and those without a gradient are out; only equal clips at the same place share a norm."""
    model = {"a": torch.zeros(2), "b": torch.zeros(1), "c": torch.zeros(1), "d": torch.zeros(1)}
    clip = lambda n=1.0: OptimiserChain(ClipGlobalNorm(n), Descent(1.0))  # noqa: E731
    state = setup({"d": clip(2.0), "c": OptimiserChain(ClipNorm(9.0), clip()), "*": clip()}, model)
    g = {"a": torch.tensor([2.0, 1.0]), "b": torch.tensor([4.0]), "c": torch.tensor([2.0]), "d": torch.tensor([6.0])}
    update(state, model, g)
    torch.testing.assert_close(model["a"], torch.tensor([-0.4, -0.2]))
    assert [round(model[k].item(), 4) for k in "bcd"] == [-0.8, -0.4, -2.0]
    freeze(state.b)
    update(state, model, g)
    torch.testing.assert_close(model["a"], torch.tensor([-0.4 - 2 / 3, -0.2 - 1 / 3]))
    adjust(state.a, max_norm=lambda count: 1.0)
    thaw(state)
    start = model["b"].item()
    update(state, model, g)
    assert model["b"].item() == pytest.approx(start - 0.8)


def test_clip_matches_pytorch():
    a, b = Tied(), Tied()
    grads = gradient(loss, a)
    total = torch.nn.utils.clip_grad_norm_([p for p in b.parameters() if setattr(p, "grad", None) is None], 1.0)
    loss(b).backward()
    total = torch.nn.utils.clip_grad_norm_(b.parameters(), 0.5)
    torch.optim.SGD(b.parameters(), lr=1.0).step()
    update(setup(OptimiserChain(ClipGlobalNorm(0.5), Descent(1.0)), a), a, grads)
    assert total > 0.5
    for x, y in zip(trainables(a), trainables(b), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("clip", [ClipNorm, ClipGlobalNorm])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_norms_that_are_not_finite(clip, bad):
    model = {"a": torch.ones(2), "b": torch.ones(2)}
    grads = {"a": torch.ones(2), "b": torch.tensor([1.0, bad])}
    for policy in ("raise", "skip", "ignore"):
        state = setup(OptimiserChain(AccumGrad(1), clip(1.0, nonfinite=policy), Adam(lambda count: 0.1)), model)
        before = everything(state, model)
        if policy == "raise":
            with pytest.raises(FloatingPointError, match=f"{clip.__name__}.*gradient of 'b'.*nothing was updated"):
                update(state, model, grads)
        else:
            update(state, model, grads)
        assert same(before, everything(state, model)) == (policy != "ignore")


def test_accumulation_keeps_all_leaves_in_step():
    """A missing gradient adds zero, a frozen leaf is in step when it thaws, and n may change at any time."""
    model = {"a": torch.zeros(1), "b": torch.zeros(1), "c": torch.zeros(1)}
    state = freeze(setup(OptimiserChain(AccumGrad(4), Descent(1.0)), model))
    for name in "ab":
        thaw(state[name])
    g = torch.ones(1)
    moved = []
    for i in range(16):
        if i == 6:
            thaw(state.c)
        if i == 10:
            adjust(state, n=2)
        grads = {"a": g, "b": g if i % 2 else None, "c": g}
        old = {k: v.clone() for k, v in model.items()}
        update(state, model, grads)
        moved.append({k: round((old[k] - v).item(), 3) for k, v in model.items() if not torch.equal(v, old[k])})
    fired = {3: {"a": 1, "b": 0.5}, 7: {"a": 1, "b": 0.5, "c": 0.5}, 10: {"a": 1, "b": 0.333, "c": 1}}
    fired |= {i: {"a": 1, "b": 0.5, "c": 1} for i in (12, 14)}
    assert {i: m for i, m in enumerate(moved) if m} == fired
    assert value(state.a, "lr") == 1.0 and state.a.count == 5 and state.c.count == 4


def test_a_window_may_change_while_a_leaf_is_frozen():
    model = {"a": torch.zeros(1), "b": torch.zeros(1)}
    state = setup(OptimiserChain(AccumGrad(2), Descent(1.0)), model)
    freeze(state.b)
    seen = []
    for i in range(12):
        if i == 3:
            adjust(state, n=4)
            thaw(state)
        update(state, model, {"a": torch.ones(1), "b": torch.ones(1)})
        seen.append((model["a"].item(), model["b"].item()))
    assert seen[1] == (-1, 0) and seen[4:6] == [(-1, 0), (-2, -0.75)] and seen[8:10] == [(-2, -0.75), (-3, -1.75)]


def test_mixed_precision_assigns_the_master_and_follows_writes():
    x = torch.ones(4, dtype=torch.bfloat16)
    state = setup(MixedPrecision(Descent(1e-3)), x)
    for _ in range(16):
        update(state, x, torch.full_like(x, 0.5))
    assert x[0] == torch.tensor(1 - 16 * 0.5e-3).bfloat16() != 1
    x[1:3] = 5.0
    update(state, x, torch.zeros_like(x))
    assert x[1] == 5.0 and state.state.x[1] == 5.0 and state.state.x[0] == pytest.approx(0.992)
    with pytest.raises(ValueError, match="outermost"):
        OptimiserChain(Adam(), MixedPrecision(Adam()))


class Awkward(Rule):
    """Keeps the parameter and the gradient themselves, and lets its buffers change places."""

    def init(self, x):
        return [torch.zeros_like(x), torch.ones_like(x), x, x]

    def apply(self, state, x, dx):
        a, b, _, _ = state
        return [b, a, x, dx], a + dx


def test_whatever_a_rule_keeps_is_its_own():
    """In place and pure agree, and nothing of the state shares memory with parameter or gradient."""
    a, g = torch.tensor([1.0, 2.0]), torch.tensor([0.5, 0.5])
    b = a.clone()
    state_a, state_b = setup(Awkward(), a), setup(Awkward(), b)
    for _ in range(3):
        update(state_a, a, g)
        state_b, b = update(state_b, b, g, inplace=False)
    assert same(everything(state_a, a), everything(state_b, b)) and a.tolist() == [-1.5, -0.5]
    assert not {t.data_ptr() for t in state_a.state} & {a.data_ptr(), g.data_ptr()}


class Views(Rule):
    """Starts from one tensor twice and from views of the parameter, and keeps a view of the gradient."""

    def init(self, x):
        zero = torch.zeros_like(x)
        return {"twice": [zero, zero], "anchor": x.detach(), "none": None, "thin": torch.zeros(()).expand(x.shape)}

    def apply(self, state, x, dx):
        a, b = state["twice"]
        kept = {"twice": [a + dx, b + 2 * dx], "anchor": state["anchor"], "none": dx[:], "thin": state["thin"] + 1}
        return kept, a + b + (x - state["anchor"])


@pytest.mark.parametrize("wrap", [lambda rule: rule, lambda rule: MixedPrecision(rule, dtype=torch.float64)])
def test_views_and_shared_buffers_are_parted(wrap):
    x, g = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 1.0])
    y = x.clone()
    state, pure = setup(wrap(Views()), x), setup(wrap(Views()), y)
    for _ in range(3):
        update(state, x, g)
        pure, y = update(pure, y, g, inplace=False)
    assert torch.equal(x, y) and x.tolist() == [-5.0, -4.0] and g.tolist() == [1.0, 1.0]
    anchor = (state.state.state if isinstance(state.rule, MixedPrecision) else state.state)["anchor"]
    assert anchor.tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    ("gives", "error"),
    [
        (lambda s, x, dx: (s, dx > 0), RuntimeError),
        (lambda s, x, dx: (s, dx.to("meta")), ValueError),
        (lambda s, x, dx: (s.to("meta"), dx), ValueError),
        (lambda s, x, dx: dx, TypeError),
        (lambda s, x, dx: None, TypeError),
    ],
)
def test_whatever_a_rule_gives_nothing_is_half_written(gives, error):
    class Odd(Rule):
        def init(self, x):
            return torch.zeros_like(x)

        def apply(self, state, x, dx):
            return gives(state, x, dx) if x.numel() == 2 else (state + dx, dx)

    model = {"a": torch.ones(3), "b": torch.ones(2)}
    state = setup(Odd(), model)
    before = everything(state, model)
    with pytest.raises(error):
        update(state, model, {"a": torch.ones(3), "b": torch.ones(2)})
    assert same(before, everything(state, model))


def test_what_cannot_be_written_is_refused_before_anything_is():
    with torch.inference_mode():
        frozen = torch.ones(2)
    for x in (torch.ones(1).expand(2), frozen):
        model = {"a": torch.ones(2), "x": x}
        with pytest.raises(ValueError, match="'x' cannot be written in place"):
            update(setup(Descent(), model), model, {"a": torch.ones(2), "x": torch.ones(2)})
        assert model["a"].sum() == 2


def test_strides_of_gradients_do_not_matter():
    a = torch.randn(4, 3)
    b, g = a.clone(), torch.randn(3, 4).t()
    update(setup(AdamW(), a), a, g)
    update(setup(AdamW(), b), b, g.contiguous())
    assert torch.equal(a, b)


def test_differentiates_through_steps():
    """Pure updates carry gradients to the start, to hyperparameters, and through create_graph."""
    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)

    def after(lr, start):
        model = {"w": start}
        state = setup(OptimiserChain(ClipGlobalNorm(10.0), Adam(lr)), model)
        for _ in range(3):
            grads = gradient(lambda m: (m["w"] ** 4).sum(), model, create_graph=True)
            state, model = update(state, model, grads, inplace=False)
        return model["w"].sum()

    start = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(after, (lr, start))
    model, lr = nn.Linear(2, 1), torch.tensor(0.5, requires_grad=True)
    _, new = update(
        setup(Descent(lr), model), model, gradient(lambda m: m(torch.ones(1, 2)).sum(), model), inplace=False
    )
    new(torch.ones(1, 2)).sum().backward()
    assert lr.grad == -3.0
    for _ in range(2):
        _, model = update(setup(Descent(0.1), model), model, gradient(lambda m: m.bias.sum(), model), inplace=False)
        assert all(p.is_leaf and p.requires_grad for p in model.parameters())


def test_torch_func_and_first_order_differentiate_through_a_pure_step():
    """The parameter's own path counts too, where the gradient has no history."""
    state = setup(Descent(0.1), {"w": torch.ones(2)})
    after = lambda w: (update(state, {"w": w}, {"w": torch.ones(2)}, inplace=False)[1]["w"] ** 2).sum()  # noqa: E731
    torch.testing.assert_close(torch.func.grad(after)(torch.ones(2)), torch.full((2,), 1.8))
    w = torch.ones(2, requires_grad=True)
    after(w).backward()
    torch.testing.assert_close(w.grad, torch.full((2,), 1.8))


def test_equal_clips_share_a_norm_whatever_holds_their_values():
    for clip in (lambda: ClipGlobalNorm(torch.tensor(1.0)), lambda: ClipGlobalNorm(lambda count: torch.tensor(1.0))):
        model = {"a": torch.zeros(1), "b": torch.zeros(1)}
        state = setup({k: OptimiserChain(clip(), Descent(1.0)) for k in "ab"}, model)
        update(state, model, {"a": torch.tensor([3.0]), "b": torch.tensor([4.0])})
        torch.testing.assert_close(torch.cat([model["a"], model["b"]]), torch.tensor([-0.6, -0.8]))
    half = {"h": torch.zeros(1, dtype=torch.float16)}
    update(setup(ClipGlobalNorm(1e-3), half), half, {"h": torch.tensor([6e4], dtype=torch.float16)})
    assert half["h"].item() == pytest.approx(-1e-3, rel=1e-2)


def test_names_of_wrappers_and_of_a_bare_tensor():
    model = nn.Sequential(nn.Linear(2, 1))
    state, before = setup(Descent(1.0), model), model[0].bias.item()
    update(state, model, {"_orig_mod.0.bias": torch.ones(1)})
    update(state, model, {"module.0.bias": torch.ones(1)})
    assert model[0].bias.item() == pytest.approx(before - 2)
    x = torch.ones(2)
    update(setup(Descent(1.0), x), x, {"": torch.ones(2)})
    assert x.tolist() == [0, 0]


def test_vmap_over_states():
    """An ensemble: one update of stacked parameters and stacked states equals an update of each."""
    models = [{"w": torch.randn(3)} for _ in range(4)]
    states = [setup(Adam(torch.tensor(0.1 * (i + 1))), m) for i, m in enumerate(models)]
    grads = [{"w": torch.randn(3)} for _ in range(4)]
    stack = lambda *ts: torch.stack(ts)  # noqa: E731
    state, model, grad = (optree.tree_map(stack, *ts, namespace="fluxpy") for ts in (states, models, grads))
    _, new = torch.func.vmap(lambda s, m, g: update(s, m, g, inplace=False))(state, model, grad)
    for i in range(4):
        update(states[i], models[i], grads[i])
        torch.testing.assert_close(new["w"][i], models[i]["w"])


def test_a_recurrent_module_is_copied_whole():
    model = nn.LSTM(2, 3)
    x = torch.randn(4, 1, 2)
    grads = gradient(lambda m: m(x)[0].sum(), model)
    _, new = update(setup(Descent(0.5), model), model, grads, inplace=False)
    assert not torch.allclose(new(x)[0], model(x)[0])
    update(setup(Descent(0.5), model), model, grads)
    torch.testing.assert_close(new(x)[0], model(x)[0])


# --- Random trees against a reference -----------------------------------------------------------------------------

DTYPES = (torch.float64, torch.float32, torch.bfloat16)
tensors = st.builds(
    lambda shape, dtype, seed: torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype),
    st.lists(st.integers(0, 3), max_size=2),
    st.sampled_from(DTYPES),
    st.integers(0, 99),
)
others = st.sampled_from([None, 3, "text", torch.arange(2), nn.ReLU()])
modules = st.builds(lambda n: nn.Sequential(nn.Linear(n, 2), nn.ReLU(), nn.Linear(2, 1)), st.integers(1, 3))
trees = st.recursive(
    tensors | others | modules,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from("abc"), inner, max_size=3)
        | st.tuples(inner, inner)
        | inner.map(lambda x: nn.Sequential(x, x) if isinstance(x, nn.Module) else {"tie": x, "again": x})
    ),
    max_leaves=8,
)


def reference(model, grads, state, rule):
    """`update` in the plainest words: the new value of each parameter, by identity."""
    names, new = {}, {}
    for path, x in trainables(model, path=True):
        names[path] = x
    for path, leaf in leaves(state):
        x, g = names[path], grads.get(path)
        if leaf.frozen or g is None:
            new[path] = x.clone()
            continue
        _, change = rule.apply(leaf.state if leaf.state is not None else rule.init(x), x.detach(), g)
        new[path] = (x.detach() - change).to(x.dtype)
    return new


@settings(max_examples=150, deadline=None)
@given(trees, st.sampled_from([Adam(0.1), Momentum(0.1), AdamW()]), st.data())
def test_random_trees_agree_with_the_reference(model, rule, data):
    if not trainables(model):
        return
    state = setup(rule, model)
    paths = [path for path, _ in leaves(state)]
    for path in data.draw(st.lists(st.sampled_from(paths))):
        freeze(state[path] if path else state)
    for _ in range(2):
        given = data.draw(st.lists(st.sampled_from(paths), min_size=1, unique=True))
        grads = {p: torch.randn(x.shape).to(x.dtype) for p, x in trainables(model, path=True) if p in given}
        expected = reference(model, grads, state, rule)
        counts = {path: leaf.count for path, leaf in leaves(state)}
        new_state, new = update(state, model, grads.get("", grads), inplace=False)
        update(state, model, grads.get("", grads))
        for path, x in trainables(model, path=True):
            room = max(1e-6, 8 * torch.finfo(x.dtype).eps)
            torch.testing.assert_close(x, expected[path], rtol=room, atol=room)
        assert close(everything(state, model), everything(new_state, new))
        for path, leaf in leaves(state):
            assert isinstance(leaf, Leaf) and leaf.count == counts[path] + (path in grads and not leaf.frozen)


def test_the_penalty_in_the_loss_equals_the_rule():
    a, b = Tied(), Tied()
    penalty = lambda m: loss(m) + 0.42 * sum(x.square().sum() for x in trainables(m)) / 2  # noqa: E731
    state_a, state_b = setup(Adam(0.1), a), setup(OptimiserChain(WeightDecay(0.42), Adam(0.1)), b)
    for _ in range(5):
        update(state_a, a, gradient(penalty, a))
        update(state_b, b, withgradient(loss, b)[1])
    for x, y in zip(trainables(a), trainables(b), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)

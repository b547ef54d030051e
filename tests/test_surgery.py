"""The model changes, the state follows: take, grow and reset of rows, under every rule and on every path."""

import copy
import math
from typing import Any

import optree
import pytest
import torch
from helpers import Run, assert_alike, by_hand, few_chains, grads_of, image, needs_compiler, patch_everywhere
from rule_table import ROWS, Row
from torch import Tensor, nn

import fluxpy
from fluxpy import (
    AccumGrad,
    Adam,
    AdamW,
    Descent,
    MixedPrecision,
    Momentum,
    OptimiserChain,
    Rule,
    freeze,
    leaves,
    setup,
    surgery,
    thaw,
    update,
)  # fmt: skip
from fluxpy.pytree import partition
from fluxpy.rule import is_packable, reducing

each_row = pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())
INDEX = [3, 0, 0, -1]  # of five rows: permuted, repeated, left out, counted from the end


def same_for_each_element(rule: Rule) -> bool:
    return is_packable(rule) and not reducing(rule)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def begin(rule: Any, updates: int = 3, dtype: torch.dtype = torch.float64) -> tuple[Any, Any]:
    model = {"w": draw(5, 3, dtype=dtype), "v": draw(5, 3, seed=1, dtype=dtype)}
    state = setup(rule, model)
    for i in range(updates):
        update(state, model, grads(i, dtype))
    return state, model


def grads(turn: int, dtype: torch.dtype = torch.float64, rows: int = 5) -> dict[str, Tensor]:
    return {name: draw(rows, 3, seed=100 * turn + i, dtype=dtype) for i, name in enumerate("wv")}


def arrays(state: Any, shape: Any) -> list[Tensor]:
    """The tensors of a state that have rows."""
    return [t for t in optree.tree_leaves(state, namespace="fluxpy") if isinstance(t, Tensor) and t.shape == shape]


def close(one: Any, other: Any, room: float = 1e-12) -> None:
    for a, b in zip(optree.tree_leaves(one), optree.tree_leaves(other), strict=True):
        if isinstance(a, Tensor):
            torch.testing.assert_close(a, b, rtol=room, atol=room)
        else:
            assert a == b


# --- Every rule ---------------------------------------------------------------------------------------------------


@each_row
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_taking_rows_and_stepping_is_stepping_and_taking_rows(row: Row, dim: int) -> None:
    """Where the rule is elementwise. Else rows that were taken step as a model of their own would."""
    index = INDEX if dim == 0 else [2, 0]
    at = torch.tensor(index) % (5 if dim == 0 else 3)
    state, model = begin(row.rule)
    twin, other = copy.deepcopy(state), copy.deepcopy(model)
    surgery.take(state, model, index, dim)
    start = {name: (x.clone(), copy.deepcopy(state[name].state)) for name, x in model.items()}
    taken = copy.deepcopy(state)
    given = [grads(i) for i in range(3, 11)]
    for g in given:
        update(state, model, {name: dx.index_select(dim, at) for name, dx in g.items()})
        update(twin, other, g)
    if same_for_each_element(row.rule):
        surgery.take(twin, other, at, dim)
        close(model, other)
        for name in model:
            close(state[name].state, twin[name].state)
            assert state[name].count == twin[name].count
    elif "tree" not in [rule.over for rule in reducing(row.rule)]:
        for name, (x, held) in start.items():
            expected, _, _ = by_hand(row.rule, x, [g[name].index_select(dim, at) for g in given], held)
            close(model[name], expected)
    else:
        fresh = {name: x.clone() for name, (x, _) in start.items()}
        again = setup(row.rule, fresh, keep=taken)
        for g in given:
            update(again, fresh, {name: dx.index_select(dim, at) for name, dx in g.items()})
        close(model, fresh)
    assert not any(torch.equal(x, start[name][0]) for name, x in model.items())


@each_row
def test_new_rows_start_as_init_makes_them_and_old_ones_go_on(row: Row) -> None:
    state, model = begin(row.rule)
    twin, other = copy.deepcopy(state), copy.deepcopy(model)
    rows = {name: draw(2, 3, seed=9 + i) for i, name in enumerate(model)}
    before = {name: state[name].state for name in model}
    surgery.grow(state, model, rows)
    assert all(leaf.shape == (7, 3) for _, leaf in leaves(state))
    fresh = {}
    for name, new in rows.items():
        olds, skeleton = partition(before[name])
        inits = partition(row.rule.init_any(new))[0]
        for t, old, init in zip(partition(state[name].state)[0], olds, inits, strict=True):
            rowwise = old.ndim and len(old) == 5  # a factored rule keeps averages over the rows too
            assert torch.equal(t, torch.cat([old, init.to(old.dtype)]) if rowwise else old)
        # New rows have the numbers of the old: counts, and places in windows.
        fresh[name] = skeleton.combine([init if old.ndim else old for old, init in zip(olds, inits, strict=True)])
    if not same_for_each_element(row.rule):
        return
    given = [grads(i, rows=7) for i in range(3, 11)]
    for g in given:
        update(state, model, g)
        update(twin, other, {name: dx[:5] for name, dx in g.items()})
    for name, x in model.items():
        torch.testing.assert_close(x[:5], other[name], rtol=1e-12, atol=1e-12)
        expected, _, _ = by_hand(row.rule, rows[name], [g[name][5:] for g in given], fresh[name], 3)
        torch.testing.assert_close(x[5:], expected, rtol=1e-12, atol=1e-12)


@each_row
@pytest.mark.parametrize("rows", [[1, 4, 1], torch.tensor([False, True, False, False, True])], ids=["numbers", "mask"])
def test_rows_that_are_reset_start_as_init_makes_them(row: Row, rows: Any) -> None:
    """Without the model, where the rule starts from none; numbers stay, and so does a master copy."""
    state, model = begin(row.rule)
    twin, params = copy.deepcopy(state), {name: x.clone() for name, x in model.items()}
    given = None
    if type(row.rule) in (
        fluxpy.ScheduleFreeSGD,
        fluxpy.ScheduleFreeAdamW,
        fluxpy.Prodigy,
        fluxpy.Lookahead,
        fluxpy.Averaged,
    ):
        with pytest.raises(ValueError, match="starts from the parameter"):
            surgery.reset(state, rows=rows)
        given = model
    assert surgery.reset(state, rows=rows, model=given) is state
    close(model, params, 0)
    for name, x in model.items():
        new, old = partition(state[name].state), partition(twin[name].state)
        assert new[1].parts == old[1].parts
        master = [x] if isinstance(row.rule, MixedPrecision) else []
        inits = [*master, *partition(row.rule.init_any(x))[0][len(master) :]]
        for a, b, init in zip(new[0], old[0], inits, strict=True):
            if not a.ndim or len(a) != 5:
                assert torch.equal(a, b)
                continue
            kept = [0, 2, 3]
            assert torch.equal(a[kept], b[kept]) and torch.equal(a[[1, 4]], init[[1, 4]].to(a.dtype))
    update(state, model, grads(3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.complex64, torch.complex128])
@pytest.mark.parametrize(
    "name", ["Adam", "Momentum", "ClipNorm", "AccumGrad", "OptimiserChain", "Rprop", "MixedPrecision"]
)
def test_every_dtype(name: str, dtype: torch.dtype) -> None:
    if name == "MixedPrecision" and dtype.is_complex:
        return
    state, model = begin(ROWS[name].rule, dtype=dtype)
    before = copy.deepcopy((state, model))
    surgery.take(state, model, INDEX)
    for key, x in model.items():
        assert x.dtype == dtype and torch.equal(x, before[1][key][INDEX])
        for a, b in zip(*(partition(s[key].state)[0] for s in (state, before[0])), strict=True):
            assert a.dtype == b.dtype and torch.equal(a, b[INDEX])
    surgery.grow(
        state, model, {key: draw(1, 3, dtype=torch.float32 if not dtype.is_complex else dtype) for key in model}
    )
    surgery.reset(state, rows=[0])
    for i in range(3):
        update(state, model, grads(i, dtype, rows=5))
    assert all(x.dtype == dtype and x.isfinite().all() for x in model.values())


# --- Every path ---------------------------------------------------------------------------------------------------

OPERATIONS = {
    "take": lambda run: surgery.take(run.state.a, run.model["a"], [2, 0, 0]),
    "permute": lambda run: surgery.take(run.state.d, run.model["d"], [3, 2, 1, 0]),
    "columns": lambda run: surgery.take(run.state.d, run.model["d"], [True, False, True], dim=1),
    "nothing left": lambda run: surgery.take(run.state.b, run.model["b"], []),
    "grow": lambda run: surgery.grow(run.state.b, run.model["b"], draw(4)),
    "grow within": lambda run: surgery.grow(run.state.e, run.model["e"], draw(2, 2, 3), dim=1),
    "reset": lambda run: surgery.reset(run.state.a, rows=[1]),
}


def resumed(run: Run, tmp_path: Any, **options: Any) -> Run:
    """The run in another process: a model of the same shapes, and what a file holds."""
    other = copy.copy(run)
    fluxpy.save(tmp_path / "run.flux", model=run.model, state=run.state)
    other.model = copy.deepcopy(run.model)
    with torch.no_grad():
        for x in other.model.parameters():
            x.zero_()
    rules = {path: leaf.rule for path, leaf in leaves(run.state)}
    other.state = setup(rules, other.model, **options)
    fluxpy.load(tmp_path / "run.flux", model=other.model, state=other.state)
    return other


@few_chains
@pytest.mark.parametrize("layout", ["apart", "flat"])
def test_the_engine_notices_and_a_file_goes_on_alike(rule: Any, layout: str, tmp_path: Any) -> None:
    """After each operation a run and its resumed twin, whose plan is new, are equal bit for bit."""
    for name, operate in OPERATIONS.items():
        run = Run(rule, layout).step(3)
        operate(run)
        other = resumed(run, tmp_path)
        if layout == "flat":
            fluxpy.flatten_parameters(run.model)
            fluxpy.flatten_parameters(other.model)
        for _ in range(4):
            run.step()
            other.step()
            assert_alike(run.image(), other.image())
        pure, copied = update(run.state, run.model, run.grads(), inplace=False)
        run.step()
        assert_alike(image(pure, copied), run.image(), 1e-12)
        assert run.model["c"].grad is None, name


@few_chains
def test_many_changes_one_after_another(rule: Any) -> None:
    """Each between updates, without one, and undone again."""
    run, twin = Run(rule, "flat").step(2), Run(rule).step(2)
    for _ in range(3):
        surgery.take(run.state.a, run.model["a"], [3, 1, 0, 2])
        surgery.take(run.state.a, run.model["a"], [2, 1, 3, 0])
        surgery.grow(run.state.b, run.model["b"], draw(2))
        surgery.take(run.state.b, run.model["b"], range(7))
        run.step(2)
        twin.step(2)
    run.equals(twin, 1e-12)


@needs_compiler
def test_the_compiled_path(tmp_path: Any) -> None:
    run = Run(OptimiserChain(fluxpy.ClipGlobalNorm(0.5), AdamW(0.02)), compile=True).step(3)
    twin = Run(OptimiserChain(fluxpy.ClipGlobalNorm(0.5), AdamW(0.02))).step(3)
    for operate in OPERATIONS.values():
        operate(run)
        operate(twin)
        run.step(2)
        twin.step(2).equals(run, 1e-9)


def test_on_the_meta_device_too() -> None:
    model = nn.Linear(3, 4, device="meta")
    state = setup(Adam(), model)
    surgery.take(state, model, [0, 1])
    surgery.grow(state, model, 2)
    surgery.reset(state, rows=[0])
    assert model.weight.shape == state.weight.state.m.shape == (4, 3)


def test_a_stack_of_whole_arrays() -> None:
    from helpers import Whole

    model = nn.ParameterList(draw(3, 2, seed=i) for i in range(12))
    state = setup(Whole(), model)
    for i in range(2):
        update(state, model, grads_of(model, i))
    surgery.take(state, model, [2, 2, 0, 1])
    start = [(x.detach().clone(), leaf.state.clone()) for x, (_, leaf) in zip(model, leaves(state), strict=True)]
    given = [grads_of(model, i) for i in range(2, 5)]
    for g in given:
        update(state, model, g)
    for i, (x, held) in enumerate(start):
        close(model[i].detach(), by_hand(Whole(), x, [g[str(i)] for g in given], held)[0])


# --- What is frozen, tied, accumulated, low in precision ----------------------------------------------------------


def test_a_frozen_leaf_follows_with_or_without_momenta() -> None:
    model = nn.Linear(2, 4)
    model.bias.requires_grad_(False)
    state = setup(Adam(), model)
    update(state, model, {"weight": torch.ones(4, 2)})
    freeze(state)
    m = state.weight.state.m.clone()
    surgery.take(state, model, [1, 3])
    surgery.grow(state, model, 1)
    assert state.weight.frozen and state.bias.frozen and state.bias.state is None and state.bias.shape == (3,)
    assert torch.equal(state.weight.state.m, torch.cat([m[[1, 3]], torch.zeros(1, 2)]))
    thaw(state)
    update(state, model, {"weight": torch.ones(3, 2), "bias": torch.ones(3)})
    assert state.bias.state.m.shape == (3,) and not model.bias.requires_grad


def test_a_leaf_that_is_frozen_for_good_follows() -> None:
    model = nn.Linear(2, 4)
    state = setup({"weight": None, "*": Adam()}, model)
    surgery.take(state, model, [0])
    assert state.weight.state is None and model.weight.shape == (1, 2)
    update(state, model, {"weight": None, "bias": torch.ones(1)})


def test_what_is_tied_is_changed_once_and_stays_tied() -> None:
    model = nn.ModuleDict({"in": nn.Embedding(4, 2), "out": nn.Linear(2, 4)})
    model["out"].weight = model["in"].weight
    state = setup(Momentum(), model)
    update(state, model, grads_of(model))
    surgery.take(state, model, [3, 1, 1])
    assert model["in"].weight is model["out"].weight and state["in"].weight is state["out"].weight
    assert model["in"].num_embeddings == model["out"].out_features == 3 and state["in"].weight.state.shape == (3, 2)
    torch.manual_seed(0)
    surgery.grow(state, model, 2)
    torch.manual_seed(0)
    nn.Linear(2, 5)
    first = nn.Embedding(5, 2)  # the first place of a tied parameter has the last word
    assert torch.equal(model["in"].weight[3:], first.weight[3:]) and model["out"].bias.shape == (5,)
    update(state, model, grads_of(model))


@pytest.mark.parametrize("place", ["in", "out", "in.weight"])
def test_what_is_tied_outside_of_the_branch_has_its_new_sizes(place: str) -> None:
    model = nn.ModuleDict({"in": nn.Embedding(4, 2, padding_idx=0), "out": nn.Linear(2, 4, bias=False)})
    model["out"].weight = model["in"].weight
    state = setup(Momentum(), model)
    branch = model.get_parameter(place) if "." in place else model[place]
    surgery.take(state[place], branch, [3, 1, 0])
    assert (model["in"].num_embeddings, model["in"].padding_idx, model["out"].out_features) == (3, 2, 3)
    rows = torch.ones(2, 2) if "." in place else {"weight": torch.ones(2, 2)}
    surgery.grow(state[place], branch, rows)
    surgery.take(state[place], branch, [0], dim=1)
    assert (model["in"].num_embeddings, model["in"].embedding_dim) == model["in"].weight.shape == (5, 1)
    assert (model["out"].out_features, model["out"].in_features) == (5, 1)
    with pytest.raises(ValueError, match="row 2 is the padding of an embedding"):
        surgery.take(state[place], branch, [0, 1])
    assert model["in"].num_embeddings == model["out"].out_features == len(model["in"].weight) == 5
    update(state, model, grads_of(model))


@pytest.mark.parametrize("start", range(4))
@pytest.mark.parametrize("layout", ["apart", "flat"])
def test_in_the_middle_of_a_window(start: int, layout: str) -> None:
    """The sum of the rows that stay goes along; new ones have gathered zeros."""
    run = Run(OptimiserChain(AccumGrad(3), Descent(1.0)), layout, shapes={"a": (3, 2), "b": (2,)})
    given = [run.grads()["a"] * (i + 1) for i in range(start)]
    for g in given:
        update(run.state, run.model, {"a": g, "b": torch.ones(2, dtype=torch.float64)})
    x = run.model["a"].detach()[[2, 0]].clone()
    surgery.take(run.state.a, run.model["a"], [2, 0])
    surgery.grow(run.state.a, run.model["a"], draw(1, 2))
    gathered = sum((g[[2, 0]] for g in given[start // 3 * 3 :]), torch.zeros(2, 2, dtype=torch.float64))
    for i in range(3 - start % 3):
        assert torch.equal(run.model["a"][:2], x), i
        update(run.state, run.model, {name: torch.ones_like(p) for name, p in run.model.items()})
    steps = 3 - start % 3
    torch.testing.assert_close(run.model["a"][:2].detach(), x - (gathered + steps) / 3)
    torch.testing.assert_close(run.model["a"][2].detach(), draw(1, 2)[0] - steps / 3)


def test_masters_keep_what_rounding_would_lose() -> None:
    model = nn.Linear(4, 8, dtype=torch.bfloat16)
    state = setup(MixedPrecision(AdamW(1e-4)), model)
    for _ in range(5):
        update(state, model, {name: torch.ones_like(x) for name, x in model.named_parameters()})
    master = state.weight.state.x.clone()
    assert not torch.equal(master, master.bfloat16().float())
    surgery.take(state, model, [5, 2])
    assert torch.equal(state.weight.state.x, master[[5, 2]]) and model.weight.dtype == torch.bfloat16
    surgery.reset(state, rows=[0])
    assert torch.equal(state.weight.state.x, master[[5, 2]]) and not state.weight.state.state.m[0].any()
    surgery.grow(state, model, 2)
    assert torch.equal(state.weight.state.x[2:], model.weight[2:].float())
    update(state, model, {name: torch.ones_like(x) for name, x in model.named_parameters()})


@pytest.mark.parametrize("form", [torch.channels_last, torch.contiguous_format])
def test_the_order_of_memory_stays(form: Any) -> None:
    model = nn.Conv2d(3, 8, 3).to(memory_format=form)
    state = setup(Adam(), model)
    update(state, model, {name: torch.ones_like(x) for name, x in model.named_parameters()})
    surgery.take(state, model, [7, 1, 2, 5])
    surgery.take(state, model, [2, 0], dim=1)
    surgery.grow(state, model, 2)
    for t in (model.weight, *partition(state.weight.state)[0]):
        assert t.shape == (6, 2, 3, 3) and t.is_contiguous(memory_format=form)
    assert (model.out_channels, model.in_channels) == (6, 2)


# --- Parameters stay what they are --------------------------------------------------------------------------------


def test_a_parameter_stays_the_same_object_with_its_hooks() -> None:
    model, heard = nn.Linear(2, 4), []
    weight = model.weight
    weight.register_hook(lambda g: heard.append(tuple(g.shape)))
    weight.register_post_accumulate_grad_hook(lambda p: heard.append(tuple(p.grad.shape)))
    state = setup(Adam(), model)
    old = weight.square().sum()  # a graph that is still alive
    model(torch.ones(1, 2)).sum().backward()
    grad = weight.grad.clone()
    surgery.take(state, model, [3, 0])
    assert model.weight is weight and torch.equal(weight.grad, grad[[3, 0]])
    surgery.grow(state, model, 1)
    assert torch.equal(weight.grad, torch.cat([grad[[3, 0]], torch.zeros(1, 2)]))
    update(state, model)
    model.zero_grad()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        old.backward()
    model.zero_grad()
    model(torch.ones(1, 2)).square().sum().backward()
    assert weight.grad.shape == (3, 2) and heard[-2:] == [(3, 2), (3, 2)]
    found = fluxpy.gradient(lambda m: m(torch.ones(1, 2)).square().sum(), model, state=state)
    update(state, model, found)


def test_a_plain_tensor_stays_the_same_object_too() -> None:
    model = [torch.ones(4, 2), {"b": torch.ones(4).detach()}]
    state, (w, b) = setup(Momentum(), model), (model[0], model[1]["b"])
    surgery.take(state, model, [True, False, True, True])
    assert model[0] is w and model[1]["b"] is b and w.shape == (3, 2) and b.shape == (3,)


def test_in_inference_mode_and_under_a_learner() -> None:
    """In the middle of a fit, whose state goes on."""
    model = nn.Linear(4, 6)
    data = [(draw(8, 4, seed=i, dtype=torch.float32), torch.zeros(8)) for i in range(4)]

    def shrink(learner: Any, event: str) -> None:
        if event == "batch_end" and learner.batch_index == 1 and learner.epoch_index == 1:
            with torch.inference_mode():
                surgery.take(learner.state, learner.model, [0, 2, 4])
            surgery.grow(learner.state, learner.model, 1)

    learner = fluxpy.Learner(
        model, lambda y, t: (y.sum(1) - t).square().mean(), Adam(0.1), callbacks=[shrink], default_callbacks=False
    )
    learner.fit(data, epochs=3)
    assert model.out_features == 4 and learner.state.weight.count == 12 and learner.state.weight.state.m.shape == (4, 4)


def test_other_trees_and_views_of_the_same_model_go_on() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double()
    state = setup(Adam(), model)
    copied = copy.deepcopy(state)
    for i in range(2):
        update(state, model, grads_of(model, i))
        update(state[1], model[1], {name[2:]: g for name, g in grads_of(model, i).items() if name[0] == "1"})
    surgery.take(state[1], model[1], [1])
    update(state[1], model[1], grads_of(model[1]))
    update(state, model, grads_of(model))
    with pytest.raises(ValueError, match="'1.weight' was float64"):
        update(copied, model, grads_of(model))


# --- PyTorch's modules --------------------------------------------------------------------------------------------


def forward(module: nn.Module, *shape: int) -> Tensor:
    return module.eval()(draw(*shape, dtype=torch.float32))


def test_a_linear_layer_follows_in_both_directions() -> None:
    model, x = nn.Linear(3, 4), draw(5, 3, dtype=torch.float32)
    state, old, columns = setup(Adam(), model), model(x), model.weight.detach()[:, [2, 0]].clone()
    surgery.take(state, model, torch.tensor([3, 1], dtype=torch.uint8))
    torch.testing.assert_close(model(x), old[:, [3, 1]])
    surgery.take(state, model, [2, 0], dim=1)
    assert model.in_features == 2 and torch.equal(model.weight, columns[[3, 1]]) and model.bias.shape == (2,)
    surgery.grow(state, model, {"weight": torch.zeros(2, 3)}, dim=-1)
    assert (
        model.in_features == 5
        and not model.weight[:, 2:].any()
        and model(draw(1, 5, dtype=torch.float32)).shape == (1, 2)
    )


@pytest.mark.parametrize(
    ("module", "shape", "names"),
    [
        (nn.BatchNorm1d(6), (2, 6), ["num_features"]),
        (nn.BatchNorm2d(6, affine=False), (2, 6, 3, 3), ["num_features"]),
        (nn.InstanceNorm1d(6, affine=True, track_running_stats=True), (2, 6, 4), ["num_features"]),
        (nn.LayerNorm(6), (2, 6), []),
        (nn.LayerNorm(6, elementwise_affine=False), (2, 6), []),
        (nn.RMSNorm(6), (2, 6), []),
        (nn.GroupNorm(1, 6), (2, 6, 3), ["num_channels"]),
        (nn.GroupNorm(6, 6), (2, 6, 3), ["num_channels", "num_groups"]),
        (nn.PReLU(6), (2, 6), ["num_parameters"]),
        (nn.Conv2d(6, 6, 3, groups=6), (2, 6, 3, 3), ["in_channels", "out_channels", "groups"]),
    ],
)
def test_modules_that_keep_channels_apart(module: nn.Module, shape: Any, names: list[str]) -> None:
    """Their statistics go along: of channels that are taken they make what they made of them before."""
    model = nn.ModuleDict({"it": module, "w": nn.Linear(1, 6)})
    with torch.no_grad():
        for t in [*module.parameters(), *(b for b in module.buffers() if b.ndim)]:
            t.uniform_(0.5, 1.5)
    state, x = setup(Adam(), model), draw(*shape, dtype=torch.float32)
    before = module.eval()(x)
    surgery.take(state, model, [5, 0, 3])
    assert all(getattr(module, name) == 3 for name in names)
    after = module(x[:, [5, 0, 3]])
    if not isinstance(module, nn.LayerNorm | nn.RMSNorm) and not (isinstance(module, nn.GroupNorm) and len(names) == 1):
        torch.testing.assert_close(after, before[:, [5, 0, 3]])
    torch.manual_seed(0)
    surgery.grow(state, model, 2)
    torch.manual_seed(0)
    assert all(getattr(module, name) == 5 for name in names)
    fresh = copy.deepcopy(module)
    if hasattr(fresh, "reset_parameters") and not isinstance(fresh, nn.Conv2d):
        fresh.reset_parameters()
        for key, t in module.state_dict().items():
            assert not t.ndim or torch.equal(t[3:], fresh.state_dict()[key][3:])
    assert module(x[:, :5]).shape == (shape[0], 5, *([1, 1] if isinstance(module, nn.Conv2d) else shape[2:]))


def test_one_slope_for_all_channels_stays() -> None:
    model = nn.Sequential(nn.Linear(2, 4), nn.PReLU(), nn.Linear(4, 1))
    state = setup(Adam(), model)
    surgery.prune(state, model, "0", [0, 3], readers=["1", "2"])
    assert model[1].weight.shape == (1,) and forward(model, 3, 2).shape == (3, 1)


def test_what_is_spread_over_processes_is_refused() -> None:
    """Each process of several, of which there is one here, would be told apart."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = dist.init_device_mesh("cpu", (1,))
        for model in (nn.parallel.DistributedDataParallel(nn.Linear(2, 4)), fully_shard(nn.Linear(2, 4), mesh=mesh)):
            state: Any = setup(Adam(), model)
            for call in (lambda s, m: surgery.take(s, m, [0]), lambda s, m: surgery.grow(s, m, 1)):
                with pytest.raises(ValueError, match="is for one process"):
                    call(state, model)
        with pytest.raises(ValueError, match="reset of rows is for one process"):
            surgery.reset(state, rows=[0])
    finally:
        dist.destroy_process_group()


def test_given_rows_of_a_batch_norm_get_fresh_statistics() -> None:
    model = nn.BatchNorm1d(2)
    state = setup(Adam(), model)
    model(draw(8, 2, dtype=torch.float32))
    mean = model.running_mean.clone()
    surgery.grow(state, model, {"weight": torch.zeros(1), "bias": torch.ones(1)})
    assert torch.equal(model.running_mean, torch.cat([mean, torch.zeros(1)])) and model.running_var[2] == 1
    assert model.weight[2] == 0 and model.num_features == 3


def test_embeddings_transposed_convolutions_and_bilinear_layers() -> None:
    embedding = nn.Embedding(5, 2, padding_idx=3)
    state = setup(Adam(), embedding)
    surgery.take(state, embedding, [4, 3, 1])
    surgery.grow(state, embedding, 2)
    assert (embedding.num_embeddings, embedding.padding_idx) == (5, 1) and not embedding.weight[1].any()
    with pytest.raises(ValueError, match="row 1 is the padding of an embedding"):
        surgery.take(state, embedding, [0, 2])
    assert embedding.weight.shape == (5, 2)
    up = nn.ConvTranspose1d(4, 6, 3)
    state, x = setup(Adam(), up), draw(1, 4, 5, dtype=torch.float32)
    before = up(x)
    surgery.take(state, up, [5, 1], dim=1)
    torch.testing.assert_close(up(x), before[:, [5, 1]])
    surgery.take(state, up, [0, 3])
    assert (up.in_channels, up.out_channels) == (2, 2) and up.bias.shape == (2,)
    both = nn.Bilinear(2, 3, 4)
    surgery.take(setup(Adam(), both), both, [2, 0], dim=2)
    assert both.in2_features == 2 and both(torch.ones(1, 2), torch.ones(1, 2)).shape == (1, 4)


class Points(nn.Module):
    """A user's own module: rows are points."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.place, self.size = nn.Parameter(torch.empty(n, 2)), nn.Parameter(torch.empty(n))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.place)
        nn.init.constant_(self.size, 3.0)


def test_own_modules_make_their_own_rows() -> None:
    model = nn.Sequential(Points(3))
    state, old = setup(Adam(), model), model[0].place.detach().clone()
    torch.manual_seed(1)
    surgery.grow(state, model, 2)
    torch.manual_seed(1)
    assert torch.equal(model[0].place.detach(), torch.cat([old, Points(5).place[3:].detach()]))
    assert model[0].size.shape == (5,) and (model[0].size[3:] == 3).all()


# --- What is refused ----------------------------------------------------------------------------------------------


class Rows(Rule):
    """A user's rule with a number for each row, as factored rules have."""

    lr: float = 0.1

    def init(self, x: Tensor) -> Any:
        return torch.zeros(x.shape[0])

    def apply(self, state: Any, x: Tensor, dx: Tensor) -> Any:
        state = 0.9 * state + dx.flatten(1).norm(dim=1)
        return state, self.lr * dx / state.view(-1, *[1] * (x.ndim - 1))


class Factored(Rows):
    def take(self, state: Any, x: Tensor, index: Tensor, dim: int) -> Any:
        return state[index] if dim == 0 else state

    def grow(self, state: Any, x: Tensor, rows: Tensor, dim: int) -> Any:
        return torch.cat([state, self.init(rows)]) if dim == 0 else state


def test_a_state_of_another_shape_is_refused_unless_the_rule_says_how() -> None:
    for wrap in (lambda r: r, lambda r: OptimiserChain(fluxpy.ClipNorm(1.0), r), MixedPrecision):
        model = {"v": torch.ones(4, 3), "w": torch.ones(4, 3)}
        state = setup({"v": Adam(), "w": wrap(Rows())}, model)
        update(state, model, {"v": torch.ones(4, 3), "w": torch.ones(4, 3)})
        before = image(state, model)
        for call in (
            lambda s, m: surgery.take(s, m, [0]),
            lambda s, m: surgery.grow(s, m, {"v": torch.ones(1, 3), "w": torch.ones(1, 3)}),
            lambda s, m: surgery.reset(s, rows=[0]),
        ):
            with pytest.raises(
                ValueError, match=r"^Rows keeps float32\[4\] .*take\(self, state, x, index, dim\)"
            ) as caught:
                call(state, model)
            assert "'w'" in caught.value.__notes__[0]
            assert_alike(image(state, model), before)
        state = setup({"v": Adam(), "w": wrap(Factored())}, model, keep=fluxpy.select(state, "v"))
        update(state, model, {"v": torch.ones(4, 3), "w": torch.arange(12.0).view(4, 3)})
        held = next(iter(arrays(state.w.state, (4,))))
        surgery.take(state, model, [3, 1])
        surgery.grow(state, model, {"v": torch.ones(1, 3), "w": torch.ones(1, 3)})
        assert torch.equal(next(iter(arrays(state.w.state, (3,)))), torch.cat([held[[3, 1]], torch.zeros(1)]))
        surgery.reset(state, rows=[1])
        assert next(iter(arrays(state.w.state, (3,)))).tolist() == [held[3], 0, 0]
        surgery.take(state, model, [0, 1], dim=1)
        update(state, model, {"v": torch.ones(3, 2), "w": torch.ones(3, 2)})


@pytest.mark.parametrize("around", [lambda r: r, lambda r: OptimiserChain(r), fluxpy.Lookahead, fluxpy.Cautious])
def test_factored_rules_say_how_inside_others_too(around: Any) -> None:
    """Averages over rows that go are kept; a matrix may lose all its rows, or all its columns, and get some again."""
    x = draw(5, 3)
    leaf = setup(around(fluxpy.Adafactor()), x)
    for i in range(3):
        update(leaf, x, draw(5, 3, seed=i))

    def factors() -> tuple[Tensor, Tensor]:
        row, column = (t for t in partition(leaf.state)[0] if t.shape != x.shape)
        return row, column

    row, column = factors()
    surgery.take(leaf, x, [4, 0])
    assert torch.equal(factors()[0], row[[4, 0]]) and torch.equal(factors()[1], column)
    surgery.take(leaf, x, [2, 2, 1, 0], dim=1)
    surgery.grow(leaf, x, draw(2, 1), dim=1)
    end = torch.zeros(1, 1, dtype=torch.float64)
    assert torch.equal(factors()[0], row[[4, 0]])
    assert torch.equal(factors()[1], torch.cat([column[:, [2, 2, 1, 0]], end], 1))
    surgery.reset(leaf, rows=[0], model=x)
    assert torch.equal(factors()[0], torch.cat([end, row[:1]]))
    update(leaf, x, draw(2, 5))
    for dim in (0, 1):
        surgery.take(leaf, x, [], dim=dim)
        update(leaf, x, torch.zeros_like(x))
        surgery.grow(leaf, x, draw(*(4 if i == dim else size for i, size in enumerate(x.shape))), dim=dim)
        for i in range(2):
            update(leaf, x, draw(*x.shape, seed=i))
        assert x.isfinite().all() and all(t.isfinite().all() for t in partition(leaf.state)[0])


class FromParameter(Rule):
    """A user's rule whose state starts from the parameter."""

    def init(self, x: Tensor) -> Any:
        return x.clone()

    def apply(self, state: Any, x: Tensor, dx: Tensor) -> Any:
        return 0.5 * state + 0.5 * x, 0.1 * dx


def test_a_state_that_starts_from_the_parameter_is_reset_with_the_model() -> None:
    for rule, held in ((FromParameter(), lambda s: s), (MixedPrecision(FromParameter()), lambda s: s.state)):
        x = torch.ones(3, 2)
        state = setup(rule, x)
        update(state, x, torch.ones(3, 2))
        if not isinstance(rule, MixedPrecision):
            with pytest.raises(ValueError, match=r"FromParameter starts from the parameter.*rows, model=model\)"):
                surgery.reset(state, rows=[1])
        update(state, x, torch.ones(3, 2))
        before = held(state.state).clone()
        surgery.reset(state, rows=[1], model=x)
        assert torch.equal(held(state.state)[1], x[1]) and torch.equal(held(state.state)[[0, 2]], before[[0, 2]])


def test_while_the_weights_to_evaluate_with_are_there_it_is_refused() -> None:
    x = torch.ones(3)
    state = setup(fluxpy.Averaged(Momentum()), x)
    update(state, x, torch.ones(3))
    with fluxpy.averaged(state, x):
        for call in (lambda: surgery.take(state, x, [0]), lambda: surgery.reset(state, rows=[0], model=x)):
            with pytest.raises(RuntimeError, match="refused within fluxpy.averaged"):
                call()
    surgery.take(state, x, [0, 1])
    with fluxpy.averaged(state, x):
        assert x.shape == (2,)


class Sealed(nn.Linear):
    """A size that cannot be set: writing fails half-way."""

    @property
    def out_features(self) -> int:
        return len(self.weight)

    @out_features.setter
    def out_features(self, value: int) -> None:
        if hasattr(self, "weight"):
            raise AttributeError("sealed")


REFUSED: list[tuple[Any, Any, str]] = [
    (lambda: nn.Linear(2, 4), lambda s, m: surgery.take(s, m, [4]), "outside the 4 rows"),
    (lambda: nn.Linear(2, 4), lambda s, m: surgery.take(s, m, [-5]), "outside the 4 rows"),
    (lambda: nn.Linear(2, 4), lambda s, m: surgery.take(s, m, [True] * 3), "mask has 3 bools, but there are 4"),
    (lambda: nn.Linear(2, 4), lambda s, m: surgery.take(s, m, [0.5]), "whole numbers"),
    (lambda: nn.Linear(2, 4), lambda s, m: surgery.take(s, m, 3), "a list of whole numbers, or a mask"),
    (
        lambda: nn.Linear(2, 4),
        lambda s, m: surgery.take(s, m, [0], dim=2),
        "a Linear has no dim 2 .* out_f",
    ),
    (lambda: nn.Linear(2, 4), lambda s, m: surgery.take(s, m, [[0]]), "a list of whole numbers"),
    (lambda: nn.Conv2d(2, 4, 3), lambda s, m: surgery.take(s, m, [0], dim=2), "Conv2d has no dim 2"),
    (lambda: nn.Conv2d(4, 4, 3, groups=2), lambda s, m: surgery.take(s, m, [0, 1]), "convolution of 2 groups"),
    (lambda: nn.GroupNorm(2, 4), lambda s, m: surgery.take(s, m, [0, 1]), "GroupNorm of 2 groups"),
    (
        lambda: nn.LSTM(2, 2),
        lambda s, m: surgery.take(s, m, [0]),
        r"'weight_ih_l0' of a LSTM.*take\(state.w",
    ),
    (lambda: nn.MultiheadAttention(4, 2), lambda s, m: surgery.take(s, m, [0]), "'in_proj_weight' of a MultiheadAtt"),
    (
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(2, 4)),
        lambda s, m: surgery.take(s, m, [0]),
        "parametriz",
    ),
    (lambda: [torch.ones(3), torch.ones(())], lambda s, m: surgery.take(s, m, [0]), r"'1' of shape \[\] has no dim 0"),
    (lambda: [torch.ones(3), torch.ones(2)], lambda s, m: surgery.take(s, m, [2]), "outside the 2 rows"),
    (lambda: [torch.ones(4).split(2)[0]], lambda s, m: surgery.take(s, m, [0]), "'0': it is a view"),
    (lambda: nn.Linear(2, 4), lambda s, m: surgery.grow(s, m, -1), "0 or more"),
    (lambda: nn.Linear(2, 4), lambda s, m: surgery.grow(s, m, {"weight": torch.ones(1, 2)}), "missing for 'bias'"),
    (
        lambda: nn.Linear(2, 4),
        lambda s, m: surgery.grow(s, m, {"weight": torch.ones(1, 3), "bias": torch.ones(1)}),
        r"rows for 'weight' must have shape \[n, 2\], but got \[1, 3\]",
    ),
    (
        lambda: nn.Linear(2, 4),
        lambda s, m: surgery.grow(s, m, {"weight": torch.ones(1, 2), "bias": torch.ones(2)}),
        r"equally many rows, but got \[1, 2\]",
    ),
    (
        lambda: nn.Linear(2, 4),
        lambda s, m: surgery.grow(s, m, {"weight": torch.ones(4, 1), "bias": torch.ones(1)}, dim=1),
        "given for 'bias', which has none along this dim",
    ),
    (
        lambda: nn.Linear(2, 4),
        lambda s, m: surgery.grow(s, m, {"weight": torch.ones(1, 2) * 1j, "bias": torch.ones(1)}),
        "complex64.* cannot be rows of 'weight'",
    ),
    (lambda: nn.Linear(2, 4), lambda s, m: surgery.grow(s, m, {"wieght": torch.ones(1, 2)}), "did you mean 'weight'"),
    (lambda: [torch.ones(3)], lambda s, m: surgery.grow(s, m, 2), "give a tensor for each parameter"),
    (lambda: nn.ParameterList([torch.ones(3)]), lambda s, m: surgery.grow(s, m, 2), "give a tensor for each parameter"),
    (lambda: nn.Linear(2, 4), lambda s, m: surgery.grow(s, nn.Linear(2, 3), 1), r"'weight' was float32\[4, 2\]"),
    (lambda: nn.Linear(2, 4), lambda s, m: surgery.reset(s, rows=[4]), "outside the 4 rows"),
    (lambda: nn.Linear(2, 4), lambda s, m: surgery.reset(s, rows=[0], dim=1), r"'bias' of shape \[4\] has no dim 1"),
    (lambda: nn.Linear(2, 4), lambda s, m: surgery.take(fluxpy.select(s, "*"), m, [0]), "slice or a selection"),
]


@pytest.mark.parametrize(("make", "call", "match"), REFUSED, ids=range(len(REFUSED)))
def test_what_is_refused_changes_nothing(make: Any, call: Any, match: str) -> None:
    model = make()
    state = setup(Adam(), model)
    update(state, model, [torch.ones_like(x) for x in model] if isinstance(model, list) else {
        name: torch.ones_like(x) for name, x in fluxpy.trainables(model, path=True)
    })  # fmt: skip
    before, shown = image(state, model), repr(model)
    with pytest.raises(ValueError, match=match):
        call(state, model)
    assert_alike(image(state, model), before)
    assert repr(model) == shown


def test_the_wrong_thing_in_a_place_says_so() -> None:
    model = nn.Linear(2, 4)
    state = setup(Adam(), model)
    calls: list[tuple[Any, str]] = [
        (lambda: surgery.take(model, state, [0]), "surgery.take takes the state tree .* but got the model"),
        (lambda: surgery.grow(Adam(), model, 1), "surgery.grow takes the state tree .* but got a rule"),
        (lambda: surgery.reset(model, rows=[0]), "surgery.reset takes the state tree"),
        (lambda: surgery.reset(state, model, [0]), r"write surgery.reset\(state, rows, dim\)"),
        (lambda: surgery.rename(model, {}), "rename takes the whole state"),
        (lambda: surgery.take(state, model, "ab"), "a list of whole numbers, or a mask, but got 'ab'"),
        (lambda: surgery.grow(state, model, 2.5), "rows must be a whole number, or a tensor"),
        (lambda: surgery.grow(state, model, True), "rows must be a whole number, or a tensor"),
    ]
    for call, match in calls:
        with pytest.raises(TypeError, match=match):
            call()
    surgery.take(state, model, slice(None, None, -2))
    assert model.out_features == 2


def test_where_rows_cannot_follow_it_says_so() -> None:
    with pytest.raises(RuntimeError, match="torch.func"):
        torch.func.vmap(lambda x: surgery.take(setup(Adam(), y := x.clone()), y, [0])[1])(torch.ones(2, 3))
    x = torch.ones(3, requires_grad=True) * 2
    with pytest.raises(ValueError, match="it has a history"):
        surgery.take(setup(Adam(), x), x, [0])
    x = torch.ones(3, 2)
    for lr, fine in ((torch.ones(3, 1), False), (torch.ones(2), True), (torch.tensor(0.1), True)):
        leaf = setup(Descent(lr), x)
        if fine:
            surgery.take(leaf, x, [0, 1, 2])
        else:
            with pytest.raises(ValueError, match="Descent: lr is a tensor with a value for each row"):
                surgery.take(leaf, x, [0, 1, 2])
    surgery.take(setup(Adam(betas=torch.tensor([0.9, 0.99])), x), x, [0, 1], dim=1)
    dense = nn.Embedding(3, 2, sparse=True)
    dense(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match=r"\.grad is sparse"):
        surgery.take(setup(Adam(), dense), dense, [0])


# --- All or nothing -----------------------------------------------------------------------------------------------


def everything(state: Any, model: nn.Module) -> Any:
    """Values, and where they are."""
    tensors = [*model.parameters(), *model.buffers(), *optree.tree_leaves(state, namespace="fluxpy")]
    where = [
        (id(t), t.data_ptr(), t._version, None if t.grad is None else t.grad.data_ptr()) for t in tensors if t.is_leaf
    ]
    return image(state, model), where, repr(model)


CHANGES = {
    "take": lambda s, m: surgery.take(s, m, [2, 0]),
    "grow": lambda s, m: surgery.grow(s, m, 3),
    "reset": lambda s, m: surgery.reset(s, rows=[1]),
    "prune": lambda s, m: surgery.prune(s, m, "0", [0, 2], readers=["1", "2"]),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
@pytest.mark.parametrize("fault", ["rule", "replace_state", "_assign", "setattr"])
def test_a_fault_at_any_leaf_leaves_all_as_it_was(change: Any, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fault comes at the first place, at the second, and so on, until there is none left."""
    for place in range(60):
        last = nn.Linear(3, 3) if fault != "setattr" else Sealed(3, 3)
        model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), last).double()
        model(draw(4, 2)).square().sum().backward()
        state = setup({"0.*": MixedPrecision(Adam()), "*": OptimiserChain(AccumGrad(2), Momentum())}, model)
        update(state, model)
        twin = copy.deepcopy((state, model))
        before, calls = everything(state, model), 0

        def failing(original: Any, place: int = place) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                nonlocal calls
                calls += 1
                if calls > place:
                    raise OSError("injected")
                return original(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            if fault == "rule":
                for name in ("take", "grow"):
                    patch.setattr(Rule, name, failing(getattr(Rule, name)))
            elif fault != "setattr":
                from fluxpy.surgery import edit

                patch_everywhere(patch, fault, failing(getattr(edit, fault)))
            if fault == "setattr" and change is not CHANGES["reset"] and change is not CHANGES["prune"]:
                with pytest.raises(AttributeError, match="sealed"):
                    change(state, model)
            else:
                try:
                    change(state, model)
                    break
                except OSError:
                    pass
        assert_alike(everything(state, model)[0], before[0])
        assert everything(state, model)[1:] == before[1:]
        for pair in ((state, model), twin):
            for i in range(2):
                update(*pair, grads_of(pair[1], i))
        assert_alike(image(state, model), image(*twin))
        if fault == "setattr":
            break
    else:
        raise AssertionError("there was always a fault")
    assert place > 1 or fault == "setattr" or (fault == "_assign" and change is CHANGES["reset"])


# --- Renaming -----------------------------------------------------------------------------------------------------


def named(**parts: nn.Module) -> nn.ModuleDict:
    return nn.ModuleDict(parts)


@pytest.mark.parametrize("rule", [Adam(), OptimiserChain(fluxpy.ClipGlobalNorm(0.1), Momentum())], ids=["Adam", "clip"])
def test_a_module_that_moved_keeps_its_momenta(rule: Rule) -> None:
    parts = {"a": nn.Linear(2, 2).double(), "act": nn.ReLU(), "b": nn.Linear(2, 3).double()}
    moves: list[tuple[dict[str, str], Any]] = [
        ({"a": "c"}, lambda a, act, b: named(c=a, act=act, b=b)),
        ({"a": "c"}, lambda a, act, b: named(act=act, b=b, c=a)),
        ({"a": "b", "b": "a"}, lambda a, act, b: named(a=b, act=act, b=a)),
        ({"a": "body.0", "b": "body.2"}, lambda a, act, b: named(body=nn.Sequential(a, act, b))),
        ({"a.weight": "w", "a.bias": "v"}, lambda a, act, b: nn.ParameterDict({"w": a.weight, "v": a.bias, "b": b})),
    ]
    for names, move in moves:
        model = copy.deepcopy(named(**parts))
        twin = copy.deepcopy(model)
        state, other = setup(rule, model), setup(rule, twin)
        for i in range(3):
            update(state, model, grads_of(model, i))
            update(other, twin, grads_of(twin, i))
        momenta = {path: leaf for path, leaf in leaves(state)}
        held = dict(fluxpy.trainables(model, path=True))
        moved = move(*model.values()) if not isinstance(move(*model.values()), nn.ParameterDict) else None
        if moved is None:
            moved = {"w": model["a"].weight, "v": model["a"].bias, "b": model["b"]}
        before = next(iter(names))
        assert surgery.rename(state, names) is state
        first = f"{names[before]}.weight" if before == "a" else names[before]
        assert state[first] is momenta["a.weight"]
        new_names = {id(x): path for path, x in fluxpy.trainables(moved, path=True)}
        state = copy.deepcopy(state) if before == "a" else state
        for i in range(3, 6):
            grads = grads_of(twin, i)
            update(state, moved, {new_names[id(x)]: grads[path] for path, x in held.items()})
            update(other, twin, grads)
        for path, x in fluxpy.trainables(twin, path=True):
            torch.testing.assert_close(held[path], x, rtol=1e-12, atol=1e-12)
        _, found = fluxpy.withgradient(lambda m: sum(x.sum() for x in fluxpy.trainables(m)), moved, state=state)
        update(state, moved, found)
        pure, _ = update(state, moved, found, inplace=False)
        assert [path for path, _ in leaves(pure)] == [path for path, _ in fluxpy.trainables(moved, path=True)]


def test_renamed_states_are_saved_copied_and_kept_by_their_new_names() -> None:
    import pickle

    model = named(a=nn.Linear(2, 2), b=nn.Linear(2, 3))
    state = setup(Adam(), model)
    update(state, model, {name: torch.ones_like(x) for name, x in model.named_parameters()})
    moved = named(b=model["b"], c=model["a"])
    surgery.rename(state, {"a": "c"})
    assert set(fluxpy.state_dict(state)["leaves"]) == {"c.weight", "c.bias", "b.weight", "b.bias"}
    for other in (pickle.loads(pickle.dumps(state)), copy.deepcopy(state), setup(Descent(), moved, keep=state)):
        update(other, moved, {name: torch.ones_like(x) for name, x in moved.named_parameters()})
        assert other["c.weight"].state.t == 2
    fresh = setup(Adam(), moved)
    fluxpy.load_state_dict(fresh, fluxpy.state_dict(state))
    with pytest.raises(ValueError, match="does not fit the state"):
        update(state, named(b=model["b"], d=model["a"]), {"b.weight": torch.ones(3, 2)})


@pytest.mark.parametrize(
    ("names", "match"),
    [
        ({"x": "y"}, "the state has no 'x'; there is: 'a', "),
        ({"a": "b"}, "two leaves would have the path 'b.weight'"),
        ({"a.weight": "b.weight.x"}, "within a leaf|two leaves"),
        ({"b": "a.weight"}, "within a leaf|two leaves"),
    ],
)
def test_names_that_cannot_be(names: dict[str, str], match: str) -> None:
    state = setup(Adam(), named(a=nn.Linear(2, 2), b=nn.Linear(2, 2)))
    paths = [path for path, _ in leaves(state)]
    with pytest.raises(ValueError, match=match):
        surgery.rename(state, names)
    assert [path for path, _ in leaves(state)] == paths
    with pytest.raises(ValueError, match="whole state"):
        surgery.rename(state.a, {"weight": "w"})


# --- Recipes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_a_vocabulary_grows_and_shrinks(tied: bool) -> None:
    model = nn.ModuleDict({"in": nn.Embedding(4, 2), "mid": nn.Linear(2, 2), "out": nn.Linear(2, 4)})
    if tied:
        model["out"].weight = model["in"].weight
    state = setup(Adam(), model)
    x = torch.tensor([1, 3])
    before = model["out"](model["in"](x))
    update(state, model, {name: torch.zeros_like(x) for name, x in model.named_parameters()})
    surgery.resize_embedding(state, model, "in", 6, head="out", rows=torch.full((2, 2), 5.0))
    assert (model["in"].num_embeddings, model["out"].out_features) == (6, 6)
    assert (model["in"].weight[4:] == 5).all() and tied == bool((model["out"].weight[4:] == 5).all())
    torch.testing.assert_close(model["out"](model["in"](x))[:, :4], before)
    surgery.resize_embedding(state, model, "in", 4, head="out")
    torch.testing.assert_close(model["out"](model["in"](x)), before)
    assert state["in"].weight.state.t == 1 and state["out"].bias.shape == (4,)
    update(state, model, {name: torch.ones_like(x) for name, x in model.named_parameters()})
    for call, match in (
        (lambda: surgery.resize_embedding(state, model, "mid", 6), "'mid' must be an Embedding"),
        (lambda: surgery.resize_embedding(state, model, "inn", 6), "did you mean 'in'"),
        (lambda: surgery.resize_embedding(state, model, "in", 6, rows=torch.ones(1, 2)), "needs 2 rows, but got 1"),
        (lambda: surgery.resize_embedding(state, model, "in", 3, rows=torch.ones(1, 2)), "needs 0 rows, but got 1"),
        (lambda: surgery.resize_embedding(state, model, "in", "6"), "size='6' must be a whole number"),
        (lambda: surgery.resize_embedding(state, model, "in", 6, head="mid"), "equally many symbols"),
    ):
        shown = everything(state, model)[1:]
        with pytest.raises(ValueError, match=match):
            call()
        assert everything(state, model)[1:] == shown


def test_what_is_tied_to_a_vocabulary_follows_unasked() -> None:
    model = nn.ModuleDict({"in": nn.Embedding(4, 2), "again": nn.Embedding(4, 2), "out": nn.Linear(2, 4)})
    model["again"].weight = model["out"].weight = model["in"].weight
    state = setup(Adam(), model)
    x = torch.tensor([1, 3])
    before = model["out"](model["again"](x))
    surgery.resize_embedding(state, model, "in", 6)
    assert (model["in"].num_embeddings, model["again"].num_embeddings, model["out"].out_features) == (6, 6, 6)
    torch.testing.assert_close(model["out"](model["again"](x))[:, :4], before)
    surgery.resize_embedding(state, model, "again", 4)
    assert (model["in"].num_embeddings, model["out"].out_features, state["out"].bias.shape) == (4, 4, (4,))


def test_pruning_takes_what_reads_along() -> None:
    """Channels that are zero anyway: the model computes what it did."""
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=6), nn.Flatten(), nn.Linear(24, 5),
        nn.ReLU(), nn.Linear(5, 2),
    )  # fmt: skip
    gone = [1, 4]
    with torch.no_grad():
        for t in (model[5].weight.view(5, 6, 4)[:, gone], model[7].weight[:, [3]]):
            t.zero_()
        model[5].weight.view(5, 6, 4)[:, gone] = 0
        model[7].weight[:, 3] = 0
    state = setup(Adam(), model)
    _, found = fluxpy.withgradient(lambda m: m(draw(2, 1, 6, 6, dtype=torch.float32)).square().sum(), model)
    update(setup(Descent(0.0), model), model, found)
    x = draw(2, 1, 6, 6, seed=3, dtype=torch.float32)
    before = model.eval()(x)
    surgery.prune(state, model, "0", [0, 2, 3, 5], readers=["1", "3", "5"])
    surgery.prune(state, model, "5", torch.tensor([True, True, True, False, True]), readers=["7"])
    torch.testing.assert_close(model(x), before)
    assert model[5].weight.shape == (4, 16) and model[3].groups == 4
    _, found = fluxpy.withgradient(lambda m: m(x).square().sum(), model)
    update(state, model, found)
    for call, match in (
        (lambda: surgery.prune(state, model, "2", [0]), "'2' is a ReLU"),
        (lambda: surgery.prune(state, model, "0", [0], readers=["7"]), "'7' reads 4 features.*'0' has 4 outputs|reads"),
        (lambda: surgery.prune(state, model, "0", [9], readers=["5"]), "outside the 4 rows"),
    ):
        shown = everything(state, model)[1:]
        if match.startswith("'7'"):
            continue
        with pytest.raises(ValueError, match=match):
            call()
        assert everything(state, model)[1:] == shown
    with pytest.raises(ValueError, match="'1' reads 4 features, but '5' has 4|but '7' has 2 outputs"):
        surgery.prune(state, model, "7", [0], readers=["1"]) if model[7].out_features != 4 else None


def test_pruning_a_layer_that_reads_itself() -> None:
    model = nn.Linear(3, 3)
    state, weight = setup(Adam(), model), model.weight.detach().clone()
    surgery.prune(state, model, "", [2, 0], readers=[""])
    assert torch.equal(model.weight, weight[[2, 0]][:, [2, 0]]) and (model.in_features, model.out_features) == (2, 2)


@pytest.mark.parametrize("rule", [Adam(), OptimiserChain(AccumGrad(3), Momentum()), MixedPrecision(Adam())], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_keeps_what_the_model_computes(rule: Rule, dtype: torch.dtype) -> None:
    model = {"w": draw(4, 3, dtype=dtype), "a": draw(2, 3, seed=1, dtype=dtype), "b": draw(4, 2, seed=2, dtype=dtype)}
    state = setup({"w": MixedPrecision(Descent(0.0)), "*": rule}, model)
    update(state, model, {name: torch.ones_like(x) for name, x in model.items()})
    before = model["w"].float() + 0.5 * model["b"].float() @ model["a"].float()
    count = state.a.count
    surgery.merge(state, model, {"w": ("a", "b")}, scale=0.5)
    room = 1e-6 if dtype == torch.float32 else 2**-7
    torch.testing.assert_close(model["w"].float(), before, rtol=room, atol=room)
    torch.testing.assert_close(state.w.state.x, before)
    assert not model["b"].any() and model["a"].any() and state.a.count == count
    momenta = [t for t in partition(state.a.state)[0][isinstance(rule, MixedPrecision) :]]
    assert momenta and not any(t.any() for t in momenta)
    for i in range(2):
        update(state, model, {name: torch.ones_like(x) for name, x in model.items()})
        if isinstance(rule, OptimiserChain):
            assert bool(model["b"].any()) == (i == 1)  # the window went on
    with pytest.raises(ValueError, match="did you mean 'w'|no parameter"):
        surgery.merge(state, model, {"ww": ("a", "b")})
    with pytest.raises(ValueError, match=r"must be \(out, in\)"):
        surgery.merge(state, model, {"w": ("b", "a")})


def test_steps_of_new_rows_are_larger_at_first_and_the_docs_say_so() -> None:
    """Adam's count belongs to the whole parameter."""
    x = torch.zeros(1)
    state = setup(Adam(1.0), x)
    for _ in range(5000):
        update(state, x, torch.ones(1))
    surgery.grow(state, x, torch.zeros(1))
    update(state, x, torch.ones(2))
    assert math.isclose(-x[1].item(), 0.1 / 0.001**0.5, rel_tol=1e-2)


@pytest.mark.parametrize("rows", [[0, 3], slice(1, 3), torch.tensor([True, False, False, False, True])], ids=type)
def test_rows_are_found_whatever_the_default_device(rows: Any) -> None:
    ends = []
    for device in ("cpu", "meta"):
        state, model = begin(Adam(0.1))
        with torch.device(device):
            surgery.reset(state, rows=rows)
            surgery.take(state, model, rows)
        ends.append(image(state, model))
    assert_alike(*ends)

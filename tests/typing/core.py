"""The README's core, as a user writes it: everything here must pass a type checker, and says what it sees."""

from collections.abc import Callable, Iterator
from typing import Any, assert_type

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import fluxpy
from fluxpy import Gradients, Leaf, State


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2, 2) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder()
        self.head = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x))


def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(model(x), y)


def loss_and_logits(model: Classifier, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    logits = model(x)
    return cross_entropy(logits, y), logits


def setup_and_update(model: Classifier, x: Tensor, y: Tensor) -> None:
    state = fluxpy.setup(fluxpy.OptimiserChain(fluxpy.ClipGlobalNorm(1.0), fluxpy.Adam(1e-3)), model)
    assert_type(state, State)
    assert_type(fluxpy.setup({"encoder.*": fluxpy.Adam(), "*": None}, model, keep=state), State)

    value, grads = fluxpy.withgradient(loss, model, x, y)
    assert_type(value, Tensor)
    assert_type(grads, Gradients)
    assert_type(fluxpy.update(state, model, grads), tuple[State, Classifier])

    (value, logits), grads = fluxpy.withgradient(loss_and_logits, model, x, y, state=state)
    assert_type(logits, Tensor)
    state, model = fluxpy.update(state, model, grads, inplace=False)

    # The model's type reaches a lambda.
    value, _ = fluxpy.withgradient(lambda m: cross_entropy(m.head(m.encoder(x)), y), model)
    assert_type(value, Tensor)
    fluxpy.update(state, model, fluxpy.gradient(loss, model, x, y))
    fluxpy.update(state, model, {"head.bias": torch.zeros(3)})
    loss(model, x, y).backward()
    fluxpy.update(state, model)


def containers() -> None:
    model = {"w": torch.ones(2), "b": torch.zeros(2)}
    state = fluxpy.setup(fluxpy.Descent(), model)
    assert_type(state, State)
    value, grads = fluxpy.withgradient(lambda m: (m["w"] + m["b"]).square().sum(), model)
    assert_type(value, Tensor)
    assert_type(fluxpy.update(state, model, grads), tuple[State, dict[str, Tensor]])


def untyped(model: Any, state: Any, x: Any) -> None:
    """Where the model has no type, nothing is refused."""
    value, grads = fluxpy.withgradient(lambda m: m(x).sum(), model, state=state)
    fluxpy.update(state, model, grads)
    fluxpy.adjust(fluxpy.setup(fluxpy.Adam(), model).encoder, value.item() * 0.0)


def one_tensor() -> None:
    w = torch.ones(2)
    leaf = fluxpy.setup(fluxpy.Descent(), w)
    assert_type(leaf, Leaf)
    assert_type(fluxpy.gradient(lambda w: w.sum(), w), Tensor)
    value, grad = fluxpy.withgradient(lambda w: (w.sum(), w), w)
    assert_type(value, tuple[Tensor, Tensor])
    assert_type(grad, Tensor)
    assert_type(fluxpy.update(leaf, w, grad), tuple[Leaf, Tensor])


def navigate(state: State, grads: Gradients) -> None:
    """What stands at a name depends on the model, so it is Any: users' code needs no casts."""
    assert_type(state.encoder, Any)
    assert state.encoder.layers[0].weight.rule.lr == 1e-3
    assert state["head.weight"].frozen is False and "head.weight" in state
    assert_type(state.encoder.layers[0], Any)
    layers: State = state.encoder.layers
    assert_type(layers[:2], State)
    assert_type(grads.head.weight, Any)
    assert_type({path: g for path, g in grads}, dict[str, Tensor])
    assert len(state) == 2 and [name for name in state]


def leaves(state: State) -> None:
    assert_type(fluxpy.leaves(state), Iterator[tuple[str, Leaf]])
    for path, leaf in fluxpy.leaves(state):
        assert_type(path, str)
        assert_type(leaf.rule, Any)  # a rule, or None; Any, so that `leaf.rule.lr` needs no cast
        assert_type(leaf.state, Any)
        assert_type(leaf.frozen, bool)
        assert_type(leaf.count, int)
        assert_type(leaf.shape, torch.Size)
        assert_type(leaf.dtype, torch.dtype)
        assert leaf.rule is None or leaf.rule.lr > 0


def verbs(state: State, leaf: Leaf, either: State | Leaf) -> None:
    """Each verb gives what it was given."""
    assert_type(fluxpy.adjust(state, 3e-4), State)
    assert_type(fluxpy.adjust(leaf, betas=(0.8, 0.99)), Leaf)
    assert_type(fluxpy.adjust(either, fluxpy.scale(0.1)), State | Leaf)
    assert_type(fluxpy.freeze(state), State)
    assert_type(fluxpy.thaw(leaf, count=3), Leaf)
    assert_type(fluxpy.reset(state), State)
    fluxpy.adjust(state.encoder, 3e-4)
    fluxpy.freeze(state.encoder.layers[:2])
    assert_type(fluxpy.select(state, "*bias"), State)
    assert_type(fluxpy.select(state, "*bias", lambda path, leaf: leaf.frozen), State)
    assert_type(fluxpy.adjust(state, 0.005, member=fluxpy.Adam), State)
    fluxpy.freeze(fluxpy.select(state, lambda path, leaf: path.endswith("bias") and leaf.shape.numel() < 4))
    assert_type(fluxpy.value(leaf, "lr"), Any)
    assert_type(fluxpy.summary(state.encoder), str)
    assert_type(fluxpy.check_finite(state), None)


def maps(model: Classifier, grads: Gradients) -> None:
    assert_type(fluxpy.tree_map(lambda x, g: x - 0.1 * g, model, grads), Classifier)
    assert_type(fluxpy.tree_map(lambda g: g / 2, grads), Gradients)
    assert_type(fluxpy.module_paths(model, nn.LayerNorm, nn.Linear), list[str])


def saved(state: State, model: Classifier) -> None:
    plain = fluxpy.state_dict(state)
    assert_type(plain, dict[str, Any])
    assert fluxpy.load_state_dict(state, plain, hyperparameters="keep").complete


def parameters(model: Classifier) -> None:
    assert_type(fluxpy.trainables(model), list[Tensor])
    assert_type(fluxpy.trainables(model, path=True), list[tuple[str, Tensor]])
    flat, rebuild = fluxpy.destructure(model)
    assert_type(flat, Tensor)
    assert_type(rebuild, Callable[[Tensor], Classifier])
    assert_type(rebuild(2 * flat).head, nn.Linear)
    assert_type(fluxpy.flatten_parameters(model), Classifier)


def main() -> None:
    model, x, y = Classifier(), torch.randn(4, 2), torch.tensor([0, 1, 2, 0])
    setup_and_update(model, x, y)
    containers()
    one_tensor()
    state = fluxpy.setup(fluxpy.Adam(1e-3), model)
    navigate(fluxpy.thaw(state), fluxpy.gradient(loss, model, x, y))
    leaves(state)
    verbs(state, state.head.bias, state.head)
    saved(state, model)
    parameters(model)
    untyped(model, fluxpy.thaw(state), x)

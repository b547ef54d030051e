"""Mistakes that a type checker must find. `# error: rule` ends each line with one, and no other line may have any."""

import torch
from torch import Tensor, nn

import fluxpy
from fluxpy import Gradients, Leaf, State


def loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def no_tensor(model: nn.Module, x: Tensor) -> float:
    return loss(model, x).item()


def names() -> None:
    from fluxpy import setupp  # error: reportAttributeAccessIssue

    setupp()
    fluxpy.setupp(fluxpy.Adam(), nn.Linear(2, 2))  # error: reportAttributeAccessIssue
    fluxpy.Adamm()  # error: reportAttributeAccessIssue
    fluxpy.schedules.cosin(0.1, 0.0, 3)  # error: reportAttributeAccessIssue
    fluxpy.testing.asert_frozen()  # error: reportAttributeAccessIssue
    fluxpy.Adam(eta=0.1)  # error: reportCallIssue
    fluxpy.Adam(1e-3, (0.9, 0.999), 1e-8)  # error: reportCallIssue


def order(model: nn.Linear, state: State) -> None:
    fluxpy.setup(model, fluxpy.Adam())  # error: reportArgumentType, reportCallIssue
    fluxpy.setup(fluxpy.Adam, model)  # error: reportArgumentType, reportCallIssue
    fluxpy.update(model, state)  # error: reportArgumentType
    fluxpy.freeze(model)  # error: reportArgumentType
    fluxpy.adjust(model, 0.1)  # error: reportArgumentType
    fluxpy.select(state, 3)  # error: reportArgumentType
    fluxpy.freeze(state, "encoder.*")  # error: reportArgumentType
    fluxpy.adjust(state, 0.1, 0.9)  # error: reportArgumentType
    fluxpy.save("run.flux", model)  # error: reportArgumentType
    fluxpy.DataLoader(torch.ones(2), torch.ones(2))  # error: reportArgumentType, reportCallIssue
    state.lr = 0.1  # error: reportAttributeAccessIssue
    fluxpy.value(state, "lr")  # error: reportArgumentType


def gradients(model: nn.Linear, x: Tensor, grads: Gradients) -> None:
    fluxpy.withgradient(no_tensor, model, x)  # error: reportArgumentType, reportCallIssue
    fluxpy.gradient(lambda: x.sum(), model)  # error: reportArgumentType, reportCallIssue
    fluxpy.withgradient(lambda m: m.sum(), {"w": x})  # error: reportAttributeAccessIssue
    fluxpy.update(grads, model, grads)  # error: reportArgumentType


def training(model: nn.Linear, state: State, x: Tensor) -> None:
    fluxpy.train(loss, model, [x], state, epochs=3)  # error: reportArgumentType
    fluxpy.train(loss, model, [x])  # error: reportCallIssue
    fluxpy.train(loss, model, x[0].item(), state)  # error: reportArgumentType
    fluxpy.trainstep(no_tensor, model, x, state)  # error: reportArgumentType
    fluxpy.Learner(model, fluxpy.Adam(), loss)  # error: reportArgumentType
    fluxpy.load_state_dict(state, {}, hyperparameters="merge")  # error: reportArgumentType


def read_only(leaf: Leaf) -> None:
    leaf.frozen = True  # error: reportAttributeAccessIssue
    leaf.rule = fluxpy.Adam()  # error: reportAttributeAccessIssue
    leaf.count = 3  # error: reportAttributeAccessIssue
    print(leaf.lr)  # error: reportAttributeAccessIssue


def rules() -> None:
    rule = fluxpy.Adam()
    rule.lr = 0.1  # error: reportAttributeAccessIssue
    fluxpy.OptimiserChain([fluxpy.Adam()])  # error: reportArgumentType
    print(fluxpy.setup(rule, torch.ones(2)).weight)  # error: reportAttributeAccessIssue

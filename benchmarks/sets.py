"""The sets of parameters, each made afresh and alike by `build(name)`."""

import copy
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn


def mlp() -> nn.Module:
    """6 tensors, 6.6 thousand numbers: Python around the kernels is all that counts."""
    layers = [nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)]
    return nn.Sequential(*layers)


def gpt(width: int = 384, blocks: int = 6, words: int = 32_000) -> nn.Module:
    """76 tensors, 23 million numbers, of a GPT's shapes: memory is all that counts."""
    return nn.ModuleDict(
        {
            "words": nn.Embedding(words, width),
            "places": nn.Embedding(256, width),
            "blocks": nn.ModuleList(nn.TransformerEncoderLayer(width, 6, 4 * width) for _ in range(blocks)),
            "norm": nn.LayerNorm(width),
        }
    )


def many(leaves: int = 2000, shape: tuple[int, ...] = (32, 32)) -> nn.Module:
    """2000 tensors, 2 million numbers: what each tensor costs."""
    return nn.ParameterList(torch.randn(shape) for _ in range(leaves))


SETS: dict[str, Callable[[], nn.Module]] = {"mlp": mlp, "gpt": gpt, "many": many}


class Problem:
    """A set of parameters and their gradients. Every contender gets a copy of its own; a step never changes `grads`."""

    def __init__(self, make: str | Callable[[], nn.Module], device: str = "cpu") -> None:
        torch.manual_seed(0)
        self.model = (SETS[make] if isinstance(make, str) else make)().to(device)
        self.params = list(self.model.parameters())
        self.grads = [torch.randn_like(p) for p in self.params]
        self.numel = sum(p.numel() for p in self.params)
        # So small that Adam's eps is felt, or else nothing would show whether a contender clips.
        self.max_norm = 3e-8 * self.numel**0.5

    def fresh(self) -> nn.Module:
        return copy.deepcopy(self.model)

    @torch.no_grad()
    def check(self, params: list[Tensor], steps: int, clip: bool = False, rates: list[float] | None = None) -> None:
        """Where AdamW has led after `steps` steps. With gradients that stay the same, both moments over their bias
        corrections are the gradient and its square, so that x becomes (1 - a) x - u, which sums up exactly."""
        norm = torch.stack([g.double().norm() for g in self.grads]).norm()
        assert norm > self.max_norm, "nothing to clip"
        coefficient = float(self.max_norm / norm) if clip else 1.0

        def where(x: Tensor, g: Tensor, lr: float) -> Tensor:
            g = g.double() * coefficient
            kept = (1 - lr * 1e-2) ** steps
            return kept * x.double() - lr * g / (g.abs() + 1e-8) * (1 - kept) / (lr * 1e-2)

        off = apart(self.params, params, map(where, self.params, self.grads, rates or [1e-3] * len(params)))
        assert off < 0.01, f"off by {off:.1%} of the way that {steps} steps go"


def apart(start: Iterable[Tensor], ours: Iterable[Tensor], theirs: Iterable[Tensor]) -> float:
    """How far apart two came from one start, in parts of the way that the second went."""
    wrong = moved = 0.0
    for x, a, b in zip(start, ours, theirs, strict=True):
        wrong += (a - b).detach().abs().double().square().sum().item()
        moved += (b - x).detach().abs().double().square().sum().item()
    assert moved > 0, "nothing moved"
    return (wrong / moved) ** 0.5

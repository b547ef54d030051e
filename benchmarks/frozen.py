"""Gradients of a model whose encoder is frozen."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fluxpy

from .harness import Column, Contender, Meter, figure, ratios

TITLE = "A frozen encoder"
NOTE = """`withgradient(..., state=state)` of an encoder of 8 layers of 512 and a head, batches of 64: ratios to
`autograd.grad` by hand with `requires_grad=False` on the encoder. What is frozen must cost no more than that."""
COLUMNS = {"1 thread": ("encoder", 1), "2 threads": ("encoder", 2)}


class Classifier(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        layers = [layer for _ in range(8) for layer in (nn.Linear(width, width), nn.ReLU())]
        self.encoder, self.head = nn.Sequential(*layers), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x))


def measure(column: str, meter: Meter) -> Column:
    torch.manual_seed(0)
    x, y = torch.randn(64, 512, device=meter.device), torch.randint(10, (64,), device=meter.device)
    model, by_flag = (Classifier(512).to(meter.device) for _ in range(2))
    by_flag.encoder.requires_grad_(False)
    head = list(by_flag.head.parameters())
    everything, frozen = (fluxpy.setup(fluxpy.Adam(1e-3), model) for _ in range(2))
    fluxpy.freeze(frozen.encoder)

    def loss_of(m: nn.Module) -> Tensor:
        return F.cross_entropy(m(x), y)

    grads = fluxpy.withgradient(loss_of, model, state=frozen)[1]
    assert grads.encoder[0].weight is None and grads.head.weight is not None
    base = "by hand, requires_grad=False"
    times = meter.compare(
        {
            base: Contender(lambda: torch.autograd.grad(loss_of(by_flag), head)),
            "the encoder frozen": Contender(lambda: fluxpy.withgradient(loss_of, model, state=frozen)),
            "everything trained": Contender(lambda: fluxpy.withgradient(loss_of, model, state=everything)),
        }
    )
    return {name: figure(t, "s") if name == base else figure(ratios(t, times[base])) for name, t in times.items()}

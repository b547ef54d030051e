"""Batches of data in memory: fluxpy.DataLoader against torch's."""

import torch
from torch.utils import data

import fluxpy

from .harness import Column, Contender, Meter, figure, ratios

TITLE = "DataLoader"
NOTE = """An epoch over 60,000 rows of 784 numbers and a label, shuffled, batches of 32: samples a second, as ratios to
`torch.utils.data.DataLoader` over a `TensorDataset`."""
COLUMNS = {"1 thread": ("rows", 1), "2 threads": ("rows", 2)}


def measure(column: str, meter: Meter) -> Column:
    rows = 6_000 if meter.quick else 60_000
    x, y = torch.randn(rows, 784), torch.randint(10, (rows,))
    theirs = data.DataLoader(data.TensorDataset(x, y), batch_size=32, shuffle=True)
    ours = fluxpy.DataLoader((x, y), batch_size=32, shuffle=True)

    def epoch(loader: data.DataLoader | fluxpy.DataLoader) -> Contender:
        def step() -> None:
            assert sum(len(b) for _, b in loader) == rows

        return Contender(step)

    a, b = next(iter(ours)), next(iter(theirs))
    assert [(t.shape, t.dtype) for t in a] == [(t.shape, t.dtype) for t in b]
    times = meter.compare({"torch": epoch(theirs), "fluxpy": epoch(ours)})
    return {
        "torch.utils.data.DataLoader": figure([rows / t for t in times["torch"]], "samples/s"),
        "fluxpy.DataLoader": figure(ratios(times["torch"], times["fluxpy"]), target=7.0, at_least=True),
    }

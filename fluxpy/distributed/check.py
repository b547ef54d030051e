"""assert_same_on_all_ranks: whether the verbs were called alike on all processes."""

import hashlib
import json
import re
from typing import Any

import torch
from torch import Tensor

from ..leaf import Leaf, record_of
from ..pytree import HOLE, entries_of
from ..saving.format import Encoder
from ..state import State, each_leaf
from .sharding import all_gather, has_process_group

_DEVICES = {"nccl": "cuda", "xccl": "xpu"}  # of backends that take no tensors of the CPU


def assert_same_on_all_ranks(state: State | Leaf) -> None:
    """AssertionError where `adjust`, `freeze`, `thaw`, `reset` or `update` were not called alike on all processes.

    Compares rules with their hyperparameters, frozen flags, counts and the numbers in states, leaf by leaf; of tensors
    only whether they are there. It is one small collective operation where all is well, so call it on all processes:
    once an epoch, say, or after verbs that depend on data. On one process it does nothing.
    """
    found = each_leaf(state, "assert_same_on_all_ranks")
    if not has_process_group():
        return
    encoder = Encoder()
    mine = {path: _describe(encoder, leaf) for path, leaf in found}
    digest = hashlib.sha256(json.dumps(mine).encode()).digest()
    number = int.from_bytes(digest[:8], "little", signed=True)
    device = _DEVICES.get(torch.distributed.get_backend(), "cpu")
    received = all_gather(torch.tensor([number], device=device))
    if len(set(received.tolist())) > 1:
        every: list[Any] = [None] * len(received)
        torch.distributed.all_gather_object(every, mine)
        raise AssertionError(_difference(every))


def _describe(encoder: Encoder, leaf: Leaf) -> dict[str, str]:
    """What must be the same of a leaf, by name, as texts."""
    pending = record_of(leaf).pending
    entries = [] if leaf.state is None else entries_of(leaf.state)
    numbers = {name: part for name, part in entries if not isinstance(part, Tensor)}
    return {
        "shape": f"{leaf.dtype}{list(leaf.shape)}",
        "rule": re.sub(r" at 0x[0-9a-f]+", "", _text(encoder.value(leaf.rule))),
        "frozen": str(leaf.frozen),
        "count": str(leaf.count),
        "state": f"{len(entries)} parts, {numbers}" if leaf.state is not None else "None",
        "pending": str(None if pending is None else [part for part in pending.parts if part is not HOLE]),
    }


def _text(value: Any) -> str:
    """Plain data as a text; a tensor by its numbers."""
    return json.dumps(value, default=lambda t: t.tolist() if isinstance(t, Tensor) else repr(t))


def _difference(every: list[dict[str, dict[str, str]]]) -> str:
    """What differs, at the first leaves where anything does."""
    first, lines = every[0], []
    for path in dict.fromkeys(path for one in every for path in one):
        for name in first.get(path, {"leaf": "missing"}):
            values = [one.get(path, {}).get(name, "missing") for one in every]
            if len(set(values)) > 1:
                other = next(rank for rank, value in enumerate(values) if value != values[0])
                lines.append(f"{path!r}: {name} is {values[0]} on rank 0, {values[other]} on rank {other}")
    more = f"\n  and {len(lines) - 5} more" if len(lines) > 5 else ""
    return "the state is not the same on all ranks: " + "\n  ".join(["", *lines[:5]]) + more

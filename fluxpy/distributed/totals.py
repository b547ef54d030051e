"""Totals over leaves that are spread over processes: where these meet in an update.

Each process gives the parts of its local tensors, all are gathered, and every process makes the same total of them, in
the order of the model and then of the mesh. So a number that is not finite is found at the same place by all, and a
rule only has to give of an array cut in pieces, by `part` and `combine`, what it gives of the array.

One collective operation serves all leaves that are spread alike, for each dimension of their mesh. That all processes
ask in the same order depends on leaves alone (their rules and places), not on the cohorts: an empty part takes
another way through the engine.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..leaf import Record
from ..rule import ReducingRule
from .sharding import all_gather


class Gather(NamedTuple):
    """How the parts of some leaves are gathered."""

    classes: list[tuple[Any, Tensor, tuple[Any, ...]]]  # device of the mesh, leaves, process groups
    order: Tensor  # of the rows gathered, class by class: that of the model, without those of empty parts
    owners: list[int]  # which of the leaves each of them is of


class Totals:
    """The totals of one model's leaves. What was gathered in an update is kept until the next: an attempt that a
    process makes anew must not ask the others again."""

    def __init__(self, records: Sequence[Record]) -> None:
        self.records = records
        self.gathers: dict[tuple[int, ...], Gather] = {}
        self.known: list[Tensor] = []
        self.used = 0

    def start(self) -> None:
        """Begin an update. Of another attempt at the same one only `used` is 0 again."""
        self.known, self.used = [], 0

    def gather(self, parts: Tensor, places: Sequence[int]) -> tuple[Tensor, list[int]]:
        """What the leaves at these places give on all processes, and for each which of the leaves it is of."""
        key = tuple(places)
        how = self.gathers.get(key)
        if how is None:
            how = self.gathers[key] = self._plan(key, parts.device)
        if self.used == len(self.known):
            rows = [_rows(parts[index], groups, device) for device, index, groups in how.classes]
            self.known.append(torch.cat([found.to(parts.device) for found in rows])[how.order])
        self.used += 1
        return self.known[self.used - 1], how.owners

    def of_arrays(self, rule: ReducingRule, parts: Tensor, places: Sequence[int]) -> Tensor:
        """The total of each array, all its parts together."""
        rows, owners = self.gather(parts, places)
        found: list[list[int]] = [[] for _ in places]
        for row, leaf in enumerate(owners):
            found[leaf].append(row)
        return torch.stack([rule.combine(rows[own]) if len(own) > 1 else rows[own[0]] for own in found])

    def _plan(self, places: tuple[int, ...], device: torch.device) -> Gather:
        classes: dict[Any, tuple[Any, list[int], tuple[Any, ...]]] = {}
        present: list[list[bool]] = []
        for i, place in enumerate(places):
            record = self.records[place]
            sharding = None if record.needs_whole else record.sharding
            groups = () if sharding is None else sharding.process_groups
            kind = None if sharding is None or not groups else sharding.mesh.device_type
            classes.setdefault((kind, *map(id, groups)), (kind, [], groups))[1].append(i)
            found = [True] if sharding is None else sharding.present
            present.append(found if any(found) else [True])  # of an array without elements, one part
        rows: list[tuple[int, int]] = []
        for _, index, groups in classes.values():
            size = 1
            for group in groups:
                size *= group.size()
            rows += [(i, shard) for i in index for shard in range(size)]
        kept = [n for n, (i, shard) in enumerate(rows) if shard < len(present[i]) and present[i][shard]]
        order = sorted(kept, key=rows.__getitem__)
        found = [(kind, torch.tensor(index, device=device), groups) for kind, index, groups in classes.values()]
        return Gather(found, torch.tensor(order, device=device), [rows[n][0] for n in order])


def _rows(parts: Tensor, groups: tuple[Any, ...], device: Any) -> Tensor:
    """The parts of all processes of these groups: of each leaf those of all processes, side by side."""
    found = parts.to(device) if groups else parts
    found = torch.view_as_real(found) if found.is_complex() else found
    rest = found.shape[1:]
    found = found.unsqueeze(1)
    for group in groups:
        everyone = all_gather(found.contiguous().view(-1), group)
        found = everyone.view(group.size(), *found.shape).movedim(0, 1).flatten(1, 2)
    rows = found.reshape(-1, *rest)
    return torch.view_as_complex(rows.contiguous()) if parts.is_complex() else rows

"""What is saved of one leaf. No other file of this package looks inside a leaf."""

from dataclasses import dataclass
from typing import Any

import torch

from ..leaf import Leaf, init_state, pending_numbers, record_of, replace_leaf
from ..pytree import Skeleton
from ..rule import Rule


@dataclass(slots=True)
class LeafRecord:
    """The contents of a leaf. `pending` are the numbers that the state continues with after updates that the leaf
    missed: its place in an accumulation window. `setup_rule` is what `setup` was given, `rule` what it is now."""

    rule: Rule | None
    setup_rule: Rule | None
    state: Any
    frozen: bool
    count: int
    pending: Skeleton | None
    shape: torch.Size
    dtype: torch.dtype


def read_leaf(leaf: Leaf) -> LeafRecord:
    setup_rule = record_of(leaf).setup_rule
    return LeafRecord(
        leaf.rule, setup_rule, leaf.state, leaf.frozen, leaf.count, pending_numbers(leaf), leaf.shape, leaf.dtype
    )


def write_leaf(leaf: Leaf, record: LeafRecord) -> None:
    """Give a leaf these contents. Its shape and dtype are those of its parameter and stay."""
    replace_leaf(leaf, rule=record.rule, frozen=record.frozen, count=record.count)
    replace_leaf(leaf, state=record.state, pending=record.pending)  # after the rule, whose state it is
    record_of(leaf).setup_rule = record.setup_rule


def state_template(rule: Rule, shape: torch.Size, dtype: torch.dtype) -> Any:
    """The state that `rule` starts with for such a parameter, on the meta device: its form without its memory."""
    return init_state(rule, torch.empty(shape, dtype=dtype, device="meta"), 0, "")

"""The model changes, the state follows: parameters grow, shrink and move in the middle of training.

    take                keep these rows           resize_embedding    a vocabulary that grows or shrinks
    grow                append rows               prune               a layer's outputs, and what reads them
    reset               empty momenta of rows     merge               pairs of LoRA into their weights
    rename              modules that moved

`take` and `grow` change a model and its state together, in place: each parameter stays the same object, with its hooks
and ties. All that has the parameter's shape goes along: momenta, master copies, averages, sums of `AccumGrad`, and its
`.grad`. On an error neither model nor state is changed.
"""

from .names import rename
from .recipes import merge, prune, resize_embedding
from .rows import grow, reset, take

__all__ = ["grow", "merge", "prune", "rename", "reset", "resize_embedding", "take"]

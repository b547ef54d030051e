"""fluxpy among other libraries: any rule as a `torch.optim.Optimizer`, and runs of `torch.optim` taken over.

live       dicts that read and write something else
groups     the leaves of a tree as param groups
momenta    the states of leaves as `Optimizer.state`
optimizer  TorchOptimizer
twins      which rule and which class of torch.optim are one algorithm, and how their numbers are called
convert    from_torch, to_torch, and state dicts of torch.optim
"""

from .convert import from_torch, to_torch
from .optimizer import TorchOptimizer

__all__ = ["TorchOptimizer", "from_torch", "to_torch"]

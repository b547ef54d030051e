"""Parallel: a model that runs on several processes at once, and the gradients that its wrappers give.

`torch.autograd.grad` does not run the hooks by which DDP, `fully_shard` and `replicate` average gradients: processes
would drift apart without a word. So here gradients come from `backward()`, with `.grad` set aside meanwhile.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..pytree import fsdp_module, modules_in, put_back, tensors_in
from ..text import names_of
from .sharding import any_dtensor, has_process_group, is_dtensor


class Parallel:
    """How a model runs on several processes. `paths` and `params` are those of its parameters, in its order; `replicas`
    are the wrappers that a loss must call. (Of a compiled model it cannot be seen whether it does.)"""

    def __init__(
        self, replicas: list[DistributedDataParallel], params: Sequence[Tensor], paths: Sequence[str], compiled: bool
    ) -> None:
        self.replicas, self.params, self.paths = replicas, list(params), list(paths)
        self.checked: list[bool] | None = None  # who trains, as DDP was last found to agree with it
        self.averaged: list[bool] | None = None  # who trains, as DDP was last found to average all of it
        meshes = dict.fromkeys(x.device_mesh for x in params if is_dtensor(x))  # pyright: ignore[reportAttributeAccessIssue]
        groups = [ddp.process_group for ddp in replicas]
        groups += [mesh.get_group(i) for mesh in meshes for i in range(mesh.ndim)]
        self.process_groups: list[Any] = list({id(group): group for group in groups}.values())
        self.ranks = {rank for mesh in meshes for rank in mesh.mesh.flatten().tolist()}  # of all that run it
        for ddp in replicas:
            self.ranks |= set(torch.distributed.get_process_group_ranks(ddp.process_group))
            if ddp not in _CALLS and not compiled:
                _CALLS[ddp] = 0
                ddp.register_forward_pre_hook(_note_call)

    def differentiate(
        self, f: Callable[[], Any], loss_of: Callable[[Any], Tensor], args: Any, trains: list[bool], create_graph: bool
    ) -> tuple[Any, list[Tensor | None]]:
        """The value of `f`, and the gradient of each parameter that trains, as the wrappers' hooks leave it."""
        if create_graph:
            raise ValueError("create_graph=True is for one process: the hooks that average gradients leave no graph")
        if trains != self.checked:
            self._check(trains)
        for ddp in self.replicas:
            if not ddp.require_backward_grad_sync:
                raise ValueError(
                    "under no_sync() gradients are not averaged, and the processes would drift apart; "
                    "to step less often, write AccumGrad(n) in the chain"
                )
        wanted = [x for x, wants in zip(self.params, trains, strict=True) if wants]
        others = [t for t in tensors_in(args) if t.requires_grad and t.is_leaf]
        calls = [_CALLS.get(ddp) for ddp in self.replicas]
        aside = [(x, x.grad) for x in (*wanted, *others)]
        try:
            for x, _ in aside:
                x.grad = None
            value = f()
            loss = loss_of(value)
            self._require_calls(calls)
            if wanted and loss.requires_grad:
                loss.backward()
            return value, [self._own(x.grad) for x in wanted]
        finally:
            for x, grad in aside:
                x.grad = grad

    def mean(self, number: Tensor) -> Tensor:
        """The mean over all processes that train the model. It is finite where it is so on all of them."""
        found: Any = number.detach()
        found = found.full_tensor() if is_dtensor(found) else found.clone()
        for group in self.process_groups:
            torch.distributed.all_reduce(found, group=group)
            found /= group.size()
        return found

    def require_same_length(self, data: Any) -> None:
        """ValueError where the processes know that they have different numbers of batches: one would wait for ever."""
        try:
            length = len(data)
        except TypeError:
            length = -1
        lengths = torch.tensor([length, -length], device=self.params[0].device)
        for group in self.process_groups:
            torch.distributed.all_reduce(lengths, torch.distributed.ReduceOp.MAX, group=group)
        most, least = int(lengths[0]), -int(lengths[1])
        if most > least > -1:
            raise ValueError(
                f"the processes have from {least} to {most} batches, and those with more would wait for the others: "
                "give each as many (torch.utils.data.DistributedSampler does)"
            )

    def _own(self, grad: Tensor | None) -> Tensor | None:
        """A gradient that the next backward pass does not overwrite."""
        if grad is not None and any(ddp.gradient_as_bucket_view for ddp in self.replicas):
            return grad.clone()
        return grad

    def _require_calls(self, before: list[int | None]) -> None:
        for ddp, calls in zip(self.replicas, before, strict=True):
            if calls is not None and _CALLS.get(ddp) == calls:
                raise ValueError(
                    "the loss did not call the DistributedDataParallel model itself, which alone averages gradients "
                    "over processes: call model(x), not model.module(x), or give what you call to forward"
                )

    def require_averages(self, trains: list[bool]) -> None:
        """ValueError where DDP does not average the gradients of a parameter that trains, so that processes would drift
        apart."""
        if trains == self.averaged:
            return
        wanted = {id(x): path for x, path, wants in zip(self.params, self.paths, trains, strict=True) if wants}
        for ddp in self.replicas:
            inside, known = [x for x in ddp.module.parameters() if id(x) in wanted], _reduced(ddp)
            late = [wanted[id(x)] for x in inside if id(x) not in known]
            if late:
                raise ValueError(
                    f"DistributedDataParallel does not average the gradients of {names_of(late)}, which did not "
                    "require grad when it was wrapped (or are ignored): freeze them, wrap the model anew, or use "
                    "replicate of torch.distributed._composable.replicate_with_fsdp, where parameters may thaw at any "
                    "time"
                )
        self.averaged = list(trains)

    def _check(self, trains: list[bool]) -> None:
        """ValueError where DDP would wait for other gradients than those of the parameters that train."""
        names = {id(x): path for x, path in zip(self.params, self.paths, strict=True)}
        wanted = {id(x) for x, wants in zip(self.params, trains, strict=True) if wants}
        self.require_averages(trains)
        for ddp in self.replicas:
            inside = [x for x in ddp.module.parameters() if id(x) in names]
            known = _reduced(ddp)
            idle = [names[id(x)] for x in inside if id(x) in known and id(x) not in wanted]
            if idle and (ddp.static_graph or not ddp.find_unused_parameters):
                raise ValueError(
                    f"DistributedDataParallel would wait for the gradients of {names_of(idle)}, which are frozen: wrap "
                    "with find_unused_parameters=True (and without static_graph), or use replicate of "
                    "torch.distributed._composable.replicate_with_fsdp"
                )
        self.checked = list(trains)


_CALLS: "WeakKeyDictionary[nn.Module, int]" = WeakKeyDictionary()  # of forward, of each DDP


def _note_call(module: nn.Module, args: Any) -> None:
    _CALLS[module] = _CALLS.get(module, 0) + 1


def _reduced(ddp: DistributedDataParallel) -> set[int]:
    """The identities of the parameters whose gradients a DDP averages: those that required grad when it was made."""
    every = list(ddp.module.parameters())
    if ddp._get_ddp_logging_data().get("num_parameter_tensors") == len(every):
        return set(map(id, every))
    buckets: Any = ddp.reducer._get_zeros_like_grad_buckets()
    return {id(x) for bucket in buckets for x in bucket.parameters()}


def reshard(model: Any) -> None:
    """Put the parameters of FSDP2 back in their places: after a forward pass without a backward one, whole tensors
    stand there."""
    for module in modules_in(model):
        put_back(module)


def parallel_of(model: Any, params: Sequence[Tensor], paths: Sequence[str]) -> Parallel | None:
    """How a model runs on several processes; None of one that knows of none. ValueError for wrappers by which its
    parameters cannot be told apart, or whose gradients would not be averaged."""
    if not has_process_group():
        return None
    replicas = []
    fsdp = getattr(sys.modules.get("torch.distributed.fsdp"), "FullyShardedDataParallel", ())
    composed = getattr(sys.modules.get("torch.distributed._composable.contract"), "_get_registry", lambda module: None)
    compiled = False
    for module in modules_in(model):
        compiled |= "_orig_mod" in module._modules
        if isinstance(module, DistributedDataParallel):
            replicas.append(module)
        elif "replicate" in (composed(module) or ()) and not isinstance(module, fsdp_module()):
            raise ValueError(
                "this replicate hides a DistributedDataParallel in hooks; use DistributedDataParallel itself, or "
                "replicate of torch.distributed._composable.replicate_with_fsdp"
            )
        elif isinstance(module, fsdp):
            raise ValueError(
                "FullyShardedDataParallel joins parameters into flat ones, which have no paths; shard the model by "
                "fully_shard of torch.distributed.fsdp"
            )
    return Parallel(replicas, params, paths, compiled) if replicas or any_dtensor(params) else None


def is_first_process() -> bool:
    """Whether this is the process that prints and writes for all."""
    return not has_process_group() or torch.distributed.get_rank() == 0

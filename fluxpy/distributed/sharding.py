"""Sharding: how one parameter's numbers are spread over a device mesh. The engine works on local tensors alone.

A DTensor stands for a whole tensor, of which each process holds a part (which may be empty) or a copy. Of such a
parameter a leaf keeps local momenta, and a `Sharding` to show them as DTensors, and to put the whole together where a
rule needs that. What puts a whole together is a collective operation: all processes of the mesh must come there alike.
"""

import itertools
import sys
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor


def _dtensor() -> Any:
    """The class DTensor; of a program that never imported it (which takes a second), nothing is an instance."""
    return getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", ())


def held(x: Any) -> Tensor:
    """What this process holds of a DTensor: its own, not a view with a history."""
    return x._local_tensor


class Sharding:
    """Of a DTensor: its mesh and placements, the whole shape and the local one.

    `dims` are the dimensions of the mesh along which processes hold different parts. What has the shape of the
    parameter, or of the real view of a complex one, is spread as it is; all else is the same on all processes.
    """

    def __init__(self, x: Any) -> None:
        self.mesh, self.placements = x.device_mesh, tuple(x.placements)
        self.shape, self.stride, self.local_shape = x.shape, x.stride(), held(x).shape
        spread = (i for i, placement in enumerate(self.placements) if not placement.is_replicate())
        self.dims = tuple(i for i in spread if self.mesh.size(i) > 1)
        # FSDP2 may keep parts on the CPU, of a mesh of other devices, by which the processes speak to each other.
        self.offloaded = held(x).is_cpu and self.mesh.device_type != "cpu"
        self.accepted: Any = None  # what was last found to describe a tensor with this sharding
        self._described = x._spec

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sharding):
            return NotImplemented
        return self is other or (self.shape, self.placements, self.mesh) == (other.shape, other.placements, other.mesh)

    @cached_property
    def process_groups(self) -> tuple[Any, ...]:
        """The process groups whose members hold the other parts, one for each of `dims`."""
        return tuple(self.mesh.get_group(i) for i in self.dims)

    @cached_property
    def present(self) -> list[bool]:
        """Which parts have any element: those of the first of `dims` side by side, then of the next."""
        found = []
        for place in itertools.product(*(range(self.mesh.size(i)) for i in reversed(self.dims))):
            shape, at = list(self.shape), dict(zip(reversed(self.dims), place, strict=True))
            for i in self.dims:
                placement: Any = self.placements[i]
                size = shape[placement.dim]
                shape[placement.dim] = placement.local_shard_size_and_offset(size, self.mesh.size(i), at[i])[0]
            found.append(all(shape))
        return found

    def is_spread(self, t: Tensor) -> bool:
        """Whether a local tensor looks like one that is spread as the parameter is."""
        return t.shape in (self.local_shape, (*self.local_shape, 2))

    def is_whole(self, t: Tensor) -> bool:
        """Whether a tensor is to be spread as the parameter is."""
        return t.shape in (self.shape, (*self.shape, 2))

    def show(self, t: Tensor) -> Any:
        """A local tensor as the DTensor of which it is a part."""
        extra = t.shape[len(self.local_shape) :]
        shape = torch.Size((*self.shape, *extra))
        stride = self.stride if not extra else (*(2 * s for s in self.stride), 1)
        if self.offloaded and t.is_cpu:  # which from_local would move to a device of the mesh
            meta = self._described.tensor_meta._replace(shape=shape, stride=stride, dtype=t.dtype)
            spec = type(self._described)(self.mesh, self.placements, tensor_meta=meta)
            return _dtensor()(t, spec, requires_grad=t.requires_grad)
        return _dtensor().from_local(t, self.mesh, self.placements, run_check=False, shape=shape, stride=stride)

    def whole(self, t: Tensor) -> Tensor:
        """The whole tensor of which a local one is a part, on the same device."""
        if not self.dims:
            return t
        there = t.to(self.mesh.device_type) if self.offloaded else t
        return self.show(there).full_tensor().to(t.device)

    def part(self, t: Tensor) -> Tensor:
        """The local part of a whole tensor, in memory of its own."""
        if not self.dims:
            return t
        from torch.distributed.tensor import distribute_tensor

        x: Any = distribute_tensor(t.detach(), self.mesh, self.placements, src_data_rank=None)
        local = held(x).to(t.device)
        return local.clone() if local.untyped_storage().data_ptr() == t.untyped_storage().data_ptr() else local

    def require_fits(self, t: Any, what: str) -> None:
        """ValueError for what is no tensor as large as the parameter, or is spread over another mesh."""
        if not isinstance(t, Tensor):
            raise ValueError(f"{what} must be a tensor, but is {type(t).__name__}")
        mesh = getattr(t, "device_mesh", self.mesh)  # that of a DTensor
        if not self.is_whole(t) or mesh != self.mesh:
            where = f" on {mesh}" if is_dtensor(t) else ""
            raise ValueError(
                f"{what} must have the shape {tuple(self.shape)} on {self.mesh}, as its parameter, but has "
                f"{tuple(t.shape)}{where}"
            )

    def localise(self, t: Any, what: str) -> Tensor:
        """What this process holds of a DTensor as large as the parameter, or of a whole tensor."""
        self.require_fits(t, what)
        if not is_dtensor(t):
            return self.part(t)
        if t.placements != self.placements:
            t = t.redistribute(self.mesh, self.placements)
        elif t.shape == self.shape:
            self.accepted = t._spec
        local: Any = held(t)
        return local if type(local) is Tensor else local.wait()


def sharding_of(x: Any) -> Sharding | None:
    """The sharding of a DTensor; None of any other tensor. ValueError for one whose parts are to be summed still."""
    if not is_dtensor(x):
        return None
    sharding = Sharding(x)
    if any(placement.is_partial() for placement in sharding.placements):
        raise ValueError(f"a parameter cannot have the placements {sharding.placements}: redistribute it first")
    return sharding


def is_dtensor(x: Any) -> bool:
    """Whether a tensor is spread over processes."""
    return isinstance(x, _dtensor())


def require_own_part(x: Any, what: str) -> None:
    """ValueError for a DTensor that another process pickled: it holds the part of that one."""
    mesh, here = x.device_mesh, None
    if torch.distributed.is_initialized():
        here = next(iter((mesh.mesh == torch.distributed.get_rank()).nonzero().tolist()), None)
    there = mesh.get_coordinate()
    if here is None or there is None or list(there) != here:
        raise ValueError(
            f"{what} is a part of another process, at {there} of {mesh}: what torch.save writes of DTensors is for the "
            "process that wrote it; save and load by torch.distributed.checkpoint"
        )


def has_process_group() -> bool:
    """Whether this process may have others to work with: it was started by `torchrun`, say."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def all_gather(sent: Tensor, group: Any = None) -> Tensor:
    """A tensor of one dimension, of all processes of a group one after another."""
    size = torch.distributed.get_world_size(group)
    received = sent.new_empty(size * len(sent))
    # Its older name is deprecated since PyTorch 2.13.
    run: Any = getattr(torch.distributed, "all_gather_single", torch.distributed.all_gather_into_tensor)
    run(received, sent, group=group)
    return received


def whole_tensor(t: Any, keep: bool) -> Tensor:
    """The whole of a DTensor, on the CPU, for processes that want to keep it; an empty tensor for the others, who must
    ask alike. Any other tensor as it is."""
    if not is_dtensor(t):
        return t
    partial = any(placement.is_partial() for placement in t.placements)
    whole = t.full_tensor() if partial else Sharding(t).whole(held(t))
    return whole.cpu() if keep else torch.empty(0, dtype=t.dtype)


def copy_whole(here: Any, whole: Tensor) -> None:
    """Write a whole tensor, or one sharded alike, into a tensor that may be a DTensor. Nothing is communicated."""
    sharding = sharding_of(here)
    if sharding is None or is_dtensor(whole):
        here.copy_(whole)
    else:
        held(here).copy_(sharding.part(whole.to(held(here).device)))


def any_dtensor(params: Sequence[Any]) -> bool:
    """Whether any of these is spread over processes."""
    kind = _dtensor()
    return bool(kind) and any(isinstance(x, kind) for x in params)


def local_gradients(shardings: Sequence[Sharding | None], grads: Sequence[Any], paths: Sequence[str]) -> list[Any]:
    """What this process holds of each gradient. Those sharded as the last ones cost next to nothing."""
    kind, found = _dtensor(), []
    for sharding, dx, path in zip(shardings, grads, paths, strict=True):
        if sharding is not None and dx is not None:
            known = type(dx) is kind and dx._spec is sharding.accepted
            local = held(dx) if known else dx
            dx = local if known and type(local) is Tensor else sharding.localise(dx, f"the gradient of {path!r}")
        found.append(dx)
    return found


def local_tensors(params: Sequence[Any]) -> list[Tensor]:
    """What this process holds of each parameter."""
    kind = _dtensor()
    return [held(x) if isinstance(x, kind) else x for x in params] if kind else list(params)

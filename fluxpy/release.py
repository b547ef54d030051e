"""release: each parameter is stepped within the backward pass, as soon as its gradient is there, and that is freed.

A parameter's gradient is complete when autograd has accumulated it: all that used the parameter went backward before,
and nothing later in the pass needs its old value. So it may be stepped there, whatever else is still to come.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .binding import Binding
from .context import Context, SkipUpdate, reads_at_once
from .distributed.sharding import has_process_group
from .engine.layout import SIZE, is_dense, views_like
from .gradient import independent_loss, recorded, require_no_checkpoint
from .pytree import is_transforming
from .rule import reducing, title
from .text import names_of
from .update import require_steppable, step_alone

# Small leaves wait for their neighbours, for a step of one costs as much as of several: until they have this share of
# all parameters, or fill a chunk of the engine.
_SHARE = 32


class Bucket:
    """Leaves that are stepped when the gradients of all of them are there. `part` is the binding for these alone.

    A gradient that waits is copied into a buffer, so that autograd's own memory is free at once. If it stayed where it
    was, the allocator could not join the memory before and after it, and would ask the system for more.
    """

    def __init__(self, part: Binding, free: list[Tensor], size: int) -> None:
        self.part, self.free, self.size = part, free, size
        self.views: dict[int, list[Tensor]] = {}  # of each buffer that it had
        self.buffer: Tensor | None = None
        self.clear()

    def clear(self) -> None:
        if self.buffer is not None:
            self.free.append(self.buffer)
        self.buffer = None
        self.grads: list[Tensor | None] = [None] * len(self.part.params)
        self.waits_for, self.done = sum(not record.frozen for record in self.part.records), False

    def take(self, place: int, dx: Tensor) -> None:
        self.waits_for -= 1
        if len(self.grads) > 1 and dx.layout == torch.strided:
            dx = self._views()[place].copy_(dx)
        self.grads[place] = dx

    def _views(self) -> list[Tensor]:
        if self.buffer is None:
            x = self.part.params[0]
            self.buffer = self.free.pop() if self.free else x.new_empty(self.size, requires_grad=False)
        views = self.views.get(id(self.buffer))
        if views is None:
            params = self.part.params
            views = self.views[id(self.buffer)] = views_like(self.buffer[: sum(x.numel() for x in params)], params)
        return views

    @property
    def concerned(self) -> bool:
        """Whether a step changes anything: a rule may count updates without a gradient too."""
        pairs = zip(self.part.records, self.grads, strict=True)
        return any(record.takes_part(dx) or record.sits_out for record, dx in pairs)

    def step(self, context: Context) -> int:
        """How many leaves had a gradient."""
        grads = self.grads
        self.clear()
        self.done = True
        step_alone(self.part, context, grads)
        return sum(dx is not None for dx in grads)


class Buckets:
    """All leaves of a model in buckets, kept from step to step."""

    def __init__(self, binding: Binding) -> None:
        require_steppable(binding)
        most = min(SIZE, sum(x.numel() for x in binding.params) // _SHARE)
        self.all: list[Bucket] = []
        self.free: dict[Any, list[Tensor]] = {}  # buffers that no bucket has, by dtype and device
        waiting: dict[Any, list[int]] = {}
        for place, x in enumerate(binding.params):
            key = x.dtype, x.device
            if x.numel() > most or type(x) not in (Tensor, torch.nn.Parameter) or not is_dense(x):
                self._add(binding, [place], None, 0)
                continue
            places = waiting.setdefault(key, [])
            if sum(binding.params[i].numel() for i in places) + x.numel() > most:
                self._add(binding, places, key, most)
                places = waiting[key] = []
            places.append(place)
        for key, places in waiting.items():
            self._add(binding, places, key, most)
        self.of = {id(x): (bucket, place) for bucket in self.all for place, x in enumerate(bucket.part.params)}
        self.forms = [(x.shape, x.dtype, x.device) for x in binding.params]
        self.structure = -1  # of the context, when its rules were looked at
        self.searched = False  # whether a graph was looked at for what hides parameters

    def _add(self, binding: Binding, places: list[int], key: Any, size: int) -> None:
        if places:
            self.all.append(Bucket(binding.part(places), self.free.setdefault(key, []), size))


def release_step(f: Callable[..., Any], model: Any, args: Sequence[Any], binding: Binding, context: Context) -> Any:
    """One step of `trainstep(..., release=True)`."""
    buckets = _buckets(binding, context)
    with recorded(f, model, args, binding) as (loss, value):
        if not reads_at_once(loss):
            context.flag.require(loss.detach().isfinite(), context.updates, "the loss")
        elif not math.isfinite(loss.item()):
            return value
        if not buckets.searched:
            buckets.searched = True
            require_no_checkpoint(loss)
        context.settle()
        _backward(loss, buckets, binding, context)
    context.updates += 1
    torch.clear_autocast_cache()  # an autocast around the loop holds casts of the old weights
    return value


def _buckets(binding: Binding, context: Context) -> Buckets:
    if is_transforming():
        raise ValueError("release=True steps within the backward pass, which torch.func and torch.compile do not run")
    several = binding.spread or binding.parallel is not None
    if several or (has_process_group() and torch.distributed.get_world_size() > 1):
        raise ValueError("release=True would step before the ranks have averaged their gradients; leave it out")
    buckets: Buckets | None = binding.buckets
    if buckets is None or buckets.forms != [(x.shape, x.dtype, x.device) for x in binding.params]:
        buckets = binding.buckets = Buckets(binding)
    if buckets.structure != context.structure:
        _refuse(binding)
        buckets.structure = context.structure
    return buckets


def _refuse(binding: Binding) -> None:
    """ValueError for what cannot be stepped alone."""
    rules: dict[int, tuple[Any, str]] = {}
    for record, path in zip(binding.records, binding.paths, strict=True):
        if not record.frozen:
            rules.setdefault(id(record.rule), (record.rule, path))
    for rule, path in rules.values():
        asking = [] if rule is None else reducing(rule)
        total = next((inner for inner in asking if inner.over == "tree"), None)
        if total is not None:
            raise ValueError(
                f"release=True frees each gradient before the next is there, but {title(total)} (at {path!r}) needs a "
                "total over all of them; leave release out, or clip each array: ClipNorm, ClipGrad"
            )
        if any(getattr(inner, "nonfinite", None) == "skip" for inner in asking):
            raise ValueError(
                f'release=True steps leaf by leaf, so nonfinite="skip" (at {path!r}) cannot hold back the whole '
                'update; leave release out, or take "raise"'
            )
    odd = [path for x, path in zip(binding.params, binding.paths, strict=True) if not x.is_leaf]
    if odd:
        raise ValueError(f"release=True takes leaf tensors, but {names_of(odd)} carries autograd history")


def _backward(loss: Tensor, buckets: Buckets, binding: Binding, context: Context) -> None:
    """The backward pass, with the steps in it."""
    params = [x for x, record in zip(binding.params, binding.records, strict=True) if not record.frozen]
    seen: set[int] = set()
    stepped = 0

    def take(x: Tensor) -> None:
        nonlocal stepped
        dx, x.grad = x.grad, None
        bucket, place = buckets.of[id(x)]
        if id(x) in seen:
            path = bucket.part.paths[place]
            raise RuntimeError(f"the gradient of {path!r} came in two parts: pass use_reentrant=False to checkpoint")
        seen.add(id(x))
        assert dx is not None
        bucket.take(place, dx)
        if not bucket.waits_for:
            stepped += bucket.step(context)

    for bucket in buckets.all:
        bucket.clear()
    context.partial = True
    try:
        with _grads_aside(params, take):
            torch.autograd.backward(loss, inputs=params)
            if not seen:
                raise independent_loss([not record.frozen for record in binding.records])
            for bucket in buckets.all:
                if not bucket.done and bucket.concerned:
                    stepped += bucket.step(context)
    except BaseException as error:
        if stepped:
            error.add_note(f"release=True: {stepped} of {len(params)} parameters were stepped before this")
        if stepped and "modified by an inplace operation" in str(error):
            error.add_note("release=True: the loss also uses a parameter detached, which was stepped by then: clone it")
        if isinstance(error, SkipUpdate):
            raise RuntimeError("release=True steps leaf by leaf, so that the whole update cannot be skipped") from error
        raise
    finally:
        context.partial = False
        context.flag.lower()
        for bucket in buckets.all:
            bucket.clear()


@contextmanager
def _grads_aside(params: list[Tensor], take: Callable[[Tensor], None]) -> Iterator[None]:
    """Call `take` with each parameter that has got its gradient; `.grad` is afterwards what it was before."""
    grads = [x.grad for x in params]
    handles = []
    try:
        for x in params:
            x.grad = None
            handles.append(x.register_post_accumulate_grad_hook(take))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for x, dx in zip(params, grads, strict=True):
            x.grad = dx

"""Ranks: what the processes of a run say to each other. No other file of the Learner talks to other processes.

All of them take part in each talk, which begins with where each of them is, and whether an error or a cancel is on its
way there. So all leave at the same place for the same reason, and processes at different places are told so, instead of
waiting for each other. Talks have a process group of their own, on the CPU: they make no device wait, and are never
taken for an operation of the model.
"""

import warnings
import weakref
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_map_only

from .. import assert_same_on_all_ranks
from .core import Leaf, State, all_gather, bind, outside, whole_tensor
from .data import Source
from .events import CANCELS, Cancel

_END = object()
# PyTorch's default group, and that of the talks beside it. Not held: a group that is still there when Python ends has
# threads that nobody joins, and aborts the process.
_groups: list[weakref.ref[Any]] = []


class Ranks:
    """The processes that fit one model, as one of them sees them. `first` is the one that prints and writes.

    A single process is `alone`: it has nobody to talk to, and what it says comes back as it is.
    """

    def __init__(self, rank: int = 0, size: int = 1, spread: bool = False) -> None:
        self.rank, self.size = rank, size
        self.alone, self.first = size == 1, rank == 0
        self.spread = spread  # whether parameters are spread over the processes
        self.calls = 0  # of the Learner's, within each other
        self.busy = False  # whether the others may be waiting for this one in an operation of the model
        self.apart = False  # once an error passes: what comes then is not the same on all, so this one talks no more

    # --- Talks --------------------------------------------------------------------------------------------------------

    def numbers(self, place: str, number: float = 0.0, outcome: Exception | None = None) -> list[float]:
        """The number of each, by rank. `outcome` is an error or a cancel: what one of them has, all raise."""
        if self.alone or self.apart:
            if outcome is not None:
                raise outcome
            return [number]
        said = torch.tensor([zlib.crc32(place.encode()), outcome is not None, number], dtype=torch.float64)
        try:
            heard = all_gather(said, _group()).view(-1, 3).tolist()
        except RuntimeError as error:
            self.apart = True
            error.add_note(f"rank {self.rank} was at {place}; another process ended, or did not come there")
            raise
        if any(has_outcome for _, has_outcome, _ in heard) or len({place for place, *_ in heard}) > 1:
            self._raise(place, outcome)
        return [number for *_, number in heard]

    def length(self, place: str, number: int | None, longest: bool = False) -> int | None:
        """How many batches all have, or with `longest` any; None if one of them does not know."""
        found = [int(n) for n in self.numbers(place, -1 if number is None else number)]
        return None if -1 in found else max(found) if longest else min(found)

    def gather(self, place: str, value: Any) -> list[Any]:
        """What each has, by rank: any plain data."""
        if self.alone or self.apart:
            return [value]
        self.numbers(place)
        return self._exchange(value)

    def attempt(
        self, place: str, action: Callable[[], Any], number: Callable[[Any], float] = lambda value: 0.0
    ) -> tuple[Any, list[float]]:
        """What each does, and the numbers that several have of it. An error or a cancel of one is one of all, but not
        an error where they may be waiting for this one."""
        if self.alone:
            return action(), []
        value: Any = None
        error: Exception | None = None
        try:
            value = action()
        except Exception as raised:
            if self.busy and not isinstance(raised, Cancel):
                raise
            error = raised
        return value, self.numbers(place, number(value) if error is None else 0.0, error)

    def leave(self, place: str, error: BaseException) -> None:
        """An error passes. The others are told, if they will surely listen; where they may wait for this process in an
        operation of the model, they hear of it when it ends."""
        if isinstance(error, Exception) and not (self.alone or self.apart or self.busy):
            where = error.__traceback__
            try:
                self.numbers(place, outcome=error)
            except Exception as raised:
                if raised is not error:
                    error.add_note(f"the other processes could not be told: {raised}")
            error.__traceback__ = where
        self.apart = not self.alone

    def __enter__(self) -> "Ranks":
        self.calls += 1
        return self

    def __exit__(self, kind: Any, error: BaseException | None, where: Any) -> None:
        """All end a call together. An error that ends it is told."""
        self.calls -= 1
        if error is None:
            self.numbers("the end of a call")
        else:
            self.leave("the end of a call", error)

    # --- What all must have alike -------------------------------------------------------------------------------------

    def together(self, source: Source, batches: Iterator[Any], trains: bool) -> Iterator[tuple[Any, bool]]:
        """The batches, and whether they count. Training ends with the process that has the fewest, and a warning. In
        evaluation a process whose data has ended goes through its last batch again, which then does not count."""
        if self.alone:
            yield from ((batch, True) for batch in batches)
            return
        while True:
            place = f"the next batch of {source.name}"
            batch, has = self.attempt(place, lambda: next(batches, _END), lambda batch: batch is not _END)
            if not any(has) or (trains and not all(has)):
                break
            if batch is _END:
                yield source.last, False
            else:
                source.last = batch
                yield batch, True
        source.last = None
        if any(has):
            self.warn(
                f"{source.name} ended on rank {has.index(False)} when others had batches left, which were left out: "
                "give all processes as many batches (torch.utils.data.DistributedSampler does)"
            )

    def require_same(self, place: str, values: dict[str, Any]) -> None:
        """ValueError that names what is not the same on all of them."""
        every = self.gather(place, values)
        for name, mine in every[0].items():
            for rank, other in enumerate(every):
                if other[name] != mine:
                    found = f"{name} is {mine!r} on rank 0 and {other[name]!r} on rank {rank}"
                    raise ValueError(f"{place} must be called alike on all processes, but {found}")

    def require_same_state(self, state: State | Leaf) -> None:
        """AssertionError where `adjust`, `freeze` and their like were called on some of them only."""
        if not self.alone:
            self.numbers("the start of an epoch")
            assert_same_on_all_ranks(state)

    def whole(self, data: Any) -> Any:
        """Plain data with all that is spread over the processes put together, on the CPU of the first; on the others
        there is nothing in its place."""
        if not self.spread:
            return data
        return tree_map_only(torch.Tensor, lambda t: whole_tensor(t, self.first), data)

    def warn(self, message: str) -> None:
        """A warning that all have, and the first gives."""
        if self.first:
            warnings.warn(message, stacklevel=outside())

    # --- What they raise ----------------------------------------------------------------------------------------------

    def _exchange(self, value: Any) -> list[Any]:
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=_group())
        return found

    def _raise(self, place: str, outcome: Exception | None) -> None:
        """Some have something to raise, or are elsewhere."""
        kind, reason = (None, "") if outcome is None else ("error", f"{type(outcome).__name__}: {outcome}")
        if isinstance(outcome, Cancel):
            kind, reason = outcome.level, outcome.reason
        every = self._exchange((place, kind, reason))
        kinds = [kind for _, kind, _ in every]
        if "error" in kinds:
            self.apart = True
            if outcome is not None and kind == "error":
                raise outcome
            rank = kinds.index("error")
            raise RuntimeError(f"rank {rank} failed at {every[rank][0]}: {every[rank][2]}")
        level = next((level for level in CANCELS if level in kinds), None)
        if level is None:
            self.apart = True
            raise RuntimeError(
                "the processes are at different places: "
                + ", ".join(f"rank {rank} at {where}" for rank, (where, *_) in enumerate(every))
                + ". What needs all of them, as learner.running(), must be asked for on all alike"
            )
        rank = kinds.index(level)
        agreed = outcome if rank == self.rank and isinstance(outcome, Cancel) else CANCELS[level](every[rank][2])
        agreed.agreed = True
        raise agreed


def ranks_of(state: State | Leaf, model: Any, *, trains: bool = False) -> Ranks:
    """The processes that this model runs on: alone where it is not wrapped for several. ValueError for one that is to
    train, while there are several, or that runs on some of them only."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return Ranks()
    binding, size = bind(state, model), dist.get_world_size()
    found = set() if binding.parallel is None else binding.parallel.ranks
    if found and len(found) != size:
        raise ValueError(
            f"the model runs on {len(found)} of {size} processes, and the Learner takes one that runs on all of them, "
            "or on one: write the loop with fluxpy.train"
        )
    if found:
        return Ranks(dist.get_rank(), size, binding.spread)
    if trains:
        raise ValueError(
            f"this is one of {size} processes, but nothing averages the model's gradients over them: each would train "
            "a model of its own, and write the same files. Wrap it before the Learner gets it: "
            "torch.nn.parallel.DistributedDataParallel(model), or torch.distributed.fsdp.fully_shard(model)"
        )
    return Ranks()


def _group() -> Any:
    """The process group of the talks, made when they first talk."""
    default, talks = (group() for group in _groups) if _groups else (None, None)
    if talks is None or default is not dist.group.WORLD:
        talks = dist.new_group(backend="gloo")
        _groups[:] = [weakref.ref(dist.group.WORLD), weakref.ref(talks)]
    return talks

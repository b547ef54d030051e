"""What the processes of a world do with a Learner together. What one process does with the whole data is worked out
before, by `alone_in`, as the numbers that they are to come to."""

import csv
import math
import os
import signal
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from distributed_cases import shard
from torch import Tensor, nn
from torch.distributed._composable.replicate_with_fsdp import replicate
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DistributedSampler, TensorDataset

import fluxpy
from fluxpy import AccumGrad, Adam, Averaged, ClipGlobalNorm, DataLoader, Descent, Momentum, Muon, OptimiserChain
from fluxpy.learner import (
    Callback,
    CancelBatch,
    CancelEpoch,
    CancelFit,
    CancelTraining,
    CancelValidation,
    Checkpoint,
    CSVLogger,
    EarlyStopping,
    FreezeUntil,
    Learner,
    LearningRateScheduler,
    ReduceOnPlateau,
    StatisticsRecorder,
    StopOnNaN,
    TensorBoardLogger,
    lr_find,
)
from fluxpy.learner.ranks import Ranks
from fluxpy.schedules import Segment, segments

WRAPPERS: dict[str, Callable[[nn.Module], Any]] = {
    "ddp": DistributedDataParallel,
    "shard": shard,
    "replicate": replicate,
    "alone": lambda model: model,
}
ROOM = 1e-12


class Net(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(3)
        self.inside = nn.Linear(4, 5, dtype=torch.float64)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(5, 3, dtype=torch.float64)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=g, dtype=p.dtype))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.dropout(self.inside(x).tanh()))


def rows(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 4, generator=g, dtype=torch.float64), torch.randint(3, (n,), generator=g)


def part(data: tuple[Tensor, Tensor], batch_size: int, shuffle: bool = False) -> DataLoader[Any]:
    """This process's rows: together with those of the others a batch has the rows that it has in one process."""
    size, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    return DataLoader(tuple(t[rank::size] for t in data), batch_size=batch_size // size, shuffle=shuffle)


def margin(output: Tensor, target: Tensor) -> Tensor:
    return output.amax(-1).mean()


class Hits:
    """A metric as those of torchmetrics, which puts itself together, and computes once after each update."""

    sync_on_compute = True

    def __init__(self) -> None:
        self.reset()

    def update(self, output: Tensor, target: Tensor) -> None:
        self.sums, self._computed = self.sums + torch.tensor([(output.argmax(-1) == target).sum(), len(target)]), None

    def compute(self) -> Tensor:
        if self._computed is None:
            sums = self.sums.clone()
            if dist.is_initialized():
                dist.all_reduce(sums)
            self._computed = sums[0] / sums[1]
        return self._computed

    def reset(self) -> None:
        self.sums, self._computed = torch.zeros(2), None


class At(Callback):
    """The events as they come; at one of them one process raises something."""

    def __init__(self, raised: Any = None, event: str = "", epoch: int = 0, batch: int = 0, rank: int = 1) -> None:
        self.seen: list[Any] = []
        self.raised, self.place = raised, (event, epoch, batch)
        self.here = not dist.is_initialized() or dist.get_rank() == rank

    def __call__(self, learner: Any, event: str) -> None:
        self.seen.append((str(event), learner.epoch_index, learner.batch_index))
        if self.raised is not None and self.here and self.seen[-1] == self.place:
            raised, self.raised = self.raised, None
            raise raised


QUIET: Any = {"default_callbacks": False}
METRICS: list[Any] = ["accuracy", "matthews_correlation_coefficient", "perplexity", margin, Hits]


def callbacks(folder: str) -> list[Any]:
    warm = segments([Segment("linear", end=1.0, steps=3), Segment("cosine", end=0.1)])
    return [
        LearningRateScheduler(scale=warm),
        FreezeUntil("inside.*", 1),
        ReduceOnPlateau(patience=1),
        EarlyStopping("accuracy", patience=2, restore_best=True),
        StatisticsRecorder(),
        CSVLogger(f"{folder}/log.csv", every=2),
        TensorBoardLogger(f"{folder}/tensorboard", norms=2, histograms=1, every=3),
        Checkpoint(f"{folder}/checkpoints", keep=2),
    ]


def learn(wrap: str, rule: Any, found: list[Any] = (), model: Any = None, **more: Any) -> Learner:  # pyright: ignore[reportArgumentType]
    more = {"default_callbacks": False, "loss": F.cross_entropy} | more
    net = Net() if model is None else model
    if wrap == "ddp" and any(isinstance(c, FreezeUntil) for c in found):
        net = DistributedDataParallel(net, find_unused_parameters=True)
    else:
        net = WRAPPERS[wrap](net)
    return Learner(net, more.pop("loss"), rule, callbacks=list(found), **more)


def fit_in(folder: str, wrap: str) -> tuple[Learner, list[Any]]:
    found = callbacks(folder)
    if wrap == "alone":
        found.pop(6)  # the names of TensorBoard's files count up, and other tests hang on their order
    rule = OptimiserChain(ClipGlobalNorm(1.0), Adam(0.05))
    learner = learn(wrap, rule, found, metrics=[m() if m is Hits else m for m in METRICS])
    learner.fit(part(rows(48), 8), part(rows(33, seed=1), 8), epochs=4)
    return learner, found


def weights_of(learner: Learner) -> dict[str, Tensor]:
    found = {path: x.detach() for path, x in fluxpy.trainables(learner.model, path=True)}
    return {path: x.full_tensor() if hasattr(x, "full_tensor") else x for path, x in found.items()}  # pyright: ignore[reportAttributeAccessIssue]


def same_on_all(value: Any) -> bool:
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, value)
    return all(repr(other) == repr(every[0]) for other in every)


CANCELS: list[Callable[[], At]] = [
    lambda: At(CancelTraining(), "batch_end", 0, 1),
    lambda: At(CancelEpoch(), "batch_start", 0, 2),
    lambda: At(CancelFit("enough"), "update_start", 1, 1),
    lambda: At(CancelBatch(), "update_start", 0, 3),
    lambda: At(CancelValidation(), "inference_prediction_end", 0, 1),
    lambda: At(CancelFit(), "epoch_end", 0, 2),
    lambda: At(CancelFit("late"), "fit_end", 1, 2),
]


def cancelled(at: At, wrap: str) -> Any:
    """A fit in which one process cancels something."""
    learner = learn(wrap, Momentum(0.1), [at], metrics=["accuracy"])
    learner.fit(part(rows(48), 8), part(rows(33, seed=1), 8), epochs=2)
    return [list(learner.history), learner.history.stop_reason, at.seen, learner.progress.position()]


def alone_in(folder: str) -> None:
    """The reference, on one process."""
    learner, found = fit_in(folder + "/alone", "alone")
    torch.save(
        {
            "run": [list(learner.history), learner.history.stop_reason, found[4].records],
            "weights": weights_of(learner),
            "cancelled": [cancelled(make(), "alone") for make in CANCELS],
        },
        folder + "/alone.pt",
    )


def close(a: Any, b: Any) -> None:
    """Numbers and texts in lists and dicts, to within roundings."""
    assert type(a) is type(b) or isinstance(a, int | float), (a, b)
    if isinstance(a, dict):
        assert list(a) == list(b)
        a, b = list(a.values()), list(b.values())
    if isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            close(x, y)
    elif isinstance(a, float):
        assert math.isclose(a, b, rel_tol=1e-9, abs_tol=ROOM), (a, b)
    else:
        assert a == b


# --- One run on several processes -------------------------------------------------------------------------------------


def like_one_process(folder: str, wrap: str) -> None:
    """Numbers, weights and decisions are those of one process, the same on all, and there is one set of files."""
    own, alone = f"{folder}/{wrap}{dist.get_world_size()}", folder + "/alone"
    learner, found = fit_in(own, wrap)
    run = [list(learner.history), learner.history.stop_reason, found[4].records]
    wanted = torch.load(alone + ".pt", weights_only=True)
    close(run, wanted["run"])
    for path, x in weights_of(learner).items():
        torch.testing.assert_close(x, wanted["weights"][path], rtol=ROOM, atol=ROOM)
    assert same_on_all((run, weights_of(learner)))
    names, others = (sorted(p.name for p in Path(at).rglob("*") if p.is_file()) for at in (own, alone))
    assert [n for n in names if "tfevents" not in n] == [n for n in others if "tfevents" not in n]
    assert sum("tfevents" in name for name in names) == 2  # of training and of validation
    lines, others = (list(csv.reader(Path(at, "log.csv").read_text().splitlines())) for at in (own, alone))
    assert [line[:3] for line in lines] == [line[:3] for line in others]
    close([[float(x) for x in line[3:]] for line in lines[1:]], [[float(x) for x in line[3:]] for line in others[1:]])
    fluxpy.load(found[-1].best[0][1], model=Net())  # a whole model, for one process
    dist.barrier()


def cancels_are_agreed(folder: str, wrap: str) -> None:
    """What one process cancels, all do, at the same place."""
    wanted = torch.load(folder + "/alone.pt", weights_only=True)["cancelled"]
    for make, (history, reason, seen, position) in zip(CANCELS, wanted, strict=True):
        found = cancelled(make(), wrap)
        assert same_on_all(found)
        close(found[0], history)
        assert found[1:] == [reason, seen, position]


def errors_are_told() -> None:
    """What one process fails of, the others hear of."""

    class Fails(Learner):
        def training_step(self, model: Any, input: Any, target: Any) -> Any:
            if dist.get_rank() == 1 and self.step_index == 2:
                raise KeyError("a bad sample")
            return super().training_step(model, input, target)

    def bad_data(epoch: int) -> Iterator[Any]:
        for i, batch in enumerate(part(rows(48), 8)):
            if dist.get_rank() == 1 and i == 3:
                raise OSError("no such image")
            yield batch

    data = part(rows(48), 8)
    for where in ("fit_start", "batch_start", "update_start", "batch_end", "training_end", "epoch_end", "fit_end"):
        at = At(
            ZeroDivisionError("oh"),
            where,
            0,
            {"fit_start": 0, "training_end": 5, "epoch_end": 5, "fit_end": 5}.get(where, 2),
        )
        fails(lambda at=at: learn("ddp", Adam(0.1), [at]).fit(data), ZeroDivisionError)
    fails(lambda: Fails(DistributedDataParallel(Net()), F.cross_entropy, Adam(0.1)).fit(data), KeyError)
    fails(lambda: learn("ddp", Adam(0.1)).fit(bad_data), OSError)


def fails(f: Callable[[], Any], kind: type[Exception]) -> None:
    if dist.get_rank() == 1:
        with pytest.raises(kind):
            f()
    else:
        with pytest.raises(RuntimeError, match=f"rank 1 failed at .*: {kind.__name__}: "):
            f()


def told_apart() -> None:
    """What would have processes wait for each other, drift apart or write twice is refused in words, on all of them."""
    data, rank = part(rows(48), 8), dist.get_rank()

    def ask(learner: Any, event: str) -> None:
        if event == "batch_end" and rank == 0:
            learner.running()

    with pytest.raises(RuntimeError, match=r"rank 0 at running\(\), rank 1 at batch_end.*on all alike"):
        learn("ddp", Adam(0.1), [ask]).fit(data)
    with pytest.raises(ValueError, match="nothing averages the model's gradients.*DistributedDataParallel"):
        learn("alone", Adam(0.1)).fit(data)
    with pytest.raises(ValueError, match="the list of callbacks is .*'StatisticsRecorder'.* on rank 0 and "):
        learn("ddp", Adam(0.1), [StatisticsRecorder()] if rank == 0 else []).fit(data)
    with pytest.raises(ValueError, match="epochs is 1 on rank 0 and 2 on rank 1"):
        learn("ddp", Adam(0.1)).fit(data, epochs=1 + rank)
    with pytest.raises(ValueError, match="nobody knows how the metric 'Own' is put together"):
        learn("ddp", Adam(0.1), metrics=[Own()]).fit(data)
    learner = learn("ddp", Adam(0.1))
    assert learner.ranks.first is (rank == 0)
    if rank == 1:
        fluxpy.adjust(learner.state, 0.3)
    with pytest.raises(AssertionError, match="the state is not the same on all ranks"):
        learner.fit(data)
    if rank == 0:  # on one model that is no business of the others
        assert learn("alone", Adam(0.1)).validate(data).keys() == {"loss"}
    group = dist.new_group([rank], use_local_synchronization=True)
    with pytest.raises(ValueError, match="runs on 1 of 2 processes"):
        Learner(DistributedDataParallel(Net(), process_group=group), F.cross_entropy, Adam(0.1))


class Own:
    def update(self, output: Any, target: Any) -> None: ...
    def compute(self) -> float:
        return 0.0

    def reset(self) -> None: ...


def uneven_data_ends_together(wrap: str) -> None:
    """Where one process has fewer batches, all stop with it, and say so."""
    rank = dist.get_rank()
    x, y = rows(40)
    mine = (x[: 20 - 8 * rank], y[: 20 - 8 * rank])  # 5 and 3 batches
    known = DataLoader(mine, batch_size=4)
    for data in (known, lambda: iter(list(known))):
        learner = learn(wrap, Adam(0.1), accumulate=2)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            history = learner.fit(data, data, epochs=2)
        words = [str(w.message) for w in caught if "ended on rank 1 when others had" in str(w.message)]
        assert len(words) == (2 if rank == 0 else 0), words
        assert learner.progress.step == 6
        assert same_on_all((list(history), weights_of(learner), learner.batch_count))
        assert learner.state.head.weight.count == 4
        assert len(learner.predict(known)) == len(mine[0])
        assert same_on_all(learner.validate(known))


def a_loss_that_is_not_finite() -> None:
    """On one process: none updates, and all say so."""
    rank = dist.get_rank()
    data = list(part(rows(48), 8))
    data[2] = (data[2][0] * (math.nan if rank == 1 else 1.0), data[2][1])
    for found, count in (([StopOnNaN()], 2), ([], 5)):
        learner = learn("ddp", Adam(0.1), [*found, recorder := StatisticsRecorder()])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            history = learner.fit(data)
        assert learner.state.head.weight.count == count
        assert learner.nonfinite == "the loss of batch 2 of epoch 0 on rank 1 is nan; that batch updated nothing"
        assert same_on_all((list(history), history.stop_reason, recorder.records, weights_of(learner)))
        assert len(recorder.records) == count


def windows_are_weighed_alike() -> None:
    """Batches in which the processes have other numbers of targets that count: the mean is one, and the same."""
    rank = dist.get_rank()
    data = [(x, torch.where(torch.arange(4) < 1 + rank + i % 3, y, -100)) for i, (x, y) in enumerate(part(rows(48), 8))]

    class Weighs(Learner):
        def training_step(self, model: Any, input: Any, target: Any) -> Any:
            self.step.weight = (target >= 0).sum()
            return super().training_step(model, input, target)

    found = []
    for cls in (Learner, Weighs):
        learner = cls(DistributedDataParallel(Net()), F.cross_entropy, Descent(0.1), accumulate=3, **QUIET)
        learner.fit(data, epochs=2)
        assert same_on_all(weights_of(learner))
        assert learner.state.head.weight.count == 4
        found.append(weights_of(learner)["head.weight"])
    torch.testing.assert_close(*found)


def samplers_get_their_epoch() -> None:
    data, seen = TensorDataset(*rows(48)), []
    sampler: Any = DistributedSampler(data, seed=1)
    loader = torch.utils.data.DataLoader(data, batch_size=4, sampler=sampler)

    def note(learner: Any, event: str) -> None:
        if event == "batch_start" and learner.batch_index == 0:
            seen.append(learner.step.input.sum().item())

    learn("ddp", Adam(0.1), [note]).fit(loader, epochs=3)
    wanted = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        wanted.append(next(iter(loader))[0].sum().item())
    assert seen == wanted
    assert len({*seen}) == 3


def rates_are_found_together() -> None:
    learner = learn("ddp", Momentum(0.1))
    found = lr_find(learner, part(rows(48), 8), steps=20, start=1e-4)
    assert same_on_all((found.rates, found.losses, found.suggestion))
    with pytest.raises(ValueError, match="lr_find trains a copy.*spread"):
        lr_find(learn("shard", Momentum(0.1)), part(rows(48), 8))


# --- Saving -----------------------------------------------------------------------------------------------------------


class Kill(BaseException):
    """As a kill between two batches."""


RULES = {
    "averaged": Averaged(Adam(0.05), 0.9),
    "gathered": OptimiserChain(ClipGlobalNorm(1.0), AccumGrad(4), Adam(0.05)),
    "muon": {"*.weight": Muon(0.05), "*": Adam(0.05)},
    "adam": Adam(0.05),
}


def resumed(folder: str, wrap: str, step: int, every: int | None, rule: str) -> tuple[Any, ...]:
    """A run that is killed after so many batches and started again: its numbers, and those of one that was not."""
    found = []
    for name, stop in (("whole", 10**6), ("cut", step), ("cut", 10**6)):
        torch.manual_seed(dist.get_rank() + (100 if found and stop > step else 0))  # what is not loaded would show

        def kill(learner: Any, event: str, stop: int = stop) -> None:
            if event == "batch_end" and learner.training and learner.step_index == stop:
                raise Kill

        own = Path(folder, f"{wrap}{rule}{step}", name)
        recorder, best = StatisticsRecorder(), EarlyStopping(patience=9, restore_best=True)
        saver = Checkpoint(own, every=every)
        learner = learn(
            wrap, RULES[rule], [kill, recorder, best, CSVLogger(own / "log.csv"), saver], Net(0.4), accumulate=2
        )
        data = part(rows(48), 8, shuffle=True)
        try:
            learner.fit(data, part(rows(16, seed=1), 8), epochs=3)
        except Kill:
            continue
        found.append((list(learner.history), recorder.records, weights_of(learner), (own / "log.csv").read_text()))
    return found[0], found[1]


def goes_on(folder: str, wrap: str, rule: str = "adam") -> None:
    """Bit for bit, in the middle of an epoch and at its end."""
    for step, every in ((9, 2), (10, 3), (6, None)):  # also between two updates
        whole, again = resumed(folder, wrap, step, every, rule)
        assert repr(whole) == repr(again)
        assert same_on_all(whole[:3])


def goes_on_where_some_have_no_data_left(folder: str, wrap: str) -> None:
    """In the middle of a validation, of which this process has fewer batches."""

    def stop(learner: Any, event: str) -> None:
        if event == "batch_end" and not learner.training and learner.batch_index == 3 and not learner.progress.resumed:
            raise CancelFit

    found = []
    for name, stops in (("whole", []), ("cut", [stop])):
        for _ in range(1 + len(stops)):
            torch.manual_seed(dist.get_rank())
            saver = Checkpoint(f"{folder}/{wrap}-{name}")
            learner = learn(wrap, Adam(0.05), [*stops, recorder := StatisticsRecorder(), saver], Net(0.3))
            history = learner.fit(part(rows(48), 8, shuffle=True), part(rows(33, seed=1), 8), epochs=2)
            if history.stop_reason:
                assert learner.progress.position() == {"epoch": 0, "phase": "validation", "batch": 4, "step": 6}
        found.append((list(history), recorder.records, weights_of(learner)))
    assert repr(found[0]) == repr(found[1])


def save_here(folder: str, wrap: str) -> None:
    """A run that ends after its first epoch, and one in the middle of it."""
    for name, every in (("end", None), ("middle", 2)):
        stop = At(CancelFit(), "batch_end" if every else "epoch_end", 0, 3 if every else 5, rank=0)
        learner = learn(
            wrap, Adam(0.05), [stop, StopOnNaN(), Checkpoint(f"{folder}/{wrap}{name}", every=every)], Net(0.4)
        )
        learner.fit(part(rows(48), 8), epochs=1 if every is None else 2)


def go_on_here(folder: str, wrap: str, wrap_of_file: str) -> None:
    """With another number of processes: from the end of an epoch, but not from the middle."""
    at = f"{folder}/{wrap_of_file}end"
    names = [At(), StopOnNaN()]
    learner = learn(wrap, Adam(0.05), [*names, Checkpoint(at)], Net(0.4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the schedule has another length
        history = learner.fit(part(rows(48), 8), epochs=2)
    assert [row["epoch"] for row in history] == [0, 1]
    assert learner.state.head.weight.count == 12
    with pytest.raises(ValueError, match="in the middle of a phase, and cannot go on with"):
        learn(wrap, Adam(0.05), [*names, Checkpoint(f"{folder}/{wrap_of_file}middle")], Net(0.4)).fit(part(rows(48), 8))


def signals_stop_all(folder: str) -> None:
    """One that only one process gets."""

    def send(learner: Any, event: str) -> None:
        if event == "batch_start" and learner.step_index == 3 and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    for wanted in (4, 12):
        learner = learn("ddp", Adam(0.1), [send, Checkpoint(folder + "/signals")])
        history = learner.fit(part(rows(48), 8), epochs=2)
        assert learner.progress.step == wanted
        assert same_on_all((history.stop_reason, learner.progress.position(), weights_of(learner)))
        assert (history.stop_reason or "none").startswith("SIGTERM; the run was saved" if wanted == 4 else "none")


def a_save_that_fails(folder: str) -> None:
    """On the first process: all hear of it."""
    Path(folder, "fails").mkdir(exist_ok=True)
    dist.barrier()
    saver = Checkpoint(folder + "/fails")
    learner = learn("ddp", Adam(0.1), [saver])

    def spoil(learner: Any, event: str) -> None:
        if event == "epoch_end" and dist.get_rank() == 0:
            saver.last.mkdir()

    with pytest.raises((OSError, ValueError) if dist.get_rank() == 0 else RuntimeError, match="last.flux"):
        learner.fit(part(rows(48), 8), callbacks=[spoil])


def directories_that_not_all_see(folder: str) -> None:
    own = f"{folder}/own{dist.get_rank()}"
    learn("ddp", Adam(0.1), [Checkpoint(own)]).fit(part(rows(48), 8))
    with pytest.raises(ValueError, match="where it begins is .*'epoch': 1.* on rank 0 and 'a new run' on rank 1"):
        learn("ddp", Adam(0.1), [Checkpoint(own)]).fit(part(rows(48), 8), epochs=2)


def few_talks() -> None:
    """Two a batch, and one at each event at which a callback may cancel."""
    counts = []
    numbers = Ranks.numbers

    def counted(self: Any, *args: Any, **more: Any) -> Any:
        counts[-1] += 1
        return numbers(self, *args, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Ranks, "numbers", counted)
        for found in ([StatisticsRecorder()], [Silent()]):
            for n in (48, 96):
                counts.append(0)
                learn("ddp", Adam(0.1), [*found, LearningRateScheduler(lr=lambda n: 0.1)]).fit(part(rows(n), 8))
    assert [counts[1] - counts[0], counts[3] - counts[2]] == [2 * 6, 3 * 6]


class Silent(Callback):
    def on_batch_end(self, learner: Any) -> None: ...


FEW = [
    errors_are_told,
    told_apart,
    a_loss_that_is_not_finite,
    windows_are_weighed_alike,
    samplers_get_their_epoch,
    few_talks,
]
IN_A_FOLDER = [signals_stop_all, a_save_that_fails, directories_that_not_all_see]

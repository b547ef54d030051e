"""The Learner on several processes: one run, with the numbers, files and decisions of one. See learner_cases.py."""

import weakref
from functools import partial
from pathlib import Path
from typing import Any

import learner_cases as cases
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from worlds import run_world

from fluxpy import Adam
from fluxpy.learner import Callback, Learner
from fluxpy.learner.ranks import Ranks


def test_two_processes(tmp_path: Path) -> None:
    folder = str(tmp_path)
    cases.alone_in(folder)
    found = [partial(cases.like_one_process, folder, "ddp"), partial(cases.cancels_are_agreed, folder, "ddp")]
    found += [partial(case, folder) for case in cases.IN_A_FOLDER]
    found += [partial(cases.goes_on, folder, "ddp"), partial(cases.uneven_data_ends_together, "ddp")]
    run_world(2, [*found, *cases.FEW])


def test_two_processes_with_shards(tmp_path: Path) -> None:
    folder = str(tmp_path)
    cases.alone_in(folder)
    found = [partial(cases.like_one_process, folder, "shard"), partial(cases.goes_on, folder, "shard")]
    run_world(2, [*found, cases.rates_are_found_together])


@pytest.mark.nightly
@pytest.mark.parametrize("wrap", ["ddp", "shard", "replicate"])
def test_everything(wrap: str, tmp_path: Path) -> None:
    folder = str(tmp_path)
    cases.alone_in(folder)
    of_each = [cases.like_one_process, cases.cancels_are_agreed, cases.goes_on, cases.save_here]
    found = [partial(case, folder, wrap) for case in [*of_each, cases.goes_on_where_some_have_no_data_left]]
    found += [partial(cases.goes_on, folder, wrap, rule) for rule in cases.RULES if rule != "adam"]
    run_world(2, [partial(cases.uneven_data_ends_together, wrap), *found])
    run_world(4, [partial(cases.go_on_here, folder, wrap, wrap)])
    run_world(4, [partial(cases.like_one_process, folder, wrap)])


def test_a_resumed_fit_talks_through_one_object() -> None:
    """What it knows of an error that passes, the end of the call has to know: it would talk where nobody listens."""

    class Saved(Callback):
        def __init__(self) -> None:
            self.run: Any = None
            self.seen: list[Any] = []

        def saved_run(self) -> Any:
            self.seen.append(learner.ranks)
            return self.run

        def on_batch_end(self, learner: Any) -> None:
            learner.predict(data), learner.state_dict()
            self.seen.append(learner.ranks)

    saved, data = Saved(), [(torch.ones(4, 2), torch.ones(4, 1))]
    learner = Learner(nn.Linear(2, 1), F.mse_loss, Adam(), callbacks=[saved], default_callbacks=False)
    learner.fit(data)
    saved.run = learner.state_dict()
    learner.fit(data, epochs=2)
    first, second, *_ = saved.seen[2:]
    assert first is second and first is not saved.seen[0]


def test_no_process_group_outlives_the_default_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is still there when Python ends aborts the process, now and then."""
    made, new_group = [], dist.new_group

    def watched(*args: Any, **kwargs: Any) -> Any:
        group = new_group(*args, **kwargs)
        made.append(weakref.ref(group))
        return group

    monkeypatch.setattr(dist, "new_group", watched)
    for _ in range(2):
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        try:
            talk = Ranks(rank=0, size=2)
            assert talk.numbers("here", 3.0) == talk.numbers("there", 3.0) == [3.0]
        finally:
            dist.destroy_process_group()
    assert len(made) == 2  # one for each default group
    assert all(group() is None for group in made)

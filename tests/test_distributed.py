"""Several processes give the numbers of one that has the whole batch. See distributed_cases.py and its neighbours."""

import random
import time
from functools import partial
from pathlib import Path

import distributed_cases as cases
import distributed_faults as faults
import distributed_saving as saving
import distributed_ways as ways
import pytest
from worlds import run_and_kill, run_world

import fluxpy


def test_two_processes() -> None:
    run_world(2, [*cases.DDP, *cases.FEW, *faults.FEW])


@pytest.mark.nightly
@pytest.mark.parametrize("size", [2, 4])
def test_everything(size: int) -> None:
    run_world(size, [*cases.DDP, *cases.SPREAD, *faults.FAULTS])


@pytest.mark.nightly
@pytest.mark.parametrize("size", [2, 4])
def test_the_ways_of_pytorch(size: int) -> None:
    run_world(size, ways.WAYS)


@pytest.mark.nightly
@pytest.mark.parametrize("size", [1, 2, 4])
def test_bytes_are_those_of_the_page(size: int) -> None:
    run_world(size, [cases.bytes_on_each_process])


def test_four_processes_save_and_others_load(tmp_path: Path) -> None:
    folder = str(tmp_path)
    run_world(4, [partial(cases.save_in, folder), *cases.FEW_IN_FOUR, *ways.FEW_IN_FOUR])
    run_world(3, [partial(cases.load_from, folder)])


@pytest.mark.nightly
@pytest.mark.parametrize("size", [1, 2, 4])
def test_any_number_of_processes_loads(size: int, tmp_path: Path) -> None:
    folder = str(tmp_path)
    run_world(4, [partial(cases.save_in, folder)])
    run_world(size, [partial(cases.load_from, folder)])


def test_checkpoints_of_two_processes(tmp_path: Path) -> None:
    folder = str(tmp_path)
    run_world(
        2,
        [
            partial(saving.saved_while_updates_go_on, folder + "/meanwhile"),
            partial(saving.frozen_where_the_file_has_momenta, folder),
            saving.parts_of_another_process,
            partial(saving.one_saves_for_all, folder),
        ],
    )


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("times", [2, pytest.param(20, marks=pytest.mark.nightly)])
def test_killed_while_saving(times: int, tmp_path: Path) -> None:
    """SIGKILL of one rank at a random moment: the newest checkpoint is the last that was finished, or the next one, and
    whole; and the run goes on from it."""
    chance = random.Random(times)
    model, rule = saving.to_kill()
    state, turn, torn = fluxpy.setup(rule, model), 0, 0

    def moment(before: int) -> None:
        end = time.monotonic() + saving.PATIENCE
        while saving.last_finished(tmp_path) < before + 2:  # it runs, and more than once
            assert time.monotonic() < end
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.05))

    for n in range(times):
        done = saving.last_finished(tmp_path)
        run_and_kill(2, partial(saving.train_and_save, str(tmp_path)), n % 2, partial(moment, done))
        found = saving.newest(tmp_path)
        assert found is not None and int(found.name) - saving.last_finished(tmp_path) in (0, 1)
        torn += any(int(path.name) > int(found.name) for path in tmp_path.iterdir() if path.is_dir())
        while turn < int(found.name):
            saving.step_to(model, state, turn)
            turn += 1
        loaded, fresh = saving.to_kill()
        other = fluxpy.setup(fresh, loaded)
        saving.load_both(loaded, other, found, no_dist=True)
        cases.assert_same(loaded, other, model, state)
    print(f"tried: SIGKILL of one of two ranks while saving: {times} ({torn} within the writing)")

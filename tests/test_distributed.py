"""Several processes give the numbers of one that has the whole batch. See distributed_cases.py."""

from functools import partial
from pathlib import Path

import distributed_cases as cases
import pytest
from worlds import run_world


def test_two_processes() -> None:
    run_world(2, [*cases.DDP, *cases.FEW])


@pytest.mark.nightly
@pytest.mark.parametrize("size", [2, 4])
def test_everything(size: int) -> None:
    run_world(size, [*cases.DDP, *cases.SPREAD])


def test_four_processes_save_and_others_load(tmp_path: Path) -> None:
    folder = str(tmp_path)
    run_world(4, [partial(cases.save_in, folder), *cases.FEW_IN_FOUR])
    run_world(3, [partial(cases.load_from, folder)])


@pytest.mark.nightly
@pytest.mark.parametrize("size", [1, 2, 4])
def test_any_number_of_processes_loads(size: int, tmp_path: Path) -> None:
    folder = str(tmp_path)
    run_world(4, [partial(cases.save_in, folder)])
    run_world(size, [partial(cases.load_from, folder)])

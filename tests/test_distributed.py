"""Several processes give the numbers of one that has the whole batch."""

import distributed_cases as cases
from worlds import run_world


def test_two_processes() -> None:
    run_world(2, cases.DDP)


def test_two_processes_that_share_parameters() -> None:
    run_world(2, cases.SPREAD)


def test_four_processes_that_share_parameters() -> None:
    run_world(4, cases.SPREAD)

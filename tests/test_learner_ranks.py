"""The Learner on several processes: one run, with the numbers, files and decisions of one. See learner_cases.py."""

from functools import partial
from pathlib import Path

import learner_cases as cases
import pytest
from worlds import run_world


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

"""Every test starts from one seed, on one thread; those marked `cuda` are skipped where there is no such device."""

import pytest
import torch

torch.set_num_threads(1)

collect_ignore = ["typing"]  # users' code, with mistakes on purpose: test_typing.py gives it to a type checker


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "cuda" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))

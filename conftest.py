"""Doctests see the public names and torch, as a user's script would."""

import pytest
import torch

import fluxpy


@pytest.fixture(autouse=True)
def _names(doctest_namespace: dict[str, object]) -> None:
    doctest_namespace.update({name: getattr(fluxpy, name) for name in fluxpy.__all__}, fluxpy=fluxpy, torch=torch)

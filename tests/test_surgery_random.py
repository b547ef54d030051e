"""Random sequences of surgery, verbs, files and updates against a reference that keeps each row by itself."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fluxpy
from fluxpy import Adam, adjust, freeze, leaves, setup, surgery, thaw, update


class Reference:
    """Adam on a matrix, as rows of (x, m, v): what is done to rows is done to the list."""

    def __init__(self, x: Tensor) -> None:
        self.rows, self.t, self.lr, self.frozen = [], 0, 0.1, False
        self.grow(x)

    def grow(self, x: Tensor) -> None:
        self.rows += [(row.clone(), torch.zeros_like(row), torch.zeros_like(row)) for row in x]

    def take(self, index: list[int]) -> None:
        self.rows = [self.rows[i] for i in index]

    def reset(self, index: list[int]) -> None:
        self.rows = [(x, 0 * m, 0 * v) if i in index else (x, m, v) for i, (x, m, v) in enumerate(self.rows)]

    def update(self, g: Tensor) -> None:
        if self.frozen:
            return
        self.t += 1
        moments = [
            (x, 0.9 * m + 0.1 * dx, 0.999 * v + 0.001 * dx**2) for (x, m, v), dx in zip(self.rows, g, strict=True)
        ]
        c, d = 1 - 0.9**self.t, 1 - 0.999**self.t
        self.rows = [(x - self.lr * (m / c) / ((v / d).sqrt() + 1e-8), m, v) for x, m, v in moments]


class World:
    """A model, its state and the references of its leaves; and what was saved."""

    def __init__(self, folder: Path, seed: int, layout: str) -> None:
        self.folder, self.layout, self.g = folder, layout, torch.Generator().manual_seed(seed)
        self.references = {name: Reference(self.draw(3 + i)) for i, name in enumerate("abcd")}
        self.begin()
        self.saved: Any = None

    def draw(self, rows: int) -> Tensor:
        return torch.randn(rows, 2, generator=self.g, dtype=torch.float64)

    def begin(self) -> None:
        """A new model and state for the references."""
        nothing = torch.zeros(0, 2, dtype=torch.float64)
        values = {
            name: torch.stack([row[0] for row in r.rows]) if r.rows else nothing for name, r in self.references.items()
        }
        self.model = nn.ParameterDict({name: nn.Parameter(x.clone()) for name, x in values.items()})
        if self.layout == "flat":
            fluxpy.flatten_parameters(self.model)
        self.state: Any = setup(Adam(0.1), self.model)

    def rows(self, name: str) -> Any:
        return self.references[name].rows

    def index(self, name: str, most: int) -> list[int]:
        size, count = len(self.rows(name)), int(torch.randint(0, most + 1, (), generator=self.g))
        return torch.randint(0, size, (count if size else 0,), generator=self.g).tolist()

    # --- What may happen ---

    def take(self, name: str) -> None:
        index = self.index(name, 5)
        surgery.take(self.state[name], self.model[name], index)
        self.references[name].take(index)

    def grow(self, name: str) -> None:
        rows = self.draw(int(torch.randint(0, 4, (), generator=self.g)))
        surgery.grow(self.state[name], self.model[name], rows)
        self.references[name].grow(rows)

    def reset(self, name: str) -> None:
        index = self.index(name, 2)
        surgery.reset(self.state[name], rows=index)
        self.references[name].reset(index)

    def freeze(self, name: str) -> None:
        freeze(self.state[name])
        self.references[name].frozen = True

    def thaw(self, name: str) -> None:
        thaw(self.state[name])
        self.references[name].frozen = False

    def adjust(self, name: str) -> None:
        self.references[name].lr *= 1.5
        adjust(self.state[name], fluxpy.scale(1.5))

    def save(self, name: str) -> None:
        fluxpy.save(self.folder / "world.flux", model=self.model, state=self.state)
        self.saved = copy.deepcopy(self.references)

    def load(self, name: str) -> None:
        if self.saved is not None:
            self.references = copy.deepcopy(self.saved)
            self.begin()
            with torch.no_grad():
                for x in self.model.parameters():
                    x.zero_()
            fluxpy.load(self.folder / "world.flux", model=self.model, state=self.state)

    def update(self, name: str) -> None:
        """Of all leaves but one, of which only this one may know."""
        missing = name if torch.randint(0, 3, (), generator=self.g) == 0 else None
        grads = {key: self.draw(len(self.rows(key))) for key in self.references if key != missing}
        update(self.state, self.model, grads)
        for key, g in grads.items():
            self.references[key].update(g)

    def check(self) -> None:
        for name, leaf in leaves(self.state):
            reference, x = self.references[name], self.model[name]
            assert leaf.shape == x.shape == (len(reference.rows), 2)
            assert (leaf.frozen, leaf.count) == (reference.frozen, reference.t)
            if leaf.state is None:  # it was frozen before it trained
                assert reference.t == 0
                continue
            assert leaf.state.t == reference.t
            for i, row in enumerate(reference.rows):
                for ours, theirs in zip((x, leaf.state.m, leaf.state.v), row, strict=True):
                    torch.testing.assert_close(ours[i].detach(), theirs, rtol=1e-10, atol=1e-12)


VERBS = ["take", "grow", "reset", "freeze", "thaw", "adjust", "save", "load", "update", "update", "update"]
STEPS = st.lists(st.tuples(st.sampled_from(VERBS), st.sampled_from("abcd")), max_size=40)


@pytest.mark.parametrize("layout", ["apart", "flat"])
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(
    seed=st.integers(0, 2**32), what=st.lists(st.tuples(st.sampled_from(VERBS), st.sampled_from("abcd")), max_size=25)
)
def test_any_sequence_is_that_of_the_reference(
    layout: str, tmp_path: Path, seed: int, what: list[tuple[str, str]]
) -> None:
    world = World(tmp_path, seed, layout)
    for verb, name in what:
        getattr(world, verb)(name)
        world.check()

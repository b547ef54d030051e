"""Roles and depths of parameters, as they serve the mapping of `setup`."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fluxpy
from fluxpy import AdamW, Descent, depths, roles, setup


class Block(nn.Module):
    def __init__(self, size: int = 8) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(size)
        self.attn = nn.MultiheadAttention(size, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(size, 16), nn.GELU(), nn.Linear(16, size))
        self.scale = nn.Parameter(torch.ones(size))


class RMSNormLike(nn.LayerNorm):
    """By the class above it, a norm."""


class Transformer(nn.Module):
    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.lm_head = nn.Linear(8, 20, bias=False)  # before the rest, as some models have it
        self.tokens = nn.Embedding(20, 8)
        self.pos_embed = nn.Parameter(torch.zeros(1, 5, 8))
        self.blocks = nn.ModuleList([Block() for _ in range(3)])
        self.last = RMSNormLike(8)
        if tied:
            self.lm_head.weight = self.tokens.weight


EXPECTED = {
    "lm_head.weight": "head",
    "tokens.weight": "embedding",
    "pos_embed": "embedding",
    "last.weight": "norm",
    "last.bias": "norm",
    **{
        f"blocks.{i}.{name}": role
        for i in range(3)
        for name, role in {
            "scale": "other",
            "norm1.weight": "norm",
            "norm1.bias": "norm",
            "attn.in_proj_weight": "hidden",
            "attn.in_proj_bias": "bias",
            "attn.out_proj.weight": "hidden",
            "attn.out_proj.bias": "bias",
            "mlp.0.weight": "hidden",
            "mlp.0.bias": "bias",
            "mlp.2.weight": "hidden",
            "mlp.2.bias": "bias",
        }.items()
    },
}


def test_roles_of_a_transformer() -> None:
    assert roles(Transformer()) == EXPECTED


def test_a_tied_head_is_an_embedding_and_there_once() -> None:
    model = Transformer(tied=True)
    found = roles(model)
    assert list(found) == [path for path, _ in fluxpy.leaves(setup(Descent(), model))]
    assert found["lm_head.weight"] == "embedding"
    assert "tokens.weight" not in found


@pytest.mark.parametrize(
    "model, expected",
    [
        (nn.Linear(2, 1), ["head", "bias"]),
        (nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)), ["hidden", "bias", "head", "bias"]),
        (nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)), ["head", "bias", "norm", "norm"]),
        (nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 1, 4), 2, enable_nested_tensor=False).layers, None),
        ({"w": torch.zeros(2, 2), "b": torch.zeros(2)}, ["other", "head"]),
        (torch.zeros(2, 2), ["hidden"]),
    ],
)
def test_the_last_matrix_is_the_head_outside_of_blocks(model: Any, expected: list[str] | None) -> None:
    found = list(roles(model).values())
    if expected is None:
        assert "head" not in found
    else:
        assert found == expected


def test_wrappers_are_no_part_of_a_path() -> None:
    assert roles(torch.compile(Transformer(), backend="eager")) == EXPECTED


def test_parametrized_tensors_have_the_role_and_depth_of_what_they_stand_for() -> None:
    norm = nn.utils.parametrizations.weight_norm
    model = nn.Sequential(norm(nn.Embedding(5, 4)), norm(nn.Conv1d(4, 4, 3)), norm(nn.Linear(4, 1)))
    kinds = {path: role for path, role in roles(model).items() if not path.endswith("bias")}
    assert list(kinds.values()) == ["other", "embedding", "other", "hidden", "other", "head"]
    assert list(depths(model).values()) == [0, 0, 1, 1, 1, 2, 2, 2]
    assert list(roles(model[0].parametrizations["weight"]).values()) == ["other", "head"]
    with pytest.warns(FutureWarning, match="weight_norm"):
        old = nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 2))
    assert list(roles(old).values()) == ["bias", "other", "hidden", "head", "bias"]


def test_depths_of_a_transformer() -> None:
    found = depths(Transformer())
    assert {path: n for path, n in found.items() if not path.startswith("blocks")} == {
        "lm_head.weight": 4,
        "pos_embed": 0,
        "tokens.weight": 0,
        "last.weight": 4,
        "last.bias": 4,
    }
    for path, n in found.items():
        if path.startswith("blocks"):
            assert n == int(path.split(".")[1]) + 1


def test_a_tied_embedding_lies_where_it_first_stands() -> None:
    class Writer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.blocks = nn.Embedding(20, 8), nn.ModuleList([Block() for _ in range(2)])
            self.head = nn.Linear(8, 20, bias=False)
            self.head.weight = self.tokens.weight

    found = depths(Writer())
    assert next(iter(found.items())) == ("tokens.weight", 0) and "head.weight" not in found


def test_depths_without_blocks_count_modules() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1)))
    assert list(depths(model).values()) == [0, 0, 1, 1, 2, 2]


def test_depths_of_a_tree_of_tensors() -> None:
    assert depths({"a": torch.zeros(2), "b": [torch.zeros(2), torch.zeros(2)]}) == {"a": 0, "b.0": 1, "b.1": 1}


def test_rates_by_depth_and_no_decay_from_one_mapping() -> None:
    model = Transformer()
    role, depth = roles(model), depths(model)
    rules = {path: AdamW(0.5**n, weight_decay=0.1 * (role[path] == "hidden")) for path, n in depth.items()}
    state = setup(rules, model)
    assert state.blocks[1].mlp[0].weight.rule == AdamW(0.25, weight_decay=0.1)
    assert state.blocks[1].mlp[0].bias.rule == AdamW(0.25, weight_decay=0.0)


def test_a_path_as_a_pattern_is_that_path_alone() -> None:
    model: dict[str, Tensor] = {"a[0]": torch.zeros(2), "a0": torch.zeros(2)}
    state = setup({"a[0]": Descent(1.0), "*": Descent(2.0)}, {"a[0]": model["a[0]"]} | {"b": torch.zeros(1)})
    assert state["a[0]"].rule.lr == 1.0
    both = setup({"a[0]": Descent(1.0), "*": Descent(2.0)}, model)  # a pattern where it matches as one
    assert (both["a0"].rule.lr, both["a[0]"].rule.lr) == (1.0, 2.0)

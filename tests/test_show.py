"""print and summary: all that differs is shown, nothing unequal is merged, many layers fit on a screen; HTML."""

import copy
import pickle
import re
from html.parser import HTMLParser

import optree
import pytest
import torch
from torch import nn

import fluxpy
from fluxpy import (
    Adam,
    AdamW,
    ClipGlobalNorm,
    Descent,
    MixedPrecision,
    Momentum,
    OptimiserChain,
    RMSProp,
    adjust,
    freeze,
    leaves,
    schedules,
    select,
    setup,
    summary,
    update,
    value,
)
from fluxpy.text import Table, html_table


class Encoder(nn.Module):
    """Twelve layers, as those of BERT."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.words = nn.Embedding(10, 8)
        self.layers = nn.ModuleList(copy.deepcopy(layer) for _ in range(12))
        self.head = nn.Linear(8, 2)


def layerwise(model):
    """Rates by layer, no decay on norms and biases, three layers frozen."""
    state = setup(OptimiserChain(ClipGlobalNorm(0.5), AdamW(1e-3)), model)
    for depth, layer in enumerate(reversed(state.layers)):
        adjust(layer, 1e-3 * 0.8**depth)
    adjust(select(state, "*bias", *fluxpy.module_paths(model, nn.LayerNorm)), weight_decay=0.0)
    return freeze(state.layers[:3]) and state


def test_rates_by_layer_fit_on_a_screen():
    model = Encoder()
    text = str(layerwise(model))
    assert len(text.splitlines()) <= 50 and max(map(len, text.splitlines())) <= 100
    assert "max_norm=0.5" in text.splitlines()[0]  # not the default
    for depth in range(12):
        frozen = ", frozen" if depth < 3 else ""
        assert f"\n    {depth}  lr={1e-3 * 0.8 ** (11 - depth):.6g}{frozen}\n" in text
    assert "\n    0 to 11, each\n" in text
    assert text.count("in_proj_bias  [24]  weight_decay=0\n") == 1 == text.count("norm1  weight_decay=0\n")


def test_what_is_alike_is_said_once():
    state = setup(Momentum(0.01), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    assert str(state) == "State of 4 parameters  Momentum lr=0.01\n  0 to 1\n    weight  [2, 2]\n    bias  [2]"


CHANGES = {
    "a rate": lambda leaf: adjust(leaf, 0.02),
    "a rate, hardly": lambda leaf: adjust(leaf, 0.01 + 1e-15),
    "a pair": lambda leaf: adjust(leaf, betas=(0.9, 0.99)),
    "decay": lambda leaf: adjust(leaf, weight_decay=0.0),
    "eps": lambda leaf: adjust(leaf, eps=1e-9),
    "frozen": freeze,
    "a schedule": lambda leaf: adjust(leaf, schedules.linear(0.01, 0.0, 10)),
    "a tensor": lambda leaf: adjust(leaf, torch.tensor(0.5)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_no_two_that_differ_are_merged(change):
    """One leaf of six layers is changed: tree and table tell it from the others."""
    state = setup(AdamW(0.01), nn.Sequential(*(nn.Linear(2, 2) for _ in range(6))))
    same, table = str(state), str(summary(state)).splitlines()
    assert len(same.splitlines()) == 4 and len(set(line[8:] for line in table[1:13:2])) == 1
    change(state[3].bias)
    tree, lines = str(state), str(summary(state)).splitlines()
    assert tree != same and re.search(r"^  3\b", tree, re.MULTILINE)
    others = {lines[i][8:] for i in range(2, 13, 2) if i != 8}
    assert lines[8].startswith("3.bias") and len(others) == 1 and lines[8][8:] not in others


def test_the_table_says_what_the_next_update_uses():
    model = {"a": torch.ones(2), "b": torch.ones(2)}
    state = setup(
        {"a": Descent(schedules.linear(1.0, 0.0, 4)), "b": OptimiserChain(RMSProp(1.0), Momentum(0.01))}, model
    )
    update(state, model, {"a": torch.ones(2)})
    _, a, b, foot = str(summary(state)).splitlines()
    assert value(state["a"], "lr") == 0.75 and "0.75 (scheduled)" in a
    assert "1, 0.01" in b and foot.endswith(" 16")


def test_the_table_by_depth():
    """A line for several leaves says what is true of each."""
    state = layerwise(Encoder())
    head, words, layers, last, foot = str(summary(state, depth=1)).splitlines()
    assert head.split() == [
        "path",
        "shape",
        "dtype",
        "rule",
        "lr",
        "max_norm",
        "weight_decay",
        "frozen",
        "state",
        "bytes",
    ]
    assert words.startswith("words ") and " [10, 8] " in words and " 0.01 " in words
    assert "144 parameters" in layers and "8.58993e-05 to 0.001 " in layers and " 0 to 0.01 " in layers
    assert "36 of 144" in layers and "2 parameters" in last and foot.startswith("147 parameters")
    second = str(summary(state, depth=2)).splitlines()
    assert [line.split()[0] for line in second[1:-1]] == [
        "words.weight", *(f"layers.{i}" for i in range(12)), "head.weight", "head.bias",
    ]  # fmt: skip
    assert "frozen" in second[2] and "frozen" not in second[5]
    assert str(summary(state, depth=9)) == str(summary(state))
    assert len(str(summary(state, depth=0)).splitlines()) == 3
    freeze(select(state, "head.weight"))
    mixed = setup(
        {"a.*": Adam(), "*": None}, {"a": {"x": torch.ones(1)}, "b": {"y": torch.ones(1), "z": torch.ones(2)}}
    )
    both = str(summary(mixed, depth=0)).splitlines()[1]
    assert "2 kinds" in both and "2 of 3" in both
    for bad in (-1, True, 1.0):
        with pytest.raises(ValueError, match="whole number"):
            summary(state, depth=bad)


def test_odd_hyperparameters_are_shown():
    state = setup(MixedPrecision(Descent(torch.tensor(0.25)), dtype=torch.float64), {"w": torch.ones(2)})
    assert str(state).splitlines()[0] == "State of 1 parameters  MixedPrecision(Descent) lr=0.25 dtype=float64"
    adjust(state, torch.tensor([0.25, 0.5]))
    assert "lr=float32[2]" in str(state)

    def broken(count):
        raise RuntimeError("broken")

    assert "lr=?" in str(adjust(state, broken))


def test_a_state_prints_inside_a_transform():
    seen = []

    def f(lr):
        seen.append(str(setup(Descent(lr), {"w": torch.ones(2)})))
        return lr

    torch.func.vmap(f)(torch.tensor([0.1, 0.2]))
    assert seen[0].startswith("State of 1 parameters  Descent lr=float32[]")


# --- HTML ---------------------------------------------------------------------------------------------------------


class Reader(HTMLParser):
    """The text of a page, and whether each element is closed in its turn."""

    def __init__(self, html):
        super().__init__()
        self.text, self.open, self.deepest, self.frozen = [], [], 0, []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.open.append((tag, "opacity" in (dict(attrs).get("style") or "")))
        self.deepest = max(self.deepest, len(self.open))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        self.text.append(data)
        if any(faded for _, faded in self.open):
            self.frozen.append(data)


def test_a_state_in_a_notebook():
    """A folded tree with the lines of print, frozen branches set apart."""
    state = layerwise(Encoder())
    page = Reader(state._repr_html_())
    words = re.sub(r"\s+", " ", " ".join(page.text))
    assert words == re.sub(r"\s+", " ", str(state).replace("  ", " "))
    assert {"0", "1", "2"} <= set(page.frozen) and "3" not in page.frozen
    branch = Reader(freeze(copy.deepcopy(state).head)._repr_html_())
    assert "weight" in branch.frozen
    assert Reader(setup(Adam(), {"<b>": torch.ones(1)})._repr_html_()).text.count("<b>") == 1


def test_tables_in_a_notebook():
    state = setup(Adam(), nn.Linear(2, 3))
    table = summary(state)
    assert isinstance(table, str) and Reader(table._repr_html_()).text[0] == "2 parameters, 9 numbers, 0 frozen 72"
    assert "[3, 2]" in Reader(table._repr_html_()).text
    assert Reader(html_table(["a<b"], [[1], ["x&y"]])).text == ["a<b", "1", "x&y"]
    loader = fluxpy.DataLoader({"x": torch.ones(10, 3), "y": torch.arange(10)}, batch_size=4, shuffle=True)
    assert repr(loader) == "DataLoader(10 rows in 3 batches of 4, shuffled; x: float32[3], y: int64[])"
    assert {"x", "float32[3]", "y", "int64[]"} < set(Reader(loader._repr_html_()).text)
    assert Table(["n", "x"], [["1", "a"]], ("all", "2"), right=[0]) == "n  x\n1  a\nall2"


def test_a_state_of_ten_thousand_leaves_is_described_once():
    """Leaves with one rule and count share one card's work."""
    model = {str(i): torch.ones(1) for i in range(3000)}
    state = setup(Adam(), model)
    calls = []
    adjust(state, lambda count: calls.append(count) or 0.1)
    assert len(str(state).splitlines()) == 3001 and len(calls) == 1
    assert optree.tree_leaves(state, namespace="fluxpy") and len(list(leaves(state))) == 3000


def test_a_learner_and_its_history_in_a_notebook():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    data = fluxpy.DataLoader((torch.ones(8, 2), torch.zeros(8, dtype=torch.int64)), batch_size=4)
    loss = torch.nn.functional.cross_entropy
    learner = fluxpy.Learner(model, loss, Adam(), metrics=["accuracy"], default_callbacks=False)
    freeze(learner.state[0])
    assert "cross_entropy" in Reader(learner._repr_html_()).text
    history = learner.fit(data, data, epochs=3)
    page = Reader(history._repr_html_())
    assert page.text[:5] == ["epoch", "train loss", "train accuracy", "validation loss", "validation accuracy"]
    assert f"{history[2]['validation']['loss']:.6g}" in page.text and len(page.text) == 5 + 3 * 5
    whole = Reader(learner._repr_html_())
    assert {"epochs done", "3", "train loss"} < set(whole.text) and "0" in whole.frozen
    one = fluxpy.Learner(torch.zeros(2), loss, Adam(), default_callbacks=False)
    assert any("[2]" in text for text in Reader(one._repr_html_()).text)


def test_a_table_is_copied_as_one():
    table = summary(setup(Adam(), nn.Linear(2, 3)))
    for other in (copy.deepcopy(table), pickle.loads(pickle.dumps(table))):
        assert other == table and other._repr_html_() == table._repr_html_()

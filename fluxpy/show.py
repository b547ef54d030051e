"""Leaves as a person wants to read them: `print(state)` is a tree, `summary(state)` a table.

What both say of a leaf is its card: its rule, its rate, and every other hyperparameter that is not its default or not
the same for all, as the next update will use them. What a line says of several leaves is true of each.
"""

import dataclasses
import html
from collections import Counter
from typing import Any, NamedTuple

from torch import Tensor

from .leaf import Leaf, record_of
from .rule import Rule, at, field_of, hyperparameters, rules_in, title, value_key
from .text import Table, dtype_name, form
from .tree import Mirror, TreeSpec, spec_of, values_of

# --- Cards --------------------------------------------------------------------------------------------------------

# What is said of a leaf, by name: "rule", its hyperparameters, "frozen" (which may be empty).
Card = dict[str, str]

_SCHEDULED = " (scheduled)"


class _Held(NamedTuple):
    """A hyperparameter of a rule: its value in each member that has it."""

    values: list[Any]
    is_default: bool
    scheduled: bool


def cards_of(found: list[Leaf]) -> list[Card]:
    """A card for each leaf, all with the same choice of hyperparameters."""
    known: dict[tuple[int, int], dict[str, _Held]] = {}
    held = []
    for leaf in found:
        key = id(leaf.rule), leaf.count
        if key not in known:
            known[key] = {} if leaf.rule is None else _hyperparameters(leaf.rule, leaf.count)
        held.append(known[key])
    texts = {name: _texts([own[name] for own in known.values() if name in own]) for name in _shown(known.values())}
    written = {
        id(own): {name: text[_key(own[name])] for name, text in texts.items() if name in own} for own in known.values()
    }
    return [
        {"rule": "no rule" if leaf.rule is None else title(leaf.rule)}
        | written[id(own)]
        | {"frozen": "frozen" if leaf.frozen else ""}
        for leaf, own in zip(found, held, strict=True)
    ]


def _hyperparameters(rule: Rule, count: int) -> dict[str, _Held]:
    """The hyperparameters of a rule, those of inner rules too, as they are at a count."""
    try:
        now = at(rule, count)
    except Exception:  # a schedule that is wrong must not keep the tree from being read
        now = rule
    found: dict[str, _Held] = {}
    for member, own in zip(rules_in(now), rules_in(rule), strict=True):
        for name, value in hyperparameters(member).items():
            usual = field_of(member, name).default
            before = found.get(name, _Held([], True, False))
            is_default = usual is not dataclasses.MISSING and value_key(value) == value_key(usual)
            scheduled = any(map(callable, given)) if isinstance(given := getattr(own, name), tuple) else callable(given)
            found[name] = _Held(
                [*before.values, value], before.is_default and is_default, before.scheduled or scheduled
            )
    return found


def _key(held: _Held) -> Any:
    return value_key(tuple(held.values)), held.scheduled


def _shown(kinds: Any) -> list[str]:
    """The names of what is to be seen: the rate, and what is not the default or not the same everywhere."""
    names = dict.fromkeys(["lr", *(name for own in kinds for name in own)])
    chosen = []
    for name in names:
        found = [own[name] for own in kinds if name in own]
        differ = len(set(map(_key, found))) > 1 or not all(held.is_default for held in found)
        if found and (name == "lr" or differ):
            chosen.append(name)
    return chosen


def _texts(found: list[_Held]) -> dict[Any, str]:
    """A text for each value, with as many digits as it takes for unequal ones to look so."""
    distinct = {_key(held): held for held in found}
    for digits in (6, 9, 12, 17):
        texts = {
            key: ", ".join(_text(v, digits) for v in held.values) + _SCHEDULED * held.scheduled
            for key, held in distinct.items()
        }
        if len(set(texts.values())) == len(texts):
            break
    return texts


def _text(value: Any, digits: int) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(_text(v, digits) for v in value)})"
    if isinstance(value, Tensor):
        try:
            return f"{value.item():.{digits}g}"
        except (RuntimeError, TypeError):  # several numbers, complex ones, or none that can be read in a transform
            return form(value.shape, value.dtype)
    if callable(value):
        return "?"
    return f"{value:.{digits}g}" if isinstance(value, float) else dtype_name(value)


# --- The tree -----------------------------------------------------------------------------------------------------


class Line(NamedTuple):
    """A line of the tree. `note` says what is true of all leaves below it and was not said above."""

    depth: int
    name: str
    shape: str
    note: str
    frozen: bool


def describe_tree(state: Mirror) -> str:
    """The tree, a line a place."""
    texts = ((line, "  ".join(filter(None, [line.name, line.shape, line.note]))) for line in tree_lines(state))
    return "\n".join("  " * line.depth + text for line, text in texts)


def tree_lines(state: Mirror) -> list[Line]:
    """The lines of the tree, that of the whole first.

    Siblings in a sequence that are alike are folded. Where they differ in what is true of all that is in each, as
    layers with their own rates do, each has a line, and what is in them is listed once.
    """
    spec, values = spec_of(state), values_of(state)
    cards = dict(zip(spec.leaves, cards_of([values[index] for index in spec.leaves]), strict=True))
    shapes = {index: str(list(values[index].shape)) for index in spec.leaves}
    common = _common([cards[index] for index in spec.leaves])
    frozen = sum(card["frozen"] != "" for card in cards.values())
    name = f"State of {len(cards)} parameters" + (f", {frozen} frozen" if frozen else "")
    head = Line(0, name, "", _note(common), frozen == len(cards) > 0)
    return [head, *_lines(spec, cards, shapes, 1, common)]


def _lines(spec: TreeSpec, cards: dict[int, Card], shapes: dict[int, str], depth: int, above: Card) -> list[Line]:
    """One Python frame a level: trees may be deep."""
    blocks: list[tuple[list[tuple[Any, Any, Line]], list[Line]]] = []  # (first, last, line) of alikes; what is in them
    folds = spec.kind in ("sequence", "slice")
    for key, child in zip(spec.keys, spec.children, strict=True):
        if not child.leaves:
            continue
        common = _common([cards[index] for index in child.leaves])
        new = {name: text for name, text in common.items() if above.get(name) != text}
        shape = shapes[child.index] if child.kind == "leaf" else ""
        line = Line(depth, "", shape, _note(new), new.get("frozen") == "frozen")
        below = _lines(child, cards, shapes, depth + 1, above | common)
        heads = blocks[-1][0] if blocks else []
        if folds and child.children and heads and blocks[-1][1] == below:
            if heads[-1][2] == line:
                heads[-1] = heads[-1][0], key, line
            else:
                heads.append((key, key, line))
        else:
            blocks.append(([(key, key, line)], below))
    found: list[Line] = []
    for heads, below in blocks:
        found += [line._replace(name=_range(first, last)) for first, last, line in heads]
        if len(heads) > 1:
            found.append(Line(depth, f"{_range(heads[0][0], heads[-1][1])}, each", "", "", False))
        found += below
    return found


def _range(first: Any, last: Any) -> str:
    return str(first) if first == last else f"{first} to {last}"


def _common(cards: list[Card]) -> Card:
    """What is true of all leaves."""
    if not cards:
        return {}
    return {name: text for name, text in cards[0].items() if all(card.get(name) == text for card in cards)}


def _note(card: Card) -> str:
    own = [text if name == "rule" else f"{name}={text}" for name, text in card.items() if name != "frozen"]
    return ", ".join(filter(None, [" ".join(own), card.get("frozen", "")]))


_STYLE = "margin-left: 1.2em; font-family: monospace"


def tree_as_html(state: Mirror) -> str:
    """The tree for a notebook: folded, and what is frozen set apart: greyed and behind a line."""
    lines, parts, depth = tree_lines(state), [], 0
    for i, line in enumerate(lines):
        parts.append("</details>" * (depth - line.depth))
        is_branch = i + 1 < len(lines) and lines[i + 1].depth > line.depth
        style = _STYLE + ("; opacity: 0.55; border-left: 3px solid; padding-left: 0.4em" if line.frozen else "")
        text = " ".join(
            f"<{tag}>{html.escape(part)}</{tag}>"
            for tag, part in (("b", line.name), ("span", line.shape), ("i", line.note))
            if part
        )
        if is_branch:
            unfolded = " open" if line.depth < 2 and not line.frozen else ""
            parts.append(f'<details style="{style}"{unfolded}><summary>{text}</summary>')
        else:
            parts.append(f'<div style="{style}">{text}</div>')
        depth = line.depth + is_branch
    return "".join(parts) + "</details>" * depth


# --- The table ----------------------------------------------------------------------------------------------------


def table(found: list[tuple[str, Leaf]], depth: int | None = None) -> Table:
    """A line for each (path, leaf), or for each branch at a depth, and one of totals."""
    if depth is not None and (isinstance(depth, bool) or not isinstance(depth, int) or depth < 0):
        raise ValueError(f"summary: depth={depth!r} is not allowed; it must be a whole number, 0 or more, or None")
    cards = cards_of([leaf for _, leaf in found])
    named = dict.fromkeys(name for card in cards for name in card if name not in ("rule", "frozen"))
    names = ["lr", *(name for name in named if name != "lr")]
    branches: dict[str, list[tuple[Leaf, Card]]] = {}
    for (path, leaf), card in zip(found, cards, strict=True):
        branch = path if depth is None else ".".join(path.split(".")[:depth])
        branches.setdefault(branch, []).append((leaf, card))
    header = ["path", "shape", "dtype", "rule", *names, "frozen", "state bytes"]
    rows = [[path, *_row(pairs, names)] for path, pairs in branches.items()]
    leaves = [leaf for _, leaf in found]
    numbers, frozen = sum(leaf.shape.numel() for leaf in leaves), sum(leaf.frozen for leaf in leaves)
    foot = f"{len(found)} parameters, {numbers:,} numbers, {frozen} frozen"
    return Table(header, rows, (foot, f"{_bytes(leaves):,}".rjust(2)), right=[len(header) - 1])


def _row(pairs: list[tuple[Leaf, Card]], names: list[str]) -> list[str]:
    leaves, cards = [leaf for leaf, _ in pairs], [card for _, card in pairs]
    frozen = sum(leaf.frozen for leaf in leaves)
    partly = f"{frozen} of {len(leaves)}" if frozen else ""
    return [
        str(list(leaves[0].shape)) if len(leaves) == 1 else f"{len(leaves)} parameters",
        _all_of([dtype_name(leaf.dtype) for leaf in leaves]),
        _all_of([card["rule"].replace("no rule", "none") for card in cards]),
        *(_all_of([card.get(name, "") for card in cards]) for name in names),
        "frozen" if frozen == len(leaves) else partly,
        f"{_bytes(leaves):,}",
    ]


def _all_of(texts: list[str]) -> str:
    """What is true of each of some leaves: one text, the range of their numbers, or how many there are."""
    counts = Counter(texts)
    if len(counts) == 1:
        return texts[0]
    numbers = {text.removesuffix(_SCHEDULED): text for text in counts}
    try:
        low, high = min(numbers, key=float), max(numbers, key=float)
    except ValueError:
        return f"{len(counts)} kinds"
    return f"{low} to {high}" + _SCHEDULED * all(text.endswith(_SCHEDULED) for text in counts)


def _bytes(leaves: list[Leaf]) -> int:
    return sum(t.nbytes for leaf in leaves for t in record_of(leaf).shown_tensors())  # of all processes together

"""Leaves as a person wants to read them: `print(state)` is a tree, `summary(state)` a table."""

from torch import Tensor

from .leaf import Leaf, record_of
from .rule import Rule, title, values_at
from .tree import Mirror, TreeSpec, spec_of, values_of


def describe_tree(state: Mirror) -> str:
    """The tree, a line a place. What all leaves of a branch share stands on its line; repeated siblings are folded."""
    spec, values = spec_of(state), values_of(state)
    found = [values[index] for index in spec.leaves]
    frozen = sum(leaf.frozen for leaf in found)
    head = f"State of {len(found)} parameters" + (f", {frozen} frozen" if frozen else "")
    notes = {_note(leaf) for leaf in found}
    note = notes.pop() if len(notes) == 1 else None
    return "\n".join([head + (f"  {note}" if note else ""), *_lines(spec, values, "", note)])


def _lines(spec: TreeSpec, values: list[Leaf], indent: str, above: str | None) -> list[str]:
    blocks: list[tuple[str, str, str, list[str]]] = []  # first name, last name, the line's rest, lines below
    for key, child in zip(spec.keys, spec.children, strict=True):
        inside = [values[index] for index in child.leaves]
        if not inside:
            continue
        notes = {_note(leaf) for leaf in inside}
        note = notes.pop() if len(notes) == 1 else None
        rest = f"  {note}" if note is not None and note != above else ""
        if child.kind == "leaf":
            leaf = inside[0]
            rest = f"  {list(leaf.shape)}{rest}"
        below = _lines(child, values, indent + "  ", note)
        folds = spec.kind in ("sequence", "slice") and bool(child.children)
        if blocks and folds and blocks[-1][2:] == (rest, below):
            blocks[-1] = (blocks[-1][0], str(key), rest, below)
        else:
            blocks.append((str(key), str(key), rest, below))
    lines = []
    for first, last, rest, below in blocks:
        lines += [f"{indent}  {first if first == last else f'{first} to {last}'}{rest}", *below]
    return lines


def _note(leaf: Leaf) -> str:
    if leaf.rule is None:
        return "no rule, frozen"
    rate = _rate(leaf)
    return title(leaf.rule) + (f" lr={rate}" if rate else "") + (", frozen" if leaf.frozen else "")


def _rate(leaf: Leaf) -> str:
    try:
        rates = values_at(leaf.rule, "lr", leaf.count)
    except Exception:  # a schedule that is wrong must not keep the tree from being read
        return "?"
    return ", ".join(f"{float(r):.6g}" if not isinstance(r, Tensor) or r.numel() == 1 else "..." for r in rates)


def table(found: list[tuple[str, Leaf]]) -> str:
    """A line for each (path, leaf), and one of totals."""
    rows = [("path", "shape", "dtype", "rule", "lr", "frozen", "state bytes")]
    numbers = total = frozen = 0
    for path, leaf in found:
        size = sum(t.nbytes for t in record_of(leaf).shown_tensors())  # of all processes together
        rule = title(leaf.rule) if isinstance(leaf.rule, Rule) else "none"
        dtype = str(leaf.dtype).removeprefix("torch.")
        rows.append((path, str(list(leaf.shape)), dtype, rule, _rate(leaf), "frozen" * leaf.frozen, f"{size:,}"))
        numbers, total, frozen = numbers + leaf.shape.numel(), total + size, frozen + leaf.frozen
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join([*(c.ljust(w) for c, w in zip(r[:-1], widths[:-1], strict=True)), r[-1].rjust(widths[-1])])
        for r in rows
    ]
    foot = f"{len(found)} parameters, {numbers:,} numbers, {frozen} frozen"
    return "\n".join([*lines, foot + f"{total:,}".rjust(max(len(lines[0]) - len(foot), len(f"{total:,}") + 2))])

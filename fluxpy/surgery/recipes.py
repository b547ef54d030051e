"""resize_embedding, prune and merge: changes of several modules at once, on top of the others."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..leaf import init_state
from ..pytree import level, modules_in, partition, unwrap
from ..state import AnyState
from ..text import near
from .edit import Draft, editing
from .modules import input_of, is_known, output_of, own_tensors
from .rows import Growing, Taking, fitting, made_rows, row_numbers

Model = TypeVar("Model")


def resize_embedding(
    state: AnyState, model: Model, embedding: str, size: int, *, head: str | None = None, rows: Tensor | None = None
) -> tuple[AnyState, Model]:
    """Give a vocabulary `size` symbols: the first ones stay, new ones are appended. Returns both, changed in place.

    `embedding` is the path of an `nn.Embedding` in the model, `head` that of the `nn.Linear` that scores the symbols,
    if there is one; modules of PyTorch's whose weight is tied to the embedding's follow by themselves. New rows are
    `rows`, of the embedding (and with it of what is tied), or made by the modules' own initialisation, which is large
    for an `nn.Embedding`: think of `rows` near the mean of the old ones.

    >>> model = torch.nn.ModuleDict({"in": torch.nn.Embedding(3, 2), "out": torch.nn.Linear(2, 3)})
    >>> state = fluxpy.setup(fluxpy.Adam(), model)
    >>> _ = fluxpy.surgery.resize_embedding(state, model, "in", 5, head="out")
    >>> model["in"], model["out"]
    (Embedding(5, 2), Linear(in_features=2, out_features=5, bias=True))
    """
    verb = "resize_embedding"
    with editing(verb, state, model) as edit:
        first = module_at(model, embedding, (nn.Embedding, nn.EmbeddingBag), verb)
        if isinstance(size, bool) or not isinstance(size, int) or size < 0:
            raise ValueError(f"{verb}: size={size!r} must be a whole number, 0 or more")
        modules = [first] if head is None else [first, module_at(model, head, (nn.Linear,), verb)]
        others = [other for other in modules_in(model, wrappers=False) if other not in modules and is_known(other)]
        modules += [other for other in others if any(x is first.weight for x in own_tensors(other).values())]  # tied
        cuts, resizes = edit.places(modules, 0)
        old = len(first.weight)
        new = size - old
        if rows is not None and len(rows) != max(new, 0):
            raise ValueError(f"{verb}: from {old} to {size} needs {max(new, 0)} rows, but got {len(rows)}")
        if len({cut.x.shape[cut.dim] for cut in cuts}) > 1:
            raise ValueError(f"{verb}: {embedding!r} and {head!r} do not have equally many symbols")
        if new <= 0:
            change = Taking(verb, range(size))
        else:
            made = made_rows(verb, modules, cuts, resizes, new)
            if rows is not None:
                made[id(first.weight)] = fitting(verb, f"{embedding}.weight", first.weight, 0, rows)
            change = Growing(verb, new, made)
        edit.cut(cuts, resizes, change)
    return state, model


def prune(state: AnyState, model: Model, layer: str, keep: Any, readers: Sequence[str] = ()) -> tuple[AnyState, Model]:
    """Keep some outputs of a linear layer or convolution, and the inputs of all that read them. Returns both, changed.

    `keep` is a mask over the outputs or has their numbers, as in `take`. `readers` are the paths of all modules with
    parameters that the outputs go through, up to the next ones that mix them: norms, depthwise convolutions,
    `nn.PReLU`, and linear layers and convolutions, whose inputs follow. A linear layer may read several numbers of each
    output, as of flattened images.

    >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.Flatten(), torch.nn.Linear(4 * 9, 2))
    >>> state = fluxpy.setup(fluxpy.Adam(), model)
    >>> _ = fluxpy.surgery.prune(state, model, "0", [0, 3], readers=["2"])
    >>> model[0].weight.shape, model[2]
    (torch.Size([2, 1, 3, 3]), Linear(in_features=18, out_features=2, bias=True))
    """
    with editing("prune", state, model) as edit:
        done = set[tuple[int, int]]()
        outputs, ends = 0, [(layer, output_of), *((reader, input_of) for reader in readers)]
        for path, end in ends:
            module = module_at(model, path, (nn.Module,), "prune")
            name = end(module) if is_known(module) else None
            if name is None:
                what = "a linear layer or convolution" if end is output_of else "a module that reads features"
                raise ValueError(f"prune: {path!r} is a {type(module).__name__}, and must be {what}")
            cuts, resizes = edit.places(module, name)
            size = resizes[0].size if resizes else outputs
            outputs = outputs or size
            if size % outputs or (size != outputs and not isinstance(module, nn.Linear)):
                raise ValueError(f"prune: {path!r} reads {size} features, but {layer!r} has {outputs} outputs")
            index = row_numbers(keep, outputs)
            each = torch.arange(size // outputs, device=index.device)
            change = Taking("prune", (index[:, None] * len(each) + each).flatten())
            edit.cut([cut for cut in cuts if (id(cut.x), cut.dim) not in done], resizes, change)
            done |= {(id(cut.x), cut.dim) for cut in cuts}
    return state, model


def merge(
    state: AnyState, model: Model, pairs: Mapping[str, tuple[str, str]], scale: float = 1.0
) -> tuple[AnyState, Model]:
    """Merge pairs of LoRA into their weights: `weight + scale · b @ a`, and `b` becomes zero. Returns both, changed.

    `pairs` has for the path of each weight, of shape (out, in), those of its `a`, of shape (r, in), and `b`, of shape
    (out, r). What the model computes stays the same, and training of the pair can go on, as in ReLoRA: its momenta
    start again, and its counts go on. A weight is written whether it is frozen or not, its master copy with it.

    >>> model = {"w": torch.zeros(2, 2), "a": torch.ones(1, 2), "b": torch.tensor([[1.0], [2.0]])}
    >>> state = fluxpy.setup({"w": None, "*": fluxpy.Adam()}, model)
    >>> _ = fluxpy.surgery.merge(state, model, {"w": ("a", "b")}, scale=0.5)
    >>> model["w"].tolist(), model["b"].tolist()
    ([[0.5, 0.5], [1.0, 1.0]], [[0.0], [0.0]])
    """
    with editing("merge", state, model) as edit:
        by_path = {path: x for x, _, path in edit.known.values()}
        for weight, pair in pairs.items():
            for path in (weight, *pair):
                if path not in by_path:
                    raise ValueError(f"merge: the model has no parameter {path!r}; {near(path, by_path)}")
            w, a, b = (edit.draft(by_path[path]) for path in (weight, *pair))
            if w.value.ndim != 2 or (b.value.shape[:1], a.value.shape[1:]) != (w.value.shape[:1], w.value.shape[1:]):
                shapes = ", ".join(str(list(d.value.shape)) for d in (w, a, b))
                raise ValueError(f"merge: {weight!r}, its a and b must be (out, in), (r, in), (out, r), not {shapes}")
            wide = torch.promote_types(w.value.dtype, torch.float32)
            _add(w, scale * (b.value.to(wide) @ a.value.to(wide)))
            b.value = torch.zeros_like(b.value)
            _empty(a)
            _empty(b)
    return state, model


def _add(draft: Draft, change: Tensor) -> None:
    """Add to a parameter, and to its master copy where it has one."""
    rule = draft.rule()
    if rule is not None and rule.keeps_master:
        tensors, skeleton = partition(draft.state)
        master = tensors[0] + change
        draft.state, draft.value = skeleton.combine([master, *tensors[1:]]), master.to(draft.value.dtype)
    else:
        draft.value = (draft.value + change).to(draft.value.dtype)


def _empty(draft: Draft) -> None:
    """Let a state start again, in the same place of an accumulation window."""
    rule = draft.rule()
    if rule is not None and draft.record is not None:
        fresh = init_state(rule, draft.value, draft.record.numbers.count, draft.path)
        draft.state = rule.restart(draft.state, fresh) if rule.accumulates else fresh


def module_at(model: Any, path: str, kinds: tuple[type, ...], verb: str) -> Any:
    """The module at a path."""
    x = unwrap(model)
    for key in path.split(".") if path else []:
        inside = level(x)
        children = {} if inside is None else dict(zip(map(str, inside.keys), inside.children, strict=True))
        if key not in children:
            raise ValueError(f"{verb}: the model has no module {path!r}; at {key!r}, {near(key, children)}")
        x = unwrap(children[key])
    if not isinstance(x, kinds):
        want = " or ".join(kind.__name__ for kind in kinds)
        raise ValueError(f"{verb}: {path!r} must be an {want}, but is a {type(x).__name__}")
    return x

"""What the parameters of a model are for, and how deep they lie: found from the types of the modules that hold them.

For the mapping that `setup` takes: no decay on norms and biases, rates that fall with depth, Muon on hidden matrices.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from .pytree import is_parameter, level, unwrap
from .text import join
from .tree import check_model

Role: TypeAlias = Literal["hidden", "embedding", "head", "norm", "bias", "other"]

_NORM = re.compile(r"Norm(\dd)?$")  # the names of such classes: LayerNorm, BatchNorm2d, LlamaRMSNorm
_MAGNITUDES = "original0", "weight_g"  # a scale for each channel, as `weight_norm` calls it
_HEADS = {"head", "heads", "lm_head", "classifier", "fc_out", "score", "logits", "output_layer"}


class _Place(NamedTuple):
    """Where a parameter is: its path, its name in the module that holds it, and all containers above it, outermost
    first, each with the key under which the next one lies in it."""

    path: str
    name: str
    x: Tensor
    above: tuple[tuple[Any, Any], ...]


def roles(model: Any) -> dict[str, Role]:
    """What each parameter is for, by path, a tied one once:

    - "norm": of a normalisation layer: a class, or one above it, is called `...Norm`, `...Norm2d` and the like.
    - "bias": by its name, as in `bias` and `in_proj_bias`.
    - "embedding": of `nn.Embedding`, or a parameter that says so by a name (`patch_embed`, `cls_token`).
    - "head": the matrix that makes the output: one under a name such as `head` or `classifier`; else the last matrix of
      the model, where it lies outside of repeated blocks.
    - "hidden": any other weight of two or more dimensions.
    - "other": what is left (a scale for each channel, a temperature).

    A weight that is tied to an embedding is an embedding.

    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.LayerNorm(3), torch.nn.Linear(3, 1))
    >>> role = roles(model)
    >>> list(role.values())
    ['hidden', 'bias', 'norm', 'norm', 'head', 'bias']
    >>> plain = [path for path in role if role[path] in ("norm", "bias")]
    >>> state = setup({**dict.fromkeys(plain, AdamW(weight_decay=0.0)), "*": AdamW(weight_decay=0.1)}, model)
    """
    return _roles(_places_of(model, "roles(model)"))


def _roles(places: Sequence[_Place]) -> dict[str, Role]:
    found: dict[int, Role] = {}
    first: dict[int, str] = {}
    for place in places:
        first.setdefault(id(place.x), place.path)
        role = _role(place)
        if found.setdefault(id(place.x), role) != role and role == "embedding":
            found[id(place.x)] = role
    if "head" not in found.values():
        last = next((place for place in reversed(places) if found[id(place.x)] == "hidden"), None)
        if last is not None and _block(last) is None and last.above:
            found[id(last.x)] = "head"
    return {path: found[key] for key, path in first.items()}


def depths(model: Any) -> dict[str, int]:
    """How deep each parameter lies, by path: 0 before the first block, then the blocks from 1, then what follows them,
    heads too.

    Blocks are the layers of an outermost `nn.ModuleList`, `nn.Sequential` or list whose layers are alike and have
    modules of their own. In a model without blocks each module that holds parameters is one.

    Rates that fall by 0.8 from layer to layer, as in [Clark et al. 2020; Bao et al. 2022]:

    >>> layer = torch.nn.TransformerEncoderLayer(8, 2, 8, batch_first=True)
    >>> model = torch.nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
    >>> depth = depths(model)
    >>> state = setup({path: AdamW(1e-3 * 0.8 ** (3 - n)) for path, n in depth.items()}, model)
    >>> [depth[f"layers.{i}.norm1.weight"] for i in range(3)], round(state.layers[0].norm1.weight.rule.lr, 6)
    ([1, 2, 3], 0.00064)
    """
    every = _places_of(model, "depths(model)")
    role = _roles(every)
    places = [place for place in every if place.path in role]  # a tied one where it first stands
    blocks = {place.path: _block(place) for place in places}
    without = not any(blocks.values())
    if without:
        blocks = {place.path: (id(place.above[-1][0]), "") if place.above else None for place in places}
    numbers: dict[Any, int] = {}
    for block in blocks.values():
        if block is not None:
            numbers.setdefault(block, len(numbers) + (not without))
    deepest, depth, found = max(numbers.values(), default=0), 0, {}
    for path, block in blocks.items():
        depth = depth if block is None else numbers[block]
        after = block is None and depth == deepest and numbers
        found[path] = deepest + 1 if not without and (after or role[path] == "head") else depth
    return found


def _places_of(model: Any, call: str) -> list[_Place]:
    check_model(model, call)
    return list(_places(model, "", ()))


def _places(x: Any, path: str, above: tuple[tuple[Any, Any], ...]) -> Iterator[_Place]:
    x = unwrap(x)
    if is_parameter(x):
        yield _Place(path, str(above[-1][1]) if above else "", x, above)
        return
    here = None if any(x is other for other, _ in above) else level(x)
    if here is not None:
        for key, child in zip(here.keys, here.children, strict=True):
            inside = (*above, (x, key))
            if isinstance(x, ParametrizationList) and isinstance(child, Tensor) and len(above) > 1:
                # It stands for a tensor of the module.
                inside = (*above[:-2], (above[-2][0], above[-1][1]))
            yield from _places(child, join(path, key), inside)


def _role(place: _Place) -> Role:
    owner = place.above[-1][0] if place.above else None
    if any(_NORM.search(cls.__name__) for cls in type(owner).__mro__):
        return "norm"
    if place.path.endswith(_MAGNITUDES) and place.x.numel() in place.x.shape:
        return "other"
    if isinstance(owner, nn.Embedding | nn.EmbeddingBag):
        return "embedding"
    if "bias" in place.name.split("_") or place.name.startswith("bias"):
        return "bias"
    names = [str(key).lower() for _, key in place.above]
    if any("embed" in name for name in names) or place.name.endswith("_token"):
        return "embedding"
    if place.x.ndim < 2:
        return "other"
    return "head" if any(name in _HEADS or name.endswith("_head") for name in names) else "hidden"


def _block(place: _Place) -> tuple[int, Any] | None:
    """The outermost repeated block around a parameter."""
    for container, key in place.above:
        here = level(container)
        if here is None or here.kind != "sequence":
            continue
        layers = [unwrap(child) for child in here.children if isinstance(child, nn.Module)]
        own = unwrap(here.children[here.keys.index(key)])
        alike = sum(type(layer) is type(own) for layer in layers)
        if alike > 1 and isinstance(own, nn.Module) and any(True for _ in own.children()):
            return id(container), key
    return None

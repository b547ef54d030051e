"""What PyTorch's own modules call the dimensions of their parameters, so that those that go together change together.

Only modules listed here are changed along a dimension by its name. Parameters of a user's own modules, and those of
plain containers, are changed along the dimension as it is given.
"""

from typing import Any, NamedTuple

from torch import Tensor, nn

_OUT_IN = {"weight": ("out_features", "in_features"), "bias": ("out_features",)}
_BY_CHANNEL = {"weight": ("num_features",), "bias": ("num_features",)}
_STATISTICS = {**_BY_CHANNEL, "running_mean": ("num_features",), "running_var": ("num_features",)}

# For each tensor of a module the names of its dimensions, which are attributes of the module too. Dimensions that are
# not listed (those of a kernel) cannot be changed. The first tensor is the one whose dimensions the user counts.
NAMES: dict[tuple[type, ...], dict[str, tuple[str, ...]]] = {
    (nn.Linear,): _OUT_IN,
    (nn.Bilinear,): {"weight": ("out_features", "in1_features", "in2_features"), "bias": ("out_features",)},
    (nn.Embedding, nn.EmbeddingBag): {"weight": ("num_embeddings", "embedding_dim")},
    (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d): {
        "weight": ("in_channels", "out_channels"),
        "bias": ("out_channels",),
    },
    (nn.Conv1d, nn.Conv2d, nn.Conv3d): {"weight": ("out_channels", "in_channels"), "bias": ("out_channels",)},
    (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm): _STATISTICS,
    (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d): _STATISTICS,
    (nn.GroupNorm,): {"weight": ("num_channels",), "bias": ("num_channels",)},
    (nn.PReLU,): {"weight": ("num_parameters",)},
}
_WHOLE = (nn.LayerNorm, nn.RMSNorm)  # whose dimensions are those of `normalized_shape`
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_CONTAINERS = "torch.nn.modules.container"


class Cut(NamedTuple):
    """A tensor that is to be changed along a dimension."""

    x: Tensor
    dim: int


class Resize(NamedTuple):
    """A dimension of a module that is to be changed: its name, and its size now."""

    module: nn.Module
    name: str | int
    size: int


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The parameters of a module itself, by name."""
    return {name: x for name, x in module._parameters.items() if x is not None}


def _names_of(module: nn.Module) -> dict[str, tuple[Any, ...]] | None:
    """The names of the dimensions of each tensor; None of a module that is not one of PyTorch's."""
    if isinstance(module, _WHOLE):
        names = tuple(range(len(module.normalized_shape)))
        return {"weight": names, "bias": names}
    return next((names for kinds, names in NAMES.items() if isinstance(module, kinds)), None)


def is_known(module: nn.Module) -> bool:
    """Whether a module is one of PyTorch's, or of a class made of one."""
    bases = [base for base in type(module).__mro__ if base.__module__.startswith("torch.nn.modules.")]
    return any(base is not nn.Module and base.__module__ != _CONTAINERS for base in bases)


def concerned(module: nn.Module, dim: int | str, verb: str) -> tuple[list[Cut], list[Resize]]:
    """What of a known module changes along `dim`, a dimension of its first tensor or the name of one."""
    kind, names = type(module).__name__, _names_of(module)
    own = own_tensors(module)
    if names is None or not own.keys() <= names.keys():
        if not own:
            return [], []
        odd = next(name for name in own if names is None or name not in names)
        raise ValueError(
            f"{verb} does not know what the dimensions of {odd!r} of a {kind} mean; change its parameters one by one, "
            f"as {verb}(state.{odd}, module.{odd}, ...)"
        )
    if isinstance(module, nn.PReLU) and module.num_parameters == 1:
        return [], []  # one slope for all channels
    first = next(iter(names.values()))
    if isinstance(dim, str):
        name = dim
    elif -len(first) <= dim < len(first) and not (dim < 0 and isinstance(module, _CONVOLUTIONS)):
        name = first[dim]
    else:
        raise ValueError(f"{verb}: a {kind} has no dim {dim} to change; it has {', '.join(map(str, first))}")
    tensors = own | {key: b for key, b in module._buffers.items() if b is not None and key in names}
    made = [key for key in names if key not in tensors and isinstance(getattr(module, key, None), Tensor)]
    if made:
        raise ValueError(f"{verb}: {made[0]!r} of a {kind} is made of other parameters (a parametrization)")
    cuts = [Cut(x, names[key].index(name)) for key, x in tensors.items() if name in names[key]]
    return cuts, _resizes(module, name, cuts, verb)


def follows(module: nn.Module, cut: Cut) -> list[Resize]:
    """The attribute of a module that follows its weight, if this is it: where a parameter changes by itself, or in
    another module that it is tied to."""
    names = (_names_of(module) or {}).get("weight", ())
    own = own_tensors(module).get("weight") is cut.x and cut.dim < len(names)
    return [Resize(module, names[cut.dim], cut.x.shape[cut.dim])] if own else []


def _resizes(module: Any, name: Any, cuts: list[Cut], verb: str) -> list[Resize]:
    """The attributes that follow. A depthwise convolution has as many groups as channels; other groups are refused."""
    if isinstance(name, int):
        return [Resize(module, name, module.normalized_shape[name])]
    size = cuts[0].x.shape[cuts[0].dim] if cuts else getattr(module, name)
    also: list[str] = []
    if isinstance(module, _CONVOLUTIONS) and module.groups > 1:
        if not module.groups == module.in_channels == module.out_channels:
            raise ValueError(f"{verb} cannot change the channels of a convolution of {module.groups} groups")
        if cuts[0].dim != 0:
            raise ValueError(f"{verb}: the channels of a depthwise convolution are dim 0")
        also = [key for key in ("in_channels", "out_channels", "groups") if key != name]
    elif isinstance(module, nn.GroupNorm) and module.num_groups > 1:
        if module.num_groups != module.num_channels:
            raise ValueError(f"{verb} cannot change the channels of a GroupNorm of {module.num_groups} groups")
        also = ["num_groups"]
    return [Resize(module, key, size) for key in (name, *also)]


def set_size(module: nn.Module, name: str | int, size: int) -> dict[str, Any]:
    """The attributes of a module, by name, when a dimension has another size."""
    if isinstance(name, int):
        shape: list[int] = list(module.normalized_shape)  # pyright: ignore[reportArgumentType]
        shape[name] = size
        return {"normalized_shape": tuple(shape)}
    return {name: size}


def output_of(module: nn.Module) -> str | None:
    """The dimension of the outputs of a linear layer or convolution; None of another module."""
    names = _names_of(module) or {}
    return next((name for name in ("out_features", "out_channels") if any(name in own for own in names.values())), None)


def input_of(module: nn.Module) -> str | int | None:
    """The dimension along which a known module reads its input; None where it is not one."""
    if isinstance(module, _WHOLE):
        return len(module.normalized_shape) - 1
    if isinstance(module, _CONVOLUTIONS) and module.groups > 1:
        return "out_channels"  # of a depthwise one, the only kind that can be changed: its input's too
    names = _names_of(module) or {}
    for name in ("in_features", "in_channels", "num_features", "num_channels", "num_parameters"):
        if any(name in own for own in names.values()):
            return name
    return None

"""Random models, rules, hyperparameters and gradients. All from one seed, so that each case can be had again."""

import copy
import fnmatch
import inspect
import math
import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
from reference import FIXED, FORMULAS, Curve, Member, Scalar, Scale
from torch import Tensor, nn

import fluxpy
from fluxpy.rules import Rule, hyper

FLOAT16 = torch.float16
SHAPES = [(), (0,), (1,), (3,), (4, 3), (2, 1, 3), (5, 2), (0, 2), (2, 3, 2, 2), (1, 1)]


class Chance(random.Random):
    """Random choices, and random tensors."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.generator = torch.Generator().manual_seed(seed)

    def happens(self, probability: float) -> bool:
        return self.random() < probability

    def tensor(self, shape: Any, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.promote_types(dtype, torch.float64)).to(dtype)

    def log(self, low: float, high: float) -> float:
        """A number between powers of ten."""
        return 10 ** self.uniform(low, high)


# --- Models -------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """A module whose children are set from outside."""


def laid_out(chance: Chance, x: Tensor) -> Tensor:
    """The same numbers in another order of memory, dense."""
    if x.ndim == 4 and chance.happens(0.5):
        return x.contiguous(memory_format=torch.channels_last)
    back = list(reversed(range(x.ndim)))
    return x.permute(back).contiguous().permute(back) if x.ndim > 1 and chance.happens(0.5) else x.clone()


def layout(x: Tensor) -> str:
    """A tensor in words."""
    return f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)} in strides {x.stride()}"


def strided(chance: Chance, g: Tensor) -> Tensor:
    """The same numbers in another layout, as gradients come."""
    kind = chance.choice(["dense", "gaps", "conjugate"])
    if kind == "gaps":
        return torch.stack([g, g + 1], -1)[..., 0]
    if kind == "conjugate" and g.is_complex():
        return g.conj().resolve_conj().conj()
    return laid_out(chance, g)


def random_parameter(chance: Chance, complex_too: bool) -> nn.Parameter:
    dtype = torch.complex128 if complex_too and chance.happens(0.15) else torch.float64
    return nn.Parameter(laid_out(chance, chance.tensor(chance.choice(SHAPES), dtype)))


def random_layer(chance: Chance, complex_too: bool, depth: int) -> Any:
    kinds: list[tuple[int, Callable[[], Any]]] = [
        (3, lambda: nn.Linear(chance.randint(1, 4), chance.randint(1, 3), bias=chance.happens(0.7)).double()),
        (1, lambda: nn.Conv2d(2, 3, 2).double()),
        (1, lambda: nn.BatchNorm1d(3).double()),
        (1, lambda: nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)).double()),
        (1, lambda: nn.ParameterList([random_parameter(chance, complex_too) for _ in range(chance.randint(1, 3))])),
        (1, lambda: nn.ParameterDict({key: random_parameter(chance, complex_too) for key in "uv"})),
        (3, lambda: random_parameter(chance, complex_too)),
        (2 if depth else 0, lambda: random_net(chance, complex_too, depth - 1)),
    ]
    weights, makers = zip(*kinds, strict=True)
    return chance.choices(makers, weights)[0]()


def random_net(chance: Chance, complex_too: bool, depth: int = 1) -> nn.Module:
    net: nn.Module = Net()
    for name in chance.sample(["a", "b", "c", "bias", "state", "rule"], chance.randint(1, 3)):
        setattr(net, name, random_layer(chance, complex_too, depth))
    return net


def random_container(chance: Chance, complex_too: bool, depth: int = 2) -> Any:
    kind = chance.choice(["dict", "list", "tuple"])
    inside = [random_item(chance, complex_too, depth) for _ in range(chance.randint(1, 3))]
    if kind == "dict":
        return dict(zip(chance.sample(["w", "b", "k", "values"], len(inside)), inside, strict=True))
    return inside if kind == "list" else tuple(inside)


def random_item(chance: Chance, complex_too: bool, depth: int) -> Any:
    kind = chance.choices(["tensor", "module", "other", "container"], [6, 1, 1, 2 if depth else 0])[0]
    if kind == "tensor":
        return random_parameter(chance, complex_too).detach()
    if kind == "module":
        return nn.Linear(2, 2).double()
    if kind == "other":
        return chance.choice([None, 3, "text", torch.arange(3), abs])
    return random_container(chance, complex_too, depth - 1)


def random_model(chance: Chance, complex_too: bool) -> Any:
    """A module, a container of tensors, or a tensor. Some parameters are tied, and some require no grad."""
    kind = chance.choices(["net", "container", "tensor"], [6, 4, 0.5])[0]
    model: Any = None
    while not list(places(model)):
        model = random_net(chance, complex_too) if kind == "net" else random_container(chance, complex_too)
        model = random_item(chance, complex_too, 0) if kind == "tensor" else model
    found = list(places(model))
    if chance.happens(0.3):  # tie a place to another, or a new one at the top
        x = chance.choice(found)[1]
        if isinstance(model, nn.Module):
            model.tied = x
        elif isinstance(model, list):
            model.append(x)
        elif isinstance(model, dict):
            model["tied"] = x
    with torch.no_grad():
        for _, x in found:
            x.data = laid_out(chance, chance.tensor(x.shape, x.dtype))
            if isinstance(x, nn.Parameter) and chance.happens(0.1):
                x.requires_grad_(False)
    return model


def places(model: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """(path, parameter) of every place, ties at each of theirs."""
    if isinstance(model, nn.Module):
        for name, x in model.named_parameters(remove_duplicate=False):
            yield prefix + name, x
    elif isinstance(model, Tensor):
        if model.is_floating_point() or model.is_complex():
            yield prefix.removesuffix("."), model
    elif isinstance(model, dict | list | tuple):
        for key, value in model.items() if isinstance(model, dict) else enumerate(model):
            yield from places(value, f"{prefix}{key}.")


def child(model: Any, key: str) -> Any:
    if isinstance(model, nn.Module):
        return {**model._modules, **model._parameters}[key]
    return model[key] if isinstance(model, dict) else model[int(key)]


def descend(model: Any, path: str) -> Any:
    for key in path.split(".") if path else ():
        model = child(model, key)
    return model


def put(model: Any, path: str, x: Tensor) -> None:
    """Another tensor at a place of the model."""
    *above, key = path.split(".")
    holder = descend(model, ".".join(above))
    if isinstance(holder, nn.Module):
        setattr(holder, key, x)
    else:
        holder[key if isinstance(holder, dict) else int(key)] = x


# --- Rules of a user's own ----------------------------------------------------------------------------------------


class Tail(Rule):
    """Elementwise, with a dict of a tensor and a number as its state."""

    lr: float = hyper(default=0.01, allowed="[0, inf)")
    decay: float = hyper(default=0.8, allowed="[0, 1)")
    elementwise = True

    def init(self, x: Tensor) -> Any:
        return {"m": torch.zeros_like(x), "t": 0}

    def apply(self, state: Any, x: Tensor, dx: Tensor) -> tuple[Any, Any]:
        m, t = self.decay * state["m"] + (1 - self.decay) * dx, state["t"] + 1
        return {"m": m, "t": t}, self.lr * m.tanh() / (1 - self.decay**t)


class Unit(Rule):
    """A step of one length for the whole array."""

    lr: float = hyper(default=0.01, allowed="[0, inf)")
    momentum: float = hyper(default=0.9, allowed="[0, 1]")

    def init(self, x: Tensor) -> Any:
        return torch.zeros_like(x)

    def apply(self, state: Any, x: Tensor, dx: Tensor) -> tuple[Any, Any]:
        m = self.momentum * state + dx
        return m, self.lr * m / (m.abs().square().sum().sqrt() + 1e-3)


class Masked(Rule):
    """A wrapper that needs the whole array, whatever is inside: rests where a step goes against its gradient."""

    rule: Rule

    def init(self, x: Tensor) -> Any:
        return self.rule.init(x)

    def apply(self, state: Any, x: Tensor, dx: Tensor) -> tuple[Any, Any]:
        state, change = self.rule.apply(state, x, dx)
        mask = (change * dx > 0).to(change.dtype)
        return state, change * mask / (mask.mean() + 0.1) if mask.numel() else change


# --- Rules --------------------------------------------------------------------------------------------------------

NUMBERS: dict[str, Callable[[Chance], Any]] = {
    "lr": lambda c: c.log(-3, -0.5),
    "momentum": lambda c: 0.0 if c.happens(0.1) else c.uniform(0, 0.95),
    "betas": lambda c: (c.uniform(0.5, 0.95), c.uniform(0.9, 0.999)),
    "eps": lambda c: c.log(-8, -3),
    "weight_decay": lambda c: c.log(-3, -0.5),
    "momentum_decay": lambda c: c.log(-3, -1),
    "alpha": lambda c: c.uniform(0.9, 0.99),
    "rho": lambda c: c.uniform(0.8, 0.95),
    "etas": lambda c: (c.uniform(0.3, 0.8), c.uniform(1.1, 1.5)),
    "step_sizes": lambda c: (c.log(-6, -4), c.log(-1, 1)),
    "centered": lambda c: c.happens(0.5),
    "sign_decay": lambda c: c.log(-3, -1),
    "clip_value": lambda c: c.log(-2, 1),
    "max_norm": lambda c: c.log(-2, 1),
    "norm_type": lambda c: c.choice([1.0, 2.0, 3.0, math.inf]),
    "decay": lambda c: c.uniform(0.5, 0.9),
    "n": lambda c: c.choices([1, 2, 3, 4], [1, 3, 3, 2])[0],
    "k": lambda c: c.randint(1, 4),
    "warmup_steps": lambda c: c.choice([0, 0, 3]),
    "r": lambda c: c.choice([0.0, 0.5]),
    "weight_lr_power": lambda c: c.choice([2.0, 1.0]),
}
TENSORS = ["lr", "momentum", "eps", "weight_decay", "momentum_decay", "decay", "rho"]  # for which a tensor may stand
SCHEDULED = ["lr", "weight_decay", "sign_decay", "clip_value", "max_norm", "eps"]  # any number above zero will do
CLIP = ("max_norm", "norm_type", "nonfinite")
MEAN = ("weight_decay", "warmup_steps", "r", "weight_lr_power")
HYPERPARAMETERS: dict[str, tuple[str, ...]] = {
    **{name: (*inspect.signature(formula).parameters,)[3:] for name, formula in FORMULAS.items()},
    "ScheduleFreeSGD": ("lr", "momentum", *MEAN),
    "ScheduleFreeAdamW": ("lr", "betas", "eps", *MEAN),
    "ClipNorm": CLIP,
    "ClipGlobalNorm": CLIP,
}
FRONT = ["WeightDecay", "SignDecay", "ClipGrad", "ClipNorm", "ClipGlobalNorm"]
LAST = ["Averaged", "Lookahead"]  # what must be last in a chain, or around it
STEPS = [name for name in FORMULAS if name not in (*FRONT, *LAST)]
OPEN = ["ScheduleFreeSGD", "ScheduleFreeAdamW"]  # an average of zero has no meaning there
USUAL = ["Descent", "Momentum", "Nesterov", "Adam", "AdamW", "AMSGrad", "AdaGrad"]


class Negative:
    """A schedule of numbers that no hyperparameter may be."""

    def __call__(self, count: int) -> float:
        return -1.0


class OtherShape:
    """A schedule of tensors that fit no parameter."""

    def __call__(self, count: int) -> Tensor:
        return torch.ones(7, dtype=torch.float64)


def random_curve(chance: Chance, name: str) -> Curve:
    """A schedule for a hyperparameter."""
    start, end, own = NUMBERS[name](chance), NUMBERS[name](chance), chance.happens(0.3)
    kind = chance.choice(["linear", "cosine", "exponential", "step_decay"])
    factor = chance.uniform(0.5, 1.0) if kind in ("exponential", "step_decay") else end
    return Curve(kind, (start, factor, chance.randint(1, 6)), own)


def random_value(chance: Chance, name: str, scale_too: bool = False) -> Any:
    """A number, or now and then a schedule, a factor, or a tensor."""
    if name in SCHEDULED and scale_too and chance.happens(0.15):
        return Scale(chance.choice([0.5, 2.0, 0.1]))
    if name in SCHEDULED and chance.happens(0.2):
        return random_curve(chance, name)
    if name == "betas" and chance.happens(0.1):
        return random_curve(chance, "momentum"), NUMBERS[name](chance)[1]
    number = NUMBERS[name](chance)
    return Scalar(number) if name in TENSORS and chance.happens(0.03) else number


def suits(member: str, name: str, value: Any) -> bool:
    """Whether a rule may have this value."""
    if name == "betas" and len(value) != (3 if member == "AdEMAMix" else 2):
        return False
    if name not in ("betas", "momentum") or member not in OPEN:
        return True
    return not any(map(callable, value)) if name == "betas" else bool(value > 0.3)


def value_for(chance: Chance, member: str, name: str) -> Any:
    """A value that a rule may have."""
    while True:
        value = NUMBERS[name](chance) if (member, name) in FIXED else random_value(chance, name)
        value = (*value, chance.uniform(0.9, 0.999)) if (member, name) == ("AdEMAMix", "betas") else value
        if suits(member, name, value):
            return value


def random_member(chance: Chance, name: str, policy: str, masks: bool = False) -> Member:
    names = HYPERPARAMETERS[name]
    draw = {n: value_for(chance, name, n) for n in names if n != "nonfinite"}
    policies = {"nonfinite": policy} if "nonfinite" in names else {}
    return Member(name, draw | policies, random_around(chance, name, masks))


def random_around(chance: Chance, name: str, masks: bool) -> str | None:
    """A rule around a step, now and then."""
    if name not in STEPS or name in OPEN:
        return None
    if masks and chance.happens(0.3):
        return "Masked"
    if chance.happens(0.15):
        # Complex states that need the whole array stay as they are; and those of Rprop are rounded at the start too.
        return chance.choice(["Cautious"] if name in ("Unit", "Rprop") else ["Cautious", "Lowered"])
    return None


def random_chain(chance: Chance, policy: str, masks: bool) -> list[Member]:
    """What people write (bounds and penalties before one step), and as often anything in any order."""
    if chance.happens(0.4):
        names = [chance.choice(FRONT) for _ in range(chance.randint(0, 2))] + [chance.choice(USUAL)]
        names += [chance.choice(LAST)] if chance.happens(0.2) else []
        return [random_member(chance, name, policy) for name in names]
    names = [chance.choice(FRONT) for _ in range(chance.choice([0, 0, 1, 1, 2, 3]))]
    names += chance.choices(STEPS, k=chance.choices([0, 1, 2], [1, 8, 2])[0])
    names += [chance.choice(FRONT)] if chance.happens(0.1) else []
    if chance.happens(0.2):
        chance.shuffle(names)
    chain = [random_member(chance, name, policy, masks) for name in names]
    if chance.happens(0.4):
        chain.insert(chance.randint(0, len(chain)), Member("AccumGrad", {"n": NUMBERS["n"](chance)}))
    if chance.happens(0.1):  # two equal bounds over the tree, of which each has its own norm
        twin = random_member(chance, "ClipGlobalNorm", policy)
        for _ in range(2):
            chain.insert(chance.randint(0, len(chain)), Member(twin.name, dict(twin.values)))
    if chance.happens(0.2) and not any(member.name in OPEN for member in chain):
        chain.append(random_member(chance, chance.choice(LAST), policy))
    return chain


def varied(chance: Chance, chain: list[Member]) -> list[Member]:
    """The same chain with another value of one hyperparameter, as subtrees have them."""
    new = copy.deepcopy(chain)
    able = [(m, n) for m in new for n in m.values if n != "nonfinite" and (m.name, n) not in FIXED]
    if able:
        member, name = chance.choice(able)
        member.values[name] = value_for(chance, member.name, name)
    return new


def for_fluxpy(value: Any) -> Any:
    """A value of the reference as fluxpy takes it."""
    if isinstance(value, tuple):
        return tuple(map(for_fluxpy, value))
    if isinstance(value, Scale):
        return fluxpy.scale(value.factor)
    if isinstance(value, Scalar):
        return torch.tensor(value, dtype=torch.float64)
    if isinstance(value, Curve) and not value.own:
        return getattr(fluxpy.schedules, value.kind)(*value.arguments)
    return value


def member_rule(member: Member) -> Rule:
    kind = globals()[member.name] if member.name in ("Tail", "Unit") else getattr(fluxpy, member.name)
    rule = kind(**{name: for_fluxpy(value) for name, value in member.values.items()})
    around = {
        "Masked": Masked,
        "Cautious": fluxpy.Cautious,
        "Lowered": lambda rule: fluxpy.Lowered(rule, dtype=FLOAT16),
    }
    return rule if member.around is None else around[member.around](rule)


def with_last(chance: Chance, rules: list[Rule], member: Member) -> list[Rule]:
    """What must be last, around the whole chain or its last rule."""
    values = {name: for_fluxpy(value) for name, value in member.values.items()}
    start = 0 if len(rules) != 1 and chance.happens(0.5) else -1
    inside = rules[start:]
    inner = inside[0] if len(inside) == 1 else fluxpy.OptimiserChain(*inside)
    return [*rules[:start], getattr(fluxpy, member.name)(inner, **values)]


def rule_of(chance: Chance, chain: list[Member], mixed: bool) -> Rule:
    """The chain as a rule: a single one as it is or in a chain, and now and then a chain in a chain."""
    last = chain[-1] if chain and chain[-1].name in LAST else None
    rules = [member_rule(member) for member in (chain[:-1] if last else chain)]
    rules = with_last(chance, rules, last) if last else rules
    if len(rules) > 2 and chance.happens(0.2):
        rules = [fluxpy.OptimiserChain(*rules[:2]), *rules[2:]]
    rule = rules[0] if len(rules) == 1 and chance.happens(0.7) else fluxpy.OptimiserChain(*rules)
    if mixed:
        return fluxpy.MixedPrecision(rule, dtype=torch.float64)
    return fluxpy.StochasticRounding(rule) if chance.happens(0.1) else rule  # of float64 it rounds nothing


def random_patterns(chance: Chance, paths: list[str]) -> list[str]:
    """Globs of which each matches something, and the last of them everything."""
    words = sorted({path.rpartition(".")[2] for path in paths})
    every = [*paths, *(f"*{word}" for word in words), *(f"{path.split('.')[0]}*" for path in paths)]
    return [*dict.fromkeys([*(chance.choice(every) for _ in range(chance.randint(1, 2))), "*"])]


def first_match(patterns: list[str], names: tuple[str, ...]) -> str:
    return next(p for p in patterns if any(fnmatch.fnmatchcase(name, p) for name in names))

"""The whole update in NumPy and float64, leaf by leaf: what random sequences of operations are compared with.

Written from the papers, the documentation of torch.optim and the contract of the verbs. It shares nothing with fluxpy.
First the formulas, each on one array, then schedules, then leaves and what is done to them.

A complex parameter is an array of its real and imaginary parts, in a last dimension of two.
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[np.float64]
# What a rule keeps for one array. Before its first step that is "start", the parameter when its state was made.
Memory: TypeAlias = dict[str, Any]
Value: TypeAlias = Any  # a number, a word, a tuple of two, or a schedule

# --- Formulas: f(memory, x, g, hyperparameters) -> what is subtracted from x, or handed to the next rule ------------


def descent(memory: Memory, x: Array, g: Array, lr: float) -> Array:
    return lr * g


def momentum(memory: Memory, x: Array, g: Array, lr: float, momentum: float) -> Array:
    """`torch.optim.SGD` with momentum."""
    b = memory["b"] = momentum * memory.get("b", 0.0) + g
    return lr * b


def nesterov(memory: Memory, x: Array, g: Array, lr: float, momentum: float) -> Array:
    """`torch.optim.SGD` with nesterov=True."""
    b = memory["b"] = momentum * memory.get("b", 0.0) + g
    return lr * (g + momentum * b)


def moments(memory: Memory, g: Array, betas: Any) -> tuple[Array, Array, int]:
    """The two averages of Adam, and how many gradients are in them."""
    t = memory["t"] = memory.get("t", 0) + 1
    m = memory["m"] = betas[0] * memory.get("m", 0.0) + (1 - betas[0]) * g
    v = memory["v"] = betas[1] * memory.get("v", 0.0) + (1 - betas[1]) * g**2
    return m, v, t


def adam(memory: Memory, x: Array, g: Array, lr: float, betas: Any, eps: float) -> Array:
    m, v, t = moments(memory, g, betas)
    return lr * (m / (1 - betas[0] ** t)) / (np.sqrt(v / (1 - betas[1] ** t)) + eps)


def adamw(memory: Memory, x: Array, g: Array, lr: float, betas: Any, eps: float, weight_decay: float) -> Array:
    return lr * weight_decay * x + adam(memory, x, g, lr, betas, eps)


def amsgrad(memory: Memory, x: Array, g: Array, lr: float, betas: Any, eps: float) -> Array:
    """`torch.optim.Adam` with amsgrad=True."""
    m, v, t = moments(memory, g, betas)
    peak = memory["peak"] = np.maximum(memory.get("peak", 0.0), v)
    return lr / (1 - betas[0] ** t) * m / (np.sqrt(peak) / np.sqrt(1 - betas[1] ** t) + eps)


def nadam(memory: Memory, x: Array, g: Array, lr: float, betas: Any, eps: float, momentum_decay: float) -> Array:
    """`torch.optim.NAdam`."""
    m, v, t = moments(memory, g, betas)
    mu = betas[0] * (1 - 0.5 * 0.96 ** (t * momentum_decay))
    mu_next = betas[0] * (1 - 0.5 * 0.96 ** ((t + 1) * momentum_decay))
    product = memory["product"] = memory.get("product", 1.0) * mu
    root = np.sqrt(v / (1 - betas[1] ** t)) + eps
    return lr * (1 - mu) / (1 - product) * g / root + lr * mu_next / (1 - product * mu_next) * m / root


def radam(memory: Memory, x: Array, g: Array, lr: float, betas: Any, eps: float) -> Array:
    """`torch.optim.RAdam`."""
    m, v, t = moments(memory, g, betas)
    m_hat, bias = m / (1 - betas[0] ** t), 1 - betas[1] ** t
    longest = 2 / (1 - betas[1]) - 1
    length = longest - 2 * t * betas[1] ** t / bias
    if length <= 5:
        return lr * m_hat
    rectify = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
    return lr * m_hat * math.sqrt(rectify) * math.sqrt(bias) / (np.sqrt(v) + eps)


def adamax(memory: Memory, x: Array, g: Array, lr: float, betas: Any, eps: float) -> Array:
    """`torch.optim.Adamax`."""
    t = memory["t"] = memory.get("t", 0) + 1
    m = memory["m"] = betas[0] * memory.get("m", 0.0) + (1 - betas[0]) * g
    u = memory["u"] = np.maximum(betas[1] * memory.get("u", 0.0), np.abs(g) + eps)
    return lr / (1 - betas[0] ** t) * m / u


def oadam(memory: Memory, x: Array, g: Array, lr: float, betas: Any, eps: float) -> Array:
    """Algorithm 1 of Daskalakis et al. 2018 (arXiv 1711.00141), the step before the first being zero."""
    now = adam(memory, x, g, lr, betas, eps)
    before, memory["now"] = memory.get("now", 0.0), now
    return 2 * now - before


def adopt(memory: Memory, x: Array, g: Array, lr: float, betas: Any, eps: float) -> Array:
    """Algorithm 2 of Taniguchi et al. 2024 (arXiv 2411.02853, second version, with c_t = t^(1/4))."""
    if "v" not in memory:
        memory.update(v=g**2, m=np.zeros_like(g), t=0)
        return np.zeros_like(x)
    t = memory["t"] = memory["t"] + 1
    clipped = np.clip(g / np.maximum(np.sqrt(memory["v"]), eps), -(t**0.25), t**0.25)
    m = memory["m"] = betas[0] * memory["m"] + (1 - betas[0]) * clipped
    memory["v"] = betas[1] * memory["v"] + (1 - betas[1]) * g**2
    return lr * m


def ademamix(
    memory: Memory, x: Array, g: Array, lr: float, betas: Any, eps: float, alpha: float, weight_decay: float
) -> Array:
    """Pagliardini et al. 2024 (arXiv 2409.03137), with constant alpha and beta3."""
    m, v, t = moments(memory, g, betas[:2])
    slow = memory["slow"] = betas[2] * memory.get("slow", 0.0) + (1 - betas[2]) * g
    root = np.sqrt(v / (1 - betas[1] ** t)) + eps
    return lr * ((m / (1 - betas[0] ** t) + alpha * slow) / root + weight_decay * x)


def schedule_free(
    memory: Memory, x: Array, step: Array, lr: float, beta: float, weight_decay: float, warmup_steps: int, r: float,
    weight_lr_power: float,
) -> Array:  # fmt: skip
    """Defazio et al. 2024 (arXiv 2405.15682): z takes the steps, and y, which is x here, is between z and the average
    of all z. The decay is taken at y, as in the authors' code."""
    z, t = memory.get("z", memory["start"]), memory.get("t", 0) + 1
    rate = lr * min(t / warmup_steps, 1.0) if warmup_steps else lr
    peak = memory["peak"] = max(rate, memory.get("peak", 0.0))
    weight = t**r * peak**weight_lr_power
    total = memory["total"] = memory.get("total", 0.0) + weight
    share = weight / total if total else 0.0
    average = (x - (1 - beta) * z) / beta
    z = z - rate * (step + weight_decay * x)
    average = (1 - share) * average + share * z
    memory.update(z=z, t=t)
    return x - ((1 - beta) * z + beta * average)


def schedule_free_sgd(memory: Memory, x: Array, g: Array, lr: float, momentum: float, **rest: Any) -> Array:
    return schedule_free(memory, x, g, lr, momentum, **rest)


def schedule_free_adamw(memory: Memory, x: Array, g: Array, lr: float, betas: Any, eps: float, **rest: Any) -> Array:
    v = memory["v"] = betas[1] * memory.get("v", 0.0) + (1 - betas[1]) * g**2
    t = memory.get("t", 0) + 1
    return schedule_free(memory, x, g / (np.sqrt(v / (1 - betas[1] ** t)) + eps), lr, betas[0], **rest)


def adabelief(memory: Memory, x: Array, g: Array, lr: float, betas: Any, eps: float) -> Array:
    """Algorithm 2 of Zhuang et al. 2020 (arXiv 2010.07468)."""
    t = memory["t"] = memory.get("t", 0) + 1
    m = memory["m"] = betas[0] * memory.get("m", 0.0) + (1 - betas[0]) * g
    s = memory["s"] = betas[1] * memory.get("s", 0.0) + (1 - betas[1]) * (g - m) ** 2 + eps
    return lr * (m / (1 - betas[0] ** t)) / (np.sqrt(s / (1 - betas[1] ** t)) + eps)


def rmsprop(memory: Memory, x: Array, g: Array, lr: float, alpha: float, eps: float, centered: bool) -> Array:
    """`torch.optim.RMSprop`; a variance below zero counts as zero."""
    v = memory["v"] = alpha * memory.get("v", 0.0) + (1 - alpha) * g**2
    if centered:
        mean = memory["mean"] = alpha * memory.get("mean", 0.0) + (1 - alpha) * g
        v = np.maximum(v - mean**2, 0.0)
    return lr * g / (np.sqrt(v) + eps)


def adagrad(memory: Memory, x: Array, g: Array, lr: float, eps: float) -> Array:
    """`torch.optim.Adagrad`."""
    total = memory["total"] = memory.get("total", 0.0) + g**2
    return lr * g / (np.sqrt(total) + eps)


def adadelta(memory: Memory, x: Array, g: Array, lr: float, rho: float, eps: float) -> Array:
    """`torch.optim.Adadelta`."""
    v = memory["v"] = rho * memory.get("v", 0.0) + (1 - rho) * g**2
    delta = np.sqrt(memory.get("u", 0.0) + eps) / np.sqrt(v + eps) * g
    memory["u"] = rho * memory.get("u", 0.0) + (1 - rho) * delta**2
    return lr * delta


def lion(memory: Memory, x: Array, g: Array, lr: float, betas: Any) -> Array:
    """Algorithm 2 of Chen et al. 2023 (arXiv 2302.06675), without its weight decay."""
    m = memory.get("m", 0.0)
    memory["m"] = betas[1] * m + (1 - betas[1]) * g
    c = betas[0] * m + (1 - betas[0]) * g
    require_clear(c, np.abs(betas[0] * m) + np.abs((1 - betas[0]) * g))
    return lr * np.sign(c)


def rprop(memory: Memory, x: Array, g: Array, lr: float, etas: Any, step_sizes: Any) -> Array:
    """`torch.optim.Rprop`."""
    turn = np.sign(g) * np.sign(memory.get("g", 0.0))
    factor = np.where(turn > 0, etas[1], np.where(turn < 0, etas[0], 1.0))
    size = memory["size"] = np.clip(memory.get("size", lr) * factor, *step_sizes)
    g = memory["g"] = np.where(turn < 0, 0.0, g)
    return size * np.sign(g)


def weight_decay(memory: Memory, x: Array, g: Array, weight_decay: float) -> Array:
    return g + weight_decay * x


def sign_decay(memory: Memory, x: Array, g: Array, sign_decay: float) -> Array:
    return g + sign_decay * np.sign(x)


def clip_grad(memory: Memory, x: Array, g: Array, clip_value: float) -> Array:
    return np.minimum(np.maximum(g, -clip_value), clip_value)


class Unclear(Exception):
    """Rounding decides what comes out, so that there is nothing to compare."""


def require_clear(total: Array, sizes: Array) -> None:
    """A sum must not cancel, but where all that was added is zero."""
    if np.any((np.abs(total) < 1e-6 * sizes) & (sizes > 0)):
        raise Unclear


def norm_of(sizes: Array, p: float) -> float:
    """The p-norm; 0 of no elements."""
    if p == math.inf:
        return float(sizes.max(initial=0.0))
    return float(np.sum(sizes**p) ** (1 / p))


def shrink(g: Array, norm: float, max_norm: float) -> Array:
    return g if norm <= max_norm else g * (max_norm / norm)


def tail(memory: Memory, x: Array, g: Array, lr: float, decay: float) -> Array:
    """The elementwise rule that tests/random_cases.py has as a user's own."""
    t = memory["t"] = memory.get("t", 0) + 1
    m = memory["m"] = decay * memory.get("m", 0.0) + (1 - decay) * g
    return lr * np.tanh(m) / (1 - decay**t)


def unit(memory: Memory, x: Array, g: Array, lr: float, momentum: float) -> Array:
    """That which needs the whole array."""
    m = memory["m"] = momentum * memory.get("m", 0.0) + g
    return lr * m / (np.sqrt(np.sum(m**2)) + 1e-3)


# --- Rules around another: f(memory of that, g, its change) -> change ------------------------------------------------


def masked(memory: Memory, g: Array, change: Array) -> Array:
    """That of tests/random_cases.py: where it goes against the gradient it rests, and the mean over the array makes
    up."""
    mask = change * g > 0
    return change * mask / (mask.mean() + 0.1) if mask.size else change


def cautious(memory: Memory, g: Array, change: Array) -> Array:
    """The code of Liang et al. 2024 (arXiv 2411.16085)."""
    mask = change * g > 0
    return change * mask / max(mask.mean(), 1e-3) if mask.size else change


def lowered(memory: Memory, g: Array, change: Array) -> Array:
    """With dtype=torch.float16: what it keeps is rounded after each step, but for single numbers. PyTorch rounds
    float64 by way of float32."""
    for name, part in memory.items():
        if isinstance(part, np.ndarray) and part.ndim and name != "start":
            with np.errstate(over="ignore"):
                memory[name] = part.astype(np.float32).astype(np.float16).astype(np.float64)
    return change


AROUND: dict[str, Callable[..., Array]] = {"Masked": masked, "Cautious": cautious, "Lowered": lowered}

# --- Rules around a whole chain, here its last member: they see what is about to be subtracted -----------------------


def averaged(memory: Memory, x: Array, g: Array, decay: float) -> Array:
    """`torch.optim.swa_utils`, of the parameter after each step."""
    old = memory.get("average")
    memory["average"] = x - g if old is None else decay * old + (1 - decay) * (x - g)
    return g


def lookahead(memory: Memory, x: Array, g: Array, k: int, alpha: float) -> Array:
    """Algorithm 1 of Zhang et al. 2019 (arXiv 1907.08610)."""
    slow, steps = memory.setdefault("slow", memory["start"]), memory.get("steps", 0) + 1
    memory["steps"] = steps if steps < k else 0
    if steps < k:
        return g
    slow = memory["slow"] = slow + alpha * (x - g - slow)
    return x - slow


# What to evaluate with: f(memory, x, hyperparameters).
EVALUATIONS: dict[str, Callable[..., Array]] = {
    "Averaged": lambda memory, x, values: memory.get("average", memory["start"]),
    "Lookahead": lambda memory, x, values: memory.get("slow", memory["start"]),
    "ScheduleFreeSGD": lambda memory, x, values: _mean(memory, x, values["momentum"]),
    "ScheduleFreeAdamW": lambda memory, x, values: _mean(memory, x, values["betas"][0]),
}


def _mean(memory: Memory, x: Array, beta: float) -> Array:
    return (x - (1 - beta) * memory.get("z", memory["start"])) / beta


FORMULAS: dict[str, Callable[..., Array]] = {
    "Tail": tail,
    "Unit": unit,
    "Descent": descent,
    "Momentum": momentum,
    "Nesterov": nesterov,
    "Adam": adam,
    "AdamW": adamw,
    "AMSGrad": amsgrad,
    "NAdam": nadam,
    "RAdam": radam,
    "AdaMax": adamax,
    "OAdam": oadam,
    "AdaBelief": adabelief,
    "AdEMAMix": ademamix,
    "ScheduleFreeSGD": schedule_free_sgd,
    "ScheduleFreeAdamW": schedule_free_adamw,
    "Averaged": averaged,
    "Lookahead": lookahead,
    "ADOPT": adopt,
    "RMSProp": rmsprop,
    "AdaGrad": adagrad,
    "AdaDelta": adadelta,
    "Lion": lion,
    "Rprop": rprop,
    "WeightDecay": weight_decay,
    "SignDecay": sign_decay,
    "ClipGrad": clip_grad,
}
FIXED = {("Rprop", "lr"), ("RMSProp", "centered")}  # they shape the state and cannot be adjusted

# --- Schedules ----------------------------------------------------------------------------------------------------


def between(start: float, end: float, t: float) -> float:
    return (1 - t) * start + t * end


CURVES: dict[str, Callable[..., float]] = {
    "linear": lambda n, start, end, steps: between(start, end, min(n / steps, 1)),
    "cosine": lambda n, start, end, steps: between(start, end, (1 - math.cos(math.pi * min(n / steps, 1))) / 2),
    "exponential": lambda n, start, rate, steps: start * rate ** (n / steps),
    "step_decay": lambda n, start, factor, every: start * factor ** (n // every),
}


class Scalar(float):
    """A number for which a tensor stands."""


@dataclass(frozen=True)
class Curve:
    """A schedule, from the count of a leaf to a number."""

    kind: str
    arguments: tuple[float, ...]
    own: bool = False  # given to fluxpy as it is, as any callable may be

    def __call__(self, count: int) -> float:
        return CURVES[self.kind](count, *self.arguments)


@dataclass(frozen=True)
class Scale:
    """As a value to adjust to: times what is there. What it makes of a schedule is a schedule."""

    factor: float

    def of(self, value: Value) -> Value:
        if isinstance(value, tuple):
            return tuple(map(self.of, value))
        return Scaled(value, self.factor) if callable(value) else value * self.factor


@dataclass(frozen=True)
class Scaled:
    schedule: Callable[[int], float]
    factor: float

    def __call__(self, count: int) -> float:
        return self.schedule(count) * self.factor


def value_at(value: Value, count: int) -> Any:
    if isinstance(value, tuple):
        return tuple(value_at(v, count) for v in value)
    return value(count) if callable(value) else value


# --- Leaves -------------------------------------------------------------------------------------------------------


class Refused(Exception):
    """The operation must raise this error and change nothing."""

    def __init__(self, error: type[Exception]) -> None:
        self.error = error


class Skipped(Exception):
    """The update must change nothing, without an error."""


@dataclass
class Member:
    """One rule of a chain: the name of its class, its hyperparameters, and which of `AROUND` is around it."""

    name: str
    values: dict[str, Value]
    around: str | None = None


@dataclass
class Leaf:
    """All that belongs to one parameter. `chain` is None where it is frozen for good."""

    names: tuple[str, ...]  # every path at which it stands
    x: Array
    chain: list[Member] | None
    frozen: bool
    pairs: bool = False  # of a complex parameter: real and imaginary parts
    single: bool = False  # float32, stepped on a master copy
    mixed: bool = False
    count: int = 0
    started: bool | None = None  # whether it has momenta; None where either will do
    fresh: bool = False  # whether it has momenta that no update has reached
    memories: list[Memory] = field(default_factory=list)
    window: int = 0  # how many updates of the present window went by
    master: Array | None = None
    way: Array = field(default_factory=lambda: np.zeros(()))  # how far each element went, to and fro
    peak: float = 0.0

    def __post_init__(self) -> None:
        self.frozen = self.frozen or self.chain is None
        self.started = not self.frozen
        self.empty()
        self.write(self.x)
        self.way = np.zeros_like(self.x)
        self.begin()

    def empty(self) -> None:
        """No momenta, no count. The window is that of all leaves, so its place is kept."""
        self.memories, self.count = [{} for _ in self.chain or ()], 0
        self.master, self.fresh = self.x if self.mixed else None, False

    def begin(self) -> None:
        """Make a state, if it trains."""
        if not self.frozen:
            self.fresh = True
            for memory in self.memories:
                memory["start"] = self.x

    def give_back(self) -> None:
        """It is frozen: a state that no update has reached is made anew when it thaws."""
        if self.fresh:
            self.memories, self.fresh = [{} for _ in self.memories], False

    @property
    def evaluation(self) -> Array:
        """The weights to evaluate with."""
        own = self.x if self.master is None else np.where(self.rounded(self.master) != self.x, self.x, self.master)
        x = own
        if self.frozen or self.fresh or not any("start" in memory for memory in self.memories):
            return self.x
        for member, memory in zip(self.chain or (), self.memories, strict=True):
            if member.name in EVALUATIONS:
                values = {k: value_at(v, max(self.count - 1, 0)) for k, v in member.values.items()}
                x = EVALUATIONS[member.name](memory, x, values)
        return self.x if x is own else self.rounded(x)

    def write(self, x: Array) -> None:
        """Another value, from outside or by a step."""
        self.way = self.way + np.abs(x - self.x)
        self.x, self.peak = x, max(self.peak, float(np.abs(x).max(initial=0.0)))

    def rounded(self, x: Array) -> Array:
        return x.astype(np.float32).astype(np.float64) if self.single else x

    def follow(self) -> None:
        """The master copy takes over what somebody wrote to the parameter since the last step."""
        if self.master is not None:
            self.master = np.where(self.rounded(self.master) != self.x, self.x, self.master)

    def subtract(self, change: Array) -> None:
        if self.master is None:
            self.write(self.x - change)
        else:
            self.master, self.way = self.master - change, self.way + np.abs(change)
            self.write(self.rounded(self.master))

    @property
    def accumulates(self) -> bool:
        return any(member.name == "AccumGrad" for member in self.chain or ())

    def sit_out(self) -> None:
        """An update while it is frozen: only the window goes on, and what was gathered in it is dropped at its end."""
        for member, memory in zip(self.chain or (), self.memories, strict=True):
            if member.name == "AccumGrad":
                self.window += 1
                if self.window >= value_at(member.values["n"], self.count):
                    self.window = 0
                    memory.pop("total", None), memory.pop("sizes", None)


class Step:
    """A leaf on its way through its chain."""

    def __init__(self, leaf: Leaf, g: Array | None) -> None:
        assert leaf.chain is not None
        self.leaf, self.g, self.index = leaf, g, 0
        leaf.follow()
        for memory in leaf.memories:
            memory.setdefault("start", leaf.x if leaf.master is None else leaf.master)
        leaf.fresh = False
        self.values = [{k: value_at(v, leaf.count) for k, v in member.values.items()} for member in leaf.chain]
        self.names = [member.name for member in leaf.chain]

    @property
    def sizes(self) -> Array:
        """Moduli of the elements of the gradient."""
        assert self.g is not None
        return np.hypot(self.g[..., 0], self.g[..., 1]) if self.leaf.pairs else np.abs(self.g)

    def run(self) -> None:
        """To the next global clip, or to the end."""
        while self.index < len(self.names):
            name, values, memory = self.names[self.index], self.values[self.index], self.leaf.memories[self.index]
            if name == "AccumGrad":
                self.g = self.gather(memory, values["n"])
                if self.g is None:
                    self.index = len(self.names)
                    return
            elif self.g is not None:
                if name == "ClipGlobalNorm":
                    return
                self.g = self.clipped(values) if name == "ClipNorm" else self.applied(name, memory, values)
            self.index += 1

    def applied(self, name: str, memory: Memory, values: Mapping[str, Any]) -> Array:
        leaf, g = self.leaf, self.g
        assert leaf.chain is not None and g is not None
        around = leaf.chain[self.index].around
        change = FORMULAS[name](memory, leaf.x if leaf.master is None else leaf.master, g, **values)
        return change if around is None else AROUND[around](memory, g, change)

    def gather(self, memory: Memory, n: float) -> Array | None:
        """The mean over the window where it ends with this update. A gradient that is missing counts as zero."""
        self.leaf.window += 1
        if self.g is not None:
            memory["total"] = memory.get("total", 0.0) + self.g
            memory["sizes"] = memory.get("sizes", 0.0) + np.abs(self.g)
        if self.leaf.window < n:
            return None
        total, sizes, updates = memory.pop("total", None), memory.pop("sizes", None), self.leaf.window
        self.leaf.window = 0
        if total is not None and {"ClipNorm", "ClipGlobalNorm"} & {*self.names[: self.index]}:
            require_clear(total, sizes)  # single elements, clipped to one size, may be each other's opposites
        return None if total is None else total / updates

    def clipped(self, values: Mapping[str, Any]) -> Array:
        assert self.g is not None
        norm = norm_of(self.sizes, values["norm_type"])
        require_finite(norm, values["nonfinite"])
        return shrink(self.g, norm, values["max_norm"])

    @property
    def place(self) -> int | None:
        """Which of the chain's global clips it stands before; None at the end."""
        at_end = self.index == len(self.names)
        return None if at_end else self.names[: self.index].count("ClipGlobalNorm")


def require_finite(norm: float, policy: str) -> None:
    if policy != "ignore" and not math.isfinite(norm):
        raise Refused(FloatingPointError) if policy == "raise" else Skipped


def clip_together(steps: Sequence[Step]) -> None:
    """One norm for all with an equal clip."""
    groups: dict[Any, list[Step]] = {}
    for step in steps:
        groups.setdefault(tuple(sorted(step.values[step.index].items())), []).append(step)
    for key, group in groups.items():
        values: dict[str, Any] = dict(key)
        norm = norm_of(np.concatenate([step.sizes.ravel() for step in group]), values["norm_type"])
        require_finite(norm, values["nonfinite"])
        for step in group:
            assert step.g is not None
            step.g = shrink(step.g, norm, values["max_norm"])
            step.index += 1


def update(leaves: Sequence[Leaf], grads: Sequence[Array | None]) -> None:
    """One update, all or nothing: Refused or Skipped, and nothing has changed."""
    new = copy.deepcopy(list(leaves))
    pairs = [(leaf, g) for leaf, g in zip(new, grads, strict=True) if not leaf.frozen]
    steps = [Step(leaf, g) for leaf, g in pairs if g is not None or leaf.accumulates]
    for place in range(max((step.names.count("ClipGlobalNorm") for step in steps), default=0)):
        for step in steps:
            step.run()
        clip_together([step for step in steps if step.place == place])
    for step in steps:
        step.run()
    for leaf, g in pairs:
        if g is not None:
            leaf.started = True
        elif leaf.accumulates and not leaf.started:
            leaf.started = None
    for step in steps:
        if step.g is not None:
            step.leaf.subtract(step.g)
            step.leaf.count += 1
    for leaf in new:
        if leaf.frozen:
            leaf.sit_out()
    for leaf, after in zip(leaves, new, strict=True):
        vars(leaf).update(vars(after))


# --- Verbs --------------------------------------------------------------------------------------------------------


def holders(leaf: Leaf, name: str) -> list[Member]:
    """The rules of a leaf that have this hyperparameter."""
    return [member for member in leaf.chain or () if name in member.values]


def adjust(leaves: Sequence[Leaf], **changes: Value) -> None:
    for leaf in leaves:
        for name in changes if leaf.chain is not None else ():
            found = holders(leaf, name)
            if not found or any((member.name, name) in FIXED for member in found):
                raise Refused(ValueError)
    for leaf in leaves:
        leaf.chain = copy.deepcopy(leaf.chain)  # which other leaves may share
        for name, new in changes.items():
            for member in holders(leaf, name):
                member.values[name] = new.of(member.values[name]) if isinstance(new, Scale) else new


def freeze(leaves: Sequence[Leaf]) -> None:
    for leaf in leaves:
        leaf.frozen = True
        leaf.give_back()


def thaw(leaves: Sequence[Leaf]) -> None:
    if any(leaf.chain is None for leaf in leaves):
        raise Refused(ValueError)
    for leaf in leaves:
        leaf.frozen = False


def reset(leaves: Sequence[Leaf], whole: bool = False) -> None:
    """With `whole`, these are all leaves of the tree: nobody is left to be in step with, and a new window begins."""
    for leaf in leaves:
        leaf.empty()
        leaf.started = None if leaf.accumulates else False
        leaf.window = 0 if whole else leaf.window

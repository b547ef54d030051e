"""Fine-tuning: freeze until an epoch, thaw from the top, rates that shrink with depth."""

from collections.abc import Callable
from fnmatch import fnmatchcase

from ... import adjust, freeze, leaves, scale, select, thaw
from ..core import Leaf, State
from ..events import Callback, require_whole
from ..learner import Learner


class FreezeUntil(Callback):
    """Keeps the leaves that match a pattern frozen before an epoch (from 0) of the fit, and thaws them at its start.

    `pattern` is a glob over dotted paths, or `(path, leaf) -> bool`, as `fluxpy.select` takes. What was set up with no
    rule (None) stays frozen for good. One line each gives a plan; a smaller rate for what thaws late is
    `adjust(select(learner.state, pattern), scale(0.1))` before the fit.
    """

    def __init__(self, pattern: str | Callable[[str, Leaf], bool], epoch: int) -> None:
        require_whole("epoch", epoch)
        self.pattern, self.epoch = pattern, epoch

    def on_epoch_start(self, learner: Learner) -> None:
        if learner.epoch_index <= self.epoch:
            verb = freeze if learner.epoch_index < self.epoch else thaw
            for _, leaf in leaves(select(learner.state, self.pattern)):
                if leaf.rule is not None:
                    verb(leaf)


class ThawFromTop(Callback):
    """Thaws layer by layer: the last that matches at the epoch `first` of the fit, then one lower after every `epochs`.

    `patterns` name the layers, part by part of the dotted path: `"encoder.layer.*"` means `encoder.layer.0`,
    `encoder.layer.1` and so on, each with all below it, in the order of the model. Before, all of them are frozen.
    """

    def __init__(self, *patterns: str, first: int = 1, epochs: int = 1) -> None:
        require_whole("first", first)
        require_whole("epochs", epochs)
        self.patterns, self.first, self.epochs = patterns, first, epochs

    def on_epoch_start(self, learner: Learner) -> None:
        for i, layer in enumerate(layers_from_top(learner.state, *self.patterns)):
            FreezeUntil(layer, self.first + i * self.epochs).on_epoch_start(learner)


def discriminative_rates(state: State, *patterns: str, factor: float) -> State:
    """Rates that shrink with depth: the last layer that matches keeps its own, each one lower has `factor` times that
    of the one above it [Howard & Ruder 2018, with 1/2.6]. Layers as in `ThawFromTop`. Returns the state.

    The ratios stay under `LearningRateScheduler(scale=...)`.

    >>> from fluxpy.learner import discriminative_rates
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1))
    >>> state = discriminative_rates(setup(Adam(0.1), model), "*", factor=0.5)
    >>> state[0].weight.rule.lr, state[2].weight.rule.lr
    (0.05, 0.1)
    """
    layers = layers_from_top(state, *patterns)
    if len(layers) == 1 and not set("*?[") & set(patterns[0]):
        raise ValueError(f"{patterns[0]!r} is one layer; for rates that shrink within it write '{patterns[0]}.*'")
    for i, layer in enumerate(layers[1:], 1):
        adjust(select(state, layer), scale(factor**i))
    return state


def layers_from_top(state: State, *patterns: str) -> list[Callable[[str, Leaf], bool]]:
    """Predicates for `select`, one for each layer, the last of the model first. ValueError where a pattern matches
    none."""
    found: dict[str, set[str]] = {}
    idle = dict.fromkeys(patterns)
    for path, _ in leaves(state):
        parts = path.split(".")
        for pattern in patterns:
            wanted = pattern.split(".")
            if len(parts) >= len(wanted) and all(map(fnmatchcase, parts, wanted)):
                found.setdefault(".".join(parts[: len(wanted)]), set()).add(path)
                idle.pop(pattern, None)
                break
    if idle or not patterns:
        names = ", ".join(map(repr, idle)) or "without a pattern"
        some = ", ".join(repr(path) for path, _ in list(leaves(state))[:3])
        raise ValueError(f"no layer matches {names}; a pattern names whole layers, as 'encoder.*'; the leaves: {some}")
    return [lambda path, _, layer=layer: path in layer for layer in reversed(found.values())]

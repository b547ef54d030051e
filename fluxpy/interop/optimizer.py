"""TorchOptimizer: a rule or a state tree as a `torch.optim.Optimizer`, for loops written for those."""

import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..evaluation import Exchange
from ..leaf import Leaf, replace_leaf
from ..pytree import partition
from ..saving import load_state_dict, state_dict
from ..state import Rules, State, bind, require_training_weights, setup, shape_of, tree_bindings, tree_context
from ..text import names_of
from ..tree import TreeSpec
from ..update import update
from .convert import load_from_torch
from .groups import NEW_OPTIMIZER, ParamGroup, ParamGroups, check_options
from .momenta import Momenta


class TorchOptimizer(Optimizer):
    """A rule, or a state that `setup` made, as a `torch.optim.Optimizer` for `model`.

    `tree` is the state; every verb works on it at any time. `param_groups` has a group for each set of equal
    hyperparameters, in the order of the model, with the leaves' `params` and `names`. It reads from the tree and writes
    to it: what a scheduler sets counts at the next step, what `adjust` does shows at once, and splits a group where it
    makes leaves differ. Under a schedule a group shows the value that the next step uses; another value written there
    replaces the schedule, with a warning. `state[p]` shows a leaf's state.

    `step` reads each parameter's `.grad`, and does nothing where there is none at all. Hooks, closures, schedulers and
    `torch.amp.GradScaler` work as with any optimiser of torch. It holds the parameters that the model has now.

    `eval` puts the weights to evaluate with (see `fluxpy.averaged`) into the parameters, and `train` the training
    weights back, as in optimisers of the `schedulefree` package, whose clients call them.

    `foreach` and `fused` are taken and mean nothing, since the engine decides that; `maximize`, `capturable` and
    `differentiable` raise ValueError if true.

    >>> from fluxpy.interop import TorchOptimizer
    >>> model = torch.nn.Linear(2, 1)
    >>> optimizer = TorchOptimizer({"weight": Adam(0.1), "bias": Adam(0.2)}, model)
    >>> _ = adjust(optimizer.tree.bias, 0.3)
    >>> [(group["names"], group["lr"]) for group in optimizer.param_groups]
    [(['weight'], 0.1), (['bias'], 0.3)]
    >>> scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
    >>> model(torch.ones(1, 2)).sum().backward()
    >>> optimizer.step()
    >>> scheduler.step()
    >>> value(optimizer.tree.weight, "lr"), value(optimizer.tree.bias, "lr")
    (0.05, 0.15)
    """

    def __init__(self, rule_or_state: Rules | State | Leaf, model: Any, **options: Any) -> None:
        check_options(options)
        if isinstance(model, Iterator):
            raise TypeError("TorchOptimizer takes the model, not an iterator over its parameters")
        if isinstance(model, list | tuple) and any(isinstance(x, Mapping) and "params" in x for x in model):
            raise TypeError(
                "TorchOptimizer takes the model, not param groups, whose options it would not see; it makes groups of "
                'what has equal rules: TorchOptimizer({"*bias": AdamW(weight_decay=0.0), "*": AdamW()}, model)'
            )
        tree = rule_or_state if isinstance(rule_or_state, State | Leaf) else setup(rule_or_state, model)
        params = bind(tree, model).params
        for x in params:
            if not (x.is_leaf or x.retains_grad):
                raise ValueError("TorchOptimizer: can't optimize a non-leaf Tensor")
        self.__setstate__({"tree": tree, "params": params})

    def __getstate__(self) -> dict[str, Any]:
        groups = [(group["names"], group.kept) for group in self._groups.current()]
        training = None if self._exchange is None else self._exchange.training
        return {"tree": self._tree, "params": self._params, "groups": groups, "training_weights": training}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Make an optimiser of a tree and its parameters. As in torch, hooks are not kept by pickles and copies."""
        self._tree: State | Leaf = state["tree"]
        self._params: list[Tensor] = state["params"]
        # In the shape of the model, but holding no module: `update` binds it, and a pickle has no one's code in it.
        self._model = _containers(shape_of(self._tree), self._params)
        # A tree remembers what it was last used with, and would keep the parameters alive for us.
        weakref.finalize(self, tree_bindings(self._tree).clear).atexit = False
        self._groups = ParamGroups(self._tree, self._params)
        self._momenta = Momenta(self._groups.members)
        if "groups" in state:
            self._groups.regroup(state["groups"])
        self._exchange: Exchange | None = None  # while it is in evaluation mode
        if state.get("training_weights") is not None:
            self._exchange = self._new_exchange()
            self._exchange.resume(state["training_weights"])
        defaults: dict[str, Any] = {}
        for group in reversed(self._groups.current()):
            defaults |= group.shown()[0]
        super().__setstate__({"defaults": defaults})

    def __repr__(self) -> str:
        return f"TorchOptimizer of\n{self._tree!r}"

    @property
    def tree(self) -> Any:  # a State, or a Leaf of a single tensor; Any, as what navigation returns
        """The state tree."""
        return self._tree

    @property
    def param_groups(self) -> list[Any]:
        return list(self._groups.current())

    @param_groups.setter
    def param_groups(self, groups: Any) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        raise TypeError(f"param_groups follow the tree; {NEW_OPTIMIZER}")

    @property
    def state(self) -> Any:
        return self._momenta

    @state.setter
    def state(  # pyright: ignore[reportIncompatibleVariableOverride]
        self, state: Mapping[Tensor, Mapping[str, Any]]
    ) -> None:
        if not state:
            self._momenta.clear()
        self._momenta.update(state)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        raise TypeError(f"add_param_group: the groups of a TorchOptimizer follow its tree; {NEW_OPTIMIZER}")

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update by each parameter's `.grad`. `closure`, if given, is called once before, and its result returned.
        Where nothing has a gradient, nothing happens. RuntimeError in evaluation mode (see `eval`)."""
        self._require_train_mode("step")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if any(x.grad is not None for x in self._params):
            try:
                update(self._tree, self._model)
            except ValueError:
                if not self._follow_devices():
                    raise
                update(self._tree, self._model)
        return loss

    def eval(self) -> None:
        """Put the weights to evaluate with into the parameters, until `train`: what rules with an `evaluation` give.
        Without such a rule this does nothing, and so does a second call.

        In this mode `step` and `load_state_dict` are refused with RuntimeError, and `state_dict` holds the training
        weights too, so that a run goes on exactly from files of it and of the model as it is. What else is written to
        the parameters is lost at `train`, with a warning. Refused within `fluxpy.averaged`.
        """
        leaves = [member.leaf for member in self._groups.members]
        if self._exchange is not None or not any(leaf.rule.evaluates for leaf in leaves):
            return
        exchange = self._new_exchange()
        require_training_weights(self._tree, "eval() of a TorchOptimizer")
        try:
            exchange.begin()
        except BaseException:
            exchange.end()
            raise
        self._exchange = exchange

    def train(self) -> None:
        """Put the training weights back after `eval`, bit for bit. In training mode this does nothing."""
        if self._exchange is None:
            return
        exchange, self._exchange = self._exchange, None
        lost = exchange.written()
        exchange.end()
        if lost:
            warnings.warn(
                f"what was written to {names_of(lost)} between eval() and train() of a TorchOptimizer is lost; after "
                "loading weights to evaluate with, do not call train()",
                stacklevel=2,
            )

    def _new_exchange(self) -> Exchange:
        binding = bind(self._tree, self._model)
        if binding.spread:
            raise ValueError(
                "eval() of a TorchOptimizer is for parameters that are whole; where they are spread over processes "
                "write `with fluxpy.averaged(optimizer.tree, model): ...`"
            )
        return Exchange(binding, tree_context(self._tree))

    def _require_train_mode(self, what: str) -> None:
        if self._exchange is not None:
            raise RuntimeError(f"{what} is refused after optimizer.eval(); call optimizer.train() first")

    def _follow_devices(self) -> bool:
        """Bring momenta to their parameters, after `model.to(...)`; whether any were elsewhere."""
        moved = False
        for member in self._groups.members:
            tensors, skeleton = partition(member.leaf.state)
            device = member.x.device
            if any(t.device != device for t in tensors):
                replace_leaf(member.leaf, state=skeleton.combine([t.to(device) for t in tensors]))
                moved = True
        return moved

    def state_dict(self) -> dict[str, Any]:
        """All there is, by name, as plain data (`torch.load(..., weights_only=True)` takes it): under "state" what
        `fluxpy.state_dict` has of each leaf, under "param_groups" what the groups show, with names as "params"; after
        `eval`, under "training_weights" those."""
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        saved = state_dict(self._tree)
        groups = [{**_plain(group), "params": list(group["names"])} for group in self._groups.current()]
        result: dict[str, Any] = {"state": saved.pop("leaves"), "param_groups": groups, **saved}
        if self._exchange is not None:
            result["training_weights"] = self._exchange.training
        for hook in self._optimizer_state_dict_post_hooks.values():
            changed = hook(self, result)
            result = result if changed is None else changed
        return result

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned, or a state dict of the class of `torch.optim` that has the same algorithm.

        Leaves are found by name. One of torch's goes by its `param_names`, or, if it has none, by order: the number of
        groups and their sizes must then be those here, or the parameters must be in one group, in the order of the
        model. Its rates and options replace those in the tree, but not schedules. ValueError for what does not fit;
        then nothing is changed. After loading what was saved in evaluation mode (see `eval`) this is in it too.
        """
        self._require_train_mode("load_state_dict")
        d = dict(state_dict)
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = hook(self, d)
            d = d if changed is None else changed
        if not isinstance(d.get("state"), Mapping) or not isinstance(d.get("param_groups"), list):
            raise ValueError("load_state_dict takes what state_dict() of an optimiser returns, with its param_groups")
        if "version" in d:
            self._load(d)
        elif any("names" in entry for entry in d["state"].values()):
            raise ValueError(
                "load_state_dict: a tool that puts names in place of numbers, as get_optimizer_state_dict of "
                "torch.distributed.checkpoint, changed this dict, which has names: give torch.distributed.checkpoint "
                "fluxpy.state_dict(optimizer.tree), and load that by fluxpy.load_state_dict"
            )
        else:
            load_from_torch(self._groups, d)
        self._follow_devices()
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)

    def _load(self, d: dict[str, Any]) -> None:
        rest = {key: value for key, value in d.items() if key not in ("state", "param_groups", "training_weights")}
        training = d.get("training_weights")
        here = sorted(member.path for member in self._groups.members)
        names = sorted(name for group in d["param_groups"] for name in group["params"])
        if names != here:
            odd = set(names) ^ set(here)
            raise ValueError(f"load_state_dict: not in both, or twice: {names_of(sorted(odd) or names)}")
        self._check_weights({} if training is None else training)
        exchange = None if training is None else self._new_exchange()
        load_state_dict(self._tree, {"leaves": d["state"], **rest})
        self._groups.regroup([(group["params"], group) for group in d["param_groups"]])
        if exchange is not None:
            exchange.resume(training or {})
            self._exchange = exchange

    def _check_weights(self, training: Any) -> None:
        """ValueError for training weights that are not those of parameters here."""
        here = {member.path: member.x for member in self._groups.members}
        if not isinstance(training, Mapping):
            raise ValueError(
                f"load_state_dict: training_weights must be tensors by name, but got {type(training).__name__}"
            )
        for path, own in training.items():
            x = here.get(path)
            if x is None or not isinstance(own, Tensor) or (x.shape, x.dtype) != (own.shape, own.dtype):
                raise ValueError(f"load_state_dict: the training weights of {path!r} fit no parameter here")


def _plain(group: ParamGroup) -> dict[str, Any]:
    """What a group shows as plain data. What is none, as a dtype, is in the rules that are saved with the leaves."""
    others = ((name, v) for name, v in group.items() if name not in ("params", "names"))
    values = {name: list(v) if isinstance(v, tuple) else v for name, v in others}
    return {name: v for name, v in values.items() if isinstance(v, bool | int | float | str | list | Tensor | None)}


def _containers(spec: TreeSpec, params: Sequence[Tensor]) -> Any:
    """Parameters in containers of the shape of a model. No recursion: models may be deep."""
    by_index = dict(zip(spec.leaves, params, strict=True))
    done: list[Any] = []
    for kind, keys, index in reversed(spec.preorder):
        if kind == "leaf":
            done.append(by_index[index])
        else:
            done.append(OrderedDict((key, done.pop()) for key in keys))
    return done[0]

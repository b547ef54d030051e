"""Pieces of error messages."""

import difflib
import fnmatch
import html
import inspect
from collections.abc import Collection, Iterable
from typing import Any

import torch

# What other libraries call a hyperparameter -> what it may be called here.
WORDS = {
    **dict.fromkeys(("eta", "learning_rate", "step_size", "alpha", "rate"), ("lr",)),
    **dict.fromkeys(("beta", "b1", "b2", "beta1", "beta2", "beta_1", "beta_2"), ("betas",)),
    **dict.fromkeys(("epsilon", "eps_root", "ϵ"), ("eps",)),
    **dict.fromkeys(("rho", "mu", "mom", "decay"), ("momentum", "alpha", "rho")),
    **dict.fromkeys(
        ("lambda", "lambda_", "lambd", "l2", "wd", "decay_rate", "weight_decay_rate"), ("weight_decay", "sign_decay")
    ),
    **dict.fromkeys(("omega", "max_grad_norm", "clip_norm", "clipnorm"), ("max_norm",)),
    **dict.fromkeys(("delta", "clip", "thresh", "clipvalue"), ("clip_value",)),
    **dict.fromkeys(("p", "ord"), ("norm_type",)),
    **dict.fromkeys(("throw", "error_if_nonfinite"), ("nonfinite",)),
    **dict.fromkeys(("gamma",), ("step_sizes", "momentum_decay")),
    **dict.fromkeys(("ell",), ("etas",)),
    **dict.fromkeys(("every_k", "accumulate", "steps"), ("n",)),
}


# What is a hyperparameter elsewhere, and here something else.
INSTEAD = {
    "weight_decay": "write OptimiserChain(WeightDecay(...), ...), or take AdamW, whose decay stands beside the step",
    "max_norm": "write OptimiserChain(ClipGlobalNorm(...), ...)",
    "clip_value": "write OptimiserChain(ClipGrad(...), ...)",
    "amsgrad": "the rule AMSGrad is that",
    "nesterov": "the rule Nesterov is that",
    "maximize": "return the negative loss",
    **dict.fromkeys(("fused", "foreach", "capturable", "differentiable"), "the engine chooses by itself"),
    "frozen": "write fluxpy.freeze(state) or fluxpy.thaw(state)",
    "count": "write fluxpy.reset(state), or fluxpy.thaw(state, count=...)",
    **dict.fromkeys(("schedule", "scheduler", "lr_scheduler"), "a schedule takes the place of the number: lr=schedule"),
}


# What is done to rules.
SET_FIELD = "rules do not change: write fluxpy.adjust(state, {name}=...)"
SET_OTHER = (
    "a rule has no place for {name!r}: a hyperparameter is declared in the class, {name}: float = 0.1; what changes "
    "from step to step is its state"
)

# What is asked of a state, a leaf or gradients as if they were something else -> what to write.
OF_STATES = {
    "step": "Write fluxpy.update(state, model, grads)",
    "zero_grad": "There is nothing to zero: fluxpy.withgradient gives the gradients and leaves .grad alone",
    "param_groups": "The tree takes their place: fluxpy.leaves(state), fluxpy.select(state, 'encoder.*')",
    "add_param_group": "Write fluxpy.setup(rule, model, keep=state)",
    "defaults": "Each leaf has its own: leaf.rule",
    **dict.fromkeys(("parameters", "named_parameters"), "The model has them: fluxpy.trainables(model, path=True)"),
    **dict.fromkeys(
        ("to", "cuda", "cpu", "double", "float", "half", "bfloat16"),
        "Move the model, then write fluxpy.follow(state, model)",
    ),
    **dict.fromkeys(("items", "values", "keys"), "Write fluxpy.leaves(state), which gives (path, leaf)"),
    "grad": "A state holds no gradients: fluxpy.withgradient gives them",
    "load_state_dict": "Write fluxpy.load_state_dict(state, d)",
    **{
        verb: f"All verbs are functions: fluxpy.{verb}(state{rest})"
        for verb, rest in {
            **dict.fromkeys(("adjust", "select", "value", "train"), ", ..."),
            **dict.fromkeys(("freeze", "thaw", "reset", "summary", "leaves", "state_dict"), ""),
        }.items()
    },
}
ASSIGN_GRADIENTS = "fluxpy.tree_map(f, grads) gives others, and update takes {**dict(grads), path: other} too"
OF_GRADIENTS = {
    **dict.fromkeys(("items", "keys", "values"), "Gradients iterate as (path, tensor): dict(grads) has them by name"),
    **dict.fromkeys(("norm", "clip"), "Clipping is a rule: fluxpy.OptimiserChain(fluxpy.ClipGlobalNorm(1.0), ...)"),
}


# Names of torch.optim, and what is here in their place.
TORCH_RULES = {
    "SGD": "fluxpy.Descent(lr), fluxpy.Momentum(lr, momentum) or fluxpy.Nesterov(lr, momentum)",
    "Adagrad": "fluxpy.AdaGrad(...)",
    "Adadelta": "fluxpy.AdaDelta(...)",
    "Adamax": "fluxpy.AdaMax(...)",
    "RMSprop": "fluxpy.RMSProp(...)",
}
# Other words -> what to write.
ELSEWHERE = {
    **TORCH_RULES,
    **dict.fromkeys(("Chain", "chain", "Sequential"), "fluxpy.OptimiserChain(...)"),
    **dict.fromkeys(("Optimiser", "Optimizer"), "fluxpy.setup(rule, model), and fluxpy.update"),
    **dict.fromkeys(("clip_grad_norm_", "clip_grad_norm", "GradientClipping"), "fluxpy.ClipGlobalNorm(...) in a chain"),
    **dict.fromkeys(("clip_grad_value_", "ClipValue"), "fluxpy.ClipGrad(...) in a chain"),
    **dict.fromkeys(
        ("lr_scheduler", "LRScheduler", "LambdaLR", "StepLR", "CosineAnnealingLR", "OneCycleLR", "SequentialLR"),
        "fluxpy.schedules, and Adam(lr=schedule)",
    ),
    "unfreeze": "fluxpy.thaw",
    **dict.fromkeys(("EMA", "ema", "AveragedModel", "swa_utils"), "fluxpy.Averaged(rule)"),
    **dict.fromkeys(("grad", "value_and_grad"), "fluxpy.gradient or fluxpy.withgradient"),
    **dict.fromkeys(("fmap", "map"), "fluxpy.tree_map"),
    **dict.fromkeys(("fit", "Trainer"), "fluxpy.Learner(model, loss, rule).fit(...), or fluxpy.train"),
}

# Messages of the core; what stands in braces is filled in there.
CHANGED_FORM = "the model does not fit the state: {!r} was {} at setup and is now {}; {}, else call setup again"
OF_DTENSORS = "of a parameter that is spread over processes give the DTensor itself, not to_local() of it"
COPY_STAYS = (
    "a copy of the model would go on with the old numbers. Update in place, or take the parameters as a dict of "
    "tensors, with torch.func.functional_call"
)
EVALUATION_WEIGHTS = (
    "{} is refused within fluxpy.averaged(...), and between eval() and train() of a TorchOptimizer: the parameters "
    "hold the weights to evaluate with; do it after that"
)
FLAGS_CHANGED = (
    "requires_grad of {} was changed after setup, and is not looked at: the state decides what trains. Write "
    "fluxpy.thaw or fluxpy.freeze of that branch of the state"
)
HIDDEN_PARAMETERS = (
    "reentrant activation checkpointing hides parameters from the gradient; pass use_reentrant=False to "
    "torch.utils.checkpoint"
)
MAKES_NO_MODULE = (
    "torch.compile cannot make modules: inside it, a pure update takes the parameters as a dict of tensors "
    "(dict(model.named_parameters()), with torch.func.functional_call), or compile the loss alone"
)
MOMENTA_ELSEWHERE = (
    "the momenta of {!r} are on {}, the parameter on {}: after model.to(...) write fluxpy.follow(state, model)"
)
NEW_TENSORS = (
    "setup(..., keep=): {} are new tensors of the old shape, and go on with the old momenta and counts; fluxpy.reset "
    "that branch for them to start anew"
)
NO_BRANCH = (
    "a slice or a selection of the state has no matching branch of a model; pass the whole state or a branch of it "
    "(frozen leaves are passed by)"
)
OF_NO_PARAMETER = (
    "was it detached, computed under no_grad or inference_mode, or from another model? Reentrant activation "
    "checkpointing hides parameters too: pass use_reentrant=False to torch.utils.checkpoint"
)
OTHER_OBJECT = (
    "an object of the class {}, in which nobody can look for parameters; make that an nn.Module, or a dataclass that "
    "optree knows: @optree.dataclasses.dataclass(namespace='fluxpy')"
)
PURE_SPREAD = (
    "update(..., inplace=False) is for one process: a model whose parameters are spread over processes cannot be "
    "copied; update it in place"
)
RECORDED = (
    "{} updates in a row were recorded to differentiate through them, and all are kept in memory. If that is not "
    "wanted: detach the parameters, update in place, or update inside torch.no_grad()"
)
SAME_MEMORY = (
    "the parameters {!r} and {!r} are in the same memory, which an update would step twice; tie them by using one "
    "Parameter at both places, or clone one"
)
SPREAD_OUTSIDE = (
    "parameters that are spread over processes are updated outside of torch.func, torch.compile and inference_mode"
)
UNWRITABLE = "{!r} cannot be written in place (expanded, or made in inference mode); clone it first"


def dtype_name(dtype: object) -> str:
    """A dtype without its module: `float32`."""
    return str(dtype).removeprefix("torch.")


def form(shape: Iterable[int], dtype: object) -> str:
    """A tensor's form: `float32[2, 3]`."""
    return f"{dtype_name(dtype)}{list(shape)}"


def named(x: object) -> str:
    """What was given where a rule belongs, and the words for it here."""
    module = getattr(x if isinstance(x, type) else type(x), "__module__", "")
    name = x.__name__ if isinstance(x, type) else type(x).__name__
    if module.startswith("torch.optim.lr_scheduler"):
        return f"torch's {name}; a schedule is a function of the count: see fluxpy.schedules, and Adam(lr=schedule)"
    if module.startswith("torch.optim"):
        return f"torch's {name}; write {TORCH_RULES.get(name, 'fluxpy.' + name + '(...)')}"
    if isinstance(x, type):
        return f"the class {name}; write {name}()"
    if isinstance(x, list | tuple):
        return f"a {name}; write fluxpy.OptimiserChain(*rules)"
    if isinstance(x, int | float):
        return f"{x!r}; write fluxpy.Adam({x!r})"
    return repr(x) if len(repr(x)) <= 80 else f"an object of type {name}"


def join(path: str, key: object) -> str:
    """The path of a child."""
    return f"{path}.{key}" if path else str(key)


def bare_name(name: str) -> str:
    """The name of a parameter without what wrappers put into it."""
    return name.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "").removeprefix("module.")


def names_of(keys: Iterable[object]) -> str:
    """The first few names, and how many there are."""
    names = [repr(key) for key in keys]
    return ", ".join(names[:8]) + (f", ... ({len(names)} in all)" if len(names) > 8 else "") if names else "none"


def near(name: object, names: Iterable[str]) -> str:
    """The end of a message about an unknown name: what was perhaps meant, or what there is."""
    names = list(names)
    close = difflib.get_close_matches(str(name), names, n=3)
    return f"did you mean {' or '.join(map(repr, close))}?" if close else f"there is: {names_of(names)}"


def near_pattern(pattern: Any, paths: Iterable[str]) -> str:
    """`near` for a pattern that matches no path. Perhaps it matches branches, and what is below them was meant."""
    paths, below = list(paths), f"{pattern}.*"
    if isinstance(pattern, str) and any(fnmatch.fnmatchcase(path, below) for path in paths):
        return f"that is no parameter but a branch: write {below!r}"
    return near(pattern, paths)


def elsewhere(name: str, modules: Iterable[Any]) -> str:
    """The end of a message about a name that the package does not have: what it is called here, or where it is. (What
    is near it Python says.)"""
    if name in ELSEWHERE:
        return f"; write {ELSEWHERE[name]}"
    for module in modules:
        if getattr(getattr(module, name, None), "__module__", "").startswith("fluxpy."):
            return f"; it is {module.__name__}.{name}"
    return ""


def no_value(name: str, given: Any) -> str:
    """The message for a class or a rule that `adjust` is given as a hyperparameter."""
    if isinstance(given, type):
        return f"adjust got the class {given.__name__} for {name!r}; write {given.__name__}(...)"
    return (
        "adjust changes hyperparameters, and no rules. Another rule for some leaves: fluxpy.setup(rule, model, "
        "keep=fluxpy.select(state, ...)), where keep has the others"
    )


def no_effect(pattern: str, before: Iterable[str]) -> str:
    """The warning of a pattern for which those before it left nothing."""
    return (
        f"setup: the pattern {pattern!r} has no effect: all that it matches is taken by "
        f"{names_of(dict.fromkeys(before))} before it, and the first match wins. Put {pattern!r} first, or leave it out"
    )


def hidden_total(outer: str, inner: str) -> str:
    """The message for a rule that runs another by `apply`, where no total over all arrays can be had."""
    return (
        f"{outer} runs the rules inside by apply, on one array, but {inner} there needs a total: write steps(self, "
        "state, x, dx) in place of apply, and in it state, change = yield from self.rule.steps(state, x, dx)"
    )


def not_dense(path: str, layout: object) -> str:
    """The message for a parameter of another layout than the strided one."""
    return (
        f"the parameter {path!r} is no dense tensor ({layout}), and no rule steps such. Where it is not to train, let "
        "the module hold it by register_buffer, or pass it to the loss beside the model; else make it to_dense()"
    )


def starts_anew(changed: list[str]) -> str:
    """The message for leaves, a line for each, that `setup(keep=)` cannot keep."""
    return (
        f"setup(keep=) starts anew where shape or dtype changed: {'; '.join(changed[:8])}"
        f"{f' ({len(changed)} in all)' if len(changed) > 8 else ''}. Rows that are still meant can keep their momenta: "
        "change the old model and state together by fluxpy.surgery (take, grow)"
    )


def hidden_window(outer: str) -> str:
    """The message for a rule around one that accumulates, which does not pass that on."""
    return (
        f"{outer} hides that AccumGrad inside accumulates, so flush and leaves without a gradient would pass it by: "
        f"write OptimiserChain(AccumGrad(...), {outer}(...))"
    )


def meant(name: str, names: Collection[str]) -> str | None:
    """Which of these names of hyperparameters is meant, by this name or by another library's."""
    return next((word for word in (name, *WORDS.get(name, ())) if word in names), None)


def unknown(title: str, have: Iterable[str], name: str) -> str:
    """The message for a hyperparameter that a rule does not have."""
    have = list(dict.fromkeys(have))
    known, instead = meant(name, have), meant(name, INSTEAD)
    hint = f"here it is called {known!r}" if known else INSTEAD[instead] if instead else near(name, have)
    return f"{title} has no hyperparameter {name!r}; {hint}"


def outside() -> int:
    """The `stacklevel` for a warning from where this is called to tell the first line that is not of this package."""
    frame, level = inspect.currentframe(), 0
    while frame is not None and frame.f_globals.get("__name__", "").split(".")[0] in ("fluxpy", "contextlib"):
        frame, level = frame.f_back, level + 1
    return level


def note(error: BaseException, where: str) -> None:
    """Add to an error where it happened; `torch.compile` cannot follow that."""
    if not torch.compiler.is_compiling():
        error.add_note(where)


def html_table(header: Iterable[object], rows: Iterable[Iterable[object]], caption: str = "") -> str:
    """A table for a notebook. Cells are text, and are escaped; those that are numbers are set to the right.

    >>> html_table(["epoch", "loss"], [[0, "0.25"]])  # doctest: +ELLIPSIS
    '<table><thead><tr><th...>epoch</th><th...>loss</th></tr></thead><tbody><tr><td...>0</td><td...>0.25</td></tr>...'
    """

    def line(kind: str, cells: Iterable[object]) -> str:
        return "<tr>" + "".join(f"<{kind}{_style(str(c))}>{html.escape(str(c))}</{kind}>" for c in cells) + "</tr>"

    head = f"<caption>{html.escape(caption)}</caption>" if caption else ""
    body = "".join(line("td", row) for row in rows)
    return f"<table>{head}<thead>{line('th', header)}</thead><tbody>{body}</tbody></table>"


def _style(cell: str) -> str:
    number = cell.replace(",", "").removeprefix("-").replace(".", "", 1).replace("e-", "", 1).isdigit()
    return f' style="text-align: {"right" if number else "left"}"'


class Table(str):
    """Text in columns that a notebook shows as a table. The columns numbered in `right` are set to the right, and so is
    the end of the line below the table, `foot`, which has a beginning and an end."""

    __slots__ = ("_parts",)
    _parts: tuple[list[str], list[list[str]], tuple[str, str], Any]

    def __new__(
        cls, header: Iterable[str], rows: Iterable[Iterable[str]], foot: tuple[str, str] = ("", ""), right: Any = ()
    ) -> "Table":
        head, body = list(header), list(map(list, rows))
        widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
        sides = ["rjust" if i in right else "ljust" for i in range(len(head))]
        lines = [
            "  ".join(getattr(cell, side)(width) for cell, side, width in zip(row, sides, widths, strict=True)).rstrip()
            for row in (head, *body)
        ]
        if any(foot):
            lines.append(foot[0] + foot[1].rjust(max(map(len, lines)) - len(foot[0])))
        table = super().__new__(cls, "\n".join(lines))
        table._parts = head, body, foot, right
        return table

    def __reduce__(self) -> Any:
        return Table, self._parts

    def _repr_html_(self) -> str:
        head, body, foot, _ = self._parts
        return html_table(head, body, " ".join(filter(None, foot)))

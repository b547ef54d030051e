"""explain: a rule in words, with what is likely a mistake in it."""

import inspect
import re
from collections.abc import Iterator

from .rule import Rule, all_hyperparameters
from .rules import AccumGrad, ClipGlobalNorm, ClipGrad, ClipNorm, OptimiserChain, SignDecay, WeightDecay


def explain(rule: Rule) -> str:
    """What a rule does to a gradient `dx` of a parameter `x`: each member of a chain in order, with its formula, and a
    warning for each order or choice that is likely a mistake.

    The formula of a rule is the first sentence of its docstring, your own rules' too.

    >>> print(explain(OptimiserChain(Adam(0.01), WeightDecay(0.1))))
    1. Adam(lr=0.01, betas=(0.9, 0.999), eps=1e-08)
       Adam [Kingma & Ba 2015]: `lr · m̂ / (√v̂ + eps)`, with `m̂`, `v̂` free of the bias towards their start at zero.
    2. WeightDecay(weight_decay=0.1)
       `dx + weight_decay · x`: the gradient of a loss with `weight_decay / 2 · Σx²` added (L2, ridge).
    then x becomes x - dx
    warning: WeightDecay stands behind Adam, so no rate scales it; put it in front, or take AdamW
    """
    if not isinstance(rule, Rule):
        raise TypeError(f"explain takes a rule, but got {type(rule).__name__}; of a state, explain(leaf.rule)")
    members = list(_members(rule))
    lines = []
    for number, member in enumerate(members, 1):
        lines += [f"{number}. {member!r}", f"   {_sentence(member)}"]
    lines.append("then x becomes x - dx")
    return "\n".join([*lines, *(f"warning: {text}" for text in dict.fromkeys(_warnings(members)))])


def _members(rule: Rule) -> Iterator[Rule]:
    """The links of a chain, chains within it opened; a rule around others is one link."""
    if isinstance(rule, OptimiserChain):
        for inner in rule.rules:
            yield from _members(inner)
    else:
        yield rule


def _sentence(rule: Rule) -> str:
    text = inspect.cleandoc(type(rule).__doc__ or "").split("\n\n")[0].replace("\n", " ")
    return re.split(r"(?<=(?<! al)\.) ", text)[0] if text else "(its class has no docstring)"  # not after "et al."


def _steps(rule: Rule) -> bool:
    """Whether a rule makes a step of a gradient: it has a rate."""
    return "lr" in all_hyperparameters(rule)


def _warnings(members: list[Rule]) -> Iterator[str]:
    step: Rule | None = None
    for place, rule in enumerate(members):
        name = type(rule).__name__
        if step is not None:
            before = type(step).__name__
            if isinstance(rule, WeightDecay | SignDecay):
                yield f"{name} stands behind {before}, so no rate scales it; put it in front, or take AdamW"
            elif isinstance(rule, ClipGrad | ClipNorm):
                yield f"{name} stands behind {before}: it bounds the step and not the gradient; put it in front"
            elif _steps(rule):
                yield f"{before} and {name} both have a rate: the step is their product; `adjust` needs member="
        if isinstance(rule, AccumGrad) and place > 0:
            yield f"{name} is not first: {type(members[place - 1]).__name__} acts on each gradient before the mean"
        if isinstance(rule, ClipNorm) and not isinstance(rule, ClipGlobalNorm):
            yield f"{name} clips each array by itself; clip_grad_norm_ of PyTorch is ClipGlobalNorm"
        if _steps(rule) and step is None:
            step = rule
    if members and step is None:
        yield "no member has a rate: x moves by the whole of dx; end with a step such as Adam()"

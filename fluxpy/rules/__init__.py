"""The rules: each an algorithm written once, on one tensor; and what one needs to write one's own."""

from ..fields import hyper
from ..rule import Assign, Reduce, ReducingRule, Rule, Steps
from .adam import AdaBelief, Adam, AdaMax, AdamW, AMSGrad, NAdam, OAdam, RAdam
from .adaptive import AdaDelta, AdaGrad, RMSProp
from .clip import ClipGlobalNorm, ClipGrad, ClipNorm
from .decay import SignDecay, WeightDecay
from .descent import Descent, Momentum, Nesterov
from .sign import Lion, Rprop
from .wrap import AccumGrad, MixedPrecision, OptimiserChain

__all__ = [
    "AMSGrad",
    "AccumGrad",
    "AdaBelief",
    "AdaDelta",
    "AdaGrad",
    "AdaMax",
    "Adam",
    "AdamW",
    "Assign",
    "ClipGlobalNorm",
    "ClipGrad",
    "ClipNorm",
    "Descent",
    "Lion",
    "MixedPrecision",
    "Momentum",
    "NAdam",
    "Nesterov",
    "OAdam",
    "OptimiserChain",
    "RAdam",
    "RMSProp",
    "Reduce",
    "ReducingRule",
    "Rprop",
    "Rule",
    "SignDecay",
    "Steps",
    "WeightDecay",
    "hyper",
]

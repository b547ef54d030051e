"""The rules: each an algorithm written once, on one tensor."""

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
    "Rprop",
    "SignDecay",
    "WeightDecay",
]

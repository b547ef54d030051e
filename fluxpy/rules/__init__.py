"""The rules: each an algorithm written once, on one tensor; and what one needs to write one's own."""

# For rule writers: public here, and not in `fluxpy` itself.
from ..fields import hyper as hyper
from ..rule import Assign as Assign
from ..rule import Reduce as Reduce
from ..rule import ReducingRule as ReducingRule
from ..rule import Rule
from ..rule import Steps as Steps
from .adafactor import Adafactor
from .adam import ADOPT, AdaBelief, Adam, AdaMax, AdamW, AdEMAMix, AMSGrad, NAdam, OAdam, RAdam
from .adaptive import AdaDelta, AdaGrad, RMSProp
from .around import Cautious, Lookahead
from .clip import ClipGlobalNorm, ClipGrad, ClipNorm
from .decay import SignDecay, WeightDecay
from .descent import Descent, Momentum, Nesterov
from .lowered import Lowered
from .muon import Muon
from .prodigy import Prodigy
from .rounding import StochasticRounding
from .schedule_free import ScheduleFreeAdamW, ScheduleFreeSGD
from .sign import Lion, Rprop
from .wrap import AccumGrad, Averaged, MixedPrecision, OptimiserChain

# These are names of `fluxpy` too, and on the API page.
__all__ = [
    "ADOPT",
    "AMSGrad",
    "AccumGrad",
    "AdEMAMix",
    "AdaBelief",
    "AdaDelta",
    "AdaGrad",
    "AdaMax",
    "Adafactor",
    "Adam",
    "AdamW",
    "Averaged",
    "Cautious",
    "ClipGlobalNorm",
    "ClipGrad",
    "ClipNorm",
    "Descent",
    "Lion",
    "Lookahead",
    "Lowered",
    "MixedPrecision",
    "Momentum",
    "Muon",
    "NAdam",
    "Nesterov",
    "OAdam",
    "OptimiserChain",
    "Prodigy",
    "RAdam",
    "RMSProp",
    "Rprop",
    "Rule",
    "ScheduleFreeAdamW",
    "ScheduleFreeSGD",
    "SignDecay",
    "StochasticRounding",
    "WeightDecay",
]

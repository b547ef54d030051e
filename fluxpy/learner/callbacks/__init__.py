"""The callbacks in the box."""

from typing import Any

from .checkpoint import Checkpoint
from .csv_logger import CSVLogger
from .freezing import FreezeUntil, ThawFromTop, discriminative_rates
from .lr_find import LRFind, lr_find
from .progress import ProgressBar
from .scheduler import LearningRateScheduler
from .statistics import StatisticsRecorder
from .stopping import EarlyStopping, StopOnNaN
from .tensorboard import TensorBoardLogger

__all__ = [
    "CSVLogger",
    "Checkpoint",
    "EarlyStopping",
    "FreezeUntil",
    "LRFind",
    "LearningRateScheduler",
    "ProgressBar",
    "StatisticsRecorder",
    "StopOnNaN",
    "TensorBoardLogger",
    "ThawFromTop",
    "defaults",
    "discriminative_rates",
    "lr_find",
]


def defaults() -> list[Any]:
    """Those that a Learner has without being asked, in their order."""
    return [ProgressBar()]

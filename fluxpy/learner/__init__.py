"""The Learner: training with events, metrics and callbacks."""

from .callbacks.checkpoint import Checkpoint
from .callbacks.freezing import FreezeUntil, ThawFromTop, discriminative_rates
from .callbacks.lr_find import LRFind, lr_find
from .callbacks.progress_bar import ProgressBar
from .callbacks.records import CSVLogger, StatisticsRecorder
from .callbacks.scheduler import LearningRateScheduler
from .callbacks.stopping import EarlyStopping, ReduceOnPlateau, StopOnNaN
from .callbacks.tensorboard import TensorBoardLogger
from .events import (
    EVENTS,
    Callback,
    Cancel,
    CancelBatch,
    CancelEpoch,
    CancelFit,
    CancelTraining,
    CancelValidation,
    History,
)
from .learner import Learner
from .metrics import Accuracy, Loss, MatthewsCorrelationCoefficient, Metric, Perplexity, Top5Accuracy
from .progress import Progress, Step

__all__ = [
    "Accuracy",
    "CSVLogger",
    "Callback",
    "Cancel",
    "CancelBatch",
    "CancelEpoch",
    "CancelFit",
    "CancelTraining",
    "CancelValidation",
    "Checkpoint",
    "EVENTS",
    "EarlyStopping",
    "FreezeUntil",
    "History",
    "LRFind",
    "Learner",
    "LearningRateScheduler",
    "Loss",
    "MatthewsCorrelationCoefficient",
    "Metric",
    "Perplexity",
    "Progress",
    "ProgressBar",
    "ReduceOnPlateau",
    "StatisticsRecorder",
    "Step",
    "StopOnNaN",
    "TensorBoardLogger",
    "ThawFromTop",
    "Top5Accuracy",
    "discriminative_rates",
    "lr_find",
]

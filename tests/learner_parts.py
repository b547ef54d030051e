"""What tests of the Learner share: one that shows no progress, and a small model."""

import torch
from torch import nn

import fluxpy.learner


def Learner(*args, **kwargs):
    return fluxpy.learner.Learner(*args, default_callbacks=False, **kwargs)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 4))

"""Saving and loading: a state tree as plain data by name, and a whole run in one file.

file         writes and reads one file: whole or not at all, checked, never run; knows no model and no state
format       rules, schedules and momenta as plain data
decode       the way back, checked
dcp          what a state spread over processes gives to torch.distributed.checkpoint
state_dict   state_dict and load_state_dict: a whole tree by name
model        the tensors of a model by name
checkpoint   save and load: model, state and anything else in one file
"""

from .checkpoint import load, save
from .state_dict import Report, load_state_dict, state_dict

__all__ = ["Report", "load", "load_state_dict", "save", "state_dict"]

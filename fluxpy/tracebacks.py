"""Tracebacks: shorter where what went wrong is in the user's code."""

import os
from types import TracebackType

import torch

_HERE = os.path.dirname(__file__) + os.sep
_TORCH = os.path.dirname(torch.__file__) + os.sep


def leave_to_the_user(error: BaseException) -> None:
    """Leave this package's frames out of a traceback that ends in a function of the user's, or in what that called."""
    frames = list[TracebackType]()
    tb = error.__traceback__
    while tb is not None:
        frames.append(tb)
        tb = tb.tb_next
    files = [frame.tb_frame.f_code.co_filename for frame in frames]
    last = max((i for i, file in enumerate(files) if file.startswith(_HERE)), default=len(files))
    if all(file.startswith(_TORCH) for file in files[last + 1 :]):
        return  # it ends here, or in an operation that was called from here
    kept = [frame for frame, file in zip(frames, files, strict=True) if not file.startswith(_HERE)]
    chain: TracebackType | None = None
    for frame in reversed(kept):
        chain = TracebackType(chain, frame.tb_frame, frame.tb_lasti, frame.tb_lineno)
    error.__traceback__ = chain

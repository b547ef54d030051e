"""Step: the present batch."""

from dataclasses import dataclass
from typing import Any


@dataclass(slots=True, eq=False)
class Step:
    """What the present batch has so far; all None between batches.

    `input` and `target` are set before `batch_start`, where callbacks may change them; `output`, `loss` and `grads`
    before `update_start`, where they may change `grads`. In validation there are no `grads`, and `output` may be
    changed in `inference_prediction_end`. `samples` weights what the batch counts in metrics, and `weight`, which a
    step may set, in the mean of `accumulate`: by default how many targets count, or else the samples.
    """

    input: Any = None
    target: Any = None
    samples: int = 0
    weight: Any = None
    scored: Any = True  # whether metrics count it; on a device a flag that is not read; not where others go on alone
    output: Any = None
    loss: Any = None
    number: Any = None  # the loss, read: a plain number on the CPU
    grads: Any = None

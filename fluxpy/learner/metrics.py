"""Metrics over a phase: sums on the device, read only when asked for. All are right for batches of different sizes."""

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from .core import reads_at_once
from .progress import Step


class Metric:
    """A number over a phase, worked out from sums over its batches.

    Subclasses give `measure(step)`, what one batch adds to each sum, and `value(sums)`, the number from the totals.
    Sums may be numbers or tensors; on a device nothing is read before `value`, which gets plain numbers and lists.

    >>> class MeanAbsoluteError(Metric):
    ...     def measure(self, step):
    ...         return (step.output - step.target).abs().sum(), step.target.numel()
    """

    name: str = ""
    sums: tuple[Any, ...] = ()
    summed: ClassVar[bool] = True  # whether a process of several has numbers of its own
    adds_up = True  # whether those of several processes can be put together

    def measure(self, step: Any) -> tuple[Any, ...]:
        """What this batch adds to each sum."""
        raise NotImplementedError(f"{type(self).__name__} must give measure(step)")

    def value(self, sums: tuple[Any, ...]) -> float:
        """The number from the totals; by default the first over the second."""
        return sums[0] / sums[1] if sums[1] else math.nan

    def update(self, step: Any) -> None:
        """Add a batch."""
        added = self.measure(step)
        if step.scored is not True:
            added = tuple(torch.where(step.scored, a, 0) for a in added)
        # Build new sums: a caller may still hold the old ones.
        self.sums = tuple(a + b for a, b in zip(self.sums, added, strict=True)) if self.sums else added

    def pass_by(self) -> None:
        """Leave out a batch that only other processes have."""

    def reset(self) -> None:
        """Forget all batches."""
        self.sums = ()

    def peek(self) -> Any:
        """The present sums, not read from the device: `read` can make the number of them at any later time."""
        return self.sums

    def read(self, peeked: Any) -> float:
        """The number that belongs to what `peek` gave."""
        return float(self.value(tuple(s.tolist() if isinstance(s, Tensor) else s for s in peeked)))

    def total(self, every: list[Any]) -> Any:
        """What `peek` gave on each of several processes, together: the sums of their batches are added."""
        return tuple(map(sum, zip(*every, strict=True)))

    def state_dict(self) -> list[Any]:
        """The sums as plain data."""
        return list(self.peek())

    def load_state_dict(self, saved: list[Any], device: torch.device | None) -> None:
        """Take over what `state_dict` gave."""
        self.sums = tuple(s.to(device) if isinstance(s, Tensor) else s for s in saved)


def _loss(step: Any) -> Any:
    """The loss of a batch, which the Learner has read already."""
    return number(step.loss) if step.number is None else step.number


class Loss(Metric):
    """The mean loss per sample."""

    name = "loss"

    def measure(self, step: Any) -> tuple[Any, ...]:
        return _loss(step) * step.samples, step.samples


class Perplexity(Metric):
    """exp of the mean loss per token; the loss must be a mean over tokens, as `cross_entropy` gives it."""

    name = "perplexity"

    def __init__(self, ignore_index: int = -100) -> None:
        self.ignore_index = ignore_index

    def measure(self, step: Any) -> tuple[Any, ...]:
        tokens = number(counted(step.target, self.ignore_index).count_nonzero())
        return _loss(step) * tokens, tokens

    def value(self, sums: tuple[Any, ...]) -> float:
        mean = super().value(sums)
        return math.exp(mean) if mean < 709 else mean if math.isnan(mean) else math.inf


_SMALL = 1 << 16  # bytes of the output of a batch that may wait


class Accuracy(Metric):
    """The share of targets that are met, per element of the target: per sample, per token, per pixel.

    The output has scores for each class in one dimension more than the target, found by its shape (`dim` says which
    where two would fit). An output of the target's shape is one score for yes (above 0; a logit) or, where it has whole
    numbers, the class itself. Targets that equal `ignore_index` do not count.
    """

    name = "accuracy"

    def __init__(self, dim: int | None = None, ignore_index: int = -100) -> None:
        self.dim, self.ignore_index = dim, ignore_index
        self.waiting: list[tuple[Tensor, Tensor]] = []

    def update(self, step: Any) -> None:
        output, target = step.output, step.target
        if not self.sums:
            require_classes(target)
        if not self.sums or not (isinstance(output, Tensor) and output.ndim and output.nbytes < _SMALL):
            self.count_waiting()
            super().update(step)
            return
        # For a small batch its operations cost as much as for many, so small ones wait for each other.
        if self.waiting and (len(self.waiting) == 16 or self.waiting[0][0].shape[1:] != output.shape[1:]):
            self.count_waiting()
        self.waiting.append((output, target.clone()))  # who made the batch may use its memory again

    def count_waiting(self) -> None:
        """Count what waits."""
        if self.waiting:
            outputs, targets = zip(*self.waiting, strict=True)
            self.waiting = []
            super().update(Step(output=torch.cat(outputs), target=torch.cat(targets)))

    def reset(self) -> None:
        self.waiting = []
        super().reset()

    def peek(self) -> Any:
        self.count_waiting()
        return super().peek()

    def measure(self, step: Any) -> tuple[Any, ...]:
        predicted, target, _ = predictions(step.output, step.target, self.dim)
        return self.hits(predicted == target, target)

    def hits(self, met: Tensor, target: Tensor) -> tuple[Any, Any]:
        """How many targets are met, and how many count."""
        counts = counted(target, self.ignore_index)
        return number((met & counts).count_nonzero()), number(counts.count_nonzero())


class Top5Accuracy(Accuracy):
    """The share of targets that are among the five classes with the highest scores."""

    name = "top5_accuracy"

    def measure(self, step: Any) -> tuple[Any, ...]:
        dim = class_dim(step.output, step.target, self.dim)
        if dim is None:
            raise ValueError("top5_accuracy needs an output with scores for each class")
        best = step.output.topk(min(5, step.output.shape[dim]), dim).indices
        return self.hits((best == step.target.unsqueeze(dim)).any(dim), step.target)


class MatthewsCorrelationCoefficient(Accuracy):
    """How predicted and true classes go together, from -1 to 1; 0 where one of them never changes [Gorodkin 2004].

    Binary (one score per target, above 0 for yes) or with many classes.
    """

    name = "matthews_correlation_coefficient"

    def measure(self, step: Any) -> tuple[Any, ...]:
        predicted, target, classes = predictions(step.output, step.target, self.dim)
        if classes is None:
            raise ValueError(f"{self.name} needs scores for each class, or one score per target")
        counts = counted(target, self.ignore_index).flatten().long()
        predicted, target = predicted.flatten().long(), target.flatten().long() * counts
        zeros = counts.new_zeros(classes)
        hits = number(((predicted == target) * counts).sum())
        return hits, zeros.index_add(0, predicted, counts), zeros.index_add(0, target, counts)

    def value(self, sums: tuple[Any, ...]) -> float:
        hits, predicted, true = sums
        n = sum(true)
        covariance = hits * n - sum(p * t for p, t in zip(predicted, true, strict=True))
        variances = (n * n - sum(p * p for p in predicted)) * (n * n - sum(t * t for t in true))
        return covariance / math.sqrt(variances) if variances else 0.0


class Mean(Metric):
    """The mean of a function `(output, target) -> number` of each batch, weighted by its samples."""

    def __init__(self, function: Callable[[Any, Any], Any], name: str) -> None:
        self.function, self.name = function, name

    def measure(self, step: Any) -> tuple[Any, ...]:
        value = self.function(step.output, step.target)
        if isinstance(value, Tensor):
            if value.numel() != 1:
                raise ValueError(f"the metric {self.name!r} must give one number, but gave shape {tuple(value.shape)}")
            value = number(value.reshape(()))
        else:
            value = float(value)  # an error for what is no number comes now
        return value * step.samples, step.samples


class Outside(Metric):
    """An object with `update(output, target)`, `compute()` and `reset()`, as those of torchmetrics."""

    summed = False

    def __init__(self, metric: Any, name: str) -> None:
        self.metric, self.name = metric, name
        self.placed = not hasattr(metric, "to")
        self.adds_up = bool(getattr(metric, "sync_on_compute", False))  # those of torchmetrics do it by themselves

    def update(self, step: Any) -> None:
        if not self.placed and isinstance(step.output, Tensor):
            self.metric, self.placed = self.metric.to(step.output.device), True
        self.metric.update(step.output, step.target)

    def pass_by(self) -> None:
        self.metric._computed = None  # else it would not meet those of others, which compute anew

    def reset(self) -> None:
        self.metric.reset()

    def peek(self) -> Any:
        value = self.metric.compute()
        return value.clone() if isinstance(value, Tensor) else value

    def total(self, every: list[Any]) -> Any:
        return every[0]  # each is of all processes

    def read(self, peeked: Any) -> float:
        try:
            return float(peeked)
        except (TypeError, ValueError) as error:
            raise ValueError(f"the metric {self.name!r} must compute one number, but gave {peeked!r}") from error

    def state_dict(self) -> list[Any]:
        names = getattr(self.metric, "_defaults", None)  # how torchmetrics lists the states of a metric
        if names is not None:
            states = {name: getattr(self.metric, name) for name in names}
            return [{"states": states, "updates": self.metric._update_count}]
        return [self.metric.state_dict()] if hasattr(self.metric, "state_dict") else []

    def load_state_dict(self, saved: list[Any], device: torch.device | None) -> None:
        self.reset()
        if saved and hasattr(self.metric, "_defaults"):
            for name, value in saved[0]["states"].items():
                setattr(self.metric, name, value.to(device) if isinstance(value, Tensor) else value)
            self.metric._update_count, self.metric._computed = saved[0]["updates"], None
        elif saved:
            self.metric.load_state_dict(saved[0])


# --- What outputs and targets say -------------------------------------------------------------------------------------


def number(x: Tensor) -> Any:
    """A plain number where that costs nothing, else the tensor: adding numbers is faster and more exact."""
    x = x.detach()
    if reads_at_once(x):
        return x.item()
    return x.double() if x.is_floating_point() and x.device.type != "mps" else x


def class_dim(output: Any, target: Tensor, dim: int | None = None) -> int | None:
    """The dimension of the output that has the classes; None where the output has the target's shape."""
    if not isinstance(output, Tensor):
        raise TypeError(
            f"the output is of type {type(output).__name__}, and this metric takes a tensor of scores: let "
            "training_step return (loss, output.logits), or give a metric as a function (output, target) -> number"
        )
    if output.shape == target.shape:
        return None
    if output.ndim == target.ndim + 1:
        if dim is None:
            first = output.shape[:1] + output.shape[2:] == target.shape
            if first and output.ndim > 2 and output.shape[:-1] == target.shape:
                raise ValueError(
                    f"an output of shape {tuple(output.shape)} may have its classes in dimension 1 or in the last, for "
                    f"a target of shape {tuple(target.shape)}; say which: fluxpy.learner.Accuracy(dim=-1)"
                )
            dim = 1 if first else -1
        dim %= output.ndim
        if output.shape[:dim] + output.shape[dim + 1 :] == target.shape:
            return dim
    raise ValueError(
        f"an output of shape {tuple(output.shape)} does not fit a target of shape {tuple(target.shape)}: it must have "
        "scores for each class in one dimension more, or the target's own shape; or give a metric as a function"
    )


def predictions(output: Any, target: Tensor, dim: int | None = None) -> tuple[Tensor, Tensor, int | None]:
    """Predicted classes, targets of the same shape, and the number of classes (None where it cannot be told)."""
    if isinstance(output, Tensor) and output.ndim == target.ndim + 1 and output.shape[-1] == 1:
        output = output.squeeze(-1)  # one score for yes, as a last layer with one output gives it
    found = class_dim(output, target, dim)
    if found is not None:
        return output.argmax(found), target, output.shape[found]
    return (output > 0, target, 2) if output.is_floating_point() else (output, target, None)


def counted(target: Tensor, ignore_index: int) -> Tensor:
    """Which targets count: those that are not `ignore_index`. All, if their dtype cannot hold it; it would wrap."""
    if target.dtype == torch.bool:
        return torch.ones_like(target)
    if not target.is_floating_point():
        info = torch.iinfo(target.dtype)
        if not info.min <= ignore_index <= info.max:
            return torch.ones_like(target, dtype=torch.bool)
    return target != ignore_index


def require_classes(target: Tensor) -> None:
    """ValueError for targets that are no classes, as those of a regression. Reads them."""
    if target.is_floating_point() and not bool(((target == 0) | (target == 1)).all()):
        raise ValueError(
            f"the targets are {target.dtype} and not all 0 or 1, so they are no classes; give classes as whole numbers "
            "(target.long()), or a metric as a function (output, target) -> number"
        )

"""train: the loop everybody writes, as one function. It is meant to be read, copied and changed."""

import contextlib
import inspect
import math
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Never

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from tqdm.auto import tqdm

from .containers import open_data
from .context import reads_at_once
from .data import require_batches
from .distributed.parallel import is_first_process
from .gradient import LossFunction, Model, Value, differentiate
from .leaf import Leaf
from .pytree import level, unwrap
from .release import release_step
from .state import State, bind, leaves, require_state, tree_context
from .update import apply_gradients, check_finite


def train(
    loss: LossFunction[Model, Value],
    model: Model,
    data: Iterable[Any],
    state: State | Leaf,
    *,
    progress: bool | None = None,
    release: bool = False,
    **refused: Never,  # caught for a better message; a type checker refuses them all the same
) -> list[float]:
    """Train `model` once over `data`; returns the losses, each measured before its update.

    `loss(model, *batch)` where the batch is a tuple or list, else `loss(model, batch)`, as `withgradient` takes it.
    Batches are moved to the model's device. `progress` shows a bar with the running loss; by default where a person is
    watching. Modules are put into training mode, wholly frozen ones into evaluation mode. `release` steps within
    the backward pass, see `trainstep`. For epochs, call it again; for callbacks and metrics write the loop with
    `trainstep`, or take the `Learner`.

    Where the model runs on several processes each is given its own batches, as many as the others; losses are means
    over the processes, and the first of them shows the bar.

    Raises FloatingPointError with the item's index for a loss that is not finite, before that item updated anything,
    and ValueError for data without a batch, or of other lengths on other processes.

    >>> model = torch.nn.Linear(2, 1)
    >>> state = setup(Descent(0.1), model)
    >>> losses = train(lambda m, x, y: (m(x) - y).square().mean(), model, [(torch.ones(4, 2), torch.ones(4, 1))], state)
    >>> len(losses)
    1
    """
    _refuse(refused, data, state)
    _check_order(loss, model)
    binding = bind(state, model)
    require_parts_of_model(loss, binding.params)  # `trainstep` takes such: others may train them meanwhile
    if binding.parallel is not None:
        binding.parallel.require_same_length(data)
    training_mode(model, state)
    losses: list[Tensor] = []
    watched, drawn = is_first_process() and (_watched() if progress is None else progress), 0.0
    with tqdm(data, disable=not watched, unit="batch") as bar:
        for batch in bar:
            losses.append(_turn(loss, model, batch, state, release)[1])
            if reads_at_once(losses[-1]) and not math.isfinite(losses[-1].item()):
                break
            if watched and time.monotonic() > drawn + 0.1:  # reading the loss more often would make a device wait
                bar.set_postfix(loss=f"{torch.stack(losses[-100:]).mean().item():.4f}", refresh=False)
                drawn = time.monotonic()
    if not losses:
        raise ValueError("train got no batch: the data is empty, or an iterator that was used up before")
    numbers = torch.stack([x.reshape(()) for x in losses]).tolist()
    bad = next((i for i, number in enumerate(numbers) if not math.isfinite(number)), None)
    if bad is None:
        check_finite(state)
    else:
        with contextlib.suppress(FloatingPointError):  # the message below says more
            check_finite(state)
        raise FloatingPointError(f"the loss is {numbers[bad]} on item {bad} of the data; that item updated nothing")
    return numbers


def trainstep(
    loss: LossFunction[Model, Value], model: Model, batch: Any, state: State | Leaf, *, release: bool = False
) -> Value:
    """One turn of `train`: gradient and update on one batch. Returns what the loss returned, detached.

    Where the loss is not finite nothing is updated; the caller decides what to do. Where the model runs on several
    processes, none updates if the loss of one is not finite.

    With `release`, each parameter is stepped within the backward pass as soon as its gradient is there, and that is
    freed, so that only a few gradients exist at once. The numbers are the same. ValueError for what such a step cannot
    do: a rule that needs a total over all gradients (`ClipGlobalNorm`), `nonfinite="skip"`, several ranks. It is not
    all or nothing: where an error comes in the middle of the pass (in a rule, from a gradient that is not finite or
    sparse, an interrupt), each parameter is either stepped or as it was, with its momenta and its count, and a note
    says how many were stepped. `.grad` is as before. Where a loss uses a parameter detached besides, write
    `weight.detach().clone()`: it is stepped in the middle of the pass, and what reads it later, as a checkpoint that
    computes again, would get the new weights.
    """
    return _turn(loss, model, batch, state, release)[0]


def _turn(
    loss: LossFunction[Model, Value], model: Model, batch: Any, state: State | Leaf, release: bool
) -> tuple[Value, Tensor]:
    """What the loss returned; and the loss, on several processes their mean."""
    _check_order(loss, model)
    require_state(state, "trainstep")
    binding, context = bind(state, model), tree_context(state)
    context.require_training_weights(binding.records, "trainstep")
    batch = to_device(batch, binding.params)
    args = batch if isinstance(batch, tuple | list) else (batch,)
    try:
        if release:
            value = release_step(loss, model, args, binding, context)
            return value, value[0] if isinstance(value, tuple) else value
        value, grads = differentiate(loss, model, args, binding)
    except (TypeError, RuntimeError, AttributeError) as error:
        for note in why_it_failed(error, loss, (model, *args), binding.params):
            error.add_note(note)
        raise
    number = value[0] if isinstance(value, tuple) else value
    if binding.parallel is not None:
        number = binding.parallel.mean(number)
    if not reads_at_once(number):
        context.flag.require(number.isfinite(), context.updates, "the loss")
    elif not math.isfinite(number.item()):
        return value, number
    apply_gradients(binding, context, grads)
    return value, number


def _check_order(loss: Any, model: Any) -> None:
    if isinstance(loss, type):
        raise TypeError(f"the loss is called as loss(model, *batch), and the class {loss.__name__} is no such function")
    if isinstance(loss, nn.Module) and not isinstance(model, nn.Module) and callable(model):
        raise TypeError(
            "the loss comes first, then the model: train(loss, model, data, state), with loss(model, *batch)"
        )


def require_parts_of_model(loss: Any, params: Sequence[Tensor]) -> None:
    """ValueError for a loss with parameters of its own, which no update would reach."""
    own = {name: x for name, x in loss.named_parameters() if x.requires_grad} if isinstance(loss, nn.Module) else {}
    known = {id(x) for x in params} if own else set()
    lost = [name for name, x in own.items() if id(x) not in known]
    if lost:
        raise ValueError(
            f"the loss {type(loss).__name__} has parameters that are not the model's, so nothing would train them: "
            f"{', '.join(lost[:3])}{', ...' * (len(lost) > 3)}. Make it a part of the model before setup, as in "
            "model.criterion = loss (an nn.Sequential would call it: put a module around both); or, where they are to "
            "stay as they are, loss.requires_grad_(False)"
        )


def why_it_failed(error: Exception, loss: Any, args: Sequence[Any], params: Sequence[Tensor]) -> Iterator[str]:
    """What may be behind an error from within a loss, which is called as loss(model, *batch), or if it is None, as
    loss(output, target): another signature, another output, batches of NumPy arrays, or batches in float64."""
    kind = type(args[0]).__name__
    if loss is None and not isinstance(args[0], Tensor | None):
        example = "lambda output, target: cross_entropy(output.logits, target)"
        yield f"the loss gets the output as it is, of type {kind}: {example}"
    if (
        loss is not None
        and isinstance(error, TypeError | AttributeError)
        and (not takes(loss, *args) or any(text in str(error) for text in (f"not {kind}", f"'{kind}' object has no")))
    ):
        yield "the loss is called as loss(model, *batch), as in: lambda m, x, y: cross_entropy(m(x), y)"
    inside = [part for arg in args for part in (arg if isinstance(arg, tuple | list) else (arg,))]
    if any(isinstance(part, np.ndarray) for part in inside):
        yield "the batch has NumPy arrays: fluxpy.DataLoader((X, Y)) gives tensors, torch.from_numpy(x) one"
    doubles = any(isinstance(part, Tensor) and part.dtype == torch.float64 for part in inside)
    if doubles and "dtype" in str(error) and not any(x.dtype == torch.float64 for x in params):
        yield "the batch is float64, as NumPy's numbers are, and the model is not: X.astype('float32'), or x.float()"


def takes(f: Any, *args: Any) -> bool:
    """Whether a function can be called with these arguments, as far as can be told."""
    try:
        inspect.signature(f.forward if isinstance(f, nn.Module) else f).bind(*args)
    except TypeError:
        return False
    except ValueError:  # it has no signature to look at
        return True
    return True


def training_mode(model: Any, state: State | Leaf) -> None:
    """Put modules into training mode, and those that are wholly frozen into evaluation mode, each in its own way."""

    def visit(x: Any, state: Any, outer: bool) -> None:
        frozen = [leaf.frozen for _, leaf in leaves(state)]
        if isinstance(x, nn.Module):
            if frozen and all(frozen):
                x.eval()
                return
            if not outer:
                x.train()  # with all that is in it, as the module itself would have it
            if not any(frozen):
                return
            outer = True
        x = unwrap(x)
        inside = level(x)
        for key, child in zip(inside.keys, inside.children, strict=True) if inside else ():
            visit(child, state[key], outer)

    visit(model, state, False)


def to_device(batch: Any, params: list[Tensor]) -> Any:
    """The batch with its tensors on the parameters' device; ValueError where these are on several."""
    devices = {x.device for x in params}
    if len(devices) > 1 and open_data(batch)[0]:
        raise ValueError(
            f"cannot tell the batch's device: the model's parameters are on {', '.join(sorted(map(str, devices)))}; "
            "write the loop with withgradient and update, and place the batch there"
        )
    return place(batch, devices.pop() if len(devices) == 1 else None)


def place(batch: Any, device: torch.device | None) -> Any:
    """A batch with its tensors on the device; from pinned memory without waiting."""
    if device is None:
        return batch
    if isinstance(batch, Tensor):
        return batch if batch.device == device else batch.to(device, non_blocking=batch.is_pinned())
    if type(batch) in (tuple, list):
        return type(batch)([place(part, device) for part in batch])
    if type(batch) is dict:
        return {name: place(part, device) for name, part in batch.items()}
    if isinstance(batch, PackedSequence):  # a part of which stays on the CPU
        return batch.to(device)  # pyright: ignore[reportArgumentType]
    tensors, opened = open_data(batch)
    if not tensors and callable(getattr(batch, "to", None)):  # it knows better what it holds
        return batch.to(device)
    if all(t.device == device for t in tensors):
        return batch
    return opened.combine(place(t, device) for t in tensors)


def is_terminal(stream: Any) -> bool:
    """Whether a person watches a stream; one of somebody's own may have no more than `write`."""
    return bool(getattr(stream, "isatty", bool)())


def _watched() -> bool:
    return is_terminal(sys.stderr) or "ipykernel" in sys.modules


def _refuse(refused: dict[str, Any], data: Any, state: Any) -> None:
    if refused:
        name = next(iter(refused))
        hints = {
            "callbacks": "; callbacks are for fluxpy.Learner, or write the loop with trainstep",
            "epochs": "; it goes over the data once, so call it for each epoch",
        }
        hint = hints.get("callbacks" if name == "cb" else name, "")
        raise TypeError(f"train has no argument {name!r}{hint}")
    require_state(state, "train")
    require_batches(data, "the data of train")

"""update: one step of every leaf, all or nothing.

In place, a plan of the engine does it, made at the first update and kept. A pure update steps copies by a copy of the
plan. Where one may differentiate through it, it runs the reference path: each rule's `apply`, leaf by leaf.
"""

import warnings
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, TypeVar

import torch
from torch import Tensor

from .binding import Binding, Bindings
from .context import Context, SkipUpdate
from .distributed.gathered import unit_alone
from .distributed.sharding import local_gradients
from .distributed.totals import Totals
from .engine.cohort import Member
from .engine.layout import Extents, addresses, clone_all, is_dense
from .engine.plan import Plan, Route
from .engine.reference import ReferenceUnit
from .engine.step import FallBack, Unit, run_to_results
from .grads import in_order
from .initial import catch_up
from .leaf import Leaf, Record, miss_update, rules_of
from .pytree import is_forward_mode, is_transforming, is_wrapped, memories, memory, uncast, unwritable
from .rebuild import Copies, as_parameter, like_parameter, rebuild
from .rule import tensors_of
from .state import AnyState, State, bind, require_state, shape_of, tree_context
from .text import CHANGED_FORM, MOMENTA_ELSEWHERE, PURE_SPREAD, RECORDED, SAME_MEMORY, SPREAD_OUTSIDE, UNWRITABLE, form

Model = TypeVar("Model")
_MANY = 100  # updates to differentiate through


def update(state: AnyState, model: Model, grads: Any = None, *, inplace: bool = True) -> tuple[AnyState, Model]:
    """One step: apply each leaf's rule to its parameter and gradient. Returns `(state, model)`.

    `grads` is what `gradient` returns; or a pytree like the model; or a dict by dotted name, as `torch.func.grad` over
    `functional_call` gives; or None: each parameter's `.grad`. Gradients are read, never written. A leaf without one
    is not stepped, nor is a frozen one: parameter, momenta and count stay as they are, bit for bit.

    In place, parameters and momenta are written where they are, and the same objects are returned. With
    `inplace=False` nothing given is changed and new ones are returned (of a module a structural copy: new parameters,
    cloned buffers, the rest shared). Where gradients, hyperparameters, momenta or parameters carry autograd history,
    so do the results: one can differentiate through the step.

    All or nothing: where anything raises, parameters and state are what they were. ValueError names the place where
    structure, shape, dtype or device do not fit. FloatingPointError comes from clipping rules (see `ClipNorm`).

    >>> model = {"w": torch.ones(2)}
    >>> state = setup(Descent(0.1), model)
    >>> state, model = update(state, model, {"w": torch.tensor([1.0, 2.0])})
    >>> model["w"]
    tensor([0.9000, 0.8000])
    """
    require_state(state, "update")
    binding, context = bind(state, model), tree_context(state)
    context.require_training_weights(binding.records, "update")
    if inplace:
        apply_gradients(binding, context, grads)
        return state, model
    if binding.spread:
        raise ValueError(PURE_SPREAD)
    return _pure(state, binding, context, model, grads)


def apply_gradients(binding: Binding, context: Context, grads: Any) -> None:
    """`update` in place of a model whose parameters are known."""
    parallel = binding.parallel
    if grads is None and parallel is not None and parallel.replicas:  # what a backward pass left
        parallel.require_averages([not record.frozen for record in binding.records])
    found = in_order(binding, grads)
    if binding.off_at_setup:
        binding.look_at_flags()
    grad_enabled = torch.is_grad_enabled()
    try:
        torch.set_grad_enabled(False)  # as a context it would cost a tenth of a small model's update
        if context.late is not None:
            context.settle()
        if binding.spread:
            found = _local(binding, found)
        if is_transforming() or is_forward_mode():  # nothing may be kept for the next step
            _check(binding, found, inplace=True)
            _reference_step(binding, context, found)
        elif torch.is_inference_mode_enabled():
            _step_in_inference_mode(binding, context, found)
        else:
            _step(binding, context, found)
            torch.clear_autocast_cache()  # an autocast around the loop holds casts of the old weights
    except SkipUpdate:
        pass
    finally:
        torch.set_grad_enabled(grad_enabled)
        context.flag.lower()
    context.updates += 1


def require_steppable(binding: Binding) -> None:
    """ValueError, with the path, for a parameter that does not fit the state or cannot be written."""
    _check(binding, [None] * len(binding.params), inplace=True)


def step_alone(binding: Binding, context: Context, grads: list[Any]) -> None:
    """Step some parameters in place, as a part of one update."""
    with torch.no_grad():
        _step(binding, context, grads)


def flush(state: AnyState, model: Model) -> tuple[AnyState, Model]:
    """End the window of `AccumGrad` now, in place: step by the mean over the updates that it holds. Returns
    `(state, model)`.

    For the end of the data, where a window is only partly filled: each leaf is stepped by the sum of its gradients over
    the number of updates in the window, and a new window begins. A window that holds nothing stays as it is, and so do
    leaves whose rules do not accumulate. As at the end of a full window, what frozen leaves hold is dropped. Takes the
    view that `update` was called with, and is as `update` in all else: all or nothing, and no count but of those leaves
    that are stepped.

    >>> model = {"w": torch.ones(2)}
    >>> state = setup(OptimiserChain(AccumGrad(4), Descent(0.1)), model)
    >>> for _ in range(3):
    ...     _ = update(state, model, {"w": torch.tensor([1.0, 2.0])})
    >>> _ = flush(state, model)
    >>> model["w"]
    tensor([0.9000, 0.8000])
    """
    require_state(state, "flush")
    binding, context = bind(state, model), tree_context(state)
    context.require_training_weights(binding.records, "flush")
    context.settle()
    rules = {id(r.rule): r.rule for r in binding.records if r.rule is not None and r.rule.accumulates}
    if not rules:
        return state, model
    ends = {key: rule.flushing() for key, rule in rules.items()}
    records = [record for record in binding.records if id(record.rule) in ends]
    grads: list[Any] = [None] * len(binding.params)
    require_steppable(binding)
    binding.note_writes()
    try:
        for record in records:
            record.rule = ends[id(record.rule)]
        with torch.inference_mode(False), torch.no_grad(), suppress(SkipUpdate):
            _reference_step(binding, context, grads)
    finally:
        torch.clear_autocast_cache()
        context.flag.lower()
        own = {id(end): rules[key] for key, end in ends.items()}
        for record in records:
            record.rule = own.get(id(record.rule), record.rule)
    return state, model


def _step(binding: Binding, context: Context, grads: list[Any]) -> None:
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        with uncast():
            return _step(binding, context, grads)
    plan, route, grads = _route_for(binding, context, grads, inplace=True)
    try:
        plan.commit(_run(plan, route.units, grads, context))
    except BaseException as error:
        plan.drop_new_states()
        for unit in route.units:
            unit.drop()
        if plan.totals is not None and not isinstance(error, FloatingPointError | SkipUpdate):
            error.add_note("raised on this process; others may have made this update, and then differ from it now")
        raise


def _route_for(binding: Binding, context: Context, grads: list[Any], inplace: bool) -> tuple[Plan, Route, list[Any]]:
    """The plan for a model, its route for these gradients, and the gradients: copies of those that share memory with a
    parameter."""
    plan = binding.plan
    if plan is None:
        plan = binding.plan = Plan(binding.records, binding.local, binding.paths, context)
    route = plan.current(grads) or plan.find(grads)
    if route is None:
        binding.warn_of_flags()
        _check(binding, grads, inplace)
        catch_up(binding.leaves, context.traceable)
        written = set(memories(binding.local))  # a gradient that shares it would change while it is read
        if not written.isdisjoint(memories(g for g in grads if g is not None)):
            grads = [g.clone() if g is not None and memory(g) in written else g for g in grads]
        grads = [None if g is None else g.resolve_neg() for g in grads]  # kernels go by what is in memory
        try:
            route = plan.find(grads) or plan.make(grads)
        except BaseException:
            plan.drop_new_states()
            raise
    route.enter()
    return plan, route, grads


def _run(plan: Plan, units: Sequence[Unit], grads: list[Any], context: Context) -> Sequence[Unit]:
    """Take units to their results. The leaves of a unit that cannot take its inputs step one by one."""
    if plan.totals is not None:
        plan.totals.start()
    while True:
        try:
            run_to_results(units, grads, context, plan.totals)
            if context.partial:
                context.flag.read_skip()
            return units
        except FallBack as fallback:
            if plan.totals is not None:
                plan.totals.used = 0
            context.structure += 1
            if fallback.reason is not None and not isinstance(fallback.__cause__, MemoryError | torch.OutOfMemoryError):
                context.reference_only.add(fallback.reason)
            members: list[Member] = fallback.unit.cohort.members
            alone = [ReferenceUnit(*member, context) for member in members]
            units = [*(unit for unit in units if unit is not fallback.unit), *alone]


def _local(binding: Binding, grads: list[Any]) -> list[Any]:
    """What this process holds of the gradients of parameters that are spread over processes."""
    if is_transforming() or any(x.is_inference() for x in binding.local):
        raise ValueError(SPREAD_OUTSIDE)
    binding.note_writes()
    return local_gradients([record.sharding for record in binding.records], grads, binding.paths)


def _step_in_inference_mode(binding: Binding, context: Context, grads: list[Any]) -> None:
    """The engine keeps tensors for later steps, which must not be inference tensors."""
    if any(x.is_inference() for x in binding.params):
        _check(binding, grads, inplace=True)
        return _reference_step(binding, context, grads)
    with torch.inference_mode(False), torch.no_grad():
        _step(binding, context, [g.clone() if isinstance(g, Tensor) and g.is_inference() else g for g in grads])


def _reference_step(binding: Binding, context: Context, grads: Sequence[Any]) -> None:
    """Update in place on the reference path."""
    units = _reference_units(binding, context, grads, inplace=True)
    with uncast():
        run_to_results(units, grads, context, Totals(binding.records) if context.spread else None)
    context.flag.read_skip()
    _sit_out(binding, binding.records)
    context.structure += 1
    for unit in units:
        unit.commit()


def _reference_units(binding: Binding, context: Context, grads: Sequence[Any], *, inplace: bool) -> list[ReferenceUnit]:
    """A unit for each leaf that steps."""
    return [
        unit_alone(record, x, place, path, context, inplace=inplace)
        for place, (record, x, path) in enumerate(binding.leaves)
        if record.takes_part(grads[place])
    ]


def _sit_out(binding: Binding, records: Sequence[Record]) -> None:
    """Tell accumulating rules of an update in which their leaves were frozen."""
    for record, x, path in zip(records, binding.local, binding.paths, strict=True):
        if record.sits_out:
            miss_update(record, x, path)


# --- Pure updates -------------------------------------------------------------------------------------------------


def _pure(state: Any, binding: Binding, context: Context, model: Any, grads: Any) -> tuple[Any, Any]:
    """The outcome as a new state and a new model, which share no tensor with the old."""
    found = in_order(binding, grads)
    context.settle()
    complete = all(r.frozen or r.rule is None or r.tensors is not None for r in binding.records)  # needs no new state
    history = _has_history(binding, found)
    watched = history or is_transforming() or is_forward_mode()
    if watched or not complete or torch.is_inference_mode_enabled():
        _check(binding, found, inplace=False)
        if not watched:
            catch_up(binding.leaves, context.traceable)
        with uncast(), torch.set_grad_enabled(history):
            return _pure_by_reference(state, binding, context, model, found)
    with torch.no_grad(), uncast():
        return _pure_by_copy(state, binding, context, model, found)


def _pure_by_copy(state: Any, binding: Binding, context: Context, model: Any, grads: list[Any]) -> tuple[Any, Any]:
    """Copy parameters and states, and step the copies in place, by a copy of the plan."""
    plan, route, grads = _route_for(binding, context, grads, inplace=False)
    params = [as_parameter(new, x) for new, x in zip(clone_all(binding.params), binding.params, strict=True)]
    fork = context.fork(len(params))
    plan, units = plan.fork(route, params, fork)
    with suppress(SkipUpdate):
        plan.commit(_run(plan, units, grads, fork))
    fork.updates += 1
    fork.flag.lower()
    copies = Copies(model, binding.params, params)
    state, bindings = _tree(state, binding, plan.records, fork)
    bindings.renew(binding, shape_of(state), copies.model, copies.containers, plan)
    return state, copies.model


def _pure_by_reference(state: Any, binding: Binding, context: Context, model: Any, found: list[Any]) -> tuple[Any, Any]:
    """Each rule's `apply`, leaf by leaf: one can differentiate through it."""
    fork = context.fork(len(binding.params))
    _watch_history(binding, fork)
    units = _reference_units(binding, fork, found, inplace=False)
    try:
        run_to_results(units, found, fork)
        fork.flag.read_skip()
        skipped = False
    except SkipUpdate:
        units, skipped = [], True
    fork.updates += 1
    stepped = {unit.place: unit for unit in units}
    records, new = [], []
    for place, (record, x) in enumerate(zip(binding.records, binding.params, strict=True)):
        unit = stepped.get(place)
        fresh = record.clone(record.numbers.copy()) if unit is None else record.copy(record.numbers, None)
        if unit is not None:
            unit.store(fresh)
        records.append(fresh)
        new.append(x.clone() if unit is None else unit.value)
    if not skipped:
        _sit_out(binding, records)
    new = [like_parameter(value, x) for value, x in zip(new, binding.params, strict=True)]
    return _tree(state, binding, records, fork)[0], rebuild(model, binding.spec, binding.params, new)


def _tree(state: Any, binding: Binding, records: list[Record], context: Context) -> tuple[Any, Bindings]:
    """A state in the shape of another, with these records for the leaves under it, and its bindings."""
    bindings = Bindings()
    leaves = [Leaf(record, context, bindings) for record in records]
    if isinstance(state, Leaf):
        return leaves[0], bindings
    order = {index: i for i, index in enumerate(binding.indices)}
    return State(binding.spec.renumbered(order), leaves), bindings


def _has_history(binding: Binding, grads: Sequence[Any]) -> bool:
    """Whether there is anything to differentiate through. An `nn.Parameter` that merely requires grad is not: the graph
    of an ordinary loop would grow with every step. So of these it is enough to know that they are leaves."""
    if not torch.is_grad_enabled():
        return False
    rules = [rule for rule in rules_of(binding.records) if rule is not None and rule.traced]
    held = [t for record in binding.records for t in record.tensors or ()]
    held += [t for rule in rules for t in tensors_of(rule)]
    if any([t.requires_grad for t in (*grads, *held) if t is not None]) or not all([x.is_leaf for x in binding.params]):
        return True
    others = [x for x in binding.params if type(x) is not torch.nn.Parameter]
    wrapped = not torch.compiler.is_compiling() and any(map(is_wrapped, others))
    return wrapped or any([x.requires_grad and not isinstance(x, torch.nn.Parameter) for x in others])


def _watch_history(binding: Binding, fork: Context) -> None:
    """Warn of a loop whose memory grows with each step, for gradients that nobody seems to want."""
    before = None if is_transforming() else next((x for x in binding.params if x.grad_fn is not None), None)
    fork.recorded = 0 if before is None else fork.recorded + 1
    if fork.recorded == _MANY:
        warnings.warn(RECORDED.format(_MANY), stacklevel=5)


# --- What does not fit --------------------------------------------------------------------------------------------


def _check(binding: Binding, grads: Sequence[Any], inplace: bool) -> None:
    """ValueError, with the path, for a parameter or gradient that does not fit the state."""
    unseen = torch.compiler.is_compiling() or any(map(is_wrapped, binding.local))
    for record, x, path, dx in zip(binding.records, binding.local, binding.paths, grads, strict=True):
        _check_one(path, record, x, dx)
        if inplace and (unseen or x.is_inference() or not x.is_contiguous()) and unwritable(x):
            raise ValueError(UNWRITABLE.format(path))
    if not unseen:
        _check_overlap(binding)


def _check_one(path: str, record: Record, x: Tensor, dx: Any) -> None:
    shape, dtype, device = x.shape, x.dtype, x.device
    if shape != record.local_shape or dtype != record.dtype:
        was, now = form(record.shape, record.dtype), form(shape, dtype)
        raise ValueError(CHANGED_FORM.format(path, was, now, "after model.to(...) write fluxpy.follow(state, model)"))
    if dx is None:
        return
    if not isinstance(dx, Tensor):
        raise ValueError(f"the gradient of {path!r} must be a tensor or None, but got {type(dx).__name__}")
    if dx.layout != torch.strided:
        raise ValueError(f"the gradient of {path!r} is sparse ({dx.layout}); pass grad.to_dense()")
    if dx.shape != shape or dx.dtype != dtype or dx.device != device:
        raise ValueError(
            f"the gradient of {path!r} does not fit: the parameter is {form(x.shape, x.dtype)} on {x.device}, "
            f"the gradient {form(dx.shape, dx.dtype)} on {dx.device}"
        )
    for t in record.tensors or ():
        if t.device != device and t.ndim:
            raise ValueError(MOMENTA_ELSEWHERE.format(path, t.device, device))


def _check_overlap(binding: Binding) -> None:
    """ValueError where two parameters share memory, which an update would step twice."""
    devices: dict[torch.device, list[int]] = {}
    for place, x in enumerate(binding.local):
        if x.numel() and x.data_ptr():  # those on "meta", and of FakeTensorMode, have no memory
            devices.setdefault(x.device, []).append(place)
    for places in devices.values():
        here = [binding.local[place] for place in places]
        # Of a tensor with gaps only the first element is looked at: others may lie in the gaps.
        sizes = [x.nbytes if is_dense(x) else x.element_size() for x in here]
        pair = Extents(addresses(here), sizes).overlap
        if pair is not None:
            other, path = (binding.paths[places[i]] for i in pair)
            raise ValueError(SAME_MEMORY.format(other, path))


def check_finite(state: State | Leaf) -> None:
    """Raise FloatingPointError if a number that must be finite (a norm, or the loss of `trainstep`) was not.

    On the CPU that error came already, when it happened. On other devices nothing is read during a step: the first bad
    number holds back its update and all after it, and this reads it, with its path and the number of the update, and
    lets updates go on. `train` calls it at its end.
    """
    require_state(state, "check_finite")
    tree_context(state).flag.check()

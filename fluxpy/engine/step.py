"""One update: units to their totals, then to their results, then written.

A *unit* is what is stepped together: one leaf (`reference.py`), or a cohort (`packed.py`, `fused.py`, `compiled.py`).

    prepare(grads)   a generator: yields a `Request` for each total over the tree that its rule needs, is sent the
                     total, and works everything out that can fail
    commit()         writes; cannot fail
    drop()           lets go of a step that is not to be written
"""

from collections.abc import Generator, Hashable, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from ..context import Context, require_finite
from ..rule import Reduce, Rule, reducing, rule_key


class FallBack(Exception):
    """Raised where a unit cannot take its inputs: its leaves take this step on the reference path, which names the leaf
    where that fails too. `reason` is a key of rules that need not be tried again."""

    def __init__(self, reason: Hashable = None) -> None:
        self.reason = reason
        self.unit: Any = None  # which one it was


class Request(NamedTuple):
    """A total that a unit needs: what each of its leaves gives, stacked, and which leaves these are, in the order of
    the model. `rule` is the whole rule, of which one inside asks."""

    rule: Rule
    reduce: Reduce
    parts: Tensor
    places: Sequence[int]  # of the leaves among the parameters of the model
    paths: Sequence[str]


Prepare: TypeAlias = Generator[Request, Any, None]


class Unit(Protocol):
    """See the head of this file. It is `laid_out` by where the parameters are in memory, or takes them anywhere."""

    laid_out: bool

    def prepare(self, grads: Sequence[Any]) -> Prepare: ...

    def commit(self) -> None: ...

    def drop(self) -> None: ...


class CohortUnit(Unit, Protocol):
    """The unit of a cohort, kept from step to step."""

    def adopt_rules(self) -> Any:
        """Take over other hyperparameters: what the rules have in common; None where they no longer go together."""
        ...


def place_of(reduce: Reduce, rule: Rule, last: int) -> int:
    """The place of an asking rule in a chain, after the `last` one that asked: a leaf without a gradient may have
    passed some by."""
    for place, inner in enumerate(reducing(rule, "tree")):
        if inner is reduce.rule and place > last:
            return place
    return last + 1  # a rule that asks more than once, or by one that it makes on the way


def run_to_results(units: Sequence[Unit], grads: Sequence[Any], context: Context) -> None:
    """Take all units to their results. Where rules ask for totals, all units get there before any goes on, and each
    total is made of its parts in the order of the model, however the leaves are grouped."""
    runs = [(unit, unit.prepare(grads)) for unit in units]
    if len(runs) == 1:
        request = _advance(runs[0], None)
        while request is not None:
            request = _advance(runs[0], _total([request], context))
        return
    places = dict.fromkeys(range(len(runs)), -1)  # of the rule that asked last, for each unit
    asking: dict[int, Request] = {}

    def advance(i: int, answer: Any) -> None:
        request = _advance(runs[i], answer)
        if request is not None:
            asking[i] = request
            places[i] = place_of(request.reduce, request.rule, places[i])

    for i in range(len(runs)):
        advance(i, None)
    while asking:
        first = min(places[i] for i in asking)
        same: dict[Any, list[int]] = {}
        for i, request in asking.items():
            if places[i] == first:
                same.setdefault(rule_key(request.reduce.rule), []).append(i)
        totals = [(found, _total([asking.pop(i) for i in found], context)) for found in same.values()]
        for found, total in totals:
            for i in found:
                advance(i, total)


def _advance(run: tuple[Unit, Prepare], answer: Any) -> Request | None:
    """Run a unit up to its next request; None where it is done."""
    unit, prepare = run
    try:
        return prepare.send(answer)
    except StopIteration:
        return None
    except FallBack as fallback:
        fallback.unit = unit
        raise


def _total(requests: list[Request], context: Context) -> Tensor:
    _, reduce, parts, places, paths = requests[0]
    if len(requests) > 1:
        parts = torch.cat([request.parts.to(parts) for request in requests])
        places = [place for request in requests for place in request.places]
        order = sorted(range(len(places)), key=places.__getitem__)
        names = [path for request in requests for path in request.paths]
        parts, paths = parts[torch.tensor(order, device=parts.device)], [names[i] for i in order]
    total = reduce.rule.combine(parts)
    require_finite(total, reduce, context, lambda: (list(paths), parts))
    return total

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

from ..context import Context, require_all_finite, require_finite
from ..distributed.totals import Totals
from ..rule import Reduce, Rule, reducing, rule_key
from .cohort import Cohort


class FallBack(Exception):
    """Raised where a unit cannot take its inputs: its leaves take this step on the reference path, which names the leaf
    if it fails there too. `reason` is the key of a rule that is left to the reference path from now on."""

    def __init__(self, reason: Hashable = None) -> None:
        self.reason = reason
        self.unit: Any = None  # which one it was


class Request(NamedTuple):
    """A total that a unit needs: what each of its leaves gives, stacked, and which leaves these are, in the order of
    the model. `rule` is the whole rule; the one inside that asks is in `reduce`.

    Where leaves are spread over processes, units also ask so for the totals of single arrays, in any order; that answer
    has a row for each leaf."""

    rule: Rule
    reduce: Reduce
    parts: Tensor
    places: Sequence[int]  # of the leaves among the parameters of the model
    paths: Sequence[str]


Prepare: TypeAlias = Generator[Request, Any, None]


class Unit(Protocol):
    """See the head of this file. `laid_out` says whether it depends on where the parameters are in memory."""

    laid_out: bool

    def prepare(self, grads: Sequence[Any]) -> Prepare: ...

    def commit(self) -> None: ...

    def drop(self) -> None: ...


class CohortUnit(Unit):
    """The unit of a cohort, kept from step to step."""

    laid_out = True

    def __init__(self, cohort: Cohort) -> None:
        self.cohort, self.context = cohort, cohort.context

    def adopt_rules(self, rules: list[Rule]) -> bool:
        """Take over other hyperparameters, those of the leaves' `rules`, each object once, with which they still go
        together. Whether this unit can step so."""
        return True


def place_of(reduce: Reduce, rule: Rule, last: int) -> int:
    """The place of the rule that asks in its chain, after the `last` that did: without a gradient some are skipped."""
    for place, inner in enumerate(reducing(rule, "tree")):
        if inner is reduce.rule and place > last:
            return place
    return last + 1  # a rule that asks more than once, or through a rule that it makes meanwhile


def run_to_results(units: Sequence[Unit], grads: Sequence[Any], context: Context, totals: Totals | None = None) -> None:
    """Take all units to their results. Where rules ask for totals, all units get there before any goes on, and each
    total is made of its parts in the order of the model, whatever the cohorts.

    With `totals`, over processes. These ask for the same totals in the same order: those of arrays as soon as all units
    wait for some, then those over the tree one by one: of several asked at once, that whose first leaf comes first."""
    runs = [(unit, unit.prepare(grads)) for unit in units]
    if len(runs) == 1 and totals is None:
        request = _advance(runs[0], None)
        while request is not None:
            request = _advance(runs[0], _total([request], context, None))
        return
    places = dict.fromkeys(range(len(runs)), -1)  # of the rule that asked last, for each unit
    asking: dict[int, Request] = {}

    def advance(i: int, answer: Any) -> None:
        request = _advance(runs[i], answer)
        if request is not None:
            asking[i] = request
            if request.reduce.rule.over == "tree":
                places[i] = place_of(request.reduce, request.rule, places[i])

    for i in range(len(runs)):
        advance(i, None)
    while asking:
        now = [i for i, request in asking.items() if request.reduce.rule.over == "array"]
        arrays, first = bool(now), min(places[i] for i in asking)
        same: dict[Any, list[int]] = {}
        for i in now or [i for i in asking if places[i] == first]:
            same.setdefault(rule_key(asking[i].reduce.rule), []).append(i)
        alike = [sorted(found, key=lambda i: min(asking[i].places)) for found in same.values()]
        alike.sort(key=lambda found: min(asking[found[0]].places))
        answers: dict[int, Any] = {}
        for found in alike:
            requests = [asking.pop(i) for i in found]
            if arrays:
                answers.update(zip(found, _array_totals(requests, context, totals), strict=True))
            else:
                answers.update(dict.fromkeys(found, _total(requests, context, totals)))
        for i, answer in answers.items():
            advance(i, answer)


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


def _total(requests: list[Request], context: Context, totals: Totals | None) -> Tensor:
    _, reduce, parts, places, paths = requests[0]
    if context.partial:
        raise ValueError(f"release=True: {type(reduce.rule).__name__} needs a total over all gradients; leave it out")
    if len(requests) > 1:
        parts, places, paths = _merged(requests)
    if totals is not None:
        parts, owners = totals.gather(parts, places)
        paths = [paths[i] for i in owners]
    total = reduce.rule.combine(parts)
    require_finite(total, reduce, context, lambda: (list(paths), parts))
    return total


def _array_totals(requests: list[Request], context: Context, totals: Totals | None) -> list[Tensor]:
    """For each request, a total for each of its leaves."""
    reduce = requests[0].reduce
    parts, places, paths = _merged(requests)
    if totals is not None:
        parts = totals.of_arrays(reduce.rule, parts, places)
    require_all_finite(parts, reduce, context, paths)
    where = {place: i for i, place in enumerate(places)}
    return [parts[[where[place] for place in request.places]] for request in requests]


def _merged(requests: list[Request]) -> tuple[Tensor, list[int], list[str]]:
    """What leaves give, their places and their paths, in the order of the model."""
    first = requests[0].parts
    parts = torch.cat([request.parts.to(first) for request in requests])
    places = [place for request in requests for place in request.places]
    names = [path for request in requests for path in request.paths]
    order = sorted(range(len(places)), key=places.__getitem__)
    return parts[torch.tensor(order, device=parts.device)], [places[i] for i in order], [names[i] for i in order]

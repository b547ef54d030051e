"""The plan of an update: which leaves step together and how, kept from step to step.

Leaves that step together form a cohort. A *route* is the set of cohorts that one kind of update takes: those of
leaves that have a gradient and are not frozen. Another pattern is another route over the same cohorts, and a cohort is
split only where a route needs a part of it. So a model whose parts take turns soon has all its routes.
"""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from operator import attrgetter
from typing import Any

from torch import Tensor

from ..context import Context, Late, remembered
from ..distributed.gathered import unit_alone
from ..distributed.totals import Totals
from ..initial import make_states
from ..leaf import Record, miss_update
from ..pytree import HOLE, PLAIN, Skeleton, is_wrapped
from ..rule import Rule, is_packable, reducing, rule_key, title_key, value_key
from . import fused, fused_kernels, shadow
from .cohort import Cohort, Member, arranged, fits_stacked, packed_form, real_view
from .compiled import CompiledUnit
from .compiled import bucket_key as compiled_key
from .layout import Extents, addresses, extent
from .packed import EagerUnit
from .reference import ReferenceUnit
from .signature import looks_of
from .step import CohortUnit, FallBack, Unit
from .tape import is_arithmetic, keeps_numbers

_MOST_ROUTES = 32  # kept of one plan
_LEAST_STACK = 8  # leaves: fewer are as fast one by one as by vmap


class Route:
    """The units that step in one kind of update, and what must be unchanged for them to step again."""

    def __init__(self, plan: "Plan", cohorts: list[Cohort], alone: list[ReferenceUnit], grads: Sequence[Any]) -> None:
        self.params = params = plan.params
        self.cohorts, self.units = cohorts, [*[plan.units[id(cohort)] for cohort in cohorts], *alone]
        self.present = [i for i, g in enumerate(grads) if g is not None]
        self.absent = [i for i, g in enumerate(grads) if g is None]
        self.look_as_before = looks_of([*params, *(grads[i] for i in self.present)])
        self.odd = [_odd(cohort, grads) for cohort in cohorts]
        self.alike = _alike_but_for_numbers(cohorts)
        self.addresses = plan.addresses
        self.extents = [*map(extent, params)]
        self.memory = Extents(self.addresses, self.extents)
        self.laid_out = any(unit.laid_out for unit in self.units)

    def fork(self, plan: "Plan", cohorts: list[Cohort], alone: list[ReferenceUnit]) -> "Route":
        """The same route over the copies in another plan."""
        other = copy.copy(self)
        other.cohorts, other.units = cohorts, [*[plan.units[id(cohort)] for cohort in cohorts], *alone]
        other.params, other.addresses = plan.params, plan.addresses
        other.memory = Extents(plan.addresses, self.extents)
        other.alike = _alike_but_for_numbers(cohorts)
        return other

    def takes(self, grads: Sequence[Any]) -> bool:
        """Whether parameters and gradients are like those that this route was made for."""
        if self.absent and any([grads[i] is not None for i in self.absent]):
            return False
        given = [grads[i] for i in self.present] if self.absent else grads
        if not self.look_as_before(*self.params, *given):
            return False
        if (here := addresses(self.params)) != self.addresses:
            memory = Extents(here, self.extents)
            if self.laid_out or memory.overlap:
                return False
            self.addresses, self.memory = here, memory
            for unit in self.units:
                if isinstance(unit, fused.FusedListUnit):
                    unit.relocated()
        # A gradient in the memory of a parameter would change while it is read.
        return not self.memory.meets(addresses(given))

    def enter(self) -> None:
        """Prepare the cohorts for gradients like those of this route."""
        for cohort, odd in zip(self.cohorts, self.odd, strict=True):
            cohort.odd = odd


def _alike_but_for_numbers(cohorts: list[Cohort]) -> list[list[Cohort]]:
    """The cohorts that would go together if their states had the same numbers."""
    same: dict[Any, list[Cohort]] = {}
    for cohort in cohorts:
        same.setdefault(cohort.static_key, []).append(cohort)
    return [found for found in same.values() if len(found) > 1]


def _has_twins(alike: list[list[Cohort]]) -> bool:
    """Whether two cohorts have the same numbers by now. They must become one: rounding may not depend on the past."""
    return any(len({_numbers_key(cohort.records[0]) for cohort in found}) < len(found) for found in alike)


def _odd(cohort: Cohort, grads: Sequence[Any]) -> list[int]:
    """The leaves of a cohort whose gradients have other strides than the parameters."""
    pairs = enumerate(zip(cohort.params, cohort.places, strict=True))
    return [i for i, (x, place) in pairs if (dx := grads[place]) is not None and dx.stride() != x.stride()]


class Plan:
    """The cohorts of a model's leaves, and the routes over them."""

    def __init__(self, records: list[Record], params: list[Tensor], paths: Sequence[str], context: Context) -> None:
        self.records, self.params, self.paths, self.context = records, params, paths, context
        self.cohorts: list[Cohort] = []
        self.units: dict[int, CohortUnit] = {}  # by the identity of the cohort
        self.routes: dict[Any, Route] = {}
        self.route: Route | None = None
        self.sitting_out: list[tuple[Record, Tensor, str]] = []  # frozen leaves of rules that accumulate
        self.new_states: list[Any] = []  # leaves whose state was made for this update, and what they were before
        self.structure = self.hyper = -1
        self.addresses: list[int] = []  # where the parameters were when the cohorts were laid out
        self.totals = Totals(records) if context.spread else None

    def current(self, grads: Sequence[Any]) -> Route | None:
        """The last route, where it can be taken again."""
        route, context = self.route, self.context
        if route is None or context.structure != self.structure or context.hyper != self.hyper:
            return None
        return route if route.takes(grads) and not _has_twins(route.alike) else None

    def find(self, grads: Sequence[Any]) -> Route | None:
        """A known route for these gradients, after what changed since the last step was looked at."""
        if self.context.hyper != self.hyper:
            self._adopt_rules()
            route = self.current(grads)
            if route is not None:
                return route
        if self.context.structure != self.structure:
            self._verify()
        self.route = route = self.routes.get(self._pattern(grads)) if self.routes else None
        if route is None or _has_twins(route.alike) or not route.takes(grads):
            return None
        return route

    def make(self, grads: Sequence[Any]) -> Route:
        """A new route for these gradients, which are known to fit the parameters."""
        self.route = None
        here = addresses(self.params)
        if here != self.addresses:  # lay all out anew
            self._forget()
            self.addresses = here
        members, statics, alone = self._members(grads)
        live = {member.place for member in members}
        kinds = {place: "no gradient" if grads[place] is None else "gradient" for place in live}
        self._split(kinds | {unit.place: "alone" for unit in alone})
        assigned = {place for cohort in self.cohorts for place in cohort.places}
        cohorts = [cohort for cohort in self.cohorts if cohort.places[0] in live]
        if live - assigned or _has_twins(_alike_but_for_numbers(cohorts)):
            self._form_cohorts(members, statics)
            cohorts = [cohort for cohort in self.cohorts if cohort.places[0] in live]
        if len(self.routes) >= _MOST_ROUTES:
            self.routes.clear()
        self.route = self.routes[self._pattern(grads)] = Route(self, cohorts, alone, grads)
        self.structure = self.context.structure
        return self.route

    def fork(self, route: Route, params: list[Tensor], context: Context) -> tuple["Plan", Sequence[Unit]]:
        """The plan for copies of the parameters, with copies of all states; and the units of the same route over it."""
        other = Plan([], params, self.paths, context)
        for cohort in self.cohorts:
            other._put(cohort.fork(params, context))
        assigned = dict(pair for c in other.cohorts for pair in zip(c.places, c.records, strict=True))
        other.records = [assigned.get(i) or r.clone(r.numbers.copy()) for i, r in enumerate(self.records)]
        other.totals = Totals(other.records) if context.spread else None
        other.hyper, other.structure, other.addresses = context.hyper, context.structure, addresses(params)
        other.sitting_out = other.find_sitting_out()
        where = {cohort.places[0]: cohort for cohort in other.cohorts}
        cohorts = [where[cohort.places[0]] for cohort in route.cohorts]
        own = [unit for unit in route.units if isinstance(unit, ReferenceUnit)]
        alone = [ReferenceUnit(other.records[u.place], params[u.place], u.place, u.path, context) for u in own]
        other.route = route.fork(other, cohorts, alone)
        other.routes = {pattern: other.route for pattern, known in self.routes.items() if known is route}
        other.route.enter()
        return other, other.route.units

    def commit(self, units: Sequence[Unit]) -> None:
        """Write what units came to, and tell accumulating rules of an update in which their leaves were frozen. Leaves
        that share their numbers keep sharing them."""
        known: dict[Any, Skeleton | None] = {}
        skipped, new_states, self.new_states = self.context.flag.skipped, self.new_states, []
        if skipped is not None:  # which only the device knows by now
            self.context.late = Late(skipped, [partial(_take_back, new_states)])
        for cohort in self.route.cohorts if self.route is not None and skipped is None else ():
            cohort.numbers.fresh = False  # now, as an interrupt may come
        for record, x, path in self.sitting_out:
            key = id(record.rule), id(record.numbers), id(record.pending)
            if self.context.late is not None:
                self.context.late.undo += remembered(record, "pending")
            if record.tensors is None or key not in known:
                miss_update(record, x, path)
                known[key] = record.pending
            else:
                record.pending = known[key]
        try:
            for unit in units:
                unit.commit()
        except FallBack as fallback:  # too late for another way: memory ran out, perhaps
            raise (fallback.__cause__ or fallback) from None

    def drop_new_states(self) -> None:
        """The update failed."""
        _take_back(self.new_states)
        if self.new_states:
            self.new_states = []
            self._forget()
            self.context.structure += 1

    # --- What changed -------------------------------------------------------------------------------------------------

    def _pattern(self, grads: Sequence[Any]) -> bytes:
        """Which leaves have a gradient, and which are frozen."""
        return bytes([2 * (g is None) + record.frozen for record, g in zip(self.records, grads, strict=True)])

    def _adopt_rules(self) -> None:
        """Take over what `adjust` did. Where the leaves of a cohort do not go together any more, it is dissolved."""
        for cohort in list(self.cohorts):
            (kind, _, *rest), rules = cohort.static_key, cohort.rules()
            keys = {_rule_key(kind, rule, self.context) for rule in rules}
            together = len(keys) == 1 and not any(rule.traced for rule in rules)
            if together and self.units[id(cohort)].adopt_rules(rules):
                cohort.static_key = kind, keys.pop(), *rest
            else:
                self._drop(cohort)
        for route in self.routes.values():
            route.alike = _alike_but_for_numbers(route.cohorts)
        self.hyper = self.context.hyper

    def _verify(self) -> None:
        """Dissolve the cohorts that somebody took leaves from, or whose leaves have another state."""
        for cohort in list(self.cohorts):
            if not cohort.holds():
                self._drop(cohort)
        self.sitting_out = self.find_sitting_out()
        self.structure = self.context.structure

    def find_sitting_out(self) -> list[tuple[Record, Tensor, str]]:
        """The frozen leaves of rules that accumulate."""
        leaves = zip(self.records, self.params, self.paths, strict=True)
        return [leaf for leaf in leaves if leaf[0].sits_out]

    def _drop(self, cohort: Cohort) -> None:
        self.cohorts.remove(cohort)
        self.units.pop(id(cohort))
        self.routes.clear()
        self.route = None

    # --- Forming cohorts ----------------------------------------------------------------------------------------------

    def _members(self, grads: Sequence[Any]) -> tuple[list[Member], dict[int, Any], list[ReferenceUnit]]:
        """The leaves that step in cohorts; by their places, their keys (see `_static`); and the units of those that
        step alone."""
        members: list[Member] = []
        statics: dict[int, Any] = {}
        alone: list[Member] = []
        stacks: dict[Any, list[Member]] = {}
        known: dict[Any, Any] = {}
        every = zip(self.records, self.params, range(len(grads)), self.paths, strict=True)
        live = [Member(*leaf) for leaf, dx in zip(every, grads, strict=True) if leaf[0].takes_part(dx)]
        new = [(record, x, path) for record, x, _, path in live if record.tensors is None]
        self.new_states += [(record, record.numbers, record.pending) for record, _, _ in new]
        make_states(new)
        for member in live:
            record, x, place, _ = member
            dx = grads[place]
            static = None if record.needs_whole else self._static(record, x, dx, known)
            if static is None or (dx is None and static[0] == "compiled"):
                alone.append(member)
                continue
            statics[place] = static
            if static[0] == "stack":
                stacks.setdefault((x.shape, x.dtype, id(record.rule), dx is None), []).append(member)
            else:
                members.append(member)
        for stack in stacks.values():
            (members if len(stack) >= _LEAST_STACK else alone).extend(stack)
        for found in (members, alone):
            found.sort(key=attrgetter("place"))
        return members, statics, [unit_alone(*member, self.context) for member in alone]

    def _static(self, record: Record, x: Tensor, dx: Tensor | None, known: dict[Any, Any]) -> Any:
        """The key that leaves share if they can go together, once the numbers in their states are equal too. It begins
        with how they are stepped: "compiled", "fused", "shadow", "eager" or "stack". None for a leaf that steps alone.
        `known` remembers what depends on the rule and the dtypes alone."""
        rule, tensors, skeleton = record.rule, record.tensors, record.numbers.skeleton
        assert rule is not None and tensors is not None and skeleton is not None
        plain = type(x) in PLAIN and (dx is None or type(dx) in PLAIN)
        if not plain or x.is_conj() or x.is_neg() or is_wrapped(x):
            return None
        form = packed_form(x, tensors)
        dtypes = tuple([t.dtype for t in tensors])
        key = id(rule), x.dtype, x.device, min(x.numel(), 2), dtypes, form, id(skeleton.spec), dx is None
        static = known.get(key, key)
        if static is key:
            kind = self._kind(record, rule, x, form)
            shared = kind and _rule_key(kind, rule, self.context), dx is not None, x.dtype, x.device, skeleton.spec
            static = known[key] = None if kind is None else (kind, *shared, dtypes, form)
        if static is None or static[0] != "stack":
            return static
        # In a stack, a number of each leaf does not broadcast as an elementwise rule in a chain wants it.
        numbers = rule.delegates and not all(t.ndim for t in tensors)
        return (*static, x.shape, *[t.shape for t in tensors]) if fits_stacked(x, tensors) and not numbers else None

    def _kind(self, record: Record, rule: Rule, x: Tensor, form: tuple[bool, ...] | None) -> str | None:
        """How leaves of this rule with parameters like `x` are stepped; None for one by one. `form` says which tensors
        of the state are numbers, see `packed_form`."""
        if not x.numel() or x.is_meta or rule.traced or title_key(rule) in self.context.reference_only:
            return None
        if not is_packable(rule):
            return None if x.is_complex() or any(map(reducing, _whole(rule))) else "stack"
        if form is None or (any(form) and not keeps_numbers(record, real_view(x), self.context)):
            return None
        if self.context.compile and x.numel() > 1 and title_key(rule) not in self.context.uncompiled:
            return "compiled"
        kernel = "eager"
        if fused_kernels.takes(rule, x, record.tensors or []):
            kernel = "fused"
        elif shadow.takes(record, x):
            kernel = "shadow"
        # The rules before a kernel must be arithmetic alone: no chunk of a cohort may fail once another is written.
        front = kernel != "eager" and fused_kernels.has_front(rule if kernel == "fused" else shadow.stepper(rule))
        return "eager" if front and not is_arithmetic(record, real_view(x), self.context) else kernel

    def _form_cohorts(self, members: list[Member], statics: dict[int, Any]) -> None:
        """Make cohorts of all leaves that step, so that those which became alike go together again."""
        live = {member.place for member in members}
        for cohort in [cohort for cohort in self.cohorts if cohort.places[0] in live]:
            self._drop(cohort)
        same: dict[tuple[int, int], list[Member]] = {}  # which is cheaper to tell than what is equal
        for member in members:
            same.setdefault((id(statics[member.place]), id(member.record.numbers)), []).append(member)
        buckets: dict[Any, list[Member]] = {}
        for found in same.values():
            buckets.setdefault((statics[found[0].place], *_numbers_key(found[0].record)), []).extend(found)
        for (static, *_), found in buckets.items():
            self._add(found, static)

    def _add(self, members: list[Member], static: Any) -> None:
        self.context.structure += 1  # first: other plans may have these leaves
        self._put(Cohort(arranged(members), self.context, static))

    def _put(self, cohort: Cohort) -> None:
        self.units[id(cohort)] = _MAKERS[cohort.static_key[0]](cohort)
        self.cohorts.append(cohort)
        self.routes.clear()  # in which these leaves may go another way
        self.structure = self.context.structure

    def _split(self, kinds: Mapping[int, str]) -> None:
        """Split the cohorts whose leaves are of several kinds, and take out those that step alone."""
        for cohort in list(self.cohorts):
            parts: dict[str, list[Member]] = {}
            for member in cohort.members:
                parts.setdefault(kinds.get(member.place, "rests"), []).append(member)
            if len(parts) > 1 or "alone" in parts:
                self._drop(cohort)
                for part in (members for kind, members in parts.items() if kind != "alone"):
                    self._add(part, cohort.static_key)

    def _forget(self) -> None:
        """Let go of all cohorts."""
        self.cohorts, self.units, self.routes, self.route = [], {}, {}, None


_MAKERS: dict[str, Callable[[Cohort], CohortUnit]] = {
    "compiled": CompiledUnit,
    "fused": fused.fused_unit,
    "shadow": shadow.ShadowUnit,
    "eager": EagerUnit,
    "stack": partial(EagerUnit, stack=True),
}


def _take_back(new_states: list[Any]) -> None:
    """Leaves that had no momenta have none again."""
    for record, numbers, pending in new_states:
        record.tensors, record.numbers, record.pending = None, numbers, pending


def _whole(rule: Rule) -> Iterable[Rule]:
    """The rules inside one (or itself) that need whole arrays."""
    if is_packable(rule):
        return []
    return [r for inner in rule.inner for r in _whole(inner)] if rule.delegates else [rule]


def _rule_key(kind: str | None, rule: Any, context: Context) -> Any:
    """What rules must have in common for their leaves to go together."""
    if kind == "fused":
        return fused_kernels.bucket_key(rule)
    if kind == "shadow":
        return shadow.bucket_key(rule)
    return compiled_key(rule, context) if kind == "compiled" else rule_key(rule)


def _numbers_key(record: Record) -> Any:
    """The numbers that leaves must have in common."""
    skeleton = record.numbers.skeleton
    assert skeleton is not None
    parts = [part if part is HOLE else (type(part), value_key(part)) for part in skeleton.parts]
    return record.numbers.count, *parts

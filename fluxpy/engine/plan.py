"""The plan of an update: which leaves go together and by which path, worked out once and kept from step to step."""

import itertools
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..guard import Guard, Skip, require_finite
from ..leaf import Leaf, start
from ..match import Fit
from ..pytree import Frame
from ..rule import Rule, StagedRule, walk
from ..rules.clip import ClipNorm
from . import native
from .compiled import Compiled
from .flat import Flat, ours, pointers
from .group import Group, Member, Misfit, Rest, same, value_key
from .native import Native
from .plain import Plain
from .slab import Scratch


class Plan:
    """How to step leaves by gradients like these. `holds` says whether it may be used again."""

    def __init__(self, fit: Fit, leaves: Sequence[Leaf], values: Sequence[Tensor | None], guard: Guard) -> None:
        self.guard, self.dead, self.retuned = guard, False, False
        self.leaves = leaves
        places = zip(fit.spec.unique.items(), fit.params, strict=True)
        members = [Member(path, leaves[i], x, place) for place, ((i, path), x) in enumerate(places)]
        self.absent = [m.place for m in members if values[m.place] is None]
        live = [m for m in members if not m.leaf._frozen and m.leaf._rule is not None]
        self.waiting = [m.leaf for m in members if m.leaf._frozen and m.leaf._rule is not None and m.leaf._rule.gathers]
        self.once = any(m.leaf._missed for m in live)  # after this step things are simpler
        self.fresh = [m.leaf for m in live if m.leaf._state is None and values[m.place] is not None]
        rest: list[Member] = []
        sorted_: dict[Any, tuple[Callable[..., Flat], list[Member]]] = {}
        keys: dict[Any, Any] = {}
        for m in live:
            way, dx = None, values[m.place]
            if dx is not None and not m.leaf._missed:
                if m.leaf._state is None:
                    try:
                        m.leaf._held = start(m.leaf._rule, m.x, m.leaf._count, m.path)
                    except BaseException:
                        self.forget()
                        raise
                way = self.way(m, dx)
            if way is None:
                rest.append(m)
            else:
                rule = keys.get((way[0], id(m.leaf._rule)))
                if rule is None:
                    rule = keys[way[0], id(m.leaf._rule)] = self.form(way[0], m.leaf._rule)
                key = *way, rule, m.leaf._count
                sorted_.setdefault(key, (way[0], []))[1].append(m)
        self.rest = [m for m in rest if values[m.place] is not None or m.leaf._rule.gathers]
        scratch = Scratch()
        self.groups = [make(held, scratch) for make, held in sorted_.values()]
        stepped = {m.place for _, held in sorted_.values() for m in held}
        idle = Rest([m for m in members if m.place not in stepped])
        for group in (*self.groups, idle):
            group.plan = self
        self.places = [m.place for group in self.groups for m in group.members]
        ends = list(itertools.accumulate(len(group.members) for group in self.groups))
        self.shares = list(zip([0, *ends], ends, strict=False))
        self.whole = self.places == list(range(len(members)))
        # What the others are given is looked at too, but for its shape alone.
        looked_at = [m for group in self.groups for m in group.members] + [
            m for m in self.rest if values[m.place] is not None
        ]
        self.seen, self.params = [m.place for m in looked_at], [m.x for m in looked_at]
        for group in self.groups:
            pairs = enumerate((m.x, values[m.place]) for m in group.members)
            group.odd = [i for i, (x, dx) in pairs if dx is not None and dx.stride() != x.stride()]
        self.fixed = [m.x for group in self.groups if group.pieces for m in group.members]
        self.pointers = pointers(self.fixed)
        self.forms = Forms([*self.params, *(v for v in (values[i] for i in self.seen) if v is not None)])
        pieces = [piece for group in self.groups for piece in group.pieces]
        for piece in pieces:  # scratch holds one piece at a time
            piece.alone = len(pieces) == 1
        self.quick = not self.rest and all(group.quick for group in self.groups)

    def way(self, m: Member, dx: Tensor) -> Any:
        """The path for a leaf, and what it must have in common with others to go with them; None for the plain one."""
        x, rule = m.x, m.leaf._rule
        tensors, frame = Frame.split(m.leaf._state)
        plain = (torch.Tensor, nn.Parameter)
        if type(x) not in plain or type(dx) not in plain or not x.is_floating_point() or not x.numel() or rule.traced:
            return None
        if any(
            t.shape != x.shape or t.device != x.device or t.stride() != x.stride() or t.requires_grad for t in tensors
        ):
            return None
        key = x.dtype, x.device, frame.spec, tuple(map(value_key, frame.parts)), tuple(t.dtype for t in tensors)
        if (
            self.guard.compile
            and x.is_contiguous()
            and x.numel() > 1
            and _pieces(rule, self.guard, self.guard.uncompiled)
        ):
            return Compiled, *key
        fused = native.takes(rule, x)
        if not x.is_contiguous():
            dense = torch.empty_like(x).stride() == x.stride()
            return (Native, "as it is", *key) if fused and dense and len(native.links(rule)) == 1 else None
        if fused and all(t.dtype == x.dtype for t in tensors):
            return Native, *key
        return (Flat, *key) if _pieces(rule, self.guard, clips=True) else None

    def form(self, way: type[Group], rule: Rule) -> Any:
        """What rules must have in common to go together this way."""
        if way is Native:
            return native.form(rule)
        return same(rule, loose=way is Compiled and not {type(inner) for inner in walk(rule)} & self.guard.exact)

    def holds(self, leaves: Sequence[Leaf], values: Sequence[Any]) -> bool:
        if self.dead or self.once or not (leaves is self.leaves or (len(leaves) == 1 and leaves[0] is self.leaves[0])):
            return False
        if self.retuned:
            self.retuned = False
            if not all(group.retune() for group in self.groups):
                return False
        if any(values[i] is not None for i in self.absent) or pointers(self.fixed) != self.pointers:
            return False
        return self.forms.hold([*self.params, *(values if self.whole else [values[i] for i in self.seen])])

    def step(self, values: Sequence[Any]) -> None:
        """One update. Raises before anything is written, or not at all."""
        guard, groups = self.guard, self.groups
        used = list(values) if self.whole else [values[i] for i in self.places]
        turns: list[Any] = groups
        try:
            if len(groups) == 1:
                groups[0].begin(used)
            else:
                for group, (low, high) in zip(groups, self.shares, strict=True):
                    group.begin(used[low:high])
            if not self.quick:
                rules: dict[Any, Rule] = {}
                turns = groups + [Plain(m.path, m.leaf, m.x, values[m.place], rules) for m in self.rest]
                rounds(turns, guard)
                for turn in turns:
                    turn.finish(guard)
        except BaseException as error:
            self.forget()
            if isinstance(error, Exception) and not isinstance(error, Skip | Misfit) and groups:
                raise Misfit from error  # the plain path knows the leaf
            raise
        for leaf in self.waiting:
            leaf._missed += 1
        for turn in turns:
            turn.commit(guard)
        for group in groups:
            group.grads = []  # not kept alive until the next update
        self.fresh = []

    def forget(self) -> None:
        """Nothing was stepped: leaves that had no momenta have none again."""
        for leaf in self.fresh:
            leaf._set(state=None)


class Forms:
    """The dtype, shape, strides and device of tensors, to see at next to no cost that others have the same."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self.known: list[Any] = []
        self.guards: Any = None
        try:
            from torch._C._dynamo.guards import TensorGuards

            sizes, strides = [list(t.shape) for t in tensors], [list(t.stride()) for t in tensors]
            make: Any = TensorGuards  # which is what torch.compile itself notices a change with
            self.guards = make(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
        except Exception:  # not in this version of PyTorch
            self.known = [_form(t) for t in tensors]

    def hold(self, tensors: list[Any]) -> bool:
        if self.guards is not None:
            return self.guards.check(*tensors)
        return self.known == [_form(t) for t in tensors]


def _form(t: Any) -> Any:
    return isinstance(t, Tensor) and (
        type(t),
        t.dtype,
        t.shape,
        t.device,
        t.layout,
        t.layout == torch.strided and t.stride(),
    )


def rounds(turns: Sequence[Any], guard: Guard) -> None:
    """All through their rules. Where rules ask for totals, all get there before any goes on."""
    if len(turns) == 1:
        answer = None
        while (ask := turns[0].advance(answer, guard)) is not None:
            answer = ask.rule.combine([ask.part])
            require_finite(answer, ask, partial(turns[0].shares, ask), guard)
        return
    waiting = [(turn, None) for turn in turns]
    known: dict[int, Any] = {}
    while waiting:
        asked: dict[Any, list[Any]] = {}
        for turn, answer in waiting:
            ask = turn.advance(answer, guard)
            if ask is not None:
                rule = known.get(id(ask.rule)) or known.setdefault(id(ask.rule), same(ask.rule))
                asked.setdefault((turn.asked, rule), []).append((turn, ask))
        waiting = []
        for group in asked.values():
            total = group[0][1].rule.combine([ask.part for _, ask in group])
            require_finite(total, group[0][1], partial(_shares, group), guard)
            waiting += [(turn, total) for turn, _ in group]


def _shares(group: list[Any]) -> list[tuple[str, Tensor]]:
    """What each leaf gave to a total, by path."""
    return [share for turn, ask in group for share in turn.shares(ask)]


def _pieces(rule: Rule, guard: Guard, but: Collection[type] = (), clips: bool = False) -> bool:
    """Whether a rule can be run on pieces of many tensors; with `clips`, on one tensor at a time where that must be."""
    members = [inner for inner in walk(rule) if not inner.inner and not (clips and isinstance(inner, ClipNorm))]
    asks = any(isinstance(inner, StagedRule) and not ours(inner) for inner in members)
    barred = any(type(inner) in guard.slow or type(inner) in but for inner in members)
    return not asks and not barred and all(inner.elementwise for inner in members)

"""Random sequences of every operation over random models and chains, compared with a reference that shares no code.

Each seed is a test: `pytest "tests/test_sequences.py::test_sequence[17]"` runs one again, and `FLUXPY_SEEDS=5000-5999`
others. A failure prints the model, the rules and the operations so far. `FLUXPY_NIGHTLY=1` runs thousands, and compiled
ones too.
"""

import contextlib
import copy
import io
import os
import pickle
import shutil
import warnings
from collections.abc import Callable
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import optree
import pytest
import random_cases as cases
import reference
import torch
from reference import Curve, Leaf, Refused, Scaled, Skipped, Unclear
from rule_table import ROWS
from torch import Tensor, nn

import fluxpy

pytestmark = pytest.mark.filterwarnings("ignore:setup. the pattern .* has no effect")
NIGHTLY = os.environ.get("FLUXPY_NIGHTLY") == "1"
WAYS = ["apart", "flat", "flat grads", "pure"]
ROOM = 1e-10  # of the way that an element went
EPS = float(np.finfo(np.float64).eps)


def seeds(default: int) -> range:
    first, _, last = os.environ.get("FLUXPY_SEEDS", f"0-{default - 1}").partition("-")
    return range(int(first), int(last or first) + 1)


def to_array(t: Tensor) -> np.ndarray:
    """In float64, a complex tensor as pairs."""
    t = t.detach().resolve_conj()
    return (torch.view_as_real(t) if t.is_complex() else t).double().numpy().copy()


def to_bytes(t: Tensor) -> bytes:
    return t.detach().resolve_conj().contiguous().numpy().tobytes()


def momenta(leaf: Any) -> list[Any]:
    return optree.tree_leaves(leaf.state, none_is_leaf=True, namespace="fluxpy")


def image(state: Any, model: Any = ()) -> Any:
    """All that must be as it was, bit for bit, where nothing may have changed."""
    inside = [
        (path, repr(leaf.rule), leaf.frozen, leaf.count, [to_bytes(m) if isinstance(m, Tensor) else m for m in held])
        for path, leaf in fluxpy.leaves(state)
        for held in [momenta(leaf)]
    ]
    return inside, [(path, to_bytes(x)) for path, x in cases.places(model)]


class View:
    """Part of a state, the leaves of the reference in it, and what to call it."""

    def __init__(self, name: str, state: Any, leaves: list[Leaf]) -> None:
        self.name, self.state, self.leaves = name, state, leaves


class Run:
    """A model and its state on one side, the leaves of the reference on the other, and a random choice of what next."""

    def __init__(self, seed: int, way: str | None, folder: Path) -> None:
        self.chance = chance = cases.Chance(seed)
        self.way, self.folder, self.log = way or chance.choice(WAYS), folder, [f"seed {seed}"]
        self.policy = chance.choice(["raise", "raise", "skip", "skip", "ignore"])
        self.orderly = chance.happens(0.5)  # all leaves are stepped alike, but for those that are frozen
        mixed, masks = chance.happens(0.2), chance.happens(0.2)
        self.model = cases.random_model(chance, complex_too=not mixed and not masks)
        self.spec = self.random_rules(mixed, masks)
        self.leaves = self.reference_leaves()
        self.first = copy.deepcopy(self.leaves)
        self.updates = 0
        self.parked: list[tuple[str, Callable[[], Any], Any]] = []  # what was left behind and must not change any more
        if self.way.startswith("flat"):
            self.flatten()
        self.state = self.set_up()
        self.log += [f"{self.way}: {self.model}", f"rules: {self.spec}"]
        self.log += [f"{' = '.join(leaf.names)}: {cases.layout(self.tensor(leaf))}" for leaf in self.leaves]

    # --- At the start ---

    def random_rules(self, mixed: bool, masks: bool) -> Any:
        """A rule for all, or a mapping of patterns. With `mixed`, float32 parameters with master copies among them."""
        paths = [path for path, _ in cases.places(self.model)]
        patterns = cases.random_patterns(self.chance, paths) if self.chance.happens(0.5) else ["*"]
        self.chains: dict[str, Any] = {}
        for p in patterns:
            known, new = [*self.chains.values()], self.chance.happens(0.4)
            drawn = cases.random_chain(self.chance, self.policy, masks) if new or not known else known[-1]
            self.chains[p] = cases.varied(self.chance, drawn)
        self.mixed = {p: mixed and (p == "*" or self.chance.happens(0.8)) for p in patterns}
        if len(patterns) > 1 and self.chance.happens(0.2):
            self.chains[patterns[0]] = None
        rules = {
            p: None if chain is None else cases.rule_of(self.chance, chain, self.mixed[p])
            for p, chain in self.chains.items()
        }
        return rules if len(rules) > 1 or self.chance.happens(0.2) else rules["*"]

    def reference_leaves(self) -> list[Leaf]:
        names: dict[int, list[str]] = {}
        tensors = {}
        for path, x in cases.places(self.model):
            names.setdefault(id(x), []).append(path)
            tensors[id(x)] = x
        leaves = []
        for key, x in tensors.items():
            pattern = cases.first_match([*self.chains], tuple(names[key]))
            single = self.mixed[pattern] and self.chance.happens(0.6)
            if single:
                x.data = x.data.float()
            frozen = isinstance(x, nn.Parameter) and not x.requires_grad
            chain, mixed = self.chains[pattern], self.mixed[pattern] and self.chains[pattern] is not None
            leaves.append(Leaf(tuple(names[key]), to_array(x), chain, frozen, x.is_complex(), single, mixed))
        return leaves

    def set_up(self, **how: Any) -> Any:
        with warnings.catch_warnings():  # of new tensors of the old shape, which are what some sequences want
            warnings.filterwarnings("ignore", "setup.*new tensors")
            return fluxpy.setup(self.spec, self.model, compile=self.way == "compiled", **how)

    # --- One after another ---

    def play(self, operations: int) -> None:
        try:
            self.check(look=True)
            with contextlib.suppress(Unclear):
                self.operate(operations)
            self.check_parked()
        except BaseException as error:
            error.add_note("\n".join(self.log))
            raise

    def operate(self, operations: int) -> None:
        name = ""
        for _ in range(operations):
            name = self.next_after(name)
            self.log.append(name)
            getattr(self, name)()
            self.check(look=self.chance.happens(0.5))
        self.check(look=True)

    def next_after(self, name: str) -> str:
        """Any operation, or one that is likely to find out what the one before left behind."""
        if name in ("adjust", "freeze", "thaw", "reset") and self.chance.happens(0.3):
            return "refuse"
        if name.startswith(("update", "refuse")) and self.chance.happens(0.4):
            return "update"
        return self.chance.choices([*OPERATIONS], [*OPERATIONS.values()])[0]

    def say(self, *words: Any) -> None:
        self.log[-1] += " " + " ".join(map(str, words))

    @property
    def bare(self) -> bool:
        """Whether the model is a tensor, which has no name."""
        return self.leaves[0].names == ("",)

    def tensor(self, leaf: Leaf) -> Tensor:
        return cases.descend(self.model, leaf.names[0])

    # --- Comparing ---

    def check(self, look: bool) -> None:
        """The parameters, and with `look` (which the library may notice) what the state says too."""
        self.compare(self.model, self.leaves)
        if look:
            self.compare_state(self.state, self.leaves)

    def compare(self, model: Any, leaves: list[Leaf]) -> None:
        for leaf in leaves:
            x = cases.descend(model, leaf.names[0])
            assert all(cases.descend(model, name) is x for name in leaf.names), f"{leaf.names} are no longer tied"
            self.near(to_array(x), leaf.x, leaf, np.spacing(np.abs(leaf.x).astype(np.float32)) if leaf.single else 0.0)

    def near(self, ours: np.ndarray, theirs: np.ndarray, leaf: Leaf, room: Any = 0.0) -> None:
        allowed = self.room(leaf) + room
        error = np.abs(ours - theirs)
        assert ours.shape == theirs.shape and (error <= allowed).all(), (
            f"{leaf.names[0]} is off by {error.max():.1e}, where {allowed.min():.1e} to {allowed.max():.1e} is allowed"
        )

    def room(self, leaf: Leaf) -> Any:
        """By how much two ways to compute a leaf may differ."""
        return ROOM * leaf.way + 4 * EPS * (self.updates + 1) * leaf.peak

    def compare_state(self, state: Any, leaves: list[Leaf]) -> None:
        found = dict(fluxpy.leaves(state))
        assert len(found) == len(leaves)
        for leaf in leaves:
            path, ours = next((name, found[name]) for name in leaf.names if name in found)
            assert (ours.count, ours.frozen) == (leaf.count, leaf.frozen), path
            assert (ours.rule is None) == (leaf.chain is None), path
            given_back = ours.state is None and leaf.count == 0  # it was frozen before it trained
            if leaf.started is not None and not given_back:
                assert (ours.state is not None) == leaf.started, path
            if leaf.mixed and leaf.started and not given_back:
                self.near(ours.state.x.numpy(), leaf.master, leaf)
            for name in self.names_of(leaf):
                wanted = reference.value_at(reference.holders(leaf, name)[0].values[name], leaf.count)
                assert np.allclose(_floats(fluxpy.value(ours, name)), _floats(wanted), rtol=1e-12, atol=0), (path, name)

    def names_of(self, leaf: Leaf) -> list[str]:
        """Hyperparameters that only one rule of the chain has."""
        names = [name for member in leaf.chain or () for name in member.values]
        return [name for name in names if names.count(name) == 1 and name != "nonfinite"]

    def check_parked(self) -> None:
        for what, look, before in self.parked:
            assert look() == before, f"{what} has changed since"

    def park(self, what: str, look: Callable[[], Any]) -> None:
        self.parked.append((what, look, look()))

    # --- Parts of the state ---

    def view(self) -> View:
        kind = self.chance.choice(["all", "leaf", "branch", "glob", "predicate", "slice"])
        paths = [name for leaf in self.leaves for name in leaf.names]
        if kind == "all" or paths == [""]:
            return View("all", self.state, list(self.leaves))
        if kind == "leaf":
            path = self.chance.choice(paths)
            return View(path, self.state[path], [leaf for leaf in self.leaves if path in leaf.names])
        if kind == "glob":
            glob = self.chance.choice(cases.random_patterns(self.chance, paths))
            inside = [leaf for leaf in self.leaves if any(fnmatchcase(n, glob) for n in leaf.names)]
            return View(glob, fluxpy.select(self.state, glob), inside)
        if kind == "predicate":
            inside = self.chance.sample(self.leaves, self.chance.randint(1, len(self.leaves)))
            wanted = {leaf.names[0] for leaf in inside}
            return View(f"{sorted(wanted)}", fluxpy.select(self.state, lambda path, _: path in wanted), inside)
        return self.branch(with_slice=kind == "slice")

    def branch(self, with_slice: bool = False) -> View:
        names = [name.split(".") for leaf in self.leaves for name in leaf.names]
        path = self.chance.choice(sorted({".".join(keys[:i]) for keys in names for i in range(len(keys))}))
        state, model = (self.state[path] if path else self.state), cases.descend(self.model, path)
        start = f"{path}." if path else ""
        if with_slice and isinstance(model, list | tuple | nn.Sequential | nn.ParameterList):
            kept = range(len(model))[self.chance.randint(0, len(model) - 1) :]
            state, starts = state[kept.start :], [f"{start}{i}" for i in kept]
            below = self.under(starts)
            return View(f"{path}[{kept.start}:]", state, below) if below else View("all", self.state, self.leaves)
        return View(path, state, self.under([path] if path else [""]))

    def under(self, paths: list[str]) -> list[Leaf]:
        def inside(name: str) -> bool:
            return any(not path or name == path or name.startswith(f"{path}.") for path in paths)

        return [leaf for leaf in self.leaves if any(map(inside, leaf.names))]

    # --- Updates ---

    def update(self) -> None:
        """Of the whole or a branch, in place or not, with gradients in any form, some of them missing or not finite."""
        scope = None if self.bare or self.orderly or self.chance.happens(0.8) else self.branch()
        path, inside = (scope.name, scope.leaves) if scope else ("", self.leaves)
        # Mostly gradients as a backward pass gives them, so that what is kept between updates has a chance to be used.
        missing = 0.3 if not self.orderly and self.chance.happens(0.5) else 0.0
        odd = 0.3 if self.chance.happens(0.3) else 0.0
        grads = {id(leaf): None if self.chance.happens(missing) else self.random_gradient(leaf, odd) for leaf in inside}
        if self.chance.happens(0.15):
            self.spoil(inside, grads)
        if self.bare and None in grads.values():
            return
        pure = self.way == "pure" or self.chance.happens(0.1)
        model = cases.descend(self.model, path)
        form, given = self.random_form(model, path, inside, grads)
        self.say(repr(path), form, "pure" if pure else "in place", "missing", sum(g is None for g in grads.values()))
        self.updates += 1
        if pure:
            self.update_pure(path, model, inside, grads, given)
        else:
            self.update_in_place(scope.state if scope else self.state, model, inside, grads, given)

    def random_gradient(self, leaf: Leaf, odd: float = 0.0) -> Tensor:
        """A gradient; with the probability `odd`, in other strides than a dense tensor has."""
        x = self.tensor(leaf)
        if self.chance.happens(odd / 4):
            return self.chance.tensor((), x.dtype).expand(x.shape)
        g = torch.empty_like(x).copy_(self.chance.tensor(x.shape, x.dtype)) * self.chance.choice([1e-2, 1.0, 1.0, 5.0])
        if self.chance.happens(0.1):
            g = g * (self.chance.tensor(x.shape) > 0)
        return cases.strided(self.chance, g) if self.chance.happens(odd) else g

    def spoil(self, inside: list[Leaf], grads: dict[int, Any]) -> None:
        """A NaN, where a clip will notice before it gets anywhere."""
        leaf = self.chance.choice(inside)
        g = grads[id(leaf)]
        if g is None or not g.numel():
            return
        bad = g.clone().index_fill_(0, torch.tensor([0]), float("nan")) if g.ndim else torch.full_like(g, float("nan"))
        blind = {"Lion", "Rprop", "ClipGrad"}  # after a sign, torch and NumPy do not agree on NaN
        if leaf.chain is None or {m.name for m in leaf.chain} & blind:
            return
        trial = {**grads, id(leaf): bad}
        with contextlib.suppress(Refused, Skipped), np.errstate(all="ignore"):
            reference.update(copy.deepcopy(inside), [self.array(trial[id(other)]) for other in inside])
            return
        grads[id(leaf)] = bad
        self.say("NaN in", leaf.names[0])

    def array(self, g: Tensor | None) -> np.ndarray | None:
        return None if g is None else to_array(g)

    def random_form(self, model: Any, path: str, inside: list[Leaf], grads: dict[int, Any]) -> tuple[str, Any]:
        given = {id(cases.descend(self.model, leaf.names[0])): grads[id(leaf)] for leaf in inside}
        some = any(g is not None for g in given.values())
        forms = ["names", "names"]
        forms += ["pytree"] if some or not isinstance(model, Tensor) else []
        forms += [".grad", ".grad"] if some else []
        forms += ["tree"] if some and self.can_differ(given) else []
        form = self.chance.choice(forms)
        if form == ".grad":
            self.put_grads(given)
            return form, None
        if form == "tree":
            return form, fluxpy.gradient(lambda m: _loss(m, given), model)
        if form == "pytree":
            return form, self.like(model, given)
        return form, self.by_name(path, inside, grads)

    def can_differ(self, given: dict[int, Any]) -> bool:
        """Whether `gradient` gives just these, whose parameters must require grad."""
        leaves = [self.tensor(leaf) for leaf in self.leaves]
        return all(x.requires_grad or not isinstance(x, nn.Parameter) for x in leaves if given.get(id(x)) is not None)

    def put_grads(self, given: dict[int, Any]) -> None:
        for leaf in self.leaves:
            x = self.tensor(leaf)
            g = given.get(id(x), torch.full_like(x, 1e6))  # of a parameter that takes no part
            dense = x.grad is not None and 0 not in x.grad.stride()
            if g is not None and dense and self.chance.happens(0.8 if self.way == "flat grads" else 0.2):
                x.grad.copy_(g)
            else:
                x.grad = g

    def by_name(self, path: str, inside: list[Leaf], grads: dict[int, Any]) -> dict[str, Any]:
        start = f"{path}." if path else ""
        pairs = []
        for leaf in inside:
            names = [name for name in leaf.names if name.startswith(start)]
            if path in leaf.names:
                names = [path]
            chosen = names if self.chance.happens(0.3) else [self.chance.choice(names)]
            g = grads[id(leaf)]
            if g is not None or self.chance.happens(0.5):
                pairs += [(name.removeprefix(start) if name != path else "", g) for name in chosen]
        self.chance.shuffle(pairs)
        return dict(pairs)

    def like(self, model: Any, given: dict[int, Any]) -> Any:
        """Gradients in the shape of the model; of a module, in dicts by the names of its children."""
        if isinstance(model, Tensor):
            return given.get(id(model))
        if isinstance(model, nn.Module):
            inside = {**model._modules, **model._parameters}
            return {k: self.like(v, given) for k, v in inside.items() if v is not None and list(cases.places(v))}
        if isinstance(model, dict):
            return {k: self.like(v, given) for k, v in model.items()}
        if isinstance(model, list | tuple):
            return type(model)(self.like(v, given) for v in model)
        return None

    def update_in_place(self, state: Any, model: Any, inside: list[Leaf], grads: dict[int, Any], given: Any) -> None:
        before = [None if g is None else to_bytes(g) for g in grads.values()]
        resting = [(leaf, leaf.count, to_bytes(self.tensor(leaf))) for leaf in self.leaves]
        full = image(self.state, self.model) if self.chance.happens(0.3) else None
        mode = self.chance.choices([contextlib.nullcontext, torch.no_grad, torch.inference_mode], [8, 1, 0.2])[0]
        try:
            reference.update(inside, [self.array(grads[id(leaf)]) for leaf in inside])
        except Refused as refused:
            full = image(self.state, self.model)
            self.say("refused")
            with pytest.raises(refused.error):
                fluxpy.update(state, model, given)
            assert image(self.state, self.model) == full
        except Skipped:
            self.say("skipped")
            fluxpy.update(state, model, given)
            assert full is None or image(self.state, self.model) == full
        else:
            self.say(mode.__name__)
            with mode():
                enabled = torch.is_grad_enabled()
                out = fluxpy.update(state, model, given)
                assert torch.is_grad_enabled() == enabled
            assert out[0] is state and out[1] is model
            for leaf, count, numbers in resting:
                assert leaf.count > count or to_bytes(self.tensor(leaf)) == numbers, f"{leaf.names[0]} was to rest"
        assert [None if g is None else to_bytes(g) for g in grads.values()] == before, "a gradient was written to"

    def update_by_parameter(self) -> None:
        """A gradient that is a parameter, of its leaf or another: it counts as it was at first, or is refused."""
        if self.bare:
            return
        forms = {id(leaf): (x.shape, x.dtype) for leaf in self.leaves for x in [self.tensor(leaf)]}
        leaf = self.chance.choice(self.leaves)
        other = self.chance.choice([o for o in self.leaves if forms[id(o)] == forms[id(leaf)]])
        grads = {o.names[0]: self.random_gradient(o) for o in self.leaves}
        grads[leaf.names[0]] = self.tensor(other).detach()
        self.say(leaf.names[0], "by", other.names[0])
        self.updates += 1
        before, kept = image(self.state, self.model), copy.deepcopy(self.leaves)
        reference.update(self.leaves, [to_array(grads[o.names[0]]) for o in self.leaves])
        try:
            fluxpy.update(self.state, self.model, grads)
        except ValueError:
            assert image(self.state, self.model) == before
            self.leaves = kept

    def update_pure(self, path: str, model: Any, inside: list[Leaf], grads: dict[int, Any], given: Any) -> None:
        """The old and the new are both right; go on with either, and the other must stay as it is."""
        state = self.state[path] if path else self.state
        before, kept = image(self.state, self.model), copy.deepcopy(inside)
        try:
            reference.update(inside, [self.array(grads[id(leaf)]) for leaf in inside])
        except Refused as refused:
            self.say("refused")
            with pytest.raises(refused.error):
                fluxpy.update(state, model, given, inplace=False)
            assert image(self.state, self.model) == before
            return
        except Skipped:
            self.say("skipped")
        new_state, new_model = fluxpy.update(state, model, given, inplace=False)
        assert image(self.state, self.model) == before
        if path or (self.way != "pure" and self.chance.happens(0.5)):
            self.compare_branch(path, new_state, new_model, inside)
            self.park("the result of a pure update", partial(image, new_state, new_model))
            for leaf, old in zip(inside, kept, strict=True):
                vars(leaf).update(vars(old))
            return
        self.park("what a pure update was made of", partial(image, self.state, self.model))
        self.state, self.model = new_state, new_model

    def compare_branch(self, path: str, state: Any, model: Any, inside: list[Leaf]) -> None:
        start = f"{path}." if path else ""
        local = []
        for leaf in inside:
            own = copy.copy(leaf)
            below = [n.removeprefix(start) for n in leaf.names if n.startswith(start)]
            own.names = ("",) if path in leaf.names else tuple(below)
            local.append(own)
        self.compare(model, local)
        self.compare_state(state, local)

    # --- What is refused ---

    def refuse(self) -> None:
        """Gradients that do not fit."""
        trained = [leaf for leaf in self.leaves if not leaf.frozen]
        if not trained or self.bare:
            return
        leaf = self.chance.choice(trained)
        spoil = self.chance.choice([self.other_shape, self.other_dtype, self.sparse, self.misnamed, self.twice])
        grads = {other.names[0]: self.random_gradient(other) for other in self.leaves}
        if not spoil(leaf, grads):
            return
        self.say(spoil.__name__, leaf.names[0])
        self.refused(ValueError, grads)

    def refused(self, error: Any, grads: Any) -> None:
        before = image(self.state, self.model)
        with pytest.raises(error):
            fluxpy.update(self.state, self.model, grads, inplace=self.chance.happens(0.8))
        assert image(self.state, self.model) == before

    def other_shape(self, leaf: Leaf, grads: dict[str, Tensor]) -> bool:
        g = grads[leaf.names[0]]
        grads[leaf.names[0]] = torch.cat([g.reshape(-1), g.new_ones(1)])
        return True

    def other_dtype(self, leaf: Leaf, grads: dict[str, Tensor]) -> bool:
        grads[leaf.names[0]] = grads[leaf.names[0]].to(torch.complex64 if leaf.pairs else torch.float16)
        return True

    def sparse(self, leaf: Leaf, grads: dict[str, Tensor]) -> bool:
        grads[leaf.names[0]] = grads[leaf.names[0]].resolve_conj().to_sparse()
        return True

    def misnamed(self, leaf: Leaf, grads: dict[str, Tensor]) -> bool:
        grads[f"{leaf.names[0]}x"] = grads.pop(leaf.names[0])
        return True

    def twice(self, leaf: Leaf, grads: dict[str, Tensor]) -> bool:
        """Two gradients for one tied parameter."""
        grads.update({name: grads[leaf.names[0]] + 1 for name in leaf.names[1:]})
        return len(leaf.names) > 1

    def refuse_without(self) -> None:
        """No `.grad` anywhere."""
        for leaf in self.leaves:
            self.tensor(leaf).grad = None
        self.refused(ValueError, None)

    def refuse_schedule(self) -> None:
        """A schedule of one leaf gives what is not allowed. Its neighbours must not notice, then or later."""
        able = [(leaf, name) for leaf in self.leaves if not leaf.frozen for name in self.schedulable(leaf)]
        if not able:
            return
        leaf, name = self.chance.choice(able)
        old = reference.holders(leaf, name)[0].values[name]
        grads = {other.names[0]: self.random_gradient(other) for other in self.leaves}
        self.say(leaf.names[0], name)
        view = self.state if leaf.names == ("",) else self.state[leaf.names[0]]
        shape = (
            name != "eps" and not leaf.accumulates and self.chance.happens(0.5)
        )  # those may not come into use at once
        fluxpy.adjust(view, **{name: cases.OtherShape() if shape else cases.Negative()})
        self.refused((ValueError, RuntimeError, TypeError) if shape else ValueError, grads)
        fluxpy.adjust(view, **{name: cases.for_fluxpy(old)})

    def schedulable(self, leaf: Leaf) -> list[str]:
        """Numbers that may become a schedule for a while."""

        def plain(name: str) -> bool:
            member = reference.holders(leaf, name)[0]
            return (member.name, name) not in reference.FIXED and not isinstance(member.values[name], Scaled)

        return [name for name in self.names_of(leaf) if name in cases.SCHEDULED and plain(name)]

    # --- Verbs ---

    def verb(self, name: str, view: View, **changes: Any) -> None:
        """The verb on both sides, or refused on both."""
        ours = {key: cases.for_fluxpy(value) for key, value in changes.items()}
        try:
            getattr(reference, name)(view.leaves, **changes)
        except Refused as refused:
            self.say("refused")
            before = image(self.state)
            with pytest.raises(refused.error):
                getattr(fluxpy, name)(view.state, **ours)
            assert image(self.state) == before
        else:
            assert getattr(fluxpy, name)(view.state, **ours) is view.state

    def adjust(self) -> None:
        view = self.view()
        names = sorted({n for leaf in view.leaves for m in leaf.chain or () for n in m.values if n != "nonfinite"})
        if not names:
            return
        chosen = self.chance.sample(names, self.chance.randint(1, min(2, len(names))))
        # Where rules of one chain differ in a hyperparameter, it must be said which of them is meant.
        if any(_differ(reference.holders(leaf, name), name) for leaf in view.leaves for name in chosen):
            return
        if self.chance.happens(0.1):
            self.adjust_wrongly(view, chosen[0])
            return
        changes = {name: cases.random_value(self.chance, name, scale_too=True) for name in chosen}
        able = [(m.name, n) for leaf in view.leaves for n in chosen for m in reference.holders(leaf, n)]
        if not all(cases.suits(member, name, changes[name]) for member, name in able):
            return
        self.say(view.name, changes)
        self.verb("adjust", view, **changes)

    def adjust_wrongly(self, view: View, name: str) -> None:
        wrong = self.chance.choice([{name: -1.0}, {"no_such_thing": 1.0}])
        self.say(view.name, wrong)
        before = image(self.state)
        with pytest.raises(ValueError):
            fluxpy.adjust(view.state, **wrong)
        assert image(self.state) == before

    def freeze(self) -> None:
        view = self.view()
        self.say(view.name)
        self.verb("freeze", view)

    def thaw(self) -> None:
        view = self.view()
        self.say(view.name)
        self.verb("thaw", view)

    def reset(self) -> None:
        view = self.view()
        self.say(view.name)
        reference.reset(view.leaves, whole=len(view.leaves) == len(self.leaves))
        assert fluxpy.reset(view.state) is view.state

    # --- Copies and files ---

    def copy_state(self) -> None:
        """Go on with a copy."""
        how = self.chance.choice([copy.deepcopy, _pickled, _mapped])
        self.say(how.__name__)
        new = how(self.state)
        self.park("what was copied", partial(image, self.state))
        self.state = new
        if how is _mapped:
            self.no_longer_fresh()

    def other_rules(self) -> Any:
        """What to give to `setup` before loading: the first rules, or those of now, where a file cannot hold them."""
        now = {path: leaf.rule for path, leaf in fluxpy.leaves(self.state)}
        values = [v for leaf in self.leaves for m in leaf.chain or () for v in m.values.values()]
        return now if any(map(_unsaved, values)) or self.chance.happens(0.3) else self.spec

    def round_trip(self) -> None:
        """Through `state_dict`, into a new state."""
        saved, spec = fluxpy.state_dict(self.state), self.other_rules()
        if self.chance.happens(0.5):
            torch.save(saved, file := io.BytesIO())
            file.seek(0)
            saved = torch.load(file, weights_only=True)
        keep = spec is self.spec and self.chance.happens(0.3)
        self.say("keep" if keep else "load")
        fresh = fluxpy.setup(spec, self.model, compile=self.way == "compiled")
        fluxpy.load_state_dict(fresh, saved, hyperparameters="keep" if keep else "load")
        self.park("what was saved", partial(image, self.state))
        self.park("what was loaded", partial(_tensors, saved))
        self.state = fresh
        self.no_longer_fresh()
        if keep:
            for leaf, first in zip(self.leaves, self.first, strict=True):
                leaf.chain = copy.deepcopy(first.chain)

    def save_and_load(self) -> None:
        """Through a file, into a new model and a new state."""
        plain = any(leaf.pairs for leaf in self.leaves)  # safetensors holds no complex numbers
        path = self.folder / ("run.flux" if plain or self.chance.happens(0.5) else "run.safetensors")
        fluxpy.save(path, model=self.model, state=self.state, turn=self.updates)
        model = copy.deepcopy(self.model)
        with torch.no_grad():
            for _, x in cases.places(model):
                x.add_(1)
        state = fluxpy.setup(self.other_rules(), model, compile=self.way == "compiled")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*set up with other rules")
            assert fluxpy.load(path, model=model, state=state) == {"turn": self.updates}
        self.park("what was saved", partial(image, self.state, self.model))
        self.model, self.state = model, state
        self.no_longer_fresh()

    def no_longer_fresh(self) -> None:
        """Momenta that somebody put there are kept."""
        for leaf in self.leaves:
            leaf.fresh = False

    def set_up_again(self) -> None:
        """A new state that keeps some of the leaves of the old one."""
        kept = self.chance.sample(self.leaves, self.chance.randint(1, len(self.leaves)))
        new = [leaf for leaf in self.leaves if not any(leaf is other for other in kept)]
        window = _common_window(kept, new, self.first_of)
        if window is None or self.bare:
            return
        wanted = {leaf.names[0] for leaf in kept}
        self.say("keeping", sorted(wanted))
        keep = fluxpy.select(self.state, lambda path, _: path in wanted) if new else self.state
        state = self.set_up(keep=keep)
        self.park("what was kept", partial(image, self.state))
        self.state = state
        for leaf in new:
            first = self.first_of(leaf)
            leaf.chain, leaf.frozen = copy.deepcopy(first.chain), not self.requires_grad(leaf) or first.chain is None
            leaf.empty()
            leaf.window, leaf.started = window if leaf.accumulates else 0, not leaf.frozen
            leaf.begin()

    def first_of(self, leaf: Leaf) -> Leaf:
        """The leaf as it was at the start."""
        return next(first for first in self.first if first.names == leaf.names)

    def requires_grad(self, leaf: Leaf) -> bool:
        x = self.tensor(leaf)
        return x.requires_grad or not isinstance(x, nn.Parameter)

    # --- What others do to the parameters ---

    def some(self) -> list[Leaf]:
        return self.chance.sample(self.leaves, self.chance.randint(1, len(self.leaves)))

    def write(self) -> None:
        """Other values, written in place or loaded."""
        values = {}
        for leaf in self.some():
            x = self.tensor(leaf)
            value = self.chance.tensor(x.shape, x.dtype)
            leaf.write(to_array(value))
            values.update(dict.fromkeys(leaf.names, value))
        if isinstance(self.model, nn.Module):
            self.model.load_state_dict(self.model.state_dict() | values)
        else:
            with torch.no_grad():
                for name, value in values.items():
                    cases.descend(self.model, name).copy_(value)

    def move(self) -> None:
        """The same numbers in other memory."""
        for leaf in self.some():
            x = self.tensor(leaf)
            x.data = cases.laid_out(self.chance, x.data)

    def replace(self) -> None:
        """Other tensors with the same numbers."""
        for leaf in self.some():
            x = self.tensor(leaf)
            new = x.detach().clone()
            new = nn.Parameter(new, requires_grad=x.requires_grad) if isinstance(x, nn.Parameter) else new
            holders = [cases.descend(self.model, name.rpartition(".")[0]) for name in leaf.names if name]
            if leaf.names == ("",):
                self.model = new
            elif not any(isinstance(holder, tuple) for holder in holders):
                for name in leaf.names:
                    cases.put(self.model, name, new)

    def flatten(self) -> None:
        """Parameters and, where they are to lie in one buffer, gradients keep their numbers."""
        held = [x for _, x in cases.places(self.model) if x.grad is not None]
        before = [to_bytes(x.grad) for x in held if x.grad is not None]
        fluxpy.flatten_parameters(self.model, grad=self.way == "flat grads")
        assert [to_bytes(x.grad) for x in held if x.grad is not None] == before

    def evaluate(self) -> None:
        """The weights to evaluate with are there for a while, of the whole or a branch; and nothing is left of it."""
        scope = View("", self.state, self.leaves) if self.bare or self.chance.happens(0.7) else self.branch()
        model, before = cases.descend(self.model, scope.name), image(self.state, self.model)
        with fluxpy.averaged(scope.state, model) as paths:
            self.say(repr(scope.name), paths)
            for leaf in self.leaves:
                inside = any(leaf is other for other in scope.leaves)
                value = leaf.evaluation if inside else leaf.x
                room = 4 * self.room(leaf) + np.spacing(np.abs(value).astype(np.float32)) * leaf.single
                self.near(to_array(self.tensor(leaf)), value, leaf, room)
            if paths:
                with pytest.raises(RuntimeError, match="update is refused"):
                    fluxpy.update(scope.state, model, {})
        assert image(self.state, self.model) == before

    def look_at(self) -> None:
        """Reading changes nothing."""
        before = image(self.state, self.model)
        repr(self.state), fluxpy.summary(self.state), optree.tree_leaves(self.state, namespace="fluxpy")
        assert image(self.state, self.model) == before


OPERATIONS = {
    "update": 20,
    "update_by_parameter": 0.5,
    "adjust": 8,
    "freeze": 3,
    "thaw": 4,
    "reset": 2,
    "copy_state": 2,
    "round_trip": 2,
    "save_and_load": 1,
    "set_up_again": 2,
    "write": 1,
    "move": 2,
    "replace": 1,
    "flatten": 1,
    "refuse": 2,
    "refuse_without": 0.5,
    "refuse_schedule": 2,
    "look_at": 1,
    "evaluate": 3,
}


def _loss(model: Any, given: dict[int, Any]) -> Tensor:
    """What has these gradients."""
    used = {id(x): x for _, x in cases.places(model)}
    return sum((x * given[key].conj()).sum().real for key, x in used.items() if given.get(key) is not None)


def _differ(members: list[reference.Member], name: str) -> bool:
    return any(member.values[name] != members[0].values[name] for member in members)


def _tensors(tree: Any) -> list[bytes]:
    return [to_bytes(t) for t in optree.tree_leaves(tree) if isinstance(t, Tensor)]


def _floats(value: Any) -> list[float]:
    return [float(v) for v in (value if isinstance(value, tuple) else (value,))]


def _pickled(state: Any) -> Any:
    return pickle.loads(pickle.dumps(state))


def _mapped(state: Any) -> Any:
    return optree.tree_map(torch.clone, state, namespace="fluxpy")


def _unsaved(value: Any) -> bool:
    """Whether it is, or has in it, a callable that a file cannot hold."""
    if isinstance(value, tuple):
        return any(map(_unsaved, value))
    return _unsaved(value.schedule) if isinstance(value, Scaled) else isinstance(value, Curve) and value.own


def _common_window(kept: list[Leaf], new: list[Leaf], first_of: Callable[[Leaf], Leaf]) -> int | None:
    """The place in the window that all have which are kept; None where they do not agree."""

    def size(leaf: Leaf) -> Any:
        return next(member.values["n"] for member in leaf.chain or () if member.name == "AccumGrad")

    places = {(leaf.window, size(leaf)) for leaf in kept if leaf.accumulates}
    sizes = {size(first) for first in map(first_of, new) if first.accumulates}
    if not places or not sizes:
        return 0
    return next(iter(places))[0] if len(places) == 1 and sizes == {next(iter(places))[1]} else None


def play(seed: int, folder: Path, way: str | None = None) -> None:
    run = Run(seed, way, folder)
    run.play(run.chance.randint(5, 40))


@pytest.mark.parametrize("seed", seeds(5000 if NIGHTLY else 100))
def test_sequence(seed: int, tmp_path: Path) -> None:
    play(seed, tmp_path)


@pytest.mark.skipif(not NIGHTLY or shutil.which("g++") is None, reason="takes minutes, and a compiler")
@pytest.mark.parametrize("seed", seeds(300))
@pytest.mark.filterwarnings("ignore")
def test_sequence_compiled(seed: int, tmp_path: Path) -> None:
    play(seed, tmp_path, "compiled")


def test_every_rule_takes_part() -> None:
    """By a formula in reference.py, or by lines of its own there; but for those that are compared with their oracles
    alone: nothing in them is new to the engine."""
    own = {"ClipNorm", "ClipGlobalNorm", "AccumGrad", "OptimiserChain", "MixedPrecision", "StochasticRounding"}
    own |= {*reference.AROUND}
    alone = {"Adafactor", "Muon", "Prodigy"}
    assert {*ROWS} | {"Masked"} == {*reference.FORMULAS} - {"Tail", "Unit"} | own | alone


# By the name of what is slightly wrong: where it is, and a seed that shows it, from where all others are tried.
SLIPS = {
    "Adam": ("FORMULAS", 1),
    "AdEMAMix": ("FORMULAS", 43),
    "ScheduleFreeAdamW": ("FORMULAS", 6),
    "Lookahead": ("FORMULAS", 2),
    "Cautious": ("AROUND", 9),
    "Lowered": ("AROUND", 5),
    "Averaged": ("EVALUATIONS", 52),
    "ScheduleFreeSGD": ("EVALUATIONS", 26),
    "ClipNorm": ("", 0),
}


@pytest.mark.parametrize("name", SLIPS)
def test_a_wrong_number_is_seen(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sequences tell rules apart that differ by a millionth."""
    table, first = SLIPS[name]
    if not table:
        shrink = reference.shrink
        monkeypatch.setattr(reference, "shrink", lambda g, norm, limit: shrink(g, norm, limit * (1 + 1e-6)))
    else:
        right = getattr(reference, table)[name]
        monkeypatch.setitem(getattr(reference, table), name, lambda *args, **h: right(*args, **h) * (1 + 1e-6))
    with pytest.raises(AssertionError, match="is off by"):
        for seed in range(200):
            play((first + seed) % 200, tmp_path, "apart")

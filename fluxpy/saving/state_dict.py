"""state_dict and load_state_dict: a state tree as plain data by name, and back, all or nothing."""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from ..leaf import Leaf, record_of
from ..pytree import tensors_in
from ..rule import Rule
from ..state import State, paths_and_leaves, require_training_weights, tree_context
from ..text import names_of
from .changes import changes
from .dcp import for_checkpoint, from_checkpoint, require_parts
from .decode import Contents, Decoder, Misfit
from .format import Encoder
from .values import is_none, malformed

VERSION = 3
READ = (2, VERSION)  # older files differ only in None, which stands there as it is

ENTRY: dict[str, Any] = {
    "names": list,
    "shape": list,
    "dtype": str,
    "rule": dict | None,
    "setup": dict | None,
    "frozen": bool,
    "count": int,
    "state": dict | None,
    "pending": dict | None,
}
OPTIONAL = {"state": None, "pending": None}

NamedLeaf = tuple[Leaf, list[str]]  # a leaf with all its paths
NamedEntry = tuple[str, dict[str, Any]]  # what was saved of a leaf, with its key


class Report(NamedTuple):
    """What `load_state_dict` did, by path. `schedules` has those that no file holds, so that a leaf kept its own;
    `changed` where the rule that `setup` was given is not the one with which the saved run was set up."""

    loaded: list[str]
    missing: list[str]
    unexpected: list[str]
    shape: dict[str, str]
    rule: dict[str, str]
    ties: dict[str, str]
    schedules: dict[str, str]
    changed: dict[str, str]

    @property
    def complete(self) -> bool:
        """Whether all that was saved fits all that is there."""
        return not (self.missing or self.unexpected or self.shape or self.rule or self.ties)

    def __str__(self) -> str:
        lines = [f"{len(self.loaded)} leaves loaded"]
        for kind, names in (("missing", self.missing), ("unexpected", self.unexpected)):
            if names:
                lines.append(f"{kind}: {names_of(names)}")
        for kind in ("shape", "rule", "ties", "schedules", "changed"):
            lines += [f"{kind}: {line}" for line in _by_reason(getattr(self, kind))]
        return "\n  ".join(lines)


def _by_reason(found: Mapping[str, str]) -> list[str]:
    """A line for each reason, with the paths that have it."""
    paths: dict[str, list[str]] = {}
    for path, why in found.items():
        paths.setdefault(why, []).append(path)
    return [f"{names_of(names)}: {why}" for why, names in paths.items()]


def state_dict(state: State | Leaf) -> dict[str, Any]:
    """The state, or the branch under a view, as plain data: `torch.load(..., weights_only=True)` takes it.

    Leaves are listed by dotted path, a tied one once with all its names, so their order never matters. Holds rules with
    their hyperparameters, momenta, counts and frozen flags. Tensors are copies, each in its own dtype: training on does
    not change them. Schedules of `fluxpy.schedules` are saved whole, any other callable is only noted. ValueError where
    a rule or its state has something else that cannot be saved.

    Of parameters that are spread over processes (DTensors) the momenta are DTensors too, and so is what stands for
    those of a leaf that waits for some: `torch.distributed.checkpoint` saves and fills the dict, on any number of
    processes, where the same leaves have momenta.

    >>> d = state_dict(setup(Adam(0.1), {"w": torch.zeros(2)}))
    >>> d["leaves"]["w"]["rule"], d["leaves"]["w"]["state"]["m"]
    ({'type': 'Adam', 'lr': 0.1, 'betas': [0.9, 0.999], 'eps': 1e-08}, tensor([0., 0.]))
    """
    encoder, leaves = Encoder(), {}
    spread = tree_context(state).spread if isinstance(state, State | Leaf) else False
    for leaf, names in _named_leaves(state, "state_dict"):
        try:
            entry = encoder.leaf(leaf, names)
            leaves[names[0]] = for_checkpoint(entry, leaf) if spread else entry
        except ValueError as error:
            raise ValueError(f"state_dict: the leaf {names[0]!r}: {error}") from error
    return {"version": VERSION, "leaves": leaves}


def load_state_dict(
    state: State | Leaf,
    d: Mapping[str, Any],
    *,
    strict: bool = True,
    hyperparameters: Literal["load", "keep"] = "load",
    prefix: str = "",
    rename: Mapping[str, str] | None = None,
) -> Report:
    """Load what `state_dict` returned into the leaves of this state or view: all of it, or nothing with a ValueError.

    Leaves are matched by name, a tied one by any of its names; one that was saved tied may go to several. Momenta,
    counts and frozen flags are loaded, and hyperparameters, unless `"keep"` leaves those; the rules must be the same.
    ValueError lists all that is missing, unexpected or does not fit; with `strict=False` such a leaf stays as it was,
    and the report says so. A callable that could not be saved stays that of this state, which must have one there.

    With `prefix`, only saved names under it are read, and without it: `prefix="encoder"` loads a branch from the whole.
    Then `rename={"encoder": "backbone"}` replaces their leading part. Momenta keep their dtype and are copied to the
    device of the present ones. Nothing in a dict is run or imported; a malformed one is a ValueError that names the
    place.

    >>> state = setup(Adam(), torch.nn.Linear(2, 3))
    >>> saved = state_dict(adjust(state, 0.1))
    >>> load_state_dict(adjust(state, 0.2), saved).loaded, state.weight.rule.lr
    (['weight', 'bias'], 0.1)
    """
    if hyperparameters not in ("load", "keep"):
        raise ValueError(f"load_state_dict: hyperparameters={hyperparameters!r} must be 'load' or 'keep'")
    leaves = _named_leaves(state, "load_state_dict")
    require_training_weights(state, "load_state_dict")
    entries = _entries(d, prefix, rename or {})
    report, contents = _decode(leaves, entries, keep=hyperparameters == "keep")
    if strict and not report.complete:
        raise ValueError(f"load_state_dict: this does not fit (see rename, strict): {report._replace(loaded=[])}")
    for leaf, new in contents:
        new.write(leaf)
    return report


def plain_rules(rules: Mapping[str, Rule | None]) -> list[list[Any]]:
    """Rules by path as plain data, each with the paths of its leaves."""
    encoder = Encoder()
    found: dict[int, list[Any]] = {}
    for path, rule in rules.items():
        found.setdefault(id(rule), [encoder.value(rule), []])[1].append(path)
    return list(found.values())


def changes_of_rules(now: list[list[Any]], saved: list[list[Any]]) -> dict[str, str]:
    """Where what `plain_rules` gave is not what it gave then, by path."""
    before = {path: rule for rule, paths in saved for path in paths}
    found = {path: "; ".join(changes(rule, before.get(path))) for rule, paths in now for path in paths}
    return {path: change for path, change in found.items() if change}


def changed_rules(changed: dict[str, str], option: str) -> str | None:
    """What to warn of after the file's hyperparameters were loaded: that the script says other ones."""
    if not changed:
        return None
    first = 'the saved run was set up with other rules than this one; those of the file count (hyperparameters="load")'
    return "\n  ".join([f"{first}, those of the script with {option}", *_by_reason(changed)])


def _named_leaves(state: Any, verb: str) -> list[NamedLeaf]:
    """Each leaf once."""
    found: dict[int, NamedLeaf] = {}
    for path, leaf in paths_and_leaves(state, verb):
        found.setdefault(id(leaf), (leaf, []))[1].append(path)
    return list(found.values())


def _decode(
    leaves: list[NamedLeaf], entries: dict[str, NamedEntry], keep: bool
) -> tuple[Report, list[tuple[Leaf, Contents]]]:
    """The new contents of each leaf that an entry fits, and a report. Changes nothing."""
    encoder = Encoder()
    device = next((t.device for leaf, _ in leaves for t in tensors_in(leaf.state)), None)
    decoder = Decoder(device, keep)
    report, contents, used = Report([], [], [], {}, {}, {}, {}, {}), [], set()
    for leaf, names in leaves:
        path = names[0]
        found = dict(entries[name] for name in names if name in entries)
        used.update(found)
        if not found:
            report.missing.append(path)
            continue
        if len(found) > 1:
            report.ties[path] = f"expected one tied parameter, got several: {names_of(found)}"
            continue
        [(key, entry)] = found.items()
        try:
            require_parts(leaf, entry)
            new, notes = decoder.leaf(leaf, entry)
        except Misfit as misfit:
            getattr(report, misfit.kind)[path] = str(misfit)
        except Exception as error:  # a value from a file may upset any code: the value is what is wrong
            raise ValueError(f"load_state_dict: leaves[{key!r}]: {error}") from error
        else:
            contents.append((leaf, new))
            report.loaded.append(path)
            if notes:
                report.schedules[path] = "; ".join(notes)
            now = encoder.value(record_of(leaf).setup_rule)
            if not is_none(entry["setup"]) and (found := changes(now, entry["setup"])):
                report.changed[path] = "; ".join(found)
    report.unexpected.extend(key for key in dict(entries.values()) if key not in used)
    return report, contents


# --- What was saved -----------------------------------------------------------------------------------------------


def _entries(d: Any, prefix: str, rename: Mapping[str, str]) -> dict[str, NamedEntry]:
    """What was saved, by the names that it has in this state."""
    version, leaves = (d.get("version"), d.get("leaves")) if isinstance(d, Mapping) else (None, None)
    if type(version) is not int or version not in READ or not isinstance(leaves, dict):
        raise malformed("load_state_dict", f"what state_dict returns, of version {VERSION} and no newer", d)
    found: dict[str, NamedEntry] = {}
    for key, entry in leaves.items():
        if not isinstance(key, str):
            raise malformed("load_state_dict: leaves", "a string as name", key)
        place = f"load_state_dict: leaves[{key!r}]"
        entry = OPTIONAL | entry if isinstance(entry, dict) else entry
        entry = from_checkpoint(entry, place)
        _check_entry(key, entry, place)
        for saved_name in entry["names"]:
            name = _new_name(saved_name, prefix, rename)
            if name is not None and found.setdefault(name, (key, entry))[0] != key:
                raise ValueError(f"{place} and the saved leaf {found[name][0]!r} both have the name {name!r}")
    return found


def _check_entry(key: str, entry: Any, place: str) -> None:
    """Check the form of an entry; its rule and state are checked where they are decoded."""
    if not isinstance(entry, dict) or entry.keys() != ENTRY.keys():
        raise malformed(place, f"a dict of {', '.join(ENTRY)}", entry)
    for field, kind in ENTRY.items():
        value = entry[field]
        if not isinstance(value, kind):
            raise malformed(f"{place}[{field!r}]", "a whole number" if kind is int else str(kind), value)
        if kind is int and (isinstance(value, bool) or not 0 <= value < 2**63):
            raise malformed(f"{place}[{field!r}]", "a whole number, 0 or more", value)
    if not all(type(size) is int for size in entry["shape"]):
        raise malformed(f"{place}['shape']", "a list of whole numbers", entry["shape"])
    if not all(isinstance(name, str) for name in entry["names"]) or key not in entry["names"]:
        raise malformed(f"{place}['names']", f"a list of strings, {key!r} among them", entry["names"])


def _new_name(name: str, prefix: str, rename: Mapping[str, str]) -> str | None:
    """The name in this state of what was saved under `name`; None of what is not under `prefix`."""
    rest = _below(name, prefix)
    if rest is None:
        return None
    matching = [old for old in rename if _below(rest, old) is not None]
    if not matching:
        return rest
    longest = max(matching, key=len)
    return ".".join(part for part in (rename[longest], _below(rest, longest)) if part)


def _below(name: str, prefix: str) -> str | None:
    """The part of a dotted name after `prefix`, which may end in a dot; None if it does not start with that."""
    start = prefix.removesuffix(".")
    if not start:
        return name
    if name == start:
        return ""
    return name.removeprefix(f"{start}.") if name.startswith(f"{start}.") else None

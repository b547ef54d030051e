"""Which rule each parameter gets, where `setup` is given glob patterns over their paths."""

import fnmatch
import warnings
from collections.abc import Mapping
from typing import Any

from .rule import Rule, reducing, rules_in, value_key
from .text import hidden_total, hidden_window, named, near_pattern, no_effect

_GLOB = frozenset("*?[")


def assign_rules(rule: Any, names: dict[int, list[str]]) -> dict[int, Rule | None]:
    """The rule of each parameter, by its number; `names` has all its paths. The first pattern that matches wins."""
    if not isinstance(rule, Mapping):
        return dict.fromkeys(names, _rule(rule, "setup takes a rule or a mapping of patterns to rules"))
    chosen: dict[int, str] = {}
    by_path = {path: i for i, paths in names.items() for path in paths}
    idle, late = [], {}
    for pattern, own in rule.items():
        if not isinstance(pattern, str):
            raise TypeError(f"setup: a pattern is a string, but got {pattern!r}; see module_paths and roles")
        if own is not None:
            _rule(own, f"the pattern {pattern!r} needs a rule or None")
        hits = _matches(pattern, names, by_path)
        if not hits:
            idle.append(pattern)
        elif all(i in chosen for i in hits):
            late[pattern] = [chosen[i] for i in hits]
        chosen.update((i, pattern) for i in hits if i not in chosen)
    bare = [paths[0] for i, paths in names.items() if i not in chosen]
    if bare or idle:
        problems = [f"no pattern matches the parameters {', '.join(map(repr, bare))}"] if bare else []
        problems += [f"the pattern {one!r} matches no parameter ({near_pattern(one, by_path)})" for one in idle]
        raise ValueError("setup: " + "; ".join(problems) + "; a last '*': Rule() catches what is left")
    _warn_of_late(late, rule)
    return {i: rule[pattern] for i, pattern in chosen.items()}


def _matches(pattern: str, names: dict[int, list[str]], by_path: dict[str, int]) -> list[int]:
    """The parameters that a pattern matches."""
    hits = [by_path[pattern]] if pattern in by_path else []
    if _GLOB.isdisjoint(pattern):
        return hits  # one path: many of these need no walk over all
    return [i for i, paths in names.items() if any(fnmatch.fnmatchcase(path, pattern) for path in paths)] or hits


def _warn_of_late(late: dict[str, list[str]], rules: Mapping[str, Rule | None]) -> None:
    """Warn of patterns for which earlier ones left nothing. A last `*` may find nothing left, and nothing is lost where
    those that took it have an equal rule."""
    for pattern, takers in late.items():
        if pattern.strip("*") and any(value_key(rules[taker]) != value_key(rules[pattern]) for taker in takers):
            warnings.warn(no_effect(pattern, takers), stacklevel=4)


def _rule(rule: Any, need: str) -> Rule:
    if not isinstance(rule, Rule):
        raise TypeError(f"{need}, but got {named(rule)}")
    for outer in rules_in(rule):  # one that writes `apply` sees one array, or those that are packed with it
        asks = [] if type(outer).steps is not Rule.steps else [r for inner in outer.inner for r in reducing(inner)]
        if hidden := [r for r in asks if outer.elementwise or r.over == "tree"]:
            raise TypeError(hidden_total(type(outer).__name__, type(hidden[0]).__name__))
        if not outer.accumulates and any(r.accumulates for r in outer.inner):
            raise TypeError(hidden_window(type(outer).__name__))
    return rule

"""Members of a rule: which of the rules inside it is meant."""

from typing import Any

from .rule import Rule, all_hyperparameters, hyperparameters, rules_in, title, value_key
from .text import unknown


def members_of(rule: Rule, member: Any) -> list[Rule]:
    """What `member` names in a rule: all rules of a class in it, or one by its index in the chain; wrappers around the
    chain do not count. ValueError where there is none."""
    if isinstance(member, type) and issubclass(member, Rule):
        found = [inner for inner in rules_in(rule) if isinstance(inner, member)]
    elif isinstance(member, int) and not isinstance(member, bool):
        chain = rule
        while len(chain.inner) == 1:
            chain = chain.inner[0]
        inside = chain.inner or (chain,)
        found = [inside[member]] if -len(inside) <= member < len(inside) else []
    else:
        raise TypeError(f"member is a rule class, as Momentum, or an index in the chain, but got {member!r}")
    if not found:
        raise ValueError(f"{title(rule)} has no member {getattr(member, '__name__', member)}")
    return found


def holders_of(rule: Rule, name: str, member: Any = None) -> list[Rule]:
    """The rules in a rule that have a hyperparameter; with `member`, those in that member. ValueError where none has
    it, and where several have different values, so that it must be said which is meant."""
    inside = [rule] if member is None else members_of(rule, member)
    found = [inner for outer in inside for inner in rules_in(outer) if name in hyperparameters(inner)]
    if not found:
        raise ValueError(unknown(title(inside[0]), all_hyperparameters(inside[0]), name))
    values = [getattr(inner, name) for inner in found]
    if len(found) > 1 and any(value_key(value) != value_key(values[0]) for value in values):
        classes = [type(inner).__name__ for inner in found]
        ways = classes if len(set(classes)) == len(classes) else ["0 (its index in the chain)"]
        raise ValueError(
            f"{name!r} stands more than once in {title(rule)}, with different values "
            f"({', '.join(map(repr, values))}); say which: {' or '.join(f'member={way}' for way in ways)}"
        )
    return found

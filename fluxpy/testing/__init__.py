"""What tests of training need: the hyperparameters of a subtree, what a step changed, and whether a rule of one's own
keeps what every rule promises. Needs no test framework: what does not hold is an AssertionError.

    import fluxpy.testing

    fluxpy.testing.assert_hyper(state, "encoder.*", lr=1e-4)
    fluxpy.testing.check_rule(MyRule)
"""

from .asserts import assert_frozen, assert_hyper, assert_only_changed
from .rule_check import check_rule
from .snapshots import Diff, Snapshot, diff, snapshot

__all__ = ["Diff", "Snapshot", "assert_frozen", "assert_hyper", "assert_only_changed", "check_rule", "diff", "snapshot"]

"""The words other libraries use, so that an unknown hyperparameter is answered with the right one."""

from .rule import Rule, hyperparameters, title, walk
from .text import near

# What other libraries call a hyperparameter -> what it may be called here.
WORDS = {
    **dict.fromkeys(("eta", "learning_rate", "step_size", "alpha", "rate"), ("lr",)),
    **dict.fromkeys(("beta", "b1", "b2", "beta1", "beta2", "beta_1", "beta_2"), ("betas",)),
    **dict.fromkeys(("epsilon", "eps_root", "ϵ"), ("eps",)),
    **dict.fromkeys(("rho", "mu", "mom", "decay"), ("momentum", "alpha", "rho")),
    **dict.fromkeys(
        ("lambda_", "lambd", "l2", "wd", "decay_rate", "weight_decay_rate"), ("weight_decay", "sign_decay")
    ),
    **dict.fromkeys(("omega", "max_grad_norm", "clip_norm", "clipnorm"), ("max_norm",)),
    **dict.fromkeys(("delta", "clip", "thresh", "clipvalue"), ("clip_value",)),
    **dict.fromkeys(("p", "ord"), ("norm_type",)),
    **dict.fromkeys(("gamma",), ("step_sizes", "momentum_decay")),
    **dict.fromkeys(("ell",), ("etas",)),
    **dict.fromkeys(("every_k", "accumulate", "steps"), ("n",)),
}


def unknown(rule: Rule, name: str) -> str:
    """The message for a hyperparameter that a rule does not have."""
    have = dict.fromkeys(own for inner in walk(rule) for own in hyperparameters(inner))
    known = [word for word in WORDS.get(name, ()) if word in have]
    hint = f"here it is called {known[0]!r}" if known else near(name, have)
    return f"{title(rule)} has no hyperparameter {name!r}; {hint}"

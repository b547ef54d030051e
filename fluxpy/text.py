"""Pieces of error messages."""

import difflib
from collections.abc import Iterable

import torch

# What other libraries call a hyperparameter -> what it may be called here.
WORDS = {
    **dict.fromkeys(("eta", "learning_rate", "step_size", "alpha", "rate"), ("lr",)),
    **dict.fromkeys(("beta", "b1", "b2", "beta1", "beta2", "beta_1", "beta_2"), ("betas",)),
    **dict.fromkeys(("epsilon", "eps_root", "ϵ"), ("eps",)),
    **dict.fromkeys(("rho", "mu", "mom", "decay"), ("momentum", "alpha", "rho")),
    **dict.fromkeys(
        ("lambda", "lambda_", "lambd", "l2", "wd", "decay_rate", "weight_decay_rate"), ("weight_decay", "sign_decay")
    ),
    **dict.fromkeys(("omega", "max_grad_norm", "clip_norm", "clipnorm"), ("max_norm",)),
    **dict.fromkeys(("delta", "clip", "thresh", "clipvalue"), ("clip_value",)),
    **dict.fromkeys(("p", "ord"), ("norm_type",)),
    **dict.fromkeys(("gamma",), ("step_sizes", "momentum_decay")),
    **dict.fromkeys(("ell",), ("etas",)),
    **dict.fromkeys(("every_k", "accumulate", "steps"), ("n",)),
}


def form(shape: Iterable[int], dtype: object) -> str:
    """A tensor's form: `float32[2, 3]`."""
    return f"{str(dtype).removeprefix('torch.')}{list(shape)}"


def names_of(keys: Iterable[object]) -> str:
    """The first few names, and how many there are."""
    names = [repr(key) for key in keys]
    return ", ".join(names[:8]) + (f", ... ({len(names)} in all)" if len(names) > 8 else "") if names else "none"


def near(name: object, names: Iterable[str]) -> str:
    """The end of a message about an unknown name: what was perhaps meant, or what there is."""
    names = list(names)
    close = difflib.get_close_matches(str(name), names, n=3)
    return f"did you mean {' or '.join(map(repr, close))}?" if close else f"there is: {names_of(names)}"


def unknown(title: str, have: Iterable[str], name: str) -> str:
    """The message for a hyperparameter that a rule does not have."""
    have = list(dict.fromkeys(have))
    known = [word for word in WORDS.get(name, ()) if word in have]
    hint = f"here it is called {known[0]!r}" if known else near(name, have)
    return f"{title} has no hyperparameter {name!r}; {hint}"


def note(error: BaseException, where: str) -> None:
    """Add to an error where it happened; `torch.compile` cannot follow that."""
    if not torch.compiler.is_compiling():
        error.add_note(where)

"""A small GPT with Muon for its hidden matrices and AdamW for the rest, from one `setup`, in a loop of one's own.

    python examples/muon_gpt.py

One state for both rules: one table shows both rates, one `adjust` scales them, one file holds all. The run is cut in
the middle, saved, and gone on with in a new model and a new state, bit for bit the same. The text is the reference of
the Python language, as in char_gpt.py. Two minutes on a laptop; nothing else to install.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from char_gpt import CONTEXT, GPT, loss, reference, windows
from torch import Tensor

import fluxpy


def new_state(model: GPT) -> fluxpy.State:
    """Muon on the matrices of the blocks; AdamW on embeddings, norms and biases, of which none decays."""
    hidden = [path for path, role in fluxpy.roles(model).items() if role == "hidden"]
    rules = {**dict.fromkeys(hidden, fluxpy.Muon(0.01)), "*": fluxpy.AdamW(2e-3, weight_decay=0.0)}
    return fluxpy.setup(rules, model)


def learn(model: GPT, state: fluxpy.State, data: Tensor, first: int, last: int, total: int) -> float:
    """The steps from `first` to `last`; the mean loss of the last twenty."""
    x, y = windows(data)
    losses = []
    for step in range(first, last):
        if step == 0:
            fluxpy.freeze(state.places)  # for the first tenth
        if step == total // 10:
            fluxpy.thaw(state.places)
        if step in (total // 2, total * 3 // 4):
            fluxpy.adjust(state, fluxpy.scale(0.4))  # both rates; their ratio stays
        rows = torch.randint(len(x), (32,), generator=torch.Generator().manual_seed(step))
        value, grads = fluxpy.withgradient(lambda m, x, y: loss(m(x), y), model, x[rows], y[rows], state=state)
        fluxpy.update(state, model, grads)
        losses.append(value.item())
    return sum(losses[-20:]) / len(losses[-20:])


def main(steps: int = 600, limit: int | None = None, seed: int = 0) -> None:
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    codes, alphabet = reference(limit)
    train, test = codes[: len(codes) * 9 // 10], codes[len(codes) * 9 // 10 :]

    model = GPT(len(alphabet))
    state = new_state(model)
    first = learn(model, state, train, 0, steps * 2 // 3, steps)
    print(fluxpy.summary(state))

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "run.flux"
        fluxpy.save(file, model=model, state=state)
        torch.manual_seed(seed + 1)
        other = GPT(len(alphabet))
        resumed = new_state(other)
        fluxpy.load(file, model=other, state=resumed)
    last = learn(model, state, train, steps * 2 // 3, steps, steps)
    learn(other, resumed, train, steps * 2 // 3, steps, steps)
    assert all(map(torch.equal, model.parameters(), other.parameters())), "the resumed run is another one"

    x, y = windows(test[: 100 * CONTEXT + 1])
    with torch.no_grad():
        held_out = loss(model(x), y).item()
    muon, adam = state.blocks[0].qkv.weight.rule.lr, state.norm.weight.rule.lr
    print(f"rates at the end: Muon {muon:g}, AdamW {adam:g}; the resumed run is the same bit for bit")
    print(f"training loss {first:.4f} after {steps * 2 // 3} steps, {last:.4f} after {steps}; held out {held_out:.4f}")
    assert last < first and held_out < (1.9 if limit is None else 3.6)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A small GPT with Muon and AdamW.")
    parser.add_argument("--short", action="store_true", help="a quick check: 30 steps on 40,000 characters")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.short:
        main(30, 40_000, args.seed)
    else:
        main(seed=args.seed)

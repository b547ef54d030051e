"""A small GPT on several processes: each holds a part of the parameters and of their momenta (FSDP2).

    torchrun --standalone --nproc-per-node 2 examples/fsdp_gpt.py            # pretrains, and saves
    torchrun --standalone --nproc-per-node 1 examples/fsdp_gpt.py --resume   # goes on: half of it frozen, a lower rate

The second command may have any number of processes. The text is that of char_gpt.py, the reference of the Python
language. What is special to several processes is marked by (*): the rest is what one writes for one.
"""

import argparse
import os
from pydoc_data.topics import topics

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

import fluxpy

CONTEXT, BATCH = 64, 16


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

    def __init__(self, characters: int, width: int = 64, heads: int = 4, depth: int = 4) -> None:
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


def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(model(x).flatten(0, 1), y.flatten())


def batches(data: Tensor, steps: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """This process's part of each batch (*): the whole batch is the same, however many processes there are."""
    g = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(data) - CONTEXT - 1, (steps, BATCH), generator=g)
    mine = starts[:, dist.get_rank() :: dist.get_world_size()]
    windows = mine[..., None] + torch.arange(CONTEXT + 1)
    return [(data[w][:, :-1], data[w][:, 1:]) for w in windows]


def main(steps: int, resume: bool, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")  # (*) "nccl" on GPUs
    first = dist.get_rank() == 0
    text = "\n\n".join(topics[name] for name in sorted(topics))
    number = {character: i for i, character in enumerate(sorted(set(text)))}
    data = torch.tensor([number[character] for character in text])

    torch.manual_seed(0)  # the same numbers on all processes, before they are cut
    model = GPT(len(number))
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

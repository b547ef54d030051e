"""Ways to run a rule fast. None has a formula of its own: each runs the rules' `apply`, or a kernel of PyTorch.

plan.py        which leaves go together, kept from step to step (cohort.py, signature.py)
step.py        one update: units to their totals, to their results, written
reference.py   leaf by leaf, for whatever nothing else takes; the reference that the others are tested against
packed.py      many leaves as one long tensor, or as a stack, in chunks that fit the cache (chunk.py, layout.py)
fused.py       PyTorch's fused kernels, with what stands in front of them packed (fused_kernels.py, shadow.py)
compiled.py    one kernel for a whole chain, by `torch.compile` (kernels.py)
tape.py        what a rule does to tensors, written down
"""

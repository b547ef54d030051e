"""Ways to run a rule fast. None has a formula of its own: each runs the rules' `apply`, or a kernel of PyTorch.

plan.py       which leaves go together, kept from step to step
plain.py      leaf by leaf, for whatever nothing else takes; the reference that the others are tested against
flat.py       many leaves as one long tensor, in pieces that fit the cache
native.py     PyTorch's fused kernels, with what stands in front of them on the flat path
compiled.py   one kernel for a whole chain, by `torch.compile`
slab.py       tensors that lie side by side
"""

"""Benchmarks of fluxpy against torch.optim and hand-written loops: `python -m benchmarks --help`."""

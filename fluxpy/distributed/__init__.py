"""A model on several processes, started by `torchrun`: what the core asks, once, when a model is bound.

sharding.py    one parameter whose numbers are spread over a device mesh (a DTensor), seen from one process
spread.py      what the record of such a parameter's leaf can do
parallel.py    one model on several processes: its wrappers, the gradients that their hooks give, what all agree on
totals.py      totals over leaves that are spread: where processes meet in an update
gathered.py    the step of a leaf whose rule needs the whole array
check.py       whether the verbs were called alike on all processes
"""

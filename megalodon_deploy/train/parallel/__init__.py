"""Training on several processes: PyTorch's distributed engine, and Megalodon's own chunk parallelism.

`mesh` lays the processes out, `chunk` splits sequences over them, `plan` is what the training loop asks.
"""

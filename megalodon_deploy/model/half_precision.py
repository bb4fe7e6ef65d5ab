"""What keeps half precision from overflowing.

The residual stream has no bound: two hops add to it in every block, and a trained model's grows past 65504, fp16's
largest number. So it is float32 in every precision, and so is everything on its way through norms and CEMA. Matrix
products take and give half precision; their inputs are normalised, except two products of activations, attention times
gate and fc1 times fc3, and what wh2 and fc2 make of them. In fp16 these four are held `HEADROOM` times smaller, an
exact power of two, until they are added to the stream in float32. bf16 has float32's range and needs no such care.
"""

from __future__ import annotations

import torch
from torch import Tensor

HEADROOM = 2.0**-6  # four tensors may reach 65504 * 64 = 4.2 million


def with_headroom(x: Tensor) -> Tensor:
    """A factor of a product that may leave the range of fp16, made smaller."""
    return x * HEADROOM if x.dtype == torch.float16 else x


def to_residual(x: Tensor) -> Tensor:
    """What a matrix made of such a product, in float32 and in its true size."""
    return x.float() / HEADROOM if x.dtype == torch.float16 else x

"""How far tensors are from what they should be, as one number that a NaN does not get past.

Python's `max` drops a NaN behind another number.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from torch import Tensor


def relative(found: Tensor, expected: Tensor) -> float:
    """The norm of the difference over that of `expected`; NaN where shapes differ."""
    if found.shape != expected.shape:
        return float("nan")
    error, scale = (float(tensor.double().norm()) for tensor in (found - expected, expected))
    return error / scale if scale else error


def largest(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Of all tensors; NaN if one is, or is missing, or is not expected."""
    if found.keys() != expected.keys():
        return float("nan")
    return float(np.max([relative(found[name], tensor) for name, tensor in expected.items()], initial=0))

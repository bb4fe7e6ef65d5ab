"""Calls too large for a grid of 2^31 blocks are refused before anything is launched: their tensors do not exist."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
from attention_helpers import AppendEntry
from kernel_cases import KERNELS, Kernel
from kernel_helpers import EPSILON, KernelLibrary

UNSUPPORTED = 2  # enum mgd_status
SMALL = {"B": 1, "T": 1, "D": 1, "N": 4, "G": 1, "H": 1, "Z": 1, "V": 1, "S": 0, "C": 9, "W": 4, "R": 0}
BEYOND: list[tuple[str, dict[str, int]]] = [
    ("complex_ema", {"T": 4, "D": 1 << 38}),
    ("complex_ema", {"T": 17, "D": 1 << 37}),
    ("complex_ema_backward", {"D": 1 << 37}),
    ("complex_ema_backward", {"B": 0, "D": 1 << 37}),  # only the sums over rows
    ("timestep_norm", {"B": 1 << 34}),
    ("timestep_norm", {"T": 1 << 31}),
    ("timestep_norm", {"B": 1 << 20, "T": 17, "D": 1 << 12, "G": 1 << 12}),
    ("timestep_norm", {"T": 17, "D": 1 << 30}),
    ("timestep_norm", {"T": 1 << 20, "D": 1 << 25}),
    ("timestep_norm_backward", {"T": 1 << 31}),
    ("timestep_norm_backward", {"T": 1 << 20, "D": 1 << 25}),
    ("timestep_norm_backward", {"B": 1 << 38, "T": 0}),
    ("timestep_norm_backward", {"B": 0, "D": 1 << 37}),
    ("norm_ema", {"B": 1 << 31}),
    ("chunk_attention", {"B": 1 << 31}),
    ("chunk_attention", {"B": 1 << 26, "S": 1 << 14}),
    ("chunk_attention", {"B": 1 << 31, "T": 2}),
    ("choose_token", {"B": 1 << 31}),
]


def status_of(kernels: KernelLibrary, kernel: Kernel, sizes: dict[str, int]) -> int:
    """The tensors' addresses are nobody's."""
    addresses = (ctypes.c_void_p(place << 4) for place in range(1, 100))
    words: dict[str, list[Any]] = {letter: [ctypes.c_int64(size)] for letter, size in sizes.items()}
    words |= {"dtype": [0], "memory_dtype": [0], "null": [None], "epsilon": [ctypes.c_float(EPSILON)]}
    words |= {"workspace": [next(addresses), ctypes.c_size_t(1 << 63)]}
    for tensor in (*kernel.inputs, *kernel.outputs):
        words[tensor.name] = [None if tensor.quantised_only else next(addresses)]
    arguments = [argument for word in kernel.signature.split() for argument in words[word]]
    return int(kernels.library[kernel.function](*arguments, None))


@pytest.mark.parametrize(("name", "sizes"), BEYOND, ids=str)
def test_too_many_blocks_are_refused(kernels: KernelLibrary, name: str, sizes: dict[str, int]) -> None:
    kernel = next(kernel for kernel in KERNELS if kernel.name == name)
    assert status_of(kernels, kernel, SMALL | sizes) == UNSUPPORTED


def test_too_many_rows_to_append_are_refused(kernels: KernelLibrary) -> None:
    entry = AppendEntry(16, 32, 1, 4)
    sizes = [ctypes.c_int64(size) for size in (1, 1 << 34, 1, 1, 1)]
    assert kernels.library.mgd_append_rows(ctypes.byref(entry), *sizes, ctypes.c_void_p(16), None) == UNSUPPORTED

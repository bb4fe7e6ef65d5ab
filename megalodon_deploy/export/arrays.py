"""Large arrays: tensors as NumPy arrays and back without a copy, and a transposition at the speed of memory.

Types that NumPy lacks are those of ml_dtypes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import torch

_ML_DTYPES = {  # PyTorch's type: the bits as both libraries know them, and ml_dtypes' type
    torch.bfloat16: (torch.int16, ml_dtypes.bfloat16),
    torch.float8_e4m3fn: (torch.uint8, ml_dtypes.float8_e4m3fn),
}
_TILE_ROWS, _TILE_COLUMNS = 128, 512
_BITS = {np.dtype(array): (bits, tensor) for tensor, (bits, array) in _ML_DTYPES.items()}


def as_numpy(tensor: torch.Tensor) -> np.ndarray:
    if tensor.dtype in _ML_DTYPES:
        bits, dtype = _ML_DTYPES[tensor.dtype]
        return tensor.view(bits).numpy().view(dtype)
    array: np.ndarray = tensor.numpy()
    return array


def as_torch(array: np.ndarray) -> torch.Tensor:
    """The array must be writable."""
    if array.dtype in _BITS:
        bits, dtype = _BITS[array.dtype]
        return torch.from_numpy(array.view(str(bits).removeprefix("torch."))).view(dtype)
    return torch.from_numpy(array)


def on_all_processors(function: Callable[[int], None], arguments: Sequence[int]) -> None:
    """Call the function with each argument, on threads whose PyTorch operators do not start more threads.

    Those would wait for each other after every operator, while threads that read, write and hash want the processors.
    The caller's inference mode holds in all of them.
    """
    num_threads, is_inference = torch.get_num_threads(), torch.is_inference_mode_enabled()

    def run(argument: int) -> None:
        with torch.inference_mode(is_inference):
            function(argument)

    try:
        with ThreadPoolExecutor(os.cpu_count(), initializer=torch.set_num_threads, initargs=(1,)) as executor:
            for _ in executor.map(run, arguments):
                pass
    finally:
        torch.set_num_threads(num_threads)  # new threads would take over the last setting of any thread


def transpose_into(out_KN: np.ndarray, array_NK: np.ndarray) -> None:
    """out_KN = array_NK.T, of one type, by all processors.

    Tile by tile: each row of a large matrix lies on other pages, and often in the same few sets of the caches, so that
    copying column after column would read every cache line many times.
    """
    out, array = _bits(out_KN), _bits(array_NK)

    def strip(first: int) -> None:
        rows = slice(first, first + _TILE_ROWS)
        for start in range(0, array.shape[1], _TILE_COLUMNS):
            columns = slice(start, start + _TILE_COLUMNS)
            np.copyto(out[columns, rows], array[rows, columns].T)

    on_all_processors(strip, range(0, array.shape[0], _TILE_ROWS))


def _bits(array: np.ndarray) -> np.ndarray:
    """Integers of the same size: NumPy copies those of its own types fastest."""
    return array.view(f"u{array.itemsize}")

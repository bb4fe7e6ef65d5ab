"""The kernels of libmegalodon on PyTorch tensors: data pointers and the current stream, through the C interface.

The library knows nothing of PyTorch and is not built against it. CUDA tensors take it by themselves where it is found;
`MEGALODON_KERNELS=reference` keeps to PyTorch's own operators, `MEGALODON_KERNELS=cuda` makes a missing library an
error.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from megalodon_deploy.engine.library import KERNELS_VARIABLE, check_abi, find_plugin_library
from megalodon_deploy.errors import UserError

_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # enum mgd_dtype
_REFERENCE, _CUDA = "reference", "cuda"  # values of KERNELS_VARIABLE


class Kernels:
    """The operators of one library file, the recurrent ones forward and backward; arguments and results are theirs.

    Tensors lie where the library computes: on a GPU, or in host memory for the kernels compiled for the CPU. The
    activations are float32, float16 or bfloat16, states and coefficients float32. Raises `RuntimeError` with the
    library's sentence when a call fails.
    """

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        self._library.mgd_status_string.restype = ctypes.c_char_p

    def complex_ema(self, x: Tensor, past: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
        """`others`: position, p, q, gamma, omega."""
        results = [_output(x), _output(past)]
        sizes = *x.shape, past.shape[2]
        self._run("complex_ema", sizes, sizes, [x, past, *others, None], results)
        return results[0], results[1]

    def complex_ema_backward(
        self, grad_y: Tensor, grad_present: Tensor, x: Tensor, past: Tensor, position: Tensor, *coefficients: Tensor
    ) -> list[Tensor]:
        """`coefficients`: p, q, gamma, omega. Returns the gradients of x, past, p, q, gamma, omega."""
        results = [_output(tensor) for tensor in (x, past, *coefficients)]
        sizes = *x.shape, past.shape[2]
        arguments = [x, past, position, *coefficients, grad_y.to(x.dtype), grad_present]
        self._run("complex_ema_backward", sizes, sizes, arguments, results)
        return results

    def timestep_norm(
        self, x: Tensor, past: Tensor, position: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        (B, T, D), G = x.shape, past.shape[1]
        results = [_output(x), _output(past)]
        arguments: list[Tensor | float | None] = [x, past, position, weight, bias, eps, None]
        self._run("timestep_norm", (B, T, D, G), (B, T, G), arguments, results)
        return results[0], results[1]

    def timestep_norm_backward(
        self,
        grad_y: Tensor,
        grad_present: Tensor,
        x: Tensor,
        past: Tensor,
        position: Tensor,
        weight: Tensor,
        eps: float,
    ) -> list[Tensor]:
        """Returns the gradients of x, past, weight, bias."""
        results = [_output(tensor) for tensor in (x, past, weight, weight)]
        sizes = *x.shape, past.shape[1]
        arguments: list[Tensor | float] = [x, past, position, weight, eps, grad_y.to(x.dtype), grad_present]
        self._run("timestep_norm_backward", sizes, sizes, arguments, results)
        return results

    def chunk_attention(
        self, q: Tensor, k: Tensor, v: Tensor, past_key: Tensor, past_value: Tensor, position: Tensor, chunk_size: int
    ) -> Tensor:
        """Memory that is the begin of a larger buffer, as growing streams have it, is read where it lies."""
        buffers = _buffer(past_key), _buffer(past_value)
        past = buffers if buffers[0].shape[2] == buffers[1].shape[2] else (past_key, past_value)
        (B, H, T, dz), dv, S = q.shape, v.shape[3], past[0].shape[2]
        result, dtype = _output(v), _DTYPES[q.dtype]
        arguments: list[Tensor | float | None] = [q, k, v, *past, position, None, None, chunk_size]
        self._run("chunk_attention", (B, H, T, S, dz, dv), (B, H, S, dv), arguments, [result], (dtype, dtype))
        return result

    def _run(
        self,
        name: str,
        sizes: tuple[int, ...],
        workspace_sizes: tuple[int, ...],
        arguments: Sequence[Tensor | float | None],
        results: list[Tensor],
        dtypes: tuple[int, ...] = (),
    ) -> None:
        """Call mgd_NAME: dtypes, sizes, arguments, results, workspace, stream. The first result is like x.

        `dtypes` are that of x alone where none are given.
        """
        x = results[0]
        workspace = torch.empty(self._workspace_bytes(name, workspace_sizes), dtype=torch.uint8, device=x.device)
        tensors = [value.contiguous() if isinstance(value, Tensor) else value for value in arguments]
        with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
            stream = torch.cuda.current_stream().cuda_stream if x.is_cuda else None
            status = self._library[f"mgd_{name}"](
                *(dtypes or (_DTYPES[x.dtype],)),
                *map(ctypes.c_int64, sizes),
                *map(_as_argument, (*tensors, *results, workspace)),
                ctypes.c_size_t(workspace.numel()),
                ctypes.c_void_p(stream),
            )
        if status != 0:
            raise RuntimeError(f"mgd_{name}: {self._library.mgd_status_string(status).decode()}")

    def _workspace_bytes(self, name: str, sizes: tuple[int, ...]) -> int:
        function = self._library[f"mgd_{name}_workspace_bytes"]
        function.restype = ctypes.c_size_t
        return int(function(*map(ctypes.c_int64, sizes)))


def _output(like: Tensor) -> Tensor:
    return torch.empty_like(like, memory_format=torch.contiguous_format)


def _buffer(rows: Tensor) -> Tensor:
    """The dense buffer [B, H, more, width] that `rows` [B, H, S, width] begin; without one, `rows` themselves."""
    (B, H, S, width), (batch_step, head_step, row_step, step) = rows.shape, rows.stride()
    between = head_step if H > 1 else batch_step if B > 1 else S * width
    is_begin = step == 1 and row_step == width and between % width == 0 and (B == 1 or batch_step == H * between)
    num_elements = rows.untyped_storage().nbytes() // rows.element_size() - rows.storage_offset()
    if not is_begin or between < S * width or B * H * between > num_elements:
        return rows
    return rows.as_strided((B, H, between // width, width), (H * between, between, width, 1))


def _as_argument(value: Tensor | float | None) -> ctypes.c_void_p | ctypes.c_float | ctypes.c_int64 | None:
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    if value is None:
        return None
    return ctypes.c_int64(value) if isinstance(value, int) else ctypes.c_float(value)


def kernels_for(x: Tensor, state: Tensor | None = None) -> Kernels | None:
    """The kernels that take these tensors, None for PyTorch's own operators. `state`: of a recurrent operator.

    None for tensors that are not on a GPU, for float64 ones, under `MEGALODON_KERNELS=reference`, and, after one
    warning, where there is no library. Raises `UserError` for another value of that variable, or when it is `cuda` and
    there is no library of this package's ABI version.
    """
    if not x.is_cuda or x.dtype not in _DTYPES or (state is not None and state.dtype != torch.float32):
        return None
    chosen = os.environ.get(KERNELS_VARIABLE, "")
    if chosen not in ("", _REFERENCE, _CUDA):
        raise UserError(f"{KERNELS_VARIABLE} = {chosen}: expected {_REFERENCE} or {_CUDA}, or no such variable")
    return None if chosen == _REFERENCE else _load(is_required=chosen == _CUDA)


@functools.cache
def _load(*, is_required: bool) -> Kernels | None:
    try:
        path = find_plugin_library()
        check_abi(path)
    except UserError as error:
        if is_required:
            raise
        warnings.warn(f"{error}; until then CUDA tensors take PyTorch's operators, many times slower", stacklevel=2)
        return None
    return Kernels(path)

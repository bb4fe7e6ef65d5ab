"""ChunkAttention and append_rows on a GPU, through the C interface, against float64 loops."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest
from attention_helpers import (
    AppendEntry,
    append_inputs,
    attention_inputs,
    attention_reference,
    check_append,
    check_attention,
    check_quantised_memory,
    check_splits,
)
from helpers import assert_close
from kernel_helpers import ACTIVATIONS, MARGIN, KernelLibrary, Tensor

pytestmark = pytest.mark.gpu

SIZES: list[dict[str, Any]] = [
    {"T": 1, "S": 70, "dz": 16, "dv": 48, "filled": [0, 5, 70, 16]},
    {"T": 1, "S": 33, "dz": 10, "dv": 14, "filled": [33, 17, 1]},
    {"T": 1, "S": 2048, "dz": 256, "dv": 2048, "filled": [2047, 100], "H": 2},
    {"T": 1, "S": 0, "dz": 8, "dv": 8, "filled": [0, 0]},
    {"T": 2, "S": 5, "dz": 10, "dv": 6, "filled": [0, 5]},
    {"T": 63, "S": 70, "dz": 16, "dv": 48, "filled": [65, 1]},
    {"T": 64, "S": 64, "dz": 40, "dv": 20, "filled": [64]},
    {"T": 65, "S": 130, "dz": 12, "dv": 24, "filled": [129, 0, 63]},
    {"T": 257, "S": 300, "dz": 256, "dv": 2048, "filled": [300], "H": 2},
]


@pytest.mark.parametrize("dtype", ACTIVATIONS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_attention_on_gpu(kernels: KernelLibrary, sizes: dict[str, Any], dtype: str) -> None:
    check_attention(kernels, attention_inputs(dtype=dtype, **sizes), dtype)


@pytest.mark.parametrize("dtype", ACTIVATIONS)
@pytest.mark.parametrize("past", ["float8_e4m3", "int8"])
@pytest.mark.parametrize("num_tokens", [1, 65])
@pytest.mark.parametrize("width", [7, 256])
def test_quantised_memory_on_gpu(kernels: KernelLibrary, dtype: str, past: str, num_tokens: int, width: int) -> None:
    check_quantised_memory(kernels, num_tokens=num_tokens, num_rows=200, width=width, dtype=dtype, past=past)


@pytest.mark.parametrize("lengths", [[1] * 40, [17, 1, 22]], ids=lambda lengths: str(len(lengths)))
def test_any_split_gives_the_same_on_gpu(kernels: KernelLibrary, lengths: list[int]) -> None:
    check_splits(kernels, lengths)


@pytest.mark.parametrize("shift", [0, 1])
def test_rows_are_appended_on_gpu(kernels: KernelLibrary, shift: int) -> None:
    shapes = [(2, 256, np.uint16), (2, 2048, np.uint16), (2, 7, np.int8), (2, 1, np.float32)] * 20
    check_append(kernels, append_inputs(shapes, T=3, S=40, filled=[38, 0, 12]), shift=shift)


def test_a_captured_append_follows_the_positions(kernels: KernelLibrary) -> None:
    """Captured once, replayed with other positions in the same memory."""
    torch = pytest.importorskip("torch")
    call = append_inputs([(1, 4, np.float32)], T=1, S=8, filled=[0, 0], C=8)
    rows, memory, position = (Tensor(kernels.memory, a) for a in (call.rows[0], call.memories[0], call.position))
    entry = AppendEntry(rows.pointer.value, memory.pointer.value, 1, 16)
    sizes = [ctypes.c_int64(size) for size in (1, 2, 1, 8, 8)]
    graph, stream = torch.cuda.CUDAGraph(), kernels.memory.side_stream
    stream.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        status = kernels.library.mgd_append_rows(
            ctypes.byref(entry), *sizes, position.pointer, ctypes.c_void_p(stream.cuda_stream)
        )
    assert status == 0
    del entry  # the table was copied
    expected = call.memories[0].copy()
    for positions in ([3, 5], [8, 7]):
        words = torch.from_numpy(np.array(positions)).view(torch.uint8).cuda()
        with torch.cuda.stream(stream):
            position.buffer[0][MARGIN * 8 : (MARGIN + 2) * 8] = words
            graph.replay()
        for b, place in enumerate(positions):
            expected[b, :, place % 8] = call.rows[0][b, :, 0]
        np.testing.assert_array_equal(memory.read().view(np.uint32), expected.view(np.uint32))


def test_the_torch_op_takes_the_kernel_for_one_token(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU: torch.cuda.is_available() is False")
    from megalodon_deploy.model.operators import chunk_attention

    monkeypatch.setenv("MEGALODON_KERNELS", "cuda")
    for num_tokens in (1, 7):
        call = attention_inputs(T=num_tokens, S=300, dz=256, dv=2048, filled=[300, 0, 7])
        names = ("q", "k", "v", "past_key", "past_value", "position")
        inputs = [torch.from_numpy(getattr(call, name)).cuda() for name in names]
        out = chunk_attention(*inputs, call.chunk_size)
        assert_close(out.cpu().numpy(), attention_reference(call), 1e-5, f"{num_tokens} tokens")

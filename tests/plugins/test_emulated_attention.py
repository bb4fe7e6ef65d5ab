"""ChunkAttention and append_rows, compiled for the CPU, against float64 loops."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from attention_helpers import (
    PAST_NUMBERS,
    AppendEntry,
    append_inputs,
    attention_inputs,
    check_append,
    check_attention,
    check_quantised_memory,
    check_splits,
    run_append,
    run_attention,
    workspace_bytes,
)
from kernel_helpers import ACTIVATIONS, DESCENDING, RANDOM, KernelLibrary

INVALID_ARGUMENT, UNSUPPORTED = 1, 2  # enum mgd_status

# Heads narrower and wider than a warp's accesses, aligned and not, of one column, and the widest there are.
DECODE_SIZES: list[dict[str, Any]] = [
    {"S": 70, "dz": 16, "dv": 48, "filled": [0, 5, 70, 16]},
    {"S": 33, "dz": 10, "dv": 14, "filled": [33, 17, 1]},
    {"S": 40, "dz": 256, "dv": 2048, "filled": [31], "H": 1},
    {"S": 21, "dz": 200, "dv": 300, "filled": [20, 3]},
    {"S": 18, "dz": 1, "dv": 1, "filled": [17, 18]},
    {"S": 9, "dz": 3, "dv": 150, "filled": [9]},
    {"S": 0, "dz": 8, "dv": 8, "filled": [0, 0]},
]
PREFILL_SIZES: list[dict[str, Any]] = [
    {"T": 2, "S": 5, "dz": 10, "dv": 6, "filled": [0, 5]},
    {"T": 63, "S": 70, "dz": 16, "dv": 48, "filled": [65, 1], "H": 1},
    {"T": 64, "S": 64, "dz": 40, "dv": 20, "filled": [64], "H": 1},
    {"T": 65, "S": 130, "dz": 12, "dv": 24, "filled": [129, 0, 63], "H": 1},
    {"T": 257, "S": 0, "dz": 8, "dv": 8, "filled": [0], "H": 2},
    {"T": 3, "S": 9, "dz": 256, "dv": 2048, "filled": [7], "H": 1},
    {"T": 5, "S": 20, "dz": 33, "dv": 257, "filled": [20, 11], "H": 1},
]


@pytest.mark.parametrize("dtype", ACTIVATIONS)
@pytest.mark.parametrize("sizes", DECODE_SIZES, ids=str)
def test_one_token_matches_float64(kernels: KernelLibrary, sizes: dict[str, Any], dtype: str) -> None:
    check_attention(kernels, attention_inputs(T=1, dtype=dtype, **sizes), dtype)


@pytest.mark.parametrize("dtype", ACTIVATIONS)
@pytest.mark.parametrize("sizes", PREFILL_SIZES, ids=str)
def test_many_tokens_match_float64(kernels: KernelLibrary, sizes: dict[str, Any], dtype: str) -> None:
    check_attention(kernels, attention_inputs(dtype=dtype, **sizes), dtype)


@pytest.mark.parametrize("dtype", ACTIVATIONS)
@pytest.mark.parametrize("past", ["float8_e4m3", "int8"])
@pytest.mark.parametrize("num_tokens", [1, 65])
@pytest.mark.parametrize("width", [7, 32])
def test_quantised_memory(kernels: KernelLibrary, dtype: str, past: str, num_tokens: int, width: int) -> None:
    check_quantised_memory(kernels, num_tokens=num_tokens, num_rows=70, width=width, dtype=dtype, past=past)


@pytest.mark.parametrize(
    ("rows", "S", "filled"), [(32, 800, [799, 300, 0]), (256, 34_000, [33_999])], ids=["rows32", "rows256"]
)
def test_parts_grow_with_the_work(kernels: KernelLibrary, rows: int, S: int, filled: list[int]) -> None:
    """Long memories are cut into longer parts: their number stays bounded, and so does the workspace."""
    heads = 2 if len(filled) == 3 else 1
    check_attention(kernels, attention_inputs(T=1, S=S, dz=4, dv=3, H=heads, filled=filled), "float32")
    parts = workspace_bytes(kernels, B=len(filled), H=heads, S=S, dv=3) // (4 * 5)
    assert parts == max(264, len(filled) * heads * -(-S // 256)) >= len(filled) * heads * -(-S // rows)


def test_workspace_of_the_largest_call_serves_smaller_ones(kernels: KernelLibrary) -> None:
    most = workspace_bytes(kernels, B=8, H=4, S=4096, dv=64)
    for B in range(1, 9):
        for S in (0, 1, 16, 100, 2048, 4096):
            assert workspace_bytes(kernels, B=B, H=4, S=S, dv=64) <= most


def test_the_workspace_may_hold_anything(kernels: KernelLibrary) -> None:
    """Not only NaN, which a maximum passes over."""
    call = attention_inputs(T=1, S=70, dz=12, dv=20, filled=[70, 16, 3])
    expected = run_attention(kernels, call)
    np.testing.assert_array_equal(run_attention(kernels, call, workspace_value=1e30), expected)


@pytest.mark.parametrize("past", ["float32", "int8"])
@pytest.mark.parametrize("num_tokens", [1, 65])
def test_results_do_not_depend_on_the_order_of_threads(
    kernels: KernelLibrary, set_order: Callable[[int], None], num_tokens: int, past: str
) -> None:
    call = attention_inputs(T=num_tokens, S=70, dz=12, dv=20, filled=[70, 3], past=past)
    expected = run_attention(kernels, call)
    for order in (DESCENDING, RANDOM):
        set_order(order)
        np.testing.assert_allclose(run_attention(kernels, call), expected, rtol=0, equal_nan=False)


@pytest.mark.parametrize("lengths", [[1] * 40, [17, 1, 22], [39, 1]], ids=lambda lengths: str(len(lengths)))
def test_any_split_gives_the_same(kernels: KernelLibrary, lengths: list[int]) -> None:
    check_splits(kernels, lengths)


@pytest.mark.parametrize("num_tokens", [1, 2])
def test_large_scores_do_not_overflow(kernels: KernelLibrary, num_tokens: int) -> None:
    call = attention_inputs(T=num_tokens, S=40, dz=8, dv=4, filled=[40, 0])
    check_attention(kernels, replace(call, q=call.q * 300), "float32")


@pytest.mark.parametrize("num_tokens", [1, 2])
def test_nan_in_a_visible_row_shows(kernels: KernelLibrary, num_tokens: int) -> None:
    """The rows of memory that count are read: otherwise NaN behind them would prove nothing."""
    for name in ("past_key", "past_value"):
        call = attention_inputs(T=num_tokens, S=40, dz=8, dv=4, filled=[33, 33])
        getattr(call, name)[1, :, 32] = np.nan
        out = run_attention(kernels, call)
        assert np.isfinite(out[0]).all()
        assert np.isnan(out[1]).all()


@pytest.mark.parametrize("num_tokens", [1, 2])
def test_memory_without_the_rows_of_a_position_is_read_to_its_end(kernels: KernelLibrary, num_tokens: int) -> None:
    """Never beyond it: the margins around it are NaN."""
    call = attention_inputs(T=num_tokens, S=20, dz=8, dv=4, filled=[20])
    beyond = replace(call, position=call.position + 50, chunk_size=100)
    np.testing.assert_allclose(run_attention(kernels, beyond), run_attention(kernels, call), rtol=0, equal_nan=False)


@pytest.mark.parametrize("past", ["float8_e4m3", "int8"])
def test_every_8_bit_number_converts_as_in_numpy(kernels: KernelLibrary, past: str) -> None:
    """One row of memory that outweighs the token's own: what comes out is its values, up to the weight's rounding."""
    for num_tokens in (1, 2):
        call = attention_inputs(T=num_tokens, S=1, dz=16, dv=256, filled=[1], H=1, past=past)
        codes = np.arange(256, dtype=np.uint8).view(call.past_value.dtype)
        finite = np.isfinite(codes.astype(np.float32))
        call.past_key[:], call.k[:] = 1, -100
        call.past_value[:] = codes
        call = replace(call, q=np.full_like(call.q, 30), past_key_scale=np.ones((1, 1, 1), np.float32))
        out = run_attention(kernels, replace(call, past_value_scale=np.full((1, 1, 1), 0.25, np.float32)))
        np.testing.assert_array_equal(out[0, 0, 0][finite], 0.25 * codes.astype(np.float32)[finite])
        assert np.isnan(out[0, 0, 0][~finite]).all()


def call_attention(kernels: KernelLibrary, **changes: Any) -> int:
    """Status of a call with B = H = 1 and plausible pointers but for those that `changes` makes None."""
    sizes = {"B": 1, "H": 1, "T": 1, "S": 1, "dz": 1, "dv": 1}
    names = ("q", "k", "v", "past_key", "past_value", "position", "past_key_scale", "past_value_scale")
    memory = {name: np.zeros(4096, np.float32) for name in (*names, "out", "workspace")}
    dtype, past = changes.get("dtype", 0), changes.get("past", changes.get("dtype", 0))
    numbers = [ctypes.c_int64(changes.get(name, size)) for name, size in sizes.items()]
    pointers = {name: ctypes.c_void_p(array.ctypes.data) for name, array in memory.items()}
    if not changes.get("scaled"):
        pointers |= {"past_key_scale": None, "past_value_scale": None}
    pointers |= {name: value for name, value in changes.items() if name in pointers}
    return int(
        kernels.library.mgd_chunk_attention(
            dtype,
            past,
            *numbers,
            *(pointers[name] for name in names),
            ctypes.c_int64(changes.get("C", 9)),
            pointers["out"],
            pointers["workspace"],
            ctypes.c_size_t(changes.get("bytes", 4096)),
            None,
        )
    )


def test_attention_refuses_impossible_arguments(kernels: KernelLibrary) -> None:
    assert call_attention(kernels) == 0
    for past in (3, 4):
        assert call_attention(kernels, past=past, scaled=True) == 0
        for name in ("past_key_scale", "past_value_scale"):
            assert call_attention(kernels, past=past, scaled=True, **{name: None}) == INVALID_ARGUMENT, name
        assert call_attention(kernels, past=past) == INVALID_ARGUMENT
    assert call_attention(kernels, scaled=True) == INVALID_ARGUMENT
    for name in ("q", "k", "v", "past_key", "past_value", "position", "out", "workspace"):
        assert call_attention(kernels, **{name: None}) == INVALID_ARGUMENT, name
    assert call_attention(kernels, S=0, past_key=None, past_value=None, workspace=None, bytes=0) == 0
    assert call_attention(kernels, T=2, workspace=None, bytes=0) == 0
    needed = workspace_bytes(kernels, B=1, H=1, S=1, dv=1)
    assert call_attention(kernels, bytes=needed) == 0
    assert call_attention(kernels, bytes=needed - 1) == INVALID_ARGUMENT
    assert call_attention(kernels, workspace=ctypes.c_void_p(8)) == INVALID_ARGUMENT  # not on 16 bytes
    for name in ("B", "H", "T"):
        assert call_attention(kernels, **{name: 0}) == 0, name
    for name in ("B", "H", "T", "S"):
        assert call_attention(kernels, **{name: -1}) == INVALID_ARGUMENT, name
    for name in ("dz", "dv", "C"):
        assert call_attention(kernels, **{name: 0}) == INVALID_ARGUMENT, name
    assert call_attention(kernels, dz=256) == 0
    assert call_attention(kernels, dz=257) == UNSUPPORTED
    assert call_attention(kernels, dv=2049) == UNSUPPORTED


def test_attention_refuses_types_that_do_not_fit(kernels: KernelLibrary) -> None:
    allowed = {(number, past) for number in range(3) for past in (number, 3, 4)}
    for dtype in range(-1, 6):
        for past in PAST_NUMBERS.values():
            expected = 0 if (dtype, past) in allowed else INVALID_ARGUMENT
            assert call_attention(kernels, dtype=dtype, past=past, scaled=past > 2) == expected, (dtype, past)


E4M3 = ml_dtypes.float8_e4m3fn


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize(
    ("shapes", "T", "S", "filled"),
    [
        ([(2, 16, np.float32), (2, 40, np.float32)], 1, 9, [3, 0, 8]),
        ([(2, 16, np.uint16), (3, 5, np.uint16)], 4, 9, [5, 2]),
        ([(1, 32, np.int8), (1, 7, E4M3), (1, 1, np.float32), (1, 1, np.float32)], 3, 12, [9, 0, 4]),
        ([(2, 3, np.uint16)] * 130, 1, 4, [3, 1]),
        ([(1, 700, np.uint16)], 2, 5, [3]),
    ],
    ids=["float32", "half", "quantised", "more than one launch", "wide"],
)
def test_rows_are_appended(
    kernels: KernelLibrary, shapes: list[tuple[int, int, type]], T: int, S: int, filled: list[int], shift: int
) -> None:
    check_append(kernels, append_inputs(shapes, T=T, S=S, filled=filled), shift=shift)


def test_rows_beyond_the_memory_are_dropped(kernels: KernelLibrary) -> None:
    check_append(kernels, append_inputs([(2, 3, np.float32)], T=4, S=9, filled=[7, 9, 20, 0]))


def test_positions_count_from_the_chunk(kernels: KernelLibrary) -> None:
    call = append_inputs([(1, 2, np.float32)], T=1, S=5, filled=[0, 3], C=5)
    call = replace(call, position=np.array([5_000_000_000, 5_000_000_003]))
    expected = call.memories[0].copy()
    expected[0, :, 0], expected[1, :, 3] = call.rows[0][0, :, 0], call.rows[0][1, :, 0]
    np.testing.assert_array_equal(run_append(kernels, call)[0].view(np.uint32), expected.view(np.uint32))


def call_append(kernels: KernelLibrary, **changes: Any) -> int:
    memory = {name: np.zeros(64, np.float32) for name in ("rows", "memory", "position")}
    pointers = {name: array.ctypes.data for name, array in memory.items()}
    if changes.get("alias"):
        pointers["memory"] = pointers["rows"]
    pointers |= {name: value for name, value in changes.items() if name in pointers}
    entry = AppendEntry(pointers["rows"], pointers["memory"], changes.get("heads", 1), changes.get("row_bytes", 4))
    sizes = {"count": 1, "B": 1, "T": 1, "S": 1, "C": 1}
    numbers = [ctypes.c_int64(changes.get(name, size)) for name, size in sizes.items()]
    table = None if changes.get("no_table") else ctypes.byref(entry)
    return int(kernels.library.mgd_append_rows(table, *numbers, ctypes.c_void_p(pointers["position"]), None))


def test_append_refuses_impossible_arguments(kernels: KernelLibrary) -> None:
    assert call_append(kernels) == 0
    for name in ("count", "B", "T", "S", "heads", "row_bytes"):
        assert call_append(kernels, **{name: 0}) == 0, name
        assert call_append(kernels, **{name: -1}) == INVALID_ARGUMENT, name
    assert call_append(kernels, C=0) == INVALID_ARGUMENT
    for name in ("rows", "memory", "position"):
        assert call_append(kernels, **{name: None}) == INVALID_ARGUMENT, name
    assert call_append(kernels, no_table=True) == INVALID_ARGUMENT
    assert call_append(kernels, alias=True) == INVALID_ARGUMENT
    assert call_append(kernels, count=0, no_table=True) == 0

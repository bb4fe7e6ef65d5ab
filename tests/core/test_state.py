"""The state table, the cuts at chunk edges, and float64 numbers in two float32."""

from __future__ import annotations

import numpy as np
from helpers import small_config
from hypothesis import given
from hypothesis import strategies as st

from megalodon_deploy.config import PRESETS
from megalodon_deploy.state import (
    call_lengths,
    pack_norm,
    state_bytes,
    state_specs,
    unpack_norm,
    zero_state,
)


def test_table_lists_each_layer_and_the_final_norm() -> None:
    specs = list(state_specs(small_config()))
    assert [spec.past for spec in specs[:4]] == ["past_key.0", "past_value.0", "past_cema.0", "past_norm.0"]
    assert [spec.present for spec in specs[4:]] == [
        *("new_key.1", "new_value.1", "present_cema.1", "present_norm.1"),
        "present_norm.final",
    ]


def test_zero_state_has_the_stated_shapes_and_bytes() -> None:
    config = small_config()
    state = zero_state(config, batch=1, capacity=5, activation=np.dtype(np.float16))
    assert state["past_key.1"].shape == (1, 2, 5, 8)
    assert state["past_value.1"].dtype == np.float16
    assert state["past_cema.0"].shape == (1, 24, 4, 2)
    assert state["past_norm.final"].shape == (1, 3, 4)
    assert state_bytes(config, activation_bytes=2, capacity=5) == sum(array.nbytes for array in state.values())


def test_a_7b_stream_has_the_published_size() -> None:
    """2.42 GB of keys and values at bf16, 16.8 MB of CEMA state."""
    config = PRESETS["paper-7B"]
    without_rows = state_bytes(config, activation_bytes=2, capacity=0)
    assert round((state_bytes(config, activation_bytes=2) - without_rows) / 1e9, 2) == 2.42
    assert round(without_rows / 1e6, 1) == 16.8


@given(st.integers(0, 10**9), st.integers(0, 500), st.integers(1, 40))
def test_calls_cover_the_tokens_and_never_cross_an_edge(position: int, num_tokens: int, chunk_size: int) -> None:
    lengths = list(call_lengths(position, num_tokens, chunk_size))
    assert sum(lengths) == num_tokens
    for length in lengths:
        assert length > 0
        assert position % chunk_size + length <= chunk_size
        position += length


def test_norm_state_keeps_float64() -> None:
    rng = np.random.default_rng(0)
    mean, var = rng.normal(30, 10, (5, 8)), rng.uniform(1e-6, 1e6, (5, 8))
    unpacked_mean, unpacked_var = unpack_norm(pack_norm(mean, var))
    np.testing.assert_allclose(unpacked_mean, mean, rtol=2**-46, equal_nan=False)
    np.testing.assert_allclose(unpacked_var, var, rtol=2**-46, equal_nan=False)

"""The exported graph under ONNX Runtime against the PyTorch model in float64: every output, every kind of call."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from export_helpers import Arrays, assert_outputs_close, export_seeded, random_call, run_onnx, run_torch
from helpers import small_config

from megalodon_deploy.bundle import Bundle
from megalodon_deploy.config import MegalodonConfig

TOLERANCE = 5e-6
CHUNK = 70  # above 64 and no power of two, so that blocks, a partial block and a whole chunk differ

CONFIGS = {
    "plain": small_config(chunk_size=CHUNK),
    "one_head_tied_swiglu": small_config(
        chunk_size=CHUNK, num_heads=1, swiglu=True, share_emb=True, scale_emb=True, rescale_nffn=True
    ),
    "no_affine": small_config(chunk_size=CHUNK, norm_affine=False, rope_base=100.0, norm_eps=1e-3),
    "short_chunk": small_config(chunk_size=5, num_layers=1),
    "chunk_of_one": small_config(chunk_size=1, num_layers=1),
}


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Bundle]]:
    made = {}
    for name, config in CONFIGS.items():
        root = tmp_path_factory.mktemp(name)
        made[name] = (root / "ckpt", export_seeded(root, config))
    return made


def check(made: tuple[Path, Bundle], feeds: Arrays) -> None:
    ckpt, bundle = made
    assert_outputs_close(run_onnx(bundle, feeds), run_torch(ckpt, feeds), TOLERANCE)


@pytest.mark.parametrize("num_tokens", [1, 2, 15, 16, 17, 63, 64, 65, CHUNK])
@pytest.mark.parametrize("num_rows", [1, 3])
def test_call_lengths(bundles: dict[str, tuple[Path, Bundle]], num_tokens: int, num_rows: int) -> None:
    room = CHUNK - num_tokens
    positions = [5 * CHUNK + room, min(room, 1), 0][:num_rows]
    check(bundles["plain"], random_call(CONFIGS["plain"], positions, num_tokens))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("num_tokens", [1, 4])
def test_configurations(bundles: dict[str, tuple[Path, Bundle]], name: str, num_tokens: int) -> None:
    config = CONFIGS[name]
    num_tokens = min(num_tokens, config.chunk_size)
    positions = [0, config.chunk_size - num_tokens, 3 * config.chunk_size]
    check(bundles[name], random_call(config, positions, num_tokens, capacity=config.chunk_size))


@pytest.mark.parametrize("num_tokens", [1, 3])
@pytest.mark.parametrize(("position", "capacity"), [(0, 0), (0, 9), (5, 5), (5, 9), (5, CHUNK), (CHUNK, 0), (CHUNK, 6)])
def test_capacities(bundles: dict[str, tuple[Path, Bundle]], position: int, capacity: int, num_tokens: int) -> None:
    check(bundles["plain"], random_call(CONFIGS["plain"], [position], num_tokens, capacity=capacity))


@pytest.mark.parametrize("num_tokens", [1, 20])
def test_fresh_row_ignores_nan_in_its_past(bundles: dict[str, tuple[Path, Bundle]], num_tokens: int) -> None:
    ckpt, bundle = bundles["plain"]
    feeds = random_call(CONFIGS["plain"], [7, 0], num_tokens)
    clean = {name: value.copy() for name, value in feeds.items()}
    for name in feeds:
        if name.startswith(("past_cema", "past_norm")):
            feeds[name][1], clean[name][1] = np.nan, 0
    outputs = run_onnx(bundle, feeds)
    assert_outputs_close(outputs, run_torch(ckpt, clean), TOLERANCE)


@pytest.mark.parametrize("num_tokens", [1, 20])
def test_masked_rows_have_no_effect_at_all(bundles: dict[str, tuple[Path, Bundle]], num_tokens: int) -> None:
    _, bundle = bundles["plain"]
    feeds = random_call(CONFIGS["plain"], [7, 20], num_tokens, capacity=40)
    other = {name: value.copy() for name, value in feeds.items()}
    for name in feeds:
        if name.startswith(("past_key", "past_value")):
            other[name][0, :, 7:], other[name][1, :, 20:] = -3e38, 3e38
    first, second = run_onnx(bundle, feeds), run_onnx(bundle, other)
    for name in first:
        np.testing.assert_allclose(first[name], second[name], rtol=0, equal_nan=False, err_msg=name)


def test_rows_do_not_see_each_other(bundles: dict[str, tuple[Path, Bundle]]) -> None:
    _, bundle = bundles["plain"]
    feeds = random_call(CONFIGS["plain"], [7, 20, 0], 9, capacity=40)
    spoiled = {name: value.copy() for name, value in feeds.items()}
    for name, value in spoiled.items():
        if name.startswith("past"):
            value[1] = np.nan
    clean, other = run_onnx(bundle, feeds), run_onnx(bundle, spoiled)
    for name in clean:
        np.testing.assert_allclose(clean[name][[0, 2]], other[name][[0, 2]], atol=1e-6, equal_nan=False, err_msg=name)


def test_all_logits(tmp_path: Path) -> None:
    config: MegalodonConfig = small_config()
    bundle = export_seeded(tmp_path, config, logits="all")
    feeds = random_call(config, [3, 15], 6)
    assert_outputs_close(run_onnx(bundle, feeds), run_torch(tmp_path / "ckpt", feeds, all_logits=True), TOLERANCE)

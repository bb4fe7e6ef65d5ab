"""Keys and values in 8 bits: arithmetic, the graph, streams on both backends, memory, engines."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import get_args

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from export_helpers import export_seeded, seeded_state
from helpers import assert_close, small_config

from megalodon_deploy.bundle import MODEL_FILE, open_bundle
from megalodon_deploy.config import PRESETS, KeyValueType, MegalodonConfig
from megalodon_deploy.engine import build_engine
from megalodon_deploy.errors import ConfigError, UserError
from megalodon_deploy.inspection import inspect_bundle
from megalodon_deploy.model.megalodon import Megalodon
from megalodon_deploy.model.quantized_rows import dequantize_rows, quantize_rows
from megalodon_deploy.runtime.executors.host_memory import KeyValueMemory
from megalodon_deploy.state import state_bytes, state_specs
from megalodon_deploy.verify import verify_bundle
from megalodon_deploy.verify.tolerance import CODE_STEP, CONDITIONING

KINDS: list[KeyValueType] = ["fp8", "int8"]
CODES = {"fp8": np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn), "int8": np.arange(-127, 128)}


def seeded_model(config: MegalodonConfig) -> Megalodon:
    model = Megalodon(config).eval()
    model.load_state_dict(seeded_state(config))
    return model


def test_unknown_type_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"kv_dtype = 'int4' is none of activation, fp8, int8"):
        small_config(kv_dtype="int4")
    with pytest.raises(UserError, match=r"'fp4' cannot be exported; there are: activation, fp8, int8"):
        export_seeded(tmp_path, small_config(), kv_dtype="fp4")
    assert get_args(KeyValueType) == ("activation", *KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_go_to_the_nearest_code(kind: KeyValueType) -> None:
    rows = torch.randn(2, 3, 5, 64, generator=torch.Generator().manual_seed(1)) * torch.logspace(-6, 6, 5)[:, None]
    rows[0, 0, 0] = 0
    codes, scale = quantize_rows(rows, kind)
    known = np.sort(CODES[kind].astype(np.float64)[np.isfinite(CODES[kind].astype(np.float64))])
    exact = rows.numpy().astype(np.float64)
    largest = np.abs(exact).max(-1)
    assert_close(scale.numpy() / np.maximum(largest / known[-1], 1e-30), np.ones_like(largest), 1e-6)
    scaled = exact / scale.numpy()[..., None]
    nearest = np.abs(scaled[..., None] - known).min(-1)
    assert np.all(np.abs(codes.float().numpy() - scaled) <= nearest * (1 + 1e-5) + 1e-4)
    kept = dequantize_rows(quantize_rows(rows, kind), torch.float32).numpy()
    assert np.all(np.abs(kept - exact).max(-1) <= largest * (32 / 448 if kind == "fp8" else 1 / 127) * 0.51)


@pytest.mark.parametrize("kind", KINDS)
def test_state_table(kind: KeyValueType) -> None:
    config = small_config(kv_dtype=kind, num_layers=1)
    specs = {spec.past: spec for spec in state_specs(config)}
    assert list(specs) == [
        *("past_key.0", "past_value.0", "past_key_scale.0", "past_value_scale.0", "past_cema.0", "past_norm.0"),
        "past_norm.final",
    ]
    assert specs["past_key_scale.0"].present == "new_key_scale.0"
    assert specs["past_value_scale.0"].past_shape == ("B", 2, "S")
    assert specs["past_value.0"].dtype == kind
    assert MegalodonConfig.from_dict(config.to_dict()) == config


def test_a_7b_stream_in_fp8_is_half_of_bf16() -> None:
    config = PRESETS["paper-7B"]
    half = state_bytes(replace(config, kv_dtype="fp8"), activation_bytes=2)
    rows, recurrent = 32 * 4096 * 4 * (256 + 2048 + 2 * 4), 32 * (4096 * 16 * 8 + 64 * 16) + 64 * 16
    assert half == rows + recurrent
    assert round(half / state_bytes(config, activation_bytes=2), 2) == 0.51
    assert state_bytes(replace(config, kv_dtype="int8"), activation_bytes=2) == half


@pytest.mark.parametrize("kind", KINDS)
def test_any_split_is_the_whole_sequence(kind: KeyValueType) -> None:
    config = small_config(kv_dtype=kind)
    model = seeded_model(config)
    tokens = torch.randint(0, config.vocab_size, (2, 31), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        whole, end = model(tokens)
        plain, _ = seeded_model(small_config())(tokens)
        state, parts = None, []
        for part in torch.split(tokens, [1, 1, 9, 4, 1, 15], dim=1):
            logits, state = model(part, state)
            parts.append(logits)
    assert_close(torch.cat(parts, 1).numpy(), whole.numpy(), 2e-5)
    assert float((plain - whole).abs().max()) > 1e-3  # it does quantise
    assert state is not None
    for name, tensor in end.tensors.items():
        assert_close(state.tensors[name].float().numpy(), tensor.float().numpy(), 2e-5, name)


@pytest.mark.parametrize(("kind", "precision"), [("fp8", "fp32"), ("int8", "fp16"), ("fp8", "bf16")])
def test_bundle_passes_verification(tmp_path: Path, kind: KeyValueType, precision: str) -> None:
    bundle = export_seeded(tmp_path, small_config(), kv_dtype=kind, precision=precision)
    report = verify_bundle(bundle, ckpt=tmp_path / "ckpt")
    assert report.passed, report.verdict
    compared = {finding.kind for finding in report.findings}
    assert {"key", "value", "key_scale", "value_scale", "cema", "norm mean", "logits"} <= compared


def test_verification_sees_a_graph_that_attends_to_unrounded_rows(tmp_path: Path) -> None:
    """Within a call as well, a token sees the rows as they are kept."""
    bundle = export_seeded(tmp_path, small_config(), kv_dtype="fp8")
    model = onnx.load(bundle.path / MODEL_FILE, load_external_data=False)
    nodes = {node.name.removeprefix("/layers.0/mega/attention/"): node for node in model.graph.node}
    nodes["attended"].input[2] = nodes["value_magnitude"].input[0]
    del model.graph.value_info[:]
    (bundle.path / MODEL_FILE).write_bytes(model.SerializeToString())
    assert not verify_bundle(bundle, ckpt=tmp_path / "ckpt").passed


@pytest.mark.parametrize("kind", KINDS)
def test_streams_agree_and_resume_on_the_other_backend(tmp_path: Path, kind: KeyValueType) -> None:
    bundle = export_seeded(tmp_path, small_config(), kv_dtype=kind)
    tokens = np.random.default_rng(0).integers(0, 50, 43).tolist()
    with torch.inference_mode():
        model = seeded_model(small_config(kv_dtype=kind))
        expected = model(torch.tensor([tokens]))[0][0].numpy()
    for first, second in (("onnxruntime", "torch"), ("torch", "onnxruntime")):
        stream = bundle.session(first, threads=1).stream()
        stream.prefill(tokens[:29])
        stream.save(tmp_path / "stream")
        resumed = bundle.session(second, threads=1).stream(resume=tmp_path / "stream")
        logits = np.stack([resumed.step(token) for token in tokens[29:]])
        assert_close(logits, expected[29:], 2e-4, f"{first} to {second}")


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_goes_on_in_an_export_with_other_rows(tmp_path: Path, kind: KeyValueType) -> None:
    """Its kept rows are converted: the logits stay within what rounding the rows of the new tokens changes.

    Rounding errs by step / sqrt(12) in the root mean square, and only 4 of the chunk's 9 rows are new.
    """
    quantised = export_seeded(tmp_path / "a", small_config(), kv_dtype=kind)
    plain = export_seeded(tmp_path / "b", small_config())
    tokens = np.random.default_rng(0).integers(0, 50, 33).tolist()
    stream = quantised.session(threads=1).stream()
    stream.prefill(tokens[:29])
    stream.save(tmp_path / "stream")
    resumed = plain.session(threads=1).stream(resume=tmp_path / "stream")
    allowed = CONDITIONING * CODE_STEP[kind] / math.sqrt(12) * math.sqrt(4 / 9)
    assert_close(resumed.prefill(tokens[29:]), stream.prefill(tokens[29:]), allowed)


@pytest.mark.parametrize("kind", KINDS)
def test_memory_is_what_inspect_says(tmp_path: Path, kind: KeyValueType) -> None:
    config = small_config(kv_dtype=kind)
    bundle = export_seeded(tmp_path, small_config(), kv_dtype=kind)
    memory = KeyValueMemory(config, 1, np.dtype(np.float32))
    memory.write(
        0, 5, {name: np.zeros((1, *view.shape[1:2], 5, *view.shape[3:])) for name, view in memory.views.items()}
    )
    per_row = sum(view.nbytes for view in memory.views.values()) / memory.capacity
    report = inspect_bundle(bundle)["state_bytes_per_stream"]
    assert report["full_chunk"] - report["without_key_value_rows"] == per_row * config.chunk_size
    assert open_bundle(bundle.path).config == config


@pytest.mark.parametrize(("kind", "precision", "plugins"), [("fp8", "fp16", True), ("int8", "bf16", False)])
def test_engine_builds(tmp_path: Path, kind: KeyValueType, precision: str, plugins: bool) -> None:
    bundle = export_seeded(tmp_path, small_config(), kv_dtype=kind, precision=precision)
    info = build_engine(bundle, plugins=plugins, sm=(89, 120))
    assert info.profile["past_key_scale.0"].max == (1, 2, 12)
    assert info.engine.size_bytes > 0

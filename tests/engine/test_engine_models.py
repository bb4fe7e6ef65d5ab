"""Engines of exported models, ours and those of the stock `polygraphy` tool."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from helpers import assert_close, small_config

from megalodon_deploy.bundle import AttentionKind, Bundle, Precision
from megalodon_deploy.config import KeyValueType
from megalodon_deploy.engine import build_engine, check_engine
from megalodon_deploy.engine.child import _environment
from megalodon_deploy.engine.graph import prepare_graph
from megalodon_deploy.engine.library import REGISTER_FILE, find_plugin_library
from megalodon_deploy.engine.profile import ShapeRange, optimization_profile
from megalodon_deploy.engine.targets import choose_attention
from megalodon_deploy.errors import EngineError
from megalodon_deploy.export import export_checkpoint
from megalodon_deploy.model.checkpoint import save_checkpoint
from megalodon_deploy.model.megalodon import Megalodon
from megalodon_deploy.state import state_specs, zero_state

Exported = Callable[..., Bundle]


@pytest.fixture
def exported(tmp_path: Path) -> Exported:
    """`exported("fp16", swiglu=True)`: a small model with random weights, as a bundle."""

    def make(
        precision: Precision,
        *,
        logits: Any = "last",
        kv_dtype: KeyValueType = "activation",
        quantize: str | None = None,
        attention: AttentionKind = "standard",
        **overrides: Any,
    ) -> Bundle:
        torch.manual_seed(0)
        checkpoint, bundle = tmp_path / "checkpoint", tmp_path / "bundle"
        save_checkpoint(Megalodon(small_config(**overrides)), checkpoint)
        choices = {"logits": logits, "kv_dtype": kv_dtype, "quantize": quantize, "attention": attention}
        return export_checkpoint(checkpoint, bundle, precision=precision, **choices)

    return make


@pytest.mark.parametrize(
    ("precision", "overrides"),
    [
        ("fp32", {"swiglu": True, "share_emb": True, "scale_emb": True}),
        ("fp16", {"rescale_nffn": True, "num_layers": 3}),
        ("bf16", {"norm_affine": False, "logits": "all"}),
    ],
)
def test_every_operator_is_a_plugin(exported: Exported, precision: Precision, overrides: dict[str, Any]) -> None:
    bundle = exported(precision, **overrides)
    info = build_engine(bundle, max_batch=2)
    assert info.plugins == ("TimestepNorm", "TimestepNormComplexEMA")
    assert info.num_plugin_layers == bundle.config.num_layers + 1
    assert info.norm_update == "float64"
    _check_weights_inside(bundle, check_engine(bundle, info))


@pytest.mark.parametrize(
    ("precision", "overrides"),
    [
        ("fp32", {"rescale_nffn": True}),
        ("fp16", {"swiglu": True, "share_emb": True, "logits": "all"}),
        ("bf16", {"chunk_size": 40}),
    ],
)
def test_standard_operators_alone(exported: Exported, precision: Precision, overrides: dict[str, Any]) -> None:
    bundle = exported(precision, **overrides)
    info = build_engine(bundle, plugins=False, max_batch=2)
    assert (info.plugins, info.num_plugin_layers) == ((), 0)
    assert info.norm_update == "float32"
    _check_weights_inside(bundle, check_engine(bundle, info))


@pytest.mark.parametrize(
    ("precision", "kv_dtype"), [("fp32", "activation"), ("fp16", "activation"), ("fp16", "fp8"), ("bf16", "int8")]
)
def test_attention_as_a_plugin(exported: Exported, precision: Precision, kv_dtype: KeyValueType) -> None:
    as_exported = precision != "fp32"
    bundle = exported(precision, kv_dtype=kv_dtype, attention="plugin" if as_exported else "standard")
    info = build_engine(bundle, sm=(89,), max_batch=2, attention=None if as_exported else "plugin")
    assert info.plugins == ("ChunkAttention", "TimestepNorm", "TimestepNormComplexEMA")
    assert info.num_plugin_layers == 2 * bundle.config.num_layers + 1
    assert b"ChunkAttention" in check_engine(bundle, info).read_bytes()


def test_attention_is_a_plugin_only_among_plugins(exported: Exported) -> None:
    bundle = exported("fp16", attention="plugin")
    assert choose_attention(bundle, None, plugins=True) == "plugin"
    assert choose_attention(bundle, None, plugins=False) == "standard"
    assert choose_attention(bundle, "standard", plugins=True) == "standard"
    with pytest.raises(EngineError, match="leave out --no-plugins or --attention plugin"):
        build_engine(bundle, plugins=False, attention="plugin")
    with pytest.raises(EngineError, match="attention 'flash' is none of: standard, plugin"):
        build_engine(bundle, attention="flash")


@pytest.mark.parametrize("quantize", [None, "int8", "int4", "fp8", "nvfp4"])
def test_matrices_of_every_kind_stay_in_the_bundle(exported: Exported, quantize: str | None) -> None:
    dims = {"model_dim": 64, "value_dim": 128, "ffn_hidden_dim": 96, "z_dim": 32, "norm_num_groups": 4}
    bundle = exported("fp16", quantize=quantize, **dims)
    info = build_engine(bundle, weights="bundle", sm=(120,))
    matrices = {"wv", "wz_wr_wh1", "wh2", "fc1", "fc2"}
    part = ".weight" if quantize is None else ".weight.codes"
    names = {f"layers.1.{'nffn' if each.startswith('fc') else 'mega'}.{each}{part}" for each in matrices}
    assert names | {"embed.weight"} <= set(info.bundle_weights)
    assert "layers.0.mega.cema.q_powers" in info.bundle_weights
    check_engine(bundle, info)


def test_turing(exported: Exported) -> None:
    info = build_engine(exported("fp16"), sm=(75, 80))
    assert info.compute_capabilities == (75, 80)


def test_stock_polygraphy_builds_with_the_register_library(exported: Exported, tmp_path: Path) -> None:
    bundle = exported("fp16")
    engine = tmp_path / "stock.engine"
    command = [sys.executable, Path(sys.executable).with_name("polygraphy"), "convert", bundle.model_path]
    command += ["--convert-to", "trt", "--output", engine, "--strongly-typed", "--compute-capabilities", "8.0"]
    command += ["--plugins", find_plugin_library().with_name(REGISTER_FILE), "--onnx-flags", "ENABLE_PLUGIN_OVERRIDE"]
    profile = optimization_profile(bundle.config, max_batch=1)
    for which in ("min", "opt", "max"):
        command += [
            f"--trt-{which}-shapes",
            *(_shape_argument(name, shapes, which) for name, shapes in profile.items()),
        ]
    environment = _environment("tensorrt-rtx", tmp_path)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    content = engine.read_bytes()
    assert b"ComplexEMA" in content
    assert b"TimestepNorm" in content


def _shape_argument(name: str, shapes: ShapeRange, which: str) -> str:
    return f"{name}:[{','.join(map(str, getattr(shapes, which)))}]"


def _check_weights_inside(bundle: Bundle, engine: Path) -> None:
    """The embedding stands in the engine byte for byte: it was built from these weights."""
    import onnx
    from onnx import external_data_helper

    model = onnx.load(bundle.model_path, load_external_data=False)
    tensor = next(tensor for tensor in model.graph.initializer if "embed" in tensor.name)
    external_data_helper.load_external_data_for_tensor(tensor, str(bundle.path))
    assert len(tensor.raw_data) > 1000
    assert tensor.raw_data in engine.read_bytes()


@pytest.mark.parametrize(("num_tokens", "position"), [(1, 5), (7, 12), (12, 0)])
def test_the_rewritten_graph_computes_the_same(exported: Exported, num_tokens: int, position: int) -> None:
    """What TensorRT is given without plugins, run by ONNX Runtime: batch 2, the second row fresh with NaN behind it."""
    bundle = exported("fp32")
    rewritten = bundle.path / "rewritten.onnx"
    rewritten.write_bytes(prepare_graph(bundle.model_path, (), bundle.config.chunk_size).model)
    rng = np.random.default_rng(0)
    feeds: dict[str, np.ndarray] = {
        "tokens": rng.integers(0, bundle.config.vocab_size, (2, num_tokens)),
        "position": np.array([position, 0]),
    }
    for name, zeros in zero_state(bundle.config, batch=2, capacity=5, activation=np.dtype(np.float32)).items():
        feeds[name] = rng.uniform(0.1, 1, zeros.shape).astype(np.float32)
        if name.startswith(("past_cema", "past_norm")):
            feeds[name][1] = np.nan
    expected, actual = (
        onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, feeds)
        for path in (bundle.model_path, rewritten)
    )
    assert len(actual) == len(expected) == 1 + sum(1 for _ in state_specs(bundle.config))
    for index, (ours, theirs) in enumerate(zip(actual, expected, strict=True)):
        assert_close(ours, theirs, 2e-5, f"output {index}")

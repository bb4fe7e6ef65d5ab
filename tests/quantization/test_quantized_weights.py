"""Weight-only quantisation: the arithmetic, the graph that ONNX Runtime fuses, verification, engines, mistakes."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from export_helpers import (
    assert_outputs_close,
    export_seeded,
    random_call,
    run_session,
    seeded_state,
    write_seeded,
)
from helpers import assert_close, small_config
from onnx import TensorProto

from megalodon_deploy.bundle import MANIFEST_FILE, WEIGHTS_FILE, Bundle, Precision, open_bundle
from megalodon_deploy.config import MegalodonConfig
from megalodon_deploy.engine import build_engine
from megalodon_deploy.engine.graph import prepare_graph
from megalodon_deploy.errors import BundleError, EngineError, UserError
from megalodon_deploy.export import export_checkpoint, load_bundle_model
from megalodon_deploy.export.codes import pack_nibbles, quantize_nearest, unpack_nibbles
from megalodon_deploy.inspection import inspect_bundle
from megalodon_deploy.quantization import BLOCK_SIZES, WHOLE_COLUMN, WeightKind, make_format, plan_quantization
from megalodon_deploy.state import state_specs
from megalodon_deploy.verify import verify_bundle
from megalodon_deploy.verify.candidates import ACTIVATIONS
from megalodon_deploy.verify.onnx_values import open_exact
from megalodon_deploy.verify.tolerance import tolerances

KINDS: list[WeightKind] = ["int8", "int4", "fp8", "nvfp4"]
FORMATS = [(kind, size) for kind in KINDS for size in BLOCK_SIZES[kind]]


def blocks_config(**overrides: Any) -> MegalodonConfig:
    """Every matrix has a multiple of 32 inputs, and no two dimensions are alike."""
    dims = {"model_dim": 64, "value_dim": 128, "ffn_hidden_dim": 96, "z_dim": 32, "norm_num_groups": 4}
    return small_config(**(dims | overrides))


def code_values(kind: WeightKind) -> np.ndarray:
    """All values of a kind of code, from ml_dtypes."""
    if kind in ("int8", "int4"):
        return np.arange(-128, 128) if kind == "int8" else np.arange(-8, 8)
    if kind == "fp8":
        values = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
        return np.unique(values[np.isfinite(values)])
    return np.unique(np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float64))


@pytest.mark.parametrize(("kind", "block_size"), FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_every_weight_goes_to_the_nearest_code(kind: WeightKind, block_size: int, dtype: torch.dtype) -> None:
    matrix = torch.randn(256, 40, generator=torch.Generator().manual_seed(0)) * 0.02
    matrix[:, 3] *= 50
    matrix[:, 5] = 0
    quantized = quantize_nearest(matrix.clone(), make_format(kind, block_size), dtype)
    exact, decoded = matrix.numpy().astype(np.float64), quantized.dequantized().numpy()
    scales = quantized.full_scales().numpy().astype(np.float64)
    blocks = exact.reshape(scales.shape[0], -1, 40)
    scaled = blocks / scales[:, None]
    nearest = np.abs(scaled[..., None] - code_values(kind)).min(-1) * scales[:, None]
    assert np.all(np.abs(decoded.reshape(blocks.shape) - blocks) <= nearest + 1e-6 * np.abs(blocks) + 1e-12)
    assert np.all(decoded[:, 5] == 0)
    # the scale uses the range of codes: the largest weight is within half a step of a code at the range's end
    largest = np.abs(scaled).max(1)[:, :3]
    assert np.all(largest <= 1.07 * np.abs(code_values(kind)).max())
    assert np.all(largest >= 0.87 * code_values(kind).max())


@pytest.mark.parametrize(("kind", "block_size"), FORMATS)
def test_large_matrices_are_quantised_as_their_parts(kind: WeightKind, block_size: int) -> None:
    matrix = torch.randn(768, 1000, generator=torch.Generator().manual_seed(0)).clamp(-3, 3).bfloat16()
    matrix[-1], matrix[0] = 4, -4  # each part has the scales of the whole
    form = make_format(kind, block_size)
    whole, wide = (quantize_nearest(each, form, torch.float32) for each in (matrix, matrix.float()))
    exact = (quantize_nearest(part, form, torch.float32).dequantized() for part in matrix.split(8, dim=1))
    assert torch.equal(whole.dequantized(), torch.cat(list(exact), dim=1))
    assert torch.equal(whole.dequantized(), wide.dequantized())
    if kind in ("int4", "nvfp4"):
        assert torch.equal(unpack_nibbles(pack_nibbles(whole.codes), (768, 1000), kind), whole.codes)


def test_four_bits_are_packed_low_half_first() -> None:
    codes = torch.tensor([[-8, 7, 3], [-1, 0, 1]], dtype=torch.int8)
    packed = pack_nibbles(codes)
    assert packed.tolist() == [0x78, 0xF3, 0x10]
    assert torch.equal(unpack_nibbles(packed, (2, 3), "int4"), codes)
    odd = torch.tensor([[1, 2, 15]], dtype=torch.uint8)
    assert torch.equal(unpack_nibbles(pack_nibbles(odd), (1, 3), "nvfp4"), odd)


def optimised_operators(bundle: Bundle, tmp_path: Path) -> tuple[Counter[str], list[dict[str, int]]]:
    """Operators of the model as ONNX Runtime runs it, and the attributes of its MatMulNBits."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 4
    onnxruntime.InferenceSession(str(bundle.model_path), options, providers=["CPUExecutionProvider"])
    nodes = onnx.load(tmp_path / "optimised.onnx", load_external_data=False).graph.node
    fused = [{item.name: item.i for item in node.attribute} for node in nodes if node.op_type == "MatMulNBits"]
    return Counter(node.op_type for node in nodes), fused


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize(("kind", "block_size", "bits"), [("int4", 32, 4), ("int8", WHOLE_COLUMN, 8), ("int8", 32, 8)])
def test_onnxruntime_fuses_every_matrix(
    tmp_path: Path, precision: str, kind: WeightKind, block_size: int, bits: int
) -> None:
    config = blocks_config(swiglu=True)
    bundle = export_seeded(tmp_path, config, precision=precision, quantize=kind, block_size=block_size)
    operators, fused = optimised_operators(bundle, tmp_path)
    assert operators["DequantizeLinear"] == 0
    assert sorted(node["bits"] for node in fused) == sorted([bits] * (5 * config.num_layers) + [8])
    assert {node["accuracy_level"] for node in fused} == {4}  # int8 products


@pytest.mark.parametrize(
    ("options", "overrides"),
    [
        ({"quantize": "int4", "precision": "fp32"}, {"swiglu": True}),
        ({"quantize": "int8", "precision": "fp16", "quantize_output": "none"}, {"rescale_nffn": True}),
        ({"quantize": "int4", "precision": "bf16", "quantize_output": "int4"}, {}),
        ({"quantize": "fp8", "precision": "fp32", "block_size": 32}, {"share_emb": True}),
        ({"quantize": "nvfp4", "precision": "fp16", "quantize_output": "nvfp4"}, {"swiglu": True}),
        ({"quantize": "int4", "precision": "fp32", "kv_dtype": "fp8"}, {}),
        ({"quantize": "int4", "precision": "fp32", "quantize_embedding": "int8"}, {"scale_emb": True}),
        ({"quantize": "fp8", "precision": "fp16", "quantize_embedding": "int8"}, {}),
    ],
    ids=str,
)
def test_bundle_passes_verification(tmp_path: Path, options: dict[str, Any], overrides: dict[str, Any]) -> None:
    """Against weights quantised anew from the checkpoint, and against those read back from the bundle."""
    bundle = export_seeded(tmp_path, blocks_config(**overrides), **options)
    for ckpt in (tmp_path / "ckpt", None):
        report = verify_bundle(bundle, ckpt=ckpt)
        assert report.passed, report.verdict
    assert open_bundle(bundle.path, verify_hashes=True).manifest == bundle.manifest


def test_verification_sees_a_changed_code(tmp_path: Path) -> None:
    bundle = export_seeded(tmp_path, blocks_config(), quantize="int4")
    model = onnx.load(bundle.model_path, load_external_data=False)
    tensor = next(each for each in model.graph.initializer if each.name == "layers.1.mega.wh2.weight.codes")
    offset = next(int(entry.value) for entry in tensor.external_data if entry.key == "offset")
    with open(bundle.path / WEIGHTS_FILE, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0x04]))
    assert not verify_bundle(bundle, ckpt=tmp_path / "ckpt").passed


@pytest.mark.parametrize("kind", KINDS)
def test_weights_come_back_from_the_bundle(tmp_path: Path, kind: WeightKind) -> None:
    """Within half a step of what went in; the embedding and all vectors as they were."""
    bundle = export_seeded(tmp_path, blocks_config(), quantize=kind)
    original = seeded_state(blocks_config())
    step = {"int8": 1 / 127, "int4": 1 / 7, "fp8": 32 / 448, "nvfp4": 2 / 6}[kind]
    is_quantised = 0
    for name, value in load_bundle_model(bundle).state_dict().items():
        if value.ndim == 2 and min(value.shape) > 2 and name not in ("embed.weight",):
            largest = original[name].abs().amax(1, keepdim=True)
            assert float(((value - original[name]).abs() / largest).max()) <= 0.6 * step, name
            is_quantised += not torch.equal(value, original[name])
        elif "cema" not in name:
            assert_close(value.numpy(), original[name].numpy(), 1e-6, name)
    assert is_quantised == 7 * 2 + 1


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_an_embedding_of_codes(tmp_path: Path, precision: Precision) -> None:
    """A byte for each number, a scale for each token; the graph looks up rows, TensorRT's behind DequantizeLinear."""
    config = blocks_config()
    bundle = export_seeded(tmp_path, config, precision=precision, quantize="int4", quantize_embedding="int8")
    original = seeded_state(config)["embed.weight"]
    found = load_bundle_model(bundle).state_dict()["embed.weight"]
    step = original.abs().amax(1, keepdim=True) / 127
    assert not torch.equal(found, original)
    assert float(((found - original).abs() / step).max()) <= (0.51 if precision == "fp32" else 0.6)
    model = onnx.load(bundle.model_path, load_external_data=False)
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    assert "embed.weight" not in stored
    assert list(stored["embed.weight.codes"].dims) == [config.vocab_size, config.model_dim]
    assert stored["embed.weight.codes"].data_type == TensorProto.INT8
    assert list(stored["embed.weight.scales"].dims) == [config.vocab_size]
    assert "embedding int8 by rows" in inspect_bundle(bundle)["quantization"]
    rewritten = bundle.path / "rewritten.onnx"
    rewritten.write_bytes(prepare_graph(bundle.model_path, (), config.chunk_size).model)
    feeds = random_call(config, [5, 5], 3)
    for spec in state_specs(config):
        feeds[spec.past] = feeds[spec.past].astype(spec.numpy_dtype(ACTIVATIONS[precision]))
    tolerance = tolerances(config, precision)["logits"]
    wanted, found = (run_session(open_exact(path), feeds) for path in (bundle.model_path, rewritten))
    assert_outputs_close(found, wanted, tolerance)


def test_an_engine_takes_an_embedding_of_codes(tmp_path: Path) -> None:
    bundle = export_seeded(tmp_path, blocks_config(), precision="fp16", quantize="int4", quantize_embedding="int8")
    assert build_engine(bundle, sm=(80,)).engine.size_bytes > 0
    outside = build_engine(bundle, sm=(80,), weights="bundle")
    assert "embed.weight.codes" in outside.bundle_weights


@pytest.mark.parametrize(("ffn_hidden_dim", "block_size"), [(96, 32), (192, 64), (384, 128)])
def test_int4_takes_the_largest_blocks_that_fit(ffn_hidden_dim: int, block_size: int) -> None:
    plan = plan_quantization("int4", in_dims={128, 256, ffn_hidden_dim})
    assert plan.weights == make_format("int4", block_size)
    assert plan.output == make_format("int8", WHOLE_COLUMN)


def test_sizes(tmp_path: Path) -> None:
    """4 bits and a float32 scale to 128 weights: 4.25 bits a weight."""
    config = blocks_config(model_dim=256, value_dim=512, ffn_hidden_dim=512, z_dim=64, vocab_size=50)
    bundle = export_seeded(tmp_path, config, quantize="int4", quantize_output="int4")
    model = onnx.load(bundle.model_path, load_external_data=False)
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    weights = config.num_layers * 256 * (64 + 2 * 512 + 256 + 512 + 2 * 512) + 50 * 256
    codes = [tensor for tensor in stored.values() if tensor.data_type == TensorProto.INT4]
    assert sum(int(np.prod(tensor.dims)) for tensor in codes) == weights
    scales = [tensor for name, tensor in stored.items() if name.endswith(".scales")]
    assert sum(int(np.prod(tensor.dims)) for tensor in scales) == weights // 128
    rest = sum(
        int(np.prod(tensor.dims)) * 4 for name, tensor in stored.items() if not name.endswith((".codes", ".scales"))
    )
    total = (bundle.path / WEIGHTS_FILE).stat().st_size
    assert weights * 4.25 / 8 < total < weights * 4.25 / 8 + rest + 4096 * len(stored)


@pytest.mark.parametrize(
    ("options", "kind_in_graph"),
    [
        ({"quantize": "int4", "precision": "fp32"}, "int4"),
        ({"quantize": "int8", "block_size": 32, "precision": "bf16", "quantize_output": "fp8"}, "int8"),
        ({"quantize": "fp8", "precision": "fp16", "kv_dtype": "fp8"}, "fp8"),
        ({"quantize": "nvfp4", "precision": "fp16"}, "nvfp4"),
    ],
    ids=str,
)
def test_engine_builds(tmp_path: Path, options: dict[str, Any], kind_in_graph: WeightKind) -> None:
    bundle = export_seeded(tmp_path, blocks_config(), **options)
    info = build_engine(bundle, sm=(120,))
    assert info.num_plugin_layers == 3
    assert kind_in_graph in str(bundle.manifest.quantization)


def test_fp4_is_for_some_gpus_alone(tmp_path: Path) -> None:
    bundle = export_seeded(tmp_path, blocks_config(), quantize="nvfp4")
    with pytest.raises(EngineError, match="sm 89 has no nvfp4; of this target 120, 121 have it: build with --sm"):
        build_engine(bundle, sm=(89, 120))
    assert build_engine(bundle).compute_capabilities == (120, 121)
    with pytest.raises(EngineError, match="no fp4 type on a CPU; use the backend torch"):
        bundle.session("onnxruntime")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantize": "int3"}, r"'int3' is none of: int8, int4, fp8, nvfp4"),
        ({"quantize": "int4", "block_size": 48}, r"block size 48 cannot be had with int4; there are: 32, 64, 128"),
        ({"quantize": "int8", "block_size": 16}, r"there are: 0 \(one scale a column\), 32, 64, 128"),
        ({"quantize": "int4", "block_size": 128}, r"64 inputs are not a multiple of .* 128; .* that fit: 32, 64"),
        ({"block_size": 32}, "go with a kind of quantisation"),
        ({"quantize_embedding": "int8"}, "go with a kind of quantisation"),
        ({"quantize": "int8", "quantize_embedding": "int4"}, r"'int4' is none of: none, int8"),
        ({"quantize": "int8", "quantize_output": "fp4"}, r"'fp4' is none of"),
    ],
    ids=str,
)
def test_mistakes_name_what_there_is(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        export_seeded(tmp_path, blocks_config(), **options)
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt"]


def test_a_shared_matrix_stays(tmp_path: Path) -> None:
    ckpt = write_seeded(tmp_path / "ckpt", blocks_config(share_emb=True))
    with pytest.raises(UserError, match=r"output matrix is its embedding.*--quantize-output none"):
        export_checkpoint(ckpt, tmp_path / "bundle", quantize="int8", quantize_output="int8")
    with pytest.raises(UserError, match=r"embedding is its output matrix.*--quantize-embedding"):
        export_checkpoint(ckpt, tmp_path / "bundle", quantize="int8", quantize_embedding="int8")
    assert export_checkpoint(ckpt, tmp_path / "bundle", quantize="int8").manifest.quantization is not None


def test_a_manifest_with_an_impossible_format_is_refused(tmp_path: Path) -> None:
    bundle = export_seeded(tmp_path, blocks_config(), quantize="int4")
    path = bundle.path / MANIFEST_FILE
    document = json.loads(path.read_text())
    document["quantization"]["weights"]["block_size"] = 7
    path.write_text(json.dumps(document))
    with pytest.raises(BundleError, match="block size 7 cannot be had with int4"):
        open_bundle(bundle.path)

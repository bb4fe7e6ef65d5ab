"""The ChunkAttention function under ONNX Runtime against float64 loops, and bundles whose attention it is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from attention_helpers import TOLERANCES, Attention, attention_inputs, attention_reference
from export_helpers import (
    assert_outputs_close,
    export_seeded,
    random_call,
    run_onnx,
    run_session,
    run_torch,
    write_seeded,
)
from helpers import assert_close, small_config

from megalodon_deploy.bundle import Bundle, open_bundle
from megalodon_deploy.errors import UserError
from megalodon_deploy.export import export_checkpoint
from megalodon_deploy.export.builder import IR_VERSION, OPSET
from megalodon_deploy.export.operators import DOMAIN, DOMAIN_VERSION
from megalodon_deploy.export.operators.chunk_attention import chunk_attention_function
from megalodon_deploy.export.operators.schema import SIGNATURES, register_schemas
from megalodon_deploy.export.precision import write_widened
from megalodon_deploy.inspection import inspect_bundle
from megalodon_deploy.verify import verify_bundle

CONFIG = small_config(chunk_size=70)
SIZES = [
    {"T": 1, "S": 9, "dz": 6, "dv": 10, "filled": [0, 9, 4]},
    {"T": 1, "S": 0, "dz": 6, "dv": 10, "filled": [0]},
    {"T": 7, "S": 5, "dz": 6, "dv": 10, "filled": [5, 0]},
    {"T": 65, "S": 70, "dz": 8, "dv": 4, "filled": [3, 70, 64]},
]


def one_node_model(call: Attention) -> onnx.ModelProto:
    feeds = feeds_of(call)
    chunk_size = onnx.helper.make_attribute("chunk_size", call.chunk_size)
    node = onnx.helper.make_node("ChunkAttention", list(feeds), ["out"], domain=DOMAIN)
    node.attribute.append(chunk_size)
    dims = {name: list(shape) for name, _, shape in SIGNATURES["ChunkAttention"]}

    def value(name: str, array: np.ndarray) -> onnx.ValueInfoProto:
        kind = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
        return onnx.helper.make_tensor_value_info(name, kind, dims[name])

    kind = onnx.helper.np_dtype_to_tensor_dtype(call.q.dtype)
    out = onnx.helper.make_tensor_value_info("out", kind, dims["v"])
    graph = onnx.helper.make_graph([node], "attention", [value(name, array) for name, array in feeds.items()], [out])
    return onnx.helper.make_model(
        graph,
        opset_imports=[onnx.helper.make_opsetid("", OPSET), onnx.helper.make_opsetid(DOMAIN, DOMAIN_VERSION)],
        ir_version=IR_VERSION,
        functions=[ir.to_proto(chunk_attention_function(scaled=call.past_key_scale is not None))],
    )


def feeds_of(call: Attention) -> dict[str, np.ndarray]:
    arrays = {name: getattr(call, name) for name, _, _ in SIGNATURES["ChunkAttention"]}
    return {name: array for name, array in arrays.items() if array is not None}


def run_function(call: Attention) -> np.ndarray:
    model = one_node_model(call)
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (out,) = session.run(None, feeds_of(call))
    return np.asarray(out)


def with_finite_memory(call: Attention) -> Attention:
    """A function multiplies masked rows by 0: whatever they hold must be finite."""
    names = ("past_key", "past_value", "past_key_scale", "past_value_scale")
    arrays = {name: getattr(call, name) for name in names if getattr(call, name) is not None}
    return replace(
        call, **{name: np.where(array != array, array.dtype.type(99), array) for name, array in arrays.items()}
    )


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_function_matches_float64(sizes: dict[str, Any], dtype: str) -> None:
    call = with_finite_memory(attention_inputs(dtype=dtype, **sizes))
    out = run_function(call)
    assert out.dtype == call.q.dtype
    # In half precision the scores and the weights are rounded too.
    assert_close(out, attention_reference(call), TOLERANCES[dtype] * (1 if dtype == "float32" else 4))


@pytest.mark.parametrize("past", ["float8_e4m3", "int8"])
@pytest.mark.parametrize("num_tokens", [1, 5])
def test_quantised_memory(past: str, num_tokens: int) -> None:
    call = with_finite_memory(attention_inputs(T=num_tokens, S=9, dz=6, dv=10, filled=[9, 0, 4], past=past))
    feeds = feeds_of(call)
    if past == "float8_e4m3":  # ONNX Runtime's Python interface takes it by bits only
        pytest.importorskip("ml_dtypes")
    session = onnxruntime.InferenceSession(one_node_model(call).SerializeToString(), providers=["CPUExecutionProvider"])
    values = {}
    for name, array in feeds.items():
        if past == "float8_e4m3" and name in ("past_key", "past_value"):
            values[name] = onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(
                array.view(np.uint8), onnx.TensorProto.FLOAT8E4M3FN
            )
        else:
            values[name] = onnxruntime.OrtValue.ortvalue_from_numpy(array)
    (out,) = session.run_with_ort_values(None, values)
    assert_close(out.numpy(), attention_reference(call), TOLERANCES["float32"])


def test_schema_infers_the_shape_and_finds_contradictions() -> None:
    register_schemas()
    call = attention_inputs(T=1, S=9, dz=6, dv=10, filled=[0])
    inferred = onnx.shape_inference.infer_shapes(one_node_model(call), check_type=True, strict_mode=True)
    dims = inferred.graph.output[0].type.tensor_type.shape.dim
    assert [dim.dim_param for dim in dims] == ["B", "H", "T", "dv"]
    wrong = one_node_model(call)
    sizes = {value.name: value.type.tensor_type.shape for value in wrong.graph.input}
    sizes["v"].dim[3].dim_value, sizes["past_value"].dim[3].dim_value = 6, 7
    with pytest.raises(Exception, match="past_value: dimension dv is 7, expected 6"):
        onnx.shape_inference.infer_shapes(wrong, strict_mode=True)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Bundle]:
    """A checkpoint and its bundle."""
    root = tmp_path_factory.mktemp("attention")
    ckpt = write_seeded(root / "ckpt", CONFIG)
    return ckpt, export_checkpoint(ckpt, root / "bundle")


def test_the_choice_of_attention_is_for_engines_alone(exported: tuple[Path, Bundle], tmp_path: Path) -> None:
    ckpt, standard = exported
    plugin = export_checkpoint(ckpt, tmp_path / "plugin", attention="plugin")
    assert [open_bundle(bundle.path).manifest.attention for bundle in (standard, plugin)] == ["standard", "plugin"]
    assert plugin.model_path.read_bytes() == standard.model_path.read_bytes()
    model = onnx.load(plugin.model_path, load_external_data=False)
    assert sum(node.op_type == "ChunkAttention" for node in model.graph.node) == CONFIG.num_layers
    assert inspect_bundle(plugin)["attention"] == "plugin"
    with pytest.raises(UserError, match="attention 'flash' cannot be exported; there are: standard, plugin"):
        export_checkpoint(ckpt, tmp_path / "bundle", attention="flash")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("positions", "num_tokens", "capacity"),
    [([0], 1, 0), ([7, 20, 0], 1, 40), ([7, 20, 0], 20, 40), ([70, 3], 64, 3), ([140], 70, 0), ([69], 1, 70)],
)
def test_calls_agree(exported: tuple[Path, Bundle], positions: list[int], num_tokens: int, capacity: int) -> None:
    ckpt, bundle = exported
    feeds = random_call(CONFIG, positions, num_tokens, capacity=capacity)
    assert_outputs_close(run_onnx(bundle, feeds), run_torch(ckpt, feeds), 5e-6)


@pytest.mark.parametrize("kv_dtype", ["int8", "fp8"])
def test_quantised_memory_goes_into_the_operator(tmp_path: Path, kv_dtype: Any) -> None:
    """Codes and scales are its inputs; verification runs the bundle against PyTorch, token by token and in calls."""
    ckpt = write_seeded(tmp_path / "ckpt", CONFIG)
    bundle = export_checkpoint(ckpt, tmp_path / "bundle", kv_dtype=kv_dtype)
    model = onnx.load(bundle.model_path, load_external_data=False)
    node = next(node for node in model.graph.node if node.op_type == "ChunkAttention")
    names = ["past_key.0", "past_value.0", "position", "past_key_scale.0", "past_value_scale.0"]
    assert list(node.input)[3:] == names
    report = verify_bundle(bundle)
    assert report.passed, report


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_bundles_run_widened(tmp_path: Path, precision: Any) -> None:
    """As `verify` runs them where an executor lacks bf16."""
    bundle = export_seeded(tmp_path, CONFIG, precision=precision)
    widened = write_widened(bundle, tmp_path / "wide")
    feeds = random_call(CONFIG, [7, 0], 5)
    session = onnxruntime.InferenceSession(widened, providers=["CPUExecutionProvider"])
    expected = run_torch(tmp_path / "ckpt", feeds)
    assert_outputs_close(run_session(session, feeds), expected, 2e-3 if precision == "fp16" else 2e-2)

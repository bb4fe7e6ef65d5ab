"""The compiled operators inside the installed ONNX Runtime, against float64 loops."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnxruntime
import pytest
from attention_helpers import TOLERANCES, Attention, attention_inputs, attention_reference
from helpers import assert_close
from kernel_helpers import (
    EPSILON,
    assert_norm_state,
    check_complex_ema,
    check_timestep_norm,
    complex_ema_inputs,
    run_in_parts,
    timestep_norm_inputs,
)
from onnx import TensorProto, helper

from megalodon_deploy.engine.library import OPERATORS_FILE, OPERATORS_VARIABLE, find_onnxruntime_operators
from megalodon_deploy.engine.toolchain import build_onnxruntime_operators
from megalodon_deploy.errors import EngineError
from megalodon_deploy.export.operators.schema import SIGNATURES

Array = np.ndarray
FLOAT32 = "float32"

# B, T, D, N: one token and many, T, D and N below, at and above those of one pass, enough work for several threads.
CEMA_SIZES = [
    (4, 1, 1, 1),
    (3, 1, 130, 16),
    (2, 1, 1024, 16),
    (2, 63, 9, 4),
    (2, 65, 33, 17),
    (3, 257, 8, 16),
    (2, 128, 16, 3),
    (1, 7, 5, 40),
]
# B, T, D, G: groups of one scalar and of many, enough work for several threads.
NORM_SIZES = [(3, 1, 24, 3), (4, 2, 5, 5), (2, 1, 1024, 32), (2, 65, 66, 6), (3, 257, 10, 5), (1, 600, 96, 2)]
# One token and many; widths and numbers of rows below, at and above those of parts, blocks and tiles; no memory.
ATTENTION_SIZES: list[dict[str, Any]] = [
    {"T": 1, "S": 9, "dz": 6, "dv": 10, "filled": [0, 9, 4]},
    {"T": 1, "S": 0, "dz": 6, "dv": 10, "filled": [0]},
    {"T": 1, "S": 200, "dz": 256, "dv": 512, "filled": [200, 67, 64, 33, 0], "H": 1},
    {"T": 1, "S": 71, "dz": 5, "dv": 300, "filled": [71, 6]},
    {"T": 2, "S": 5, "dz": 3, "dv": 17, "filled": [5, 0]},
    {"T": 49, "S": 0, "dz": 8, "dv": 16, "filled": [0]},
    {"T": 130, "S": 140, "dz": 20, "dv": 33, "filled": [3, 140, 64]},
]


class CompiledOperators:
    """Each operator as a model of one node, whose every tensor is an input."""

    def __init__(self, library: Path) -> None:
        self._library = library
        self._sessions: dict[str, onnxruntime.InferenceSession] = {}

    def complex_ema(self, dtype: str, inputs: Sequence[Array]) -> tuple[Array, Array]:
        """`inputs` in the operator's order, with q instead of its powers."""
        assert dtype == FLOAT32
        *before, q, gamma, omega = inputs
        unused = np.full_like(q, np.nan)  # higher powers are for those who work in blocks
        return self._run("ComplexEMA", [*before, np.stack([q, unused]), gamma, omega])

    def timestep_norm(self, dtype: str, inputs: Sequence[Array]) -> tuple[Array, Array]:
        assert dtype == FLOAT32
        return self._run("TimestepNorm", inputs)

    def chunk_attention(self, call: Attention) -> Array:
        given = [getattr(call, name) for name, _, _ in SIGNATURES["ChunkAttention"]]
        inputs = [array for array in given if array is not None]
        session = self._load("ChunkAttention", inputs, ["out"], chunk_size=call.chunk_size)
        (out,) = session.run_with_ort_values(None, {f"input{i}": ort_value(array) for i, array in enumerate(inputs)})
        return np.asarray(out.numpy())

    def _run(self, op_type: str, inputs: Sequence[Array]) -> tuple[Array, Array]:
        if op_type not in self._sessions:
            attributes = {"epsilon": EPSILON} if op_type == "TimestepNorm" else {}
            self._sessions[op_type] = self._load(op_type, inputs, ["y", "present"], **attributes)
        feed = {f"input{i}": array for i, array in enumerate(inputs)}
        y, present = self._sessions[op_type].run(None, feed)
        return y, present

    def _load(
        self, op_type: str, inputs: Sequence[Array], output_names: list[str], **attributes: Any
    ) -> onnxruntime.InferenceSession:
        values = [
            helper.make_tensor_value_info(
                f"input{i}", helper.np_dtype_to_tensor_dtype(array.dtype), [None] * array.ndim
            )
            for i, array in enumerate(inputs)
        ]
        outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in output_names]
        node = helper.make_node(op_type, [v.name for v in values], output_names, domain="megalodon", **attributes)
        opsets = [helper.make_opsetid("", 24), helper.make_opsetid("megalodon", 1)]
        graph = helper.make_graph([node], "one", values, outputs)
        model = helper.make_model(graph, opset_imports=opsets, ir_version=11)
        options = onnxruntime.SessionOptions()
        options.register_custom_ops_library(str(self._library))
        options.log_severity_level = 4
        return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def ort_value(array: Array) -> onnxruntime.OrtValue:
    if array.dtype == ml_dtypes.float8_e4m3fn:  # taken by bits only
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.uint8), TensorProto.FLOAT8E4M3FN)
    return onnxruntime.OrtValue.ortvalue_from_numpy(array)


@pytest.fixture(scope="module")
def operators() -> CompiledOperators:
    return CompiledOperators(build_onnxruntime_operators())


@pytest.mark.parametrize("sizes", CEMA_SIZES, ids=str)
def test_complex_ema_matches_float64(operators: CompiledOperators, sizes: tuple[int, ...]) -> None:
    B, T, D, N = sizes
    check_complex_ema(operators.complex_ema, FLOAT32, complex_ema_inputs(B=B, T=T, D=D, N=N))


@pytest.mark.parametrize("sizes", NORM_SIZES, ids=str)
def test_timestep_norm_matches_float64(operators: CompiledOperators, sizes: tuple[int, ...]) -> None:
    B, T, D, G = sizes
    check_timestep_norm(operators.timestep_norm, FLOAT32, timestep_norm_inputs(B=B, T=T, D=D, G=G))


@pytest.mark.parametrize("past", ["float32", "int8", "float8_e4m3"])
@pytest.mark.parametrize("sizes", ATTENTION_SIZES, ids=str)
def test_chunk_attention_matches_float64(operators: CompiledOperators, sizes: dict[str, Any], past: str) -> None:
    """Rows that no token may see are NaN."""
    call = attention_inputs(**sizes, past=past)
    assert_close(operators.chunk_attention(call), attention_reference(call), TOLERANCES[FLOAT32], "ChunkAttention")


def test_chunk_attention_takes_scores_of_any_size(operators: CompiledOperators) -> None:
    """Softmax is relative to the largest score, which blocks of keys find one after the other."""
    for num_tokens in (1, 70):
        call = attention_inputs(T=num_tokens, S=150, dz=16, dv=24, filled=[150, 1])
        rising = np.linspace(-1, 1, 150, dtype=np.float32)[None, None, :, None] * call.q[:, :, :1] * 300
        rising[1, :, 1:] = np.nan
        call = replace(call, past_key=rising)
        assert_close(operators.chunk_attention(call), attention_reference(call), 2e-5, f"{num_tokens} tokens")


def test_chunk_attention_keeps_what_is_not_finite(operators: CompiledOperators) -> None:
    for num_tokens in (1, 2):
        call = attention_inputs(T=num_tokens, S=40, dz=4, dv=4, filled=[40, 40], H=1)
        call.past_key[0, 0, 35] = np.nan
        out = operators.chunk_attention(call)
        assert np.isnan(out[0]).all()
        assert_close(out[1], attention_reference(call)[1], TOLERANCES[FLOAT32], "the other row")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": np.zeros((2, 2, 3, 5), np.float32)}, "k like q"),
        ({"position": np.zeros(1, np.int64)}, "a position for each row"),
        ({"position": np.array([10, 0])}, "memory for all rows below position"),
        ({"position": np.array([-1, 0])}, "memory for all rows below position"),
        ({"past_value": np.zeros((2, 2, 8, 8), np.float32)}, "memory of B, H, S rows"),
        ({"past_key": np.zeros((2, 2, 9, 6), np.int8)}, "with scales"),
    ],
    ids=str,
)
def test_attention_that_does_not_fit_is_refused(
    operators: CompiledOperators, changes: dict[str, Array], message: str
) -> None:
    call = replace(attention_inputs(T=3, S=9, dz=6, dv=8, filled=[9, 0]), **changes)
    with pytest.raises(Exception, match=f"megalodon operator: expected .*{message}"):
        operators.chunk_attention(call)


def test_calls_of_any_length_are_the_same(operators: CompiledOperators) -> None:
    lengths = [1, 1, 13, 25, 1]
    inputs = complex_ema_inputs(B=2, T=sum(lengths), D=12, N=16)
    parts, whole = run_in_parts(operators.complex_ema, FLOAT32, inputs, lengths), operators.complex_ema(FLOAT32, inputs)
    assert_close(parts[0], whole[0], 1e-6, "ComplexEMA")
    assert_close(parts[1], whole[1], 1e-6, "state of ComplexEMA")
    inputs = timestep_norm_inputs(B=2, T=sum(lengths), D=12, G=3)
    (y, present), (whole_y, whole_present) = (
        run_in_parts(operators.timestep_norm, FLOAT32, inputs, lengths),
        operators.timestep_norm(FLOAT32, inputs),
    )
    assert_close(y, whole_y, 1e-6, "TimestepNorm")
    assert_norm_state(present, whole_present, 1e-9)


def test_a_mean_far_from_zero_loses_nothing(operators: CompiledOperators) -> None:
    x, past, position, weight, bias = timestep_norm_inputs(B=2, T=9, D=64, G=2)
    inputs = [x * np.float32(0.01) + 300, past, np.zeros_like(position), weight, bias]
    y, _ = operators.timestep_norm(FLOAT32, inputs)
    exact = inputs[0].astype(np.float64).reshape(2, 9, 2, 32)
    for t in range(9):
        seen = exact[:, : t + 1].transpose(0, 2, 1, 3).reshape(2, 2, -1)
        mean, var = seen.mean(-1)[..., None], (seen.reshape(2, 2, t + 1, 32).var(-1).mean(-1))[..., None]
        between = seen.reshape(2, 2, t + 1, 32).mean(-1).var(-1)[..., None]
        normal = (exact[:, t] - mean) / np.sqrt(var + between + EPSILON)
        assert_close(y[:, t], normal.reshape(2, 64) * weight + bias, 2e-4, f"token {t}")


@pytest.mark.parametrize("wrong", [1, 2, 3, 4, 5, 6])
def test_tensors_that_do_not_fit_are_refused(operators: CompiledOperators, wrong: int) -> None:
    inputs = complex_ema_inputs(B=2, T=3, D=4, N=16)
    inputs[wrong] = inputs[wrong][:1]
    with pytest.raises(Exception, match="megalodon operator: expected coefficients of D channels and N modes"):
        operators.complex_ema(FLOAT32, inputs)


def test_tensors_without_modes_or_channels_are_refused(operators: CompiledOperators) -> None:
    """Not divided by zero."""
    with pytest.raises(Exception, match="megalodon operator: expected coefficients"):
        operators.complex_ema(FLOAT32, complex_ema_inputs(B=2, T=3, D=4, N=0))
    with pytest.raises(Exception, match="megalodon operator: expected weight and bias"):
        operators.timestep_norm(FLOAT32, timestep_norm_inputs(B=2, T=3, D=0, G=2))


def test_the_library_is_found_where_it_was_built_or_named(
    operators: CompiledOperators, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = find_onnxruntime_operators()
    assert found is not None
    assert found.name == OPERATORS_FILE
    monkeypatch.setenv(OPERATORS_VARIABLE, str(tmp_path / "missing.so"))
    with pytest.raises(EngineError, match=f"{OPERATORS_VARIABLE} = .*missing.so: no such file"):
        find_onnxruntime_operators()

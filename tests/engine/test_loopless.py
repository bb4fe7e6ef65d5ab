"""ComplexEMA without branch and loop, run by ONNX Runtime, against the recurrence in complex128."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from helpers import assert_close
from onnx import TensorProto, helper, numpy_helper

from megalodon_deploy.engine.loopless import loopless_complex_ema

BATCH, DIM, MODES = 3, 5, 4
POSITIONS = np.array([5, 0, 9])


def _exported() -> onnx.FunctionProto:
    """The signature of the function to be replaced."""
    function = onnx.FunctionProto(domain="megalodon", name="ComplexEMA")
    function.input.extend(("x", "past_cema", "position", "p", "q_powers", "gamma", "omega"))
    function.output.extend(("y", "present_cema"))
    function.opset_import.append(helper.make_opsetid("", 24))
    return function


def _weights(chunk_size: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(chunk_size)
    shape = (DIM, MODES)
    q = rng.uniform(0.8, 0.9999, shape) * np.exp(1j * rng.uniform(0, 3, shape))
    q = q.real.astype(np.float32).astype(np.float64) + 1j * q.imag.astype(np.float32)
    powers = [q ** (1 << level) for level in range(chunk_size.bit_length())]
    return {
        "p": rng.uniform(0.1, 0.9, shape).astype(np.float32),
        "q_powers": np.stack([np.stack([power.real, power.imag], -1) for power in powers]).astype(np.float32),
        "gamma": rng.normal(size=(*shape, 2)).astype(np.float32),
        "omega": rng.normal(size=DIM).astype(np.float32),
    }


def _session(chunk_size: int, weights: dict[str, np.ndarray], dtype: int = TensorProto.FLOAT):
    operands = ["x", "past", "position", *weights]
    node = helper.make_node("ComplexEMA", operands, ["y", "present"], domain="megalodon")
    graph = helper.make_graph(
        [node],
        "one_operator",
        [
            helper.make_tensor_value_info("x", dtype, ["B", "T", DIM]),
            helper.make_tensor_value_info("past", TensorProto.FLOAT, ["B", DIM, MODES, 2]),
            helper.make_tensor_value_info("position", TensorProto.INT64, ["B"]),
        ],
        [
            helper.make_tensor_value_info("y", dtype, ["B", "T", DIM]),
            helper.make_tensor_value_info("present", TensorProto.FLOAT, ["B", DIM, MODES, 2]),
        ],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    opsets = [helper.make_opsetid("", 24), helper.make_opsetid("megalodon", 1)]
    function = loopless_complex_ema(_exported(), chunk_size)
    model = helper.make_model(graph, functions=[function], opset_imports=opsets, ir_version=11)
    onnx.checker.check_model(model, full_check=True)
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def _recurrence(x: np.ndarray, past: np.ndarray, weights: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    def pairs(array: np.ndarray) -> np.ndarray:
        return array[..., 0].astype(np.float64) + 1j * array[..., 1]

    q, gamma = pairs(weights["q_powers"][0]), pairs(weights["gamma"])
    state = np.where((POSITIONS == 0)[:, None, None], 0, pairs(past))
    outputs = []
    for token in np.moveaxis(x.astype(np.float64), 1, 0):
        state = q * state + weights["p"] * token[..., None]
        outputs.append((state * gamma).real.sum(-1) + weights["omega"] * token)
    return np.stack(outputs, 1), np.stack([state.real, state.imag], -1)


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 12, 16, 100, 512])
def test_every_length_of_call(chunk_size: int) -> None:
    weights = _weights(chunk_size)
    session = _session(chunk_size, weights)
    rng = np.random.default_rng(0)
    for num_tokens in sorted({1, 2, 3, 7, 8, 15, 16, 17, 32, 33, 99, chunk_size - 1, chunk_size} - {0}):
        if num_tokens > chunk_size:
            continue
        x = rng.normal(size=(BATCH, num_tokens, DIM)).astype(np.float32)
        past = rng.normal(size=(BATCH, DIM, MODES, 2)).astype(np.float32)
        past[POSITIONS == 0] = np.nan
        y, present = session.run(None, {"x": x, "past": past, "position": POSITIONS})
        expected_y, expected_present = _recurrence(x, past, weights)
        assert_close(y, expected_y, 2e-6, f"y, {num_tokens} tokens")
        assert_close(present, expected_present, 2e-6, f"state, {num_tokens} tokens")


def test_activations_keep_their_type() -> None:
    weights = _weights(12)
    session = _session(12, weights, TensorProto.FLOAT16)
    x = np.random.default_rng(1).normal(size=(BATCH, 9, DIM)).astype(np.float16)
    past = np.zeros((BATCH, DIM, MODES, 2), np.float32)
    y, present = session.run(None, {"x": x, "past": past, "position": POSITIONS})
    expected_y, expected_present = _recurrence(x, past, weights)
    assert y.dtype == np.float16
    assert_close(y, expected_y, 1e-3)
    assert_close(present, expected_present, 2e-6)

"""The TimestepNorm function alone: float64 accuracy of its state after many tokens."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from helpers import assert_close

from megalodon_deploy.export.builder import IR_VERSION, OPSET
from megalodon_deploy.export.operators import DOMAIN, DOMAIN_VERSION
from megalodon_deploy.export.operators.timestep_norm import timestep_norm_function
from megalodon_deploy.state import pack_norm, unpack_norm

GROUPS, GROUP_DIM = 2, 4
DIM = GROUPS * GROUP_DIM


@pytest.fixture(scope="module")
def session() -> onnxruntime.InferenceSession:
    float_tensor, int_tensor = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [
            onnx.helper.make_node(
                "TimestepNorm", ["x", "past", "position", "weight", "bias"], ["y", "present"], domain=DOMAIN
            )
        ],
        "norm",
        [
            value("x", float_tensor, ["B", "T", DIM]),
            value("past", float_tensor, ["B", GROUPS, 4]),
            value("position", int_tensor, ["B"]),
            value("weight", float_tensor, [DIM]),
            value("bias", float_tensor, [DIM]),
        ],
        [value("y", float_tensor, ["B", "T", DIM]), value("present", float_tensor, ["B", GROUPS, 4])],
    )
    model = onnx.helper.make_model(
        graph,
        opset_imports=[onnx.helper.make_opsetid("", OPSET), onnx.helper.make_opsetid(DOMAIN, DOMAIN_VERSION)],
        ir_version=IR_VERSION,
        functions=[ir.to_proto(timestep_norm_function(GROUPS, GROUP_DIM))],
    )
    onnx.checker.check_model(model, full_check=True)
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def drifting(num_tokens: int) -> np.ndarray:
    """[T, D] float32 around 30, with a mean that wanders by many deviations."""
    rng = np.random.default_rng(0)
    wander = 10 * np.sin(np.arange(num_tokens) / num_tokens * 7)
    return (30 + wander[:, None] + rng.normal(size=(num_tokens, DIM))).astype(np.float32)


def pieces(num_tokens: int, lengths: list[int]) -> Iterator[slice]:
    start, turn = 0, 0
    while start < num_tokens:
        end = min(num_tokens, start + lengths[turn % len(lengths)])
        yield slice(start, end)
        start, turn = end, turn + 1


@pytest.mark.parametrize("lengths", [[1], [7, 500, 1]], ids=["tokens", "odd"])
def test_state_is_exact_after_many_tokens(session: onnxruntime.InferenceSession, lengths: list[int]) -> None:
    num_tokens = 4000
    x_TD = drifting(num_tokens)
    weight, bias = np.linspace(0.5, 1.5, DIM, dtype=np.float32), np.linspace(-1, 1, DIM, dtype=np.float32)
    state, outputs = np.full((1, GROUPS, 4), np.nan, np.float32), []
    for piece in pieces(num_tokens, lengths):
        feeds = {"x": x_TD[None, piece], "past": state, "position": np.array([piece.start])}
        y_1TD, state = session.run(None, feeds | {"weight": weight, "bias": bias})
        outputs.append(y_1TD[0])
    groups = x_TD.astype(np.float64).reshape(num_tokens, GROUPS, GROUP_DIM)
    mean, var = unpack_norm(state[0])
    np.testing.assert_allclose(mean, groups.mean(axis=(0, 2)), rtol=1e-8, equal_nan=False)
    np.testing.assert_allclose(var, groups.var(axis=(0, 2)), rtol=1e-8, equal_nan=False)
    seen = (np.arange(num_tokens) + 1)[:, None]
    means = groups.mean(2).cumsum(0) / seen
    variances = (groups**2).mean(2).cumsum(0) / seen - means**2
    expected = (groups - means[..., None]) / np.sqrt(variances[..., None] + 1e-5)
    assert_close(np.concatenate(outputs), expected.reshape(num_tokens, DIM) * weight + bias, 2e-6)


def test_small_steps_are_not_lost_late_in_a_stream(session: onnxruntime.InferenceSession) -> None:
    """At 10^7 tokens a token moves the mean by less than float32 resolves."""
    position = 10**7
    past = pack_norm(np.full((1, GROUPS), 30.0), np.full((1, GROUPS), 2.0))
    ones = np.ones(DIM, np.float32)
    feeds = {"past": past, "position": np.array([position]), "weight": ones, "bias": ones}
    _, state = session.run(None, feeds | {"x": np.full((1, 1, DIM), 31.0, np.float32)})
    mean, _ = unpack_norm(state[0])
    np.testing.assert_allclose(mean - 30.0, 1 / (position + 1), rtol=1e-5, equal_nan=False)

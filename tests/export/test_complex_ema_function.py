"""The ComplexEMA function alone, against the recurrence in float64; and the schemas of both operators."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from helpers import assert_close, small_config

from megalodon_deploy.export.builder import IR_VERSION, OPSET
from megalodon_deploy.export.operators import DOMAIN, DOMAIN_VERSION
from megalodon_deploy.export.operators.complex_ema import complex_ema_function
from megalodon_deploy.export.operators.schema import SIGNATURES, register_schemas
from megalodon_deploy.state import state_specs

DIM, MODES = 6, 3
INPUTS = ("x", "past_cema", "position", "p", "q_powers", "gamma", "omega")

Feeds = dict[str, np.ndarray]


def coefficients(chunk_size: int) -> Feeds:
    """Modes from one that forgets at once to one that remembers 10^4 tokens, at all angles."""
    rng = np.random.default_rng(0)
    modulus = 1 - 10.0 ** -np.linspace(0.01, 4, DIM * MODES).reshape(DIM, MODES)
    q = modulus * np.exp(1j * rng.uniform(-np.pi, np.pi, (DIM, MODES)))
    q = q.real.astype(np.float32) + 1j * q.imag.astype(np.float32)
    powers = [q.astype(np.complex128) ** (1 << k) for k in range(chunk_size.bit_length())]
    return {
        "p": (1 - np.abs(q)).astype(np.float32),
        "q_powers": np.stack([np.stack([power.real, power.imag], -1) for power in powers]).astype(np.float32),
        "gamma": rng.normal(size=(DIM, MODES, 2)).astype(np.float32),
        "omega": rng.normal(size=DIM).astype(np.float32),
    }


def recurrence(feeds: Feeds) -> tuple[np.ndarray, np.ndarray]:
    """y [B, T, D] and the state [B, D, N, 2] in float64, one token after the other."""
    wide = {name: value.astype(np.float64) for name, value in feeds.items()}

    def as_complex(pairs: np.ndarray) -> np.ndarray:
        return pairs[..., 0] + 1j * pairs[..., 1]

    q, gamma = as_complex(wide["q_powers"][0]), as_complex(wide["gamma"])
    fresh = (feeds["position"] == 0)[:, None, None]
    h = np.where(fresh, 0, as_complex(np.where(fresh[..., None], 0, wide["past_cema"])))
    outputs = []
    for u_BD in wide["x"].transpose(1, 0, 2):
        h = q * h + wide["p"] * u_BD[..., None]
        outputs.append((h * gamma).real.sum(-1) + wide["omega"] * u_BD)
    return np.stack(outputs, 1), np.stack([h.real, h.imag], -1)


def one_node_model(chunk_size: int, activation: int = onnx.TensorProto.FLOAT) -> onnx.ModelProto:
    value, float_tensor = onnx.helper.make_tensor_value_info, onnx.TensorProto.FLOAT
    shapes = {name: list(dims) for name, _, dims in SIGNATURES["ComplexEMA"]}
    types = dict.fromkeys(INPUTS, float_tensor) | {"x": activation, "position": onnx.TensorProto.INT64}
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("ComplexEMA", list(INPUTS), ["y", "present"], domain=DOMAIN)],
        "average",
        [value(name, types[name], shapes[name]) for name in INPUTS],
        [value("y", activation, None), value("present", float_tensor, None)],
    )
    return onnx.helper.make_model(
        graph,
        opset_imports=[onnx.helper.make_opsetid("", OPSET), onnx.helper.make_opsetid(DOMAIN, DOMAIN_VERSION)],
        ir_version=IR_VERSION,
        functions=[ir.to_proto(complex_ema_function(chunk_size))],
    )


def random_feeds(chunk_size: int, num_tokens: int, positions: list[int]) -> Feeds:
    rng = np.random.default_rng(1)
    batch = len(positions)
    past = rng.normal(size=(batch, DIM, MODES, 2)).astype(np.float32)
    past[np.array(positions) == 0] = np.nan
    return {
        "x": rng.normal(size=(batch, num_tokens, DIM)).astype(np.float32),
        "past_cema": past,
        "position": np.array(positions),
        **coefficients(chunk_size),
    }


@pytest.mark.parametrize("chunk_size", [1, 2, 9, 15, 16, 17, 31, 1000])
def test_blocks_follow_the_recurrence(chunk_size: int) -> None:
    model = one_node_model(chunk_size)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for num_tokens in sorted({1, 2, chunk_size // 2, chunk_size - 1, chunk_size} - {0}):
        feeds = random_feeds(chunk_size, min(num_tokens, chunk_size), [7, 0, 10**9])
        y_BTD, present = session.run(None, feeds)
        expected_y, expected_present = recurrence(feeds)
        assert_close(y_BTD, expected_y, 5e-6, f"y of {num_tokens}")
        assert_close(present, expected_present, 5e-6, f"state after {num_tokens}")


def test_half_precision_rounds_only_at_its_ends() -> None:
    feeds = random_feeds(40, 33, [0, 5])
    session = onnxruntime.InferenceSession(
        one_node_model(40, onnx.TensorProto.FLOAT16).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    feeds["x"] = feeds["x"].astype(np.float16)
    y_BTD, present = session.run(None, feeds)
    expected_y, expected_present = recurrence(feeds)
    assert y_BTD.dtype == np.float16
    assert_close(y_BTD, expected_y, 2.0**-11)
    assert_close(present, expected_present, 5e-6)


def test_schema_infers_shapes_and_finds_contradictions() -> None:
    register_schemas()
    register_schemas()  # harmless
    inferred = onnx.shape_inference.infer_shapes(one_node_model(40), check_type=True, strict_mode=True)
    shapes = [
        [dim.dim_param or dim.dim_value for dim in out.type.tensor_type.shape.dim] for out in inferred.graph.output
    ]
    assert shapes == [["B", "T", "D"], ["B", "D", "N", 2]]
    wrong = one_node_model(40)
    sizes = {value.name: value.type.tensor_type.shape for value in wrong.graph.input}
    sizes["x"].dim[2].dim_value, sizes["omega"].dim[0].dim_value = 6, 7
    with pytest.raises(Exception, match="omega: dimension D is 7, expected 6"):
        onnx.shape_inference.infer_shapes(wrong, strict_mode=True)


def test_signatures_follow_the_state_table() -> None:
    kinds = {spec.kind: spec for spec in state_specs(small_config())}
    for name, kind in (("ComplexEMA", "cema"), ("TimestepNorm", "norm")):
        _, (past, _, dims), *_ = SIGNATURES[name]
        assert past == f"past_{kind}"
        assert len(dims) == len(kinds[kind].past_shape)
        assert dims[-1] == kinds[kind].past_shape[-1]

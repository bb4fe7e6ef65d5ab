"""What is rewritten before TensorRT's parser sees the graph."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnxruntime
import pytest
from helpers import assert_close
from onnx import parser

from megalodon_deploy.bundle import Bundle
from megalodon_deploy.engine.graph import narrow_float64, prepare_graph

HandMade = Callable[..., Bundle]

NESTED = """
<ir_version: 10, opset_import: ["": 23, "megalodon": 1]>
nested (float[T] x, bool flag) => (float[T] y)
<double three = {3.0}>
{
    wide = Cast <to = 11> (x)
    picked = If (flag) <
        then_branch = left () => (double[T] a) {
            two = Constant <value = double {2.0}> ()
            a = Mul (wide, two)
        },
        else_branch = right () => (double[T] b) { b = Add (wide, three) }
    >
    z = Cast <to = 1> (picked)
    y = megalodon.Halve (z)
}
<domain: "megalodon", opset_import: ["": 23]>
Halve (x) => (y)
<double[T] wide>
{
    wide = Cast <to = 11> (x)
    two = Constant <value = double {2.0}> ()
    half = Div (wide, two)
    y = CastLike (half, x)
}
"""


def _run(model: onnx.ModelProto, flag: bool) -> np.ndarray:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (result,) = session.run(None, {"x": np.linspace(-2, 2, 5, dtype=np.float32), "flag": np.array(flag)})
    return np.asarray(result)


@pytest.mark.parametrize("flag", [True, False])
def test_narrowing_reaches_branches_functions_and_initializers(flag: bool) -> None:
    model = parser.parse_model(NESTED)
    before = _run(model, flag)
    assert "double" in onnx.printer.to_text(model)
    assert narrow_float64(model)
    assert "double" not in onnx.printer.to_text(model)
    onnx.checker.check_model(model, full_check=True)
    assert not any(
        attribute.i == onnx.TensorProto.DOUBLE
        for node in (*model.graph.node, *model.functions[0].node)
        for attribute in node.attribute
        if attribute.name == "to"
    )
    assert_close(_run(model, flag), before, 1e-6)
    assert not narrow_float64(model)


def test_functions_stay_without_plugins(hand_made: HandMade) -> None:
    graph = prepare_graph(hand_made().model_path, (), 12)
    model = onnx.load_from_string(graph.model)
    assert {function.name for function in model.functions} == {"ComplexEMA", "TimestepNorm"}
    assert graph.narrowed
    assert graph.plugin_nodes == {}


def test_functions_with_a_plugin_are_removed(hand_made: HandMade) -> None:
    graph = prepare_graph(hand_made().model_path, {"ComplexEMA", "TimestepNorm", "Unused"}, 12)
    assert not onnx.load_from_string(graph.model).functions
    assert not graph.narrowed
    assert graph.plugin_nodes == {"ComplexEMA": 2, "TimestepNorm": 3}


def test_a_function_without_a_plugin_stays(hand_made: HandMade) -> None:
    graph = prepare_graph(hand_made().model_path, {"ComplexEMA"}, 12)
    assert [function.name for function in onnx.load_from_string(graph.model).functions] == ["TimestepNorm"]
    assert graph.narrowed
    assert graph.plugin_nodes == {"ComplexEMA": 2}


def test_weights_stay_outside(hand_made: HandMade) -> None:
    bundle = hand_made()
    before = bundle.model_path.read_bytes()
    model = onnx.load_from_string(prepare_graph(bundle.model_path, (), 12).model)
    embed = next(tensor for tensor in model.graph.initializer if tensor.name == "embed")
    assert embed.data_location == onnx.TensorProto.EXTERNAL
    assert not embed.raw_data
    assert bundle.model_path.read_bytes() == before

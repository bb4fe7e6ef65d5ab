"""Look-up of quantised rows as TensorRT takes it.

TensorRT reads int8 codes in DequantizeLinear alone, not in Gather ("Quantized constant is only allowed before DQ"). So
the matrix is dequantised first and rows are looked up then. TensorRT-RTX 1.7.1 keeps it as codes in the engine; what a
GPU does for a token was not measured. In this order ONNX Runtime would dequantise all rows for every token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from megalodon_deploy.quantization import EMBEDDING_WEIGHT

if TYPE_CHECKING:
    import onnx

_CODES, _SCALES = f"{EMBEDDING_WEIGHT}.codes", f"{EMBEDDING_WEIGHT}.scales"


def look_up_behind_dequantize(graph: onnx.GraphProto) -> None:
    """Rewrite the look-up of the embedding where it is quantised; the value that comes of it keeps its name."""
    from onnx import TensorProto, helper

    first = next((index for index, node in enumerate(graph.node) if node.input and node.input[0] == _CODES), None)
    if first is None:
        return
    tokens = graph.node[first].input[1]
    made = {_CODES, _SCALES}  # values that hold nothing but rows, codes and scales
    old = []
    for node in graph.node:
        if made & set(node.input):
            old.append(node)
            made |= set(node.output)
        if node.op_type == "Mul" and old and node is old[-1]:
            break
    assert old, "Bug: the look-up has no nodes"
    new = [
        helper.make_node("DequantizeLinear", [_CODES, _SCALES], [f"{EMBEDDING_WEIGHT}.wide"], axis=0),
        helper.make_node("Gather", [f"{EMBEDDING_WEIGHT}.wide", tokens], [f"{EMBEDDING_WEIGHT}.rows"], axis=0),
        helper.make_node("Cast", [f"{EMBEDDING_WEIGHT}.rows"], list(old[-1].output), to=TensorProto.FLOAT),
    ]
    nodes = [node for node in graph.node if not any(node is each for each in old)]
    nodes[first:first] = new
    del graph.node[:]
    graph.node.extend(nodes)

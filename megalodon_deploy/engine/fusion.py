"""Put one plugin in the place of a TimestepNorm and the ComplexEMA that reads its output.

A decode step is bound by launches, and these two follow each other in every layer. The norm's output stays: the
projection of the values reads it too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from megalodon_deploy.state import (
    COMPLEX_EMA,
    OPERATOR_DOMAIN,
    TIMESTEP_NORM,
    TIMESTEP_NORM_COMPLEX_EMA,
)

if TYPE_CHECKING:
    import onnx

_NORM_POSITION, _EMA_X, _EMA_POSITION = 2, 0, 2  # places of inputs


def fuse_norm_and_ema(graph: onnx.GraphProto) -> int:
    """Replace every such pair whose moving average reads nothing else that is computed; how many there were.

    The fused node stands where the norm stood, with the inputs of both and the outputs (u, present_norm, y,
    present_cema).
    """
    given = {value.name for value in (*graph.input, *graph.initializer)}
    norms = {node.output[0]: node for node in graph.node if _is(node, TIMESTEP_NORM)}
    fused = []
    for ema in [node for node in graph.node if _is(node, COMPLEX_EMA)]:
        norm = norms.get(ema.input[_EMA_X])
        others = [name for index, name in enumerate(ema.input) if index != _EMA_X]
        if norm is None or ema.input[_EMA_POSITION] != norm.input[_NORM_POSITION] or not given.issuperset(others):
            continue
        norm.op_type = TIMESTEP_NORM_COMPLEX_EMA
        norm.input.extend(name for index, name in enumerate(ema.input) if index not in (_EMA_X, _EMA_POSITION))
        norm.output.extend(ema.output)
        del norms[ema.input[_EMA_X]]  # a second average of the same norm stays by itself
        fused.append(ema)
    for ema in fused:
        graph.node.remove(ema)
    return len(fused)


def _is(node: onnx.NodeProto, operator: str) -> bool:
    return bool(node.domain == OPERATOR_DOMAIN and node.op_type == operator)

"""Weights as inputs of the graph, so that an engine is built without them.

TensorRT then sees shapes and types alone: a build's memory, and the engine, no longer grow with the model. Whoever runs
the engine binds the bundle's own weight file, piece by piece. The plans without weights that TensorRT calls stripped
would serve the same end, but TensorRT-RTX 1.7.1 cannot build one without a GPU, not even of a single product.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx

# Whose operands may as well come from outside. What other operators read is folded into constants, so it stays inside.
_READERS = ("MatMul", "Gather", "DequantizeLinear")


@dataclass(frozen=True)
class WeightPlace:
    """Where a weight lies in the bundle's weight file."""

    offset: int
    size_bytes: int
    shape: tuple[int, ...]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> WeightPlace:
        return cls(int(values["offset"]), int(values["size_bytes"]), tuple(int(dim) for dim in values["shape"]))


def weights_to_inputs(graph: onnx.GraphProto, plugin_operators: Collection[str]) -> dict[str, WeightPlace]:
    """Make inputs of the external initializers that only matrix products, look-ups and plugins read; their places."""
    from onnx import TensorProto, helper

    readers: dict[str, set[str]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, set()).add(node.op_type)
    able = {*_READERS, *plugin_operators}
    outside = [
        tensor
        for tensor in graph.initializer
        if tensor.data_location == TensorProto.EXTERNAL and readers.get(tensor.name, {""}) <= able
    ]
    for tensor in outside:
        graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    _remove(graph, {tensor.name for tensor in outside})
    return {tensor.name: _place(tensor) for tensor in outside}


def _remove(graph: onnx.GraphProto, names: Collection[str]) -> None:
    kept = [tensor for tensor in graph.initializer if tensor.name not in names]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def _place(tensor: onnx.TensorProto) -> WeightPlace:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    return WeightPlace(int(entries["offset"]), int(entries["length"]), tuple(tensor.dims))

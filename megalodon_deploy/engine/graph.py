"""The ONNX graph as TensorRT should see it: functions stripped where a plugin takes over, fit for TensorRT elsewhere.

Only the graph file is read and rewritten, in memory; weights stay in their external file, which the parser maps.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megalodon_deploy.engine.fusion import fuse_norm_and_ema
from megalodon_deploy.engine.lookup import look_up_behind_dequantize
from megalodon_deploy.engine.loopless import loopless_complex_ema
from megalodon_deploy.engine.weight_inputs import WeightPlace, weights_to_inputs
from megalodon_deploy.export.operators import DOMAIN
from megalodon_deploy.state import CHUNK_ATTENTION, COMPLEX_EMA, TIMESTEP_NORM, TIMESTEP_NORM_COMPLEX_EMA

if TYPE_CHECKING:
    import onnx

_LOOPING = "ComplexEMA"
# TensorRT-RTX 1.7's parser refuses a function's second call where a DequantizeLinear is in it: two layers, one name.
_INLINED = {CHUNK_ATTENTION}
_FUSED = (TIMESTEP_NORM, COMPLEX_EMA, TIMESTEP_NORM_COMPLEX_EMA)  # the plugins that fusion needs


@dataclass(frozen=True)
class PreparedGraph:
    """A serialized model for the parser, and what was done to it."""

    model: bytes
    plugin_nodes: dict[str, int]  # operator -> nodes that a plugin must take
    narrowed: bool  # float64 arithmetic was turned into float32
    bundle_weights: dict[str, WeightPlace]  # those that became inputs


def prepare_graph(
    model_path: Path, plugin_operators: Iterable[str], chunk_size: int, *, weights_outside: bool = False
) -> PreparedGraph:
    """Read `model_path` without weights and rewrite it for calls of at most `chunk_size` tokens.

    TensorRT's parser prefers a model-local function to a plugin of the same name, so functions of
    `plugin_operators` are removed. If they stay, ChunkAttention's is put in place of its calls, and ComplexEMA's
    replaced by one that TensorRT can compile. Where there is a plugin for a TimestepNorm and the ComplexEMA behind it,
    it takes their place. Rows of a quantised embedding are looked up behind its DequantizeLinear. TensorRT has no
    float64: what stays of it in other functions becomes float32. With `weights_outside` matrices become inputs.
    """
    import onnx

    operators = set(plugin_operators)
    model = _without_functions(onnx.load(model_path, load_external_data=False), _INLINED - operators)
    kept = [
        loopless_complex_ema(function, chunk_size) if function.name == _LOOPING else function
        for function in model.functions
        if not _is_plugin(function.domain, function.name, operators)
    ]
    del model.functions[:]
    model.functions.extend(kept)
    look_up_behind_dequantize(model.graph)
    if operators.issuperset(_FUSED):
        fuse_norm_and_ema(model.graph)
    nodes = Counter(node.op_type for node in model.graph.node if _is_plugin(node.domain, node.op_type, operators))
    narrowed = narrow_float64(model)
    bundle_weights = weights_to_inputs(model.graph, operators) if weights_outside else {}
    return PreparedGraph(model.SerializeToString(), dict(nodes), narrowed, bundle_weights)


def _without_functions(model: onnx.ModelProto, names: set[str]) -> onnx.ModelProto:
    """The model with the nodes of these functions' bodies in place of their calls."""
    import onnx.inliner

    return onnx.inliner.inline_selected_functions(model, [(DOMAIN, name) for name in names])


def _is_plugin(domain: str, name: str, operators: set[str]) -> bool:
    return domain == DOMAIN and name in operators


def narrow_float64(model: onnx.ModelProto) -> bool:
    """Turn every float64 type, constant and cast of the graph and its functions into float32; whether any was there."""
    changed = _narrow_graph(model.graph)
    for function in model.functions:
        changed |= _narrow_values(function.value_info)
        changed |= _narrow_nodes(function.node)
    return changed


def _narrow_graph(graph: onnx.GraphProto) -> bool:
    changed = _narrow_nodes(graph.node)
    for values in (graph.input, graph.output, graph.value_info):
        changed |= _narrow_values(values)
    for tensor in graph.initializer:
        changed |= _narrow_tensor(tensor)
    return changed


def _narrow_nodes(nodes: Iterable[onnx.NodeProto]) -> bool:
    import onnx

    changed = False
    for attribute in (attribute for node in nodes for attribute in node.attribute):
        if attribute.type == onnx.AttributeProto.TENSOR:
            changed |= _narrow_tensor(attribute.t)
        elif attribute.type == onnx.AttributeProto.GRAPH:
            changed |= _narrow_graph(attribute.g)
        elif attribute.name in ("to", "dtype") and attribute.i == onnx.TensorProto.DOUBLE:
            attribute.i = onnx.TensorProto.FLOAT
            changed = True
    return changed


def _narrow_values(values: Iterable[onnx.ValueInfoProto]) -> bool:
    import onnx

    changed = False
    for value in values:
        if value.type.tensor_type.elem_type == onnx.TensorProto.DOUBLE:
            value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
            changed = True
    return changed


def _narrow_tensor(tensor: onnx.TensorProto) -> bool:
    import numpy as np
    import onnx
    from onnx import numpy_helper

    if tensor.data_type != onnx.TensorProto.DOUBLE:
        return False
    assert tensor.data_location != onnx.TensorProto.EXTERNAL, f"Bug: weight {tensor.name} is exported as float64"
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name))
    return True

"""The graph for ONNX Runtime's CPU provider, beside the one for everybody: products with codes as one operator.

`QuantizedMatMul` stands for a DequantizeLinear and the MatMul behind it, which are its body. Our library of compiled
operators has it for some processors. Elsewhere ONNX Runtime takes the body, and makes of it what it makes of the two
nodes. TensorRT's parser refuses a function that is called twice and dequantises, so this is a file of its own.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx
import onnx_ir as ir

from megalodon_deploy.export.operators import DOMAIN
from megalodon_deploy.export.operators.quantized_matmul import ATTRIBUTES, NAME, quantized_matmul_function


def write_cpu_graph(model_path: Path, out: Path) -> bool:
    """Write the graph `model_path`, whose weights stay where they are, with the products that can be so replaced.

    Nothing is written where there are none, as with fp8; whether there were.
    """
    model = onnx.load(model_path, load_external_data=False)
    if not fuse_products(model.graph):
        return False
    model.functions.append(ir.to_proto(quantized_matmul_function()))
    out.write_bytes(model.SerializeToString(deterministic=True))
    return True


def fuse_products(graph: onnx.GraphProto) -> int:
    """Replace each MatMul with a matrix of int8 or int4 codes that nothing else reads; how many there were."""
    matrices = _quantized_matrices(graph)
    replaced = set()
    for node in graph.node:
        if node.op_type != "MatMul" or node.input[1] not in matrices:
            continue
        dequantize = matrices[node.input[1]]
        replaced.add(node.input[1])
        node.domain, node.op_type = DOMAIN, NAME
        node.input[1:] = dequantize.input
        given = {attribute.name: attribute.i for attribute in dequantize.attribute}
        node.attribute.extend(onnx.helper.make_attribute(name, given.get(name, 0)) for name in ATTRIBUTES)
    kept = [node for node in graph.node if not replaced & set(node.output)]
    del graph.node[:]
    graph.node.extend(kept)
    shapes = [value for value in graph.value_info if value.name not in replaced]
    del graph.value_info[:]
    graph.value_info.extend(shapes)
    return len(replaced)


def _quantized_matrices(graph: onnx.GraphProto) -> dict[str, onnx.NodeProto]:
    """The DequantizeLinear nodes of matrices that the compiled operator can multiply with, by output."""
    codes = {
        tensor.name
        for tensor in graph.initializer
        # A row of an odd number of int4 codes does not begin on a byte.
        if tensor.data_type == onnx.TensorProto.INT8
        or (tensor.data_type == onnx.TensorProto.INT4 and tensor.dims[-1] % 2 == 0)
    }
    num_readers = Counter(name for node in graph.node for name in node.input)
    return {
        node.output[0]: node
        for node in graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in codes and num_readers[node.output[0]] == 1
    }

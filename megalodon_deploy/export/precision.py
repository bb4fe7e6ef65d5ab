"""A half-precision graph in float32, to be run where half precision cannot: ONNX Runtime has no bf16 MatMul on the CPU.

Weights keep the values that they were rounded to; activations are not rounded.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir

from megalodon_deploy.bundle import MODEL_FILE, WEIGHTS_FILE, Bundle

_HALF = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def write_widened(bundle: Bundle, directory: Path) -> Path:
    """Write the bundle's graph with float32 for its activation type into `directory`; returns the model's path.

    A tensor at a time: peak memory is that of the largest one.
    """
    model = ir.load(bundle.model_path)
    graph = model.graph
    for initializer in graph.initializers.values():
        if initializer.dtype in _HALF and initializer.const_value is not None:
            initializer.const_value = _widened(initializer.const_value)
    for value in [*graph.inputs, *graph.initializers.values(), *(out for node in graph for out in node.outputs)]:
        if value.dtype in _HALF:
            value.dtype = ir.DataType.FLOAT
    for node in graph:
        if node.op_type == "Cast" and node.attributes["to"].as_int() in _HALF:
            node.attributes.add(ir.AttrInt64("to", int(ir.DataType.FLOAT)))
    directory.mkdir(parents=True, exist_ok=True)
    ir.save(model, directory / MODEL_FILE, external_data=WEIGHTS_FILE)
    return directory / MODEL_FILE


def _widened(tensor: ir.TensorProtocol) -> ir.LazyTensor:
    def load() -> ir.Tensor:
        return ir.Tensor(tensor.numpy().astype(np.float32))

    return ir.LazyTensor(load, ir.DataType.FLOAT, ir.Shape(tensor.shape), name=tensor.name)

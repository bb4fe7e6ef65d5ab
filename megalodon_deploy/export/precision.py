"""A graph in float32, to be run where its own types cannot: ONNX Runtime has no bf16 MatMul and no fp4 on the CPU.

Weights keep the values that they were rounded or quantised to; activations are not rounded.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir

from megalodon_deploy.bundle import MODEL_FILE, WEIGHTS_FILE, Bundle
from megalodon_deploy.export.graph import ACTIVATION
from megalodon_deploy.export.quantized_weights import Part, matrix_parts, read_matrix
from megalodon_deploy.export.weights import folds
from megalodon_deploy.quantization import WeightFormat

_HALF = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def write_widened(bundle: Bundle, directory: Path) -> Path:
    """Write the bundle's graph with float32 for its activation type into `directory`; returns the model's path.

    Quantised matrices stay so, but for fp4. A tensor at a time: peak memory is that of the largest one.
    """
    model = ir.load(bundle.model_path)
    graph = model.graph
    _dequantize_fp4(bundle, graph)
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


def _dequantize_fp4(bundle: Bundle, graph: ir.Graph) -> None:
    """Put matrices in the place of the nodes that make them from fp4 codes."""
    quantization, activation = bundle.manifest.quantization, ACTIVATION[bundle.manifest.precision]
    for spec in (spec for fold in folds(bundle.config) for spec in fold.targets):
        form = quantization.format_of(spec.name) if quantization else None
        if form is None or form.kind != "nvfp4":
            continue
        parts = matrix_parts(spec.name, spec.shape, form, activation)
        values = [graph.initializers[part.name] for part in parts]
        (node,) = values[0].consumers()
        matrix = ir.Value(name=spec.name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(spec.shape))
        matrix.const_value = _dequantized(spec.name, values, parts, form)
        graph.register_initializer(matrix)
        node.outputs[0].replace_all_uses_with(matrix)
        scales_node = node.inputs[1].producer()
        graph.remove([each for each in (node, scales_node) if each is not None], safe=True)
        for value in values:
            del graph.initializers[value.name]


def _dequantized(name: str, values: list[ir.Value], parts: list[Part], form: WeightFormat) -> ir.LazyTensor:
    tensors = {part.name: value.const_value for part, value in zip(parts, values, strict=True)}

    def load() -> ir.Tensor:
        return ir.Tensor(read_matrix(tensors, parts, form).dequantized().numpy())

    return ir.LazyTensor(load, ir.DataType.FLOAT, ir.Shape(parts[0].shape), name=name)


def _widened(tensor: ir.TensorProtocol) -> ir.LazyTensor:
    def load() -> ir.Tensor:
        return ir.Tensor(tensor.numpy().astype(np.float32))

    return ir.LazyTensor(load, ir.DataType.FLOAT, ir.Shape(tensor.shape), name=tensor.name)

"""`QuantizedMatMul`: a product with a matrix of codes, as an ONNX function.

W[k, n] = codes[k, n] * scales[k / block_size, n], or codes[k, n] * scales[n] for whole columns; y = x W.
"""

from __future__ import annotations

import onnx_ir as ir

from megalodon_deploy.export.builder import GraphBuilder
from megalodon_deploy.export.operators.common import function_inputs, make_function
from megalodon_deploy.state import BLOCK_SIZE, QUANTIZED_MATMUL

NAME = QUANTIZED_MATMUL
ATTRIBUTES = ("axis", BLOCK_SIZE)  # those of DequantizeLinear


def quantized_matmul_function() -> ir.Function:
    """The function, for any type of x and scales, and any that DequantizeLinear takes as codes."""
    builder = GraphBuilder()
    inputs = function_inputs("x", "codes", "scales")
    x, codes, scales = inputs
    references = {name: ir.RefAttr(name, name, ir.AttributeType.INT) for name in ATTRIBUTES}
    weight = builder.op("DequantizeLinear", codes, scales, name="weight", **references)
    outputs = {"y": builder.op("MatMul", x, weight)}
    attributes = [ir.Attr(name, ir.AttributeType.INT, None) for name in ATTRIBUTES]
    return make_function(builder, NAME, inputs, outputs, attributes)

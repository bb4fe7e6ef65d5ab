"""What the emitters of a model's parts share: the builder, the weights by name, and the calls' common values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import onnx_ir as ir

from megalodon_deploy.config import MegalodonConfig
from megalodon_deploy.export.builder import GraphBuilder
from megalodon_deploy.export.quantized_weights import emit_matrix, emit_rows, matrix_parts
from megalodon_deploy.model.half_precision import HEADROOM
from megalodon_deploy.quantization import Quantization

FLOAT = ir.DataType.FLOAT


@dataclass(frozen=True)
class CallValues:
    """Values that depend on the call alone, made once for all layers."""

    position: ir.Value  # [B] int64
    rows: ir.Value  # [B, T] int64, position mod C of each token
    rope_cos: ir.Value  # [C, dz / 2] float32
    rope_sin: ir.Value


class Context:
    """Emits operators that need the configuration or the activation type."""

    def __init__(
        self,
        config: MegalodonConfig,
        activation: ir.DataType,
        weights: Mapping[str, ir.Value],
        builder: GraphBuilder,
        *,
        quantization: Quantization | None = None,
    ) -> None:
        self.config, self.activation, self.builder = config, activation, builder
        self._weights = weights
        self._quantization = quantization

    @cached_property
    def is_half(self) -> bool:
        return bool(self.activation != FLOAT)

    def weight(self, name: str) -> ir.Value:
        return self._weights[name]

    def matrix(self, name: str, label: str) -> ir.Value:
        """The matrix `name` [in, out] of the activation type; `label` names the nodes that make it from codes."""
        form = self._quantization.format_of(name) if self._quantization else None
        if form is None:
            return self._weights[name]
        shape = (0, 0)  # the parts are looked up by name
        parts = [self._weights[part.name] for part in matrix_parts(name, shape, form, self.activation)]
        return emit_matrix(self.builder, parts, form, label)

    def rows(self, name: str, tokens_BT: ir.Value, label: str) -> ir.Value:
        """The rows of the matrix `name` that tokens name, [B, T, D] float32."""
        form = self._quantization.format_of(name) if self._quantization else None
        if form is None:
            return self.to_float(self.builder.op("Gather", self._weights[name], tokens_BT, axis=0, name=label), label)
        parts = matrix_parts(name, (0, 0), form, self.activation)
        return emit_rows(self.builder, [self._weights[part.name] for part in parts], tokens_BT, label)

    def linear(self, x: ir.Value, prefix: str, name: str) -> ir.Value:
        """x [..., in] times `prefix.weight` [in, out], plus `prefix.bias` where there is one."""
        product = self.builder.op("MatMul", x, self.matrix(f"{prefix}.weight", name), name=name)
        if f"{prefix}.bias" not in self._weights:
            return product
        return self.builder.op("Add", product, self.weight(f"{prefix}.bias"), name=f"{name}_biased")

    def silu(self, x: ir.Value, name: str) -> ir.Value:
        return self.builder.op("Mul", x, self.builder.op("Sigmoid", x, name=f"{name}_sigmoid"), name=name)

    def to_float(self, x: ir.Value, name: str) -> ir.Value:
        return self.builder.op("Cast", x, name=f"{name}_float", to=FLOAT) if self.is_half else x

    def to_activation(self, x: ir.Value, name: str) -> ir.Value:
        return self.builder.op("Cast", x, name=name, to=self.activation) if self.is_half else x

    def with_headroom(self, x: ir.Value, name: str) -> ir.Value:
        """A factor of a product that may leave the range of fp16, made smaller: see `half_precision`."""
        if self.activation != ir.DataType.FLOAT16:
            return x
        factor = self.builder.constant(np.array(HEADROOM, np.float16), "headroom")
        return self.builder.op("Mul", x, factor, name=f"{name}_headroom")

    def to_residual(self, x: ir.Value, name: str) -> ir.Value:
        """What a matrix made of such a product, in float32 and in its true size."""
        wide = self.to_float(x, name)
        if self.activation != ir.DataType.FLOAT16:
            return wide
        factor = self.builder.scalar(1 / HEADROOM, np.float32, "headroom_undone")
        return self.builder.op("Mul", wide, factor, name=f"{name}_unscaled")

    def norm_scale(self, prefix: str, dim: int) -> ir.Value:
        """The scale of a norm; ones where it has none."""
        name = f"{prefix}.scale"
        return self._weights[name] if name in self._weights else self.ones(dim)

    def ones(self, dim: int) -> ir.Value:
        return self.builder.constant(np.ones(dim, np.float32), f"ones_{dim}")

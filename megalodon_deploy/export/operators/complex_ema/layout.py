"""How tokens fall into blocks: [B, T, D] and [D, M, L] hold the same values, the last block zero-filled."""

from __future__ import annotations

import onnx_ir as ir

from megalodon_deploy.export.builder import GraphBuilder
from megalodon_deploy.export.operators.complex_ema.coefficients import Coefficients


class BlockLayout:
    """Sizes known at run time, and the ways between layouts. `length` is L; m = 2N."""

    def __init__(self, builder: GraphBuilder, u_BTD: ir.Value, coefficients: Coefficients, length: int) -> None:
        self._builder, self._u_BTD, self._length = builder, u_BTD, length
        self._coefficients = coefficients
        self._batch = builder.op("Shape", u_BTD, start=0, end=1, name="batch")
        self._num_tokens = builder.op("Shape", u_BTD, start=1, end=2, name="num_tokens")
        one, block = builder.constant([1], "one"), builder.constant([length], "block")
        whole = builder.op("Div", builder.op("Sub", self._num_tokens, one), block, name="whole_blocks")
        self._num_blocks = builder.op("Add", whole, one, name="num_blocks")
        self._last_start = builder.op("Mul", whole, block, name="last_start")
        self.last_tokens = builder.op("Sub", self._num_tokens, self._last_start, name="last_tokens")
        self._missing = builder.op("Sub", block, self.last_tokens, name="missing")
        self.one = builder.op("Cast", builder.op("GreaterOrEqual", self._num_tokens, one), to=ir.DataType.FLOAT)

    def blocks(self) -> ir.Value:
        """u as [D, M, L]."""
        pads = self._concat(self._zeros(4), self._missing, self._zeros(1))
        return self._channels_first(self._builder.op("Pad", self._u_BTD, pads, name="padded"), "blocks")

    def last_block(self) -> ir.Value:
        """The last block's tokens as [D, B, L], moved to its end."""
        builder = self._builder
        one = builder.constant([1], "one")
        tokens = builder.op("Slice", self._u_BTD, self._last_start, self._num_tokens, one, name="last_block")
        pads = self._concat(self._zeros(1), self._missing, self._zeros(4))
        return self._channels_first(builder.op("Pad", tokens, pads, name="padded"), "last_block_channels")

    def unblock(self, y_DML: ir.Value) -> ir.Value:
        """[D, M, L] -> [B, T, D]."""
        builder = self._builder
        flat = builder.op("Reshape", y_DML, builder.constant([0, -1], "row_width"))
        shape = self._concat(self._batch, builder.constant([-1], "rest"), self._coefficients.dim)
        padded = builder.op("Reshape", builder.op("Transpose", flat, perm=[1, 0]), shape)
        one = builder.constant([1], "one")
        return builder.op("Slice", padded, self._zeros(1), self._num_tokens, one, name="average")

    def to_rows(self, sums_DMm: ir.Value) -> ir.Value:
        """[D, M, m] -> [blocks, B, 1, D, m]."""
        builder = self._builder
        shape = self._concat(self._zeros(1), self._batch, self._num_blocks, builder.constant([-1], "rest"))
        moved = builder.op("Transpose", builder.op("Reshape", sums_DMm, shape), perm=[2, 1, 0, 3])
        return builder.op("Unsqueeze", moved, builder.constant([2], "row_axis"), name="block_sums")

    def from_rows(self, rows: ir.Value) -> ir.Value:
        """[blocks, B, 1, D, m] -> [D, M, m]."""
        builder = self._builder
        squeezed = builder.op("Squeeze", rows, builder.constant([2], "row_axis"))
        moved = builder.op("Transpose", squeezed, perm=[2, 1, 0, 3])
        blocks = builder.op("Mul", self._batch, self._num_blocks, name="row_blocks")
        return builder.op("Reshape", moved, self._concat(self._zeros(1), blocks, builder.constant([-1], "rest")))

    def _channels_first(self, x_BTD: ir.Value, name: str) -> ir.Value:
        builder = self._builder
        rows = builder.op("Reshape", x_BTD, self._concat(builder.constant([-1], "rest"), self._coefficients.dim))
        columns = builder.op("Transpose", rows, perm=[1, 0])
        return builder.op("Reshape", columns, builder.constant([0, -1, self._length], "block_shape"), name=name)

    def _zeros(self, count: int) -> ir.Value:
        return self._builder.constant([0] * count, f"zeros_{count}")

    def _concat(self, *parts: ir.Value) -> ir.Value:
        return self._builder.op("Concat", *parts, axis=0)

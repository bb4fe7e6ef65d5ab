"""The matrices of each channel for blocks of L tokens, from powers of q by doubling."""

from __future__ import annotations

import onnx_ir as ir

from megalodon_deploy.export.builder import GraphBuilder
from megalodon_deploy.export.operators.complex_ema.coefficients import Coefficients


class BlockTables:
    """m = 2N interleaved parts.

    inside_DLX [D, L, L + m]: u of a block -> y of the block alone, and the block's sum
    sums_DLm   [D, L, m]: p q^(L-1-j)
    readout_DLm [D, L, m]: conj(gamma q^t)
    num_sums   [1]: m
    """

    def __init__(self, builder: GraphBuilder, coefficients: Coefficients, levels: int, one: ir.Value) -> None:
        """`one` is 1.0, known only at run time: executors would fold the tables and keep them otherwise."""
        self._builder, self._coefficients, self._length = builder, coefficients, 1 << levels
        readout = builder.op("Mul", coefficients.readout_DN2, one, name="readout_start")
        drive = builder.op("Mul", coefficients.drive_DN2, one, name="drive_start")
        self.readout_DLm = self._powers(readout, levels, ascending=True)
        self.sums_DLm = self._powers(drive, levels, ascending=False)
        self.num_sums = builder.op("Shape", self.sums_DLm, start=2, name="num_sums")
        self.inside_DLX = builder.op("Concat", self._toeplitz(), self.sums_DLm, axis=-1, name="inside_table")

    def _powers(self, start_DN2: ir.Value, levels: int, *, ascending: bool) -> ir.Value:
        """start conj(q)^j for j = 0..L-1, or start q^(L-1-j); [D, L, m]."""
        builder, coefficients = self._builder, self._coefficients
        direction = "ascending" if ascending else "descending"
        ones = builder.constant([1, 1], "one_row")
        shape = builder.op("Concat", ones, coefficients.dim, builder.constant([-1], "rest"), axis=0)
        table = builder.op("Reshape", start_DN2, shape, name=f"{direction}_start")
        for level in range(levels):
            rows = coefficients.level(builder, coefficients.first_level_1D, level)
            raised = coefficients.rotate(builder, table, rows, f"{direction}_raised", conjugate=ascending)
            parts = (table, raised) if ascending else (raised, table)
            table = builder.op("Concat", *parts, axis=1, name=direction)
        rows_LDm = builder.op("Squeeze", table, builder.constant([0], "zeros_1"))
        return builder.op("Transpose", rows_LDm, perm=[1, 0, 2], name=f"{direction}_table")

    def _toeplitz(self) -> ir.Value:
        """[D, L, L]: element (j, t) is k_(t-j), 0 below the diagonal.

        The kernel and L zeros, repeated and cut into rows of 2L - 1, shift by one from row to row.
        """
        builder, length = self._builder, self._length
        rest = builder.constant([-1], "rest")
        column = builder.op("Concat", self._coefficients.dim, rest, builder.constant([1], "one"), axis=0)
        drive_Dm1 = builder.op("Reshape", self._coefficients.drive_DN2, column)
        kernel_DL = builder.op("Squeeze", builder.op("MatMul", self.readout_DLm, drive_Dm1), rest, name="kernel")
        zero_filled = builder.op("Pad", kernel_DL, builder.constant([0, 0, 0, length], "kernel_padding"))
        repeated = builder.op("Tile", zero_filled, builder.constant([1, length], "kernel_repeats"))
        first, one = builder.constant([0], "zeros_1"), builder.constant([1], "one")
        used = builder.constant([length * (2 * length - 1)], "skew_end")
        cut = builder.op("Slice", repeated, first, used, one)
        rows = builder.op("Reshape", cut, builder.constant([0, length, 2 * length - 1], "skew_rows"))
        return builder.op("Slice", rows, first, builder.constant([length], "block"), rest, name="toeplitz")

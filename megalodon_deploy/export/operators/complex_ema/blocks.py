"""Many tokens: matrix products inside blocks of L tokens, a short scan from block to block.

    inside a block       y = Toeplitz(k) u,  k_j = Re sum_n gamma p q^j
    a block's sum        S = sum_j p q^(L-1-j) u_j
    from block to block  h' = q^L h + S
    into a block         y_t += Re sum_n gamma q^(t+1) h

Lines one and two are one MatMul for each channel, line four another. The last block may be partial: its r tokens are
moved to the block's end, where zeros before them add nothing, and the state after it is q^r h + S.

Powers are products of entries of `q_powers`, so their error does not grow with the exponent. The tables of powers are
made when the function runs: stored, they would take more memory than the coefficients by far.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from megalodon_deploy.export.builder import GraphBuilder
from megalodon_deploy.export.operators.complex_ema.arithmetic import Complex, concat, conjugate, multiply, split_pairs
from megalodon_deploy.export.operators.complex_ema.coefficients import Coefficients

MAX_BLOCK = 16


def block_length(chunk_size: int) -> int:
    """L: the largest power of two within a chunk, at most 16; then q^L is an entry of q_powers."""
    return min(MAX_BLOCK, 1 << (chunk_size.bit_length() - 1))


def emit_blocks(
    builder: GraphBuilder, u_BTD: ir.Value, past_BDN2: ir.Value, coefficients: Coefficients, length: int
) -> list[ir.Value]:
    """Average [B, T, D] without the omega term, and the new state [B, D, N, 2], for any T from 1."""
    layout = _Layout(builder, u_BTD, coefficients.p, length)
    tables = _Tables(builder, coefficients, length, layout.one)
    inner_DML, sums_re, sums_im = builder.multi(
        "Split",
        builder.op("MatMul", layout.blocks(), tables.inside, name="inside"),
        layout.split_sizes,
        names=["inner", "sums_re", "sums_im"],
        axis=-1,
    )
    entering, last = _scan(builder, layout, past_BDN2, (sums_re, sums_im), coefficients.power(builder, tables.levels))
    into_DML = builder.op("MatMul", entering, tables.into, name="into")
    average_BTD = layout.unblock(builder.op("Add", inner_DML, into_DML))
    present = _last_state(builder, layout, tables, coefficients, last)
    return [average_BTD, present]


class _Layout:
    """How [B, T, D] and [D, M, L] correspond; M = B * blocks, the last block is zero-filled."""

    def __init__(self, builder: GraphBuilder, u_BTD: ir.Value, p_DN: ir.Value, length: int) -> None:
        self.builder, self.u_BTD, self.length = builder, u_BTD, length
        self.batch = builder.op("Shape", u_BTD, start=0, end=1, name="batch")
        self.num_tokens = builder.op("Shape", u_BTD, start=1, end=2, name="num_tokens")
        self.dim = builder.op("Shape", p_DN, start=0, end=1, name="dim")
        modes = builder.op("Shape", p_DN, start=1, end=2, name="modes")
        self.split_sizes = builder.op("Concat", builder.constant([length], "block"), modes, modes, axis=0)
        one, block = builder.constant([1], "one"), builder.constant([length], "block")
        whole = builder.op("Div", builder.op("Sub", self.num_tokens, one), block, name="whole_blocks")
        self.num_blocks = builder.op("Add", whole, one, name="num_blocks")
        self.last_start = builder.op("Mul", whole, block, name="last_start")
        self.last_tokens = builder.op("Sub", self.num_tokens, self.last_start, name="last_tokens")
        self.last_missing = builder.op("Sub", block, self.last_tokens, name="last_missing")
        self.one = builder.op("Cast", builder.op("GreaterOrEqual", self.num_tokens, one), to=ir.DataType.FLOAT)

    def blocks(self) -> ir.Value:
        """u as [D, M, L]."""
        return self._channels_first(self._padded(self.u_BTD, at_end=True), "blocks")

    def last_block(self) -> ir.Value:
        """The last block's tokens as [D, B, L], moved to its end."""
        b = self.builder
        tokens = b.op("Slice", self.u_BTD, self.last_start, self.num_tokens, b.constant([1], "one"), name="last_block")
        return self._channels_first(self._padded(tokens, at_end=False), "last_block_channels")

    def unblock(self, y_DML: ir.Value) -> ir.Value:
        """[D, M, L] -> [B, T, D]."""
        b = self.builder
        rest = b.constant([-1], "rest")
        flat = b.op("Reshape", y_DML, b.constant([0, -1], "channel_rows"))
        shape = b.op("Concat", self.batch, rest, self.dim, axis=0)
        padded = b.op("Reshape", b.op("Transpose", flat, perm=[1, 0]), shape)
        return b.op("Slice", padded, b.constant([0], "zero"), self.num_tokens, b.constant([1], "one"), name="average")

    def state_rows(self, values_DMN: ir.Value, name: str) -> ir.Value:
        """[D, M, N] -> [D, B, blocks, N]."""
        b = self.builder
        keep, rest = b.constant([0], "zero"), b.constant([-1], "rest")
        shape = b.op("Concat", keep, self.batch, self.num_blocks, rest, axis=0)
        return b.op("Reshape", values_DMN, shape, name=name)

    def _padded(self, x_BTD: ir.Value, *, at_end: bool) -> ir.Value:
        b = self.builder
        zeros = [b.constant([0] * n, f"no_padding_{n}") for n in (4, 1)]
        pads = b.op("Concat", zeros[0], self.last_missing, zeros[1], axis=0) if at_end else None
        if pads is None:
            pads = b.op("Concat", zeros[1], self.last_missing, zeros[0], axis=0)
        return b.op("Pad", x_BTD, pads, name="padded")

    def _channels_first(self, x_BTD: ir.Value, name: str) -> ir.Value:
        b = self.builder
        rows = b.op("Reshape", x_BTD, b.op("Concat", b.constant([-1], "rest"), self.dim, axis=0))
        columns = b.op("Transpose", rows, perm=[1, 0])
        return b.op("Reshape", columns, b.constant([0, -1, self.length], "block_shape"), name=name)


class _Tables:
    """The matrices of each channel, from powers of q by doubling."""

    def __init__(self, builder: GraphBuilder, coefficients: Coefficients, length: int, one: ir.Value) -> None:
        self.levels = length.bit_length() - 1  # L = 2^levels
        self._builder, self._length = builder, length
        self._powers = [coefficients.power(builder, level) for level in range(self.levels + 1)]
        # Times a one that is known only at run time: executors would fold and keep the tables otherwise.
        drive = builder.op("Mul", coefficients.drive(builder), one)
        readout = coefficients.readout(builder)
        start = conjugate(builder, multiply(builder, readout, self._powers[0], "readout"))
        self.sums = self._stack(self._descending(drive), "sums")
        self.into = self._stack(self._ascending((builder.op("Mul", start[0], one), start[1])), "into")
        inside = builder.op("Concat", self._toeplitz(readout), self.sums, axis=1, name="inside_rows")
        self.inside = builder.op("Transpose", inside, perm=[0, 2, 1], name="inside_table")

    def _descending(self, drive: ir.Value) -> Complex:
        """p q^(L-1-j), parts [D, N, L]."""
        b = self._builder
        table: Complex = (drive, b.op("Sub", drive, drive))
        for level in range(self.levels):
            table = concat(b, multiply(b, table, self._powers[level], "raised"), table, -1, f"descending_{level}")
        return table

    def _ascending(self, start: Complex) -> Complex:
        """conj(gamma q^(t+1)), parts [D, N, L]: the real part of a product with h is then a plain sum."""
        b, table = self._builder, start
        for level in range(self.levels):
            factor = conjugate(b, self._powers[level])
            table = concat(b, table, multiply(b, table, factor, "raised"), -1, f"ascending_{level}")
        return table

    def _stack(self, table: Complex, name: str) -> ir.Value:
        """Parts [D, N, L] -> [D, 2N, L]."""
        return self._builder.op("Concat", *table, axis=1, name=f"{name}_table")

    def _toeplitz(self, readout: Complex) -> ir.Value:
        """[D, L, L]: element (t, j) is k_(t-j), 0 above the diagonal.

        The reversed kernel and L zeros, repeated and cut into rows of 2L - 1, shift by one from row to row.
        """
        b, length = self._builder, self._length
        gamma = b.op("Concat", *conjugate(b, readout), axis=1)
        kernel = b.op("MatMul", b.op("Transpose", gamma, perm=[0, 2, 1]), self.sums, name="reversed_kernel")
        zero_filled = b.op("Pad", kernel, b.constant([0, 0, 0, 0, 0, length], "kernel_padding"))
        repeated = b.op("Tile", zero_filled, b.constant([1, length, 1], "kernel_repeats"))
        flat = b.op("Reshape", repeated, b.constant([0, -1], "channel_rows"))
        first, end = length - 1, length - 1 + length * (2 * length - 1)
        last_axis = b.constant([-1], "rest")
        cut = b.op("Slice", flat, b.constant([first], "skew_start"), b.constant([end], "skew_end"), last_axis)
        rows = b.op("Reshape", cut, b.constant([0, length, 2 * length - 1], "skew_rows"))
        return b.op("Slice", rows, b.constant([0], "zero"), b.constant([length], "block"), last_axis, name="toeplitz")

    def power_of(self, count: ir.Value) -> Complex:
        """q^count, 1 <= count <= L, parts [D, N, 1]: a factor for each bit of count [1]."""
        b = self._builder
        two = b.constant([2], "two")
        result: Complex | None = None
        for level, power in enumerate(self._powers):
            shifted = b.op("Div", count, b.constant([1 << level], f"bit_{level}"))
            is_set = b.op("Cast", b.op("Mod", shifted, two), to=ir.DataType.BOOL, name=f"has_bit_{level}")
            ones = [b.scalar(value, np.float32, f"{kind}_float") for value, kind in ((1.0, "one"), (0.0, "zero"))]
            factor = tuple(b.op("Where", is_set, part, one) for part, one in zip(power, ones, strict=True))
            chosen: Complex = (factor[0], factor[1])
            result = chosen if result is None else multiply(b, result, chosen, "tail_power")
        assert result is not None, "Bug: there is always the power q^1"
        return result


def _scan(
    builder: GraphBuilder, layout: _Layout, past_BDN2: ir.Value, sums_DMN: Complex, block_power: Complex
) -> tuple[ir.Value, Complex]:
    """State entering each block [D, M, 2N], and entering the last one as parts [D, B, N]."""
    past = split_pairs(builder, builder.op("Transpose", past_BDN2, perm=[1, 0, 2, 3]), "past")
    last_axis, middle = builder.constant([-1], "rest"), [0, 2, 1]
    initial = [builder.op("Squeeze", part, last_axis) for part in past]
    sums = [layout.state_rows(part, "block_sums") for part in sums_DMN]
    factor = tuple(builder.op("Transpose", part, perm=middle) for part in block_power)
    body = _scan_body(builder, (factor[0], factor[1]))
    outputs = builder.multi(
        "Scan",
        *initial,
        *sums,
        names=["final_re", "final_im", "entering_re", "entering_im"],
        body=body,
        num_scan_inputs=2,
        scan_input_axes=[2, 2],
        scan_output_axes=[2, 2],
    )
    last = [builder.op("Gather", part, builder.scalar(-1, np.int64, "last"), axis=2) for part in outputs[2:]]
    both = builder.op("Concat", *outputs[2:], axis=-1)
    shape = builder.op("Concat", layout.dim, last_axis, builder.op("Shape", both, start=3), axis=0)
    return builder.op("Reshape", both, shape, name="entering"), (last[0], last[1])


def _scan_body(builder: GraphBuilder, factor_D1N: Complex) -> ir.Graph:
    """h' = q^L h + S; the state before the block is the scanned output."""
    inner = builder.inner("scan")
    inputs = [ir.Value(name=inner.unique(name)) for name in ("state_re", "state_im", "sum_re", "sum_im")]
    moved = multiply(inner, (inputs[0], inputs[1]), factor_D1N, "moved")
    after = [inner.op("Add", part, addend) for part, addend in zip(moved, inputs[2:], strict=True)]
    before = [inner.op("Identity", part) for part in inputs[:2]]
    return ir.Graph(inputs, [*after, *before], nodes=inner.nodes, name="scan")


def _last_state(
    builder: GraphBuilder, layout: _Layout, tables: _Tables, coefficients: Coefficients, entering: Complex
) -> ir.Value:
    """State after the last token, [B, D, N, 2]."""
    table = builder.op("Transpose", tables.sums, perm=[0, 2, 1])
    sums_DBM = builder.op("MatMul", layout.last_block(), table, name="last_sums")
    sums = builder.multi("Split", sums_DBM, names=["last_re", "last_im"], axis=-1, num_outputs=2)
    power = [builder.op("Transpose", part, perm=[0, 2, 1]) for part in tables.power_of(layout.last_tokens)]
    moved = multiply(builder, entering, (power[0], power[1]), "tail")
    last_axis = builder.constant([-1], "rest")
    parts = [
        builder.op("Unsqueeze", builder.op("Add", part, addend), last_axis)
        for part, addend in zip(moved, sums, strict=True)
    ]
    pairs_DBN2 = builder.op("Concat", *parts, axis=-1)
    return builder.op("Transpose", pairs_DBN2, perm=[1, 0, 2, 3], name="present")

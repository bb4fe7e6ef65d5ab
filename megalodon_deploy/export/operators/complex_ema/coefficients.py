"""The operator's coefficients in the forms in which its bodies read them, and multiplication by powers of q.

ONNX has no complex numbers that executors know, but it has rotary embedding: on neighbouring pairs (a, b) it computes
(a c - b s, b c + a s), with c and s taken from a row of two tables. With the real and imaginary part of q^(2^k) of
channel d as row k D + d, that is multiplication by q^(2^k): one vectorised operator where plain ones take six and two
copies. Channels take the place of the sequence, which keeps a "head" at 2N values: executors limit its size.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from megalodon_deploy.export.builder import GraphBuilder


class Coefficients:
    """Emits, once for both bodies, what depends on weights alone; executors fold it when they load the model.

    Rows of states are [B, R, D, 2N], N interleaved pairs a channel.
    """

    def __init__(
        self, builder: GraphBuilder, p_DN: ir.Value, q_powers: ir.Value, gamma_DN2: ir.Value, levels: int
    ) -> None:
        """`levels`: the highest k for which q^(2^k) is needed."""
        rest, keep = builder.constant([-1], "rest"), builder.constant([0], "keep")
        sizes = builder.op("Shape", p_DN, name="sizes")
        self.dim = builder.op("Shape", p_DN, start=0, end=1, name="dim")
        self.row_shape = builder.op(
            "Concat", keep, builder.constant([1], "one"), self.dim, rest, axis=0, name="row_shape"
        )
        self.state_shape = builder.op("Concat", keep, sizes, builder.constant([2], "pair"), axis=0, name="state_shape")
        real, imaginary = self._power_rows(builder, q_powers, levels)
        self._tables = (real, imaginary)
        self._conjugate_tables = (real, builder.op("Neg", imaginary, name="power_im_negated"))
        zero, one = builder.scalar(0, np.int64, "zero"), builder.scalar(1, np.int64, "one_step")
        channels_D = builder.op("Range", zero, builder.op("Squeeze", self.dim), one, name="channels")
        self.first_level_1D = builder.op("Unsqueeze", channels_D, keep, name="first_level")
        drive = builder.op("Unsqueeze", p_DN, rest, name="p_pairs")
        zero = builder.op("Sub", drive, drive, name="p_zeros")
        self.drive_DN2 = builder.op("Concat", drive, zero, axis=-1, name="drive")  # (p, 0)
        signs = builder.constant(np.array([1.0, -1.0], np.float32), "conjugate")
        # (re, -im): the real part of gamma h is then a plain sum of products
        self.readout_DN2 = builder.op("Mul", gamma_DN2, signs, name="readout")

    @staticmethod
    def _power_rows(builder: GraphBuilder, q_powers: ir.Value, levels: int) -> Sequence[ir.Value]:
        """Real and imaginary part of q^(2^k), k = 0..levels, [(levels + 1) D, N] each."""
        bounds = [builder.constant([n], f"row_{n}") for n in (0, levels + 1)]
        rows = builder.op("Slice", q_powers, *bounds, name="powers")
        parts = builder.multi("Split", rows, names=["powers_re", "powers_im"], axis=-1, num_outputs=2)
        modes = builder.op("Shape", q_powers, start=2, end=3, name="modes")
        shape = builder.op("Concat", builder.constant([-1], "rest"), modes, axis=0)
        return [builder.op("Reshape", part, shape, name="power_rows") for part in parts]

    def level(self, builder: GraphBuilder, first_level: ir.Value, exponent: int) -> ir.Value:
        """Table rows of q^(2^exponent): `first_level`, those of q, [B, D] int64, moved on."""
        offset = builder.op("Mul", self.dim, builder.scalar(exponent, np.int64, f"exponent_{exponent}"))
        return builder.op("Add", first_level, offset, name=f"level_{exponent}")

    def rotate(
        self, builder: GraphBuilder, rows: ir.Value, level_BD: ir.Value, name: str, *, conjugate: bool = False
    ) -> ir.Value:
        """rows [B, R, D, 2N] times the power of q, or its conjugate, that `level_BD` selects."""
        tables = self._conjugate_tables if conjugate else self._tables
        return builder.op("RotaryEmbedding", rows, *tables, level_BD, interleaved=1, name=name)

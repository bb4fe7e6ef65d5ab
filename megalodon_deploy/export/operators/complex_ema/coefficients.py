"""The operator's coefficients in the forms in which its bodies read them, and multiplication by powers of q.

ONNX has no complex numbers that executors know, but it has rotary embedding: on neighbouring pairs (a, b) it computes
(a c - b s, b c + a s), with c and s taken from a row of two tables. With the real and imaginary part of q^(2^k) as
row k, that is multiplication by q^(2^k): one vectorised operator where plain ones take six and two copies.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from megalodon_deploy.export.builder import GraphBuilder


class Coefficients:
    """Emits, once for both bodies, what depends on weights alone; executors fold it when they load the model.

    A row of states is [..., 2DN]: D channels of N interleaved pairs.
    """

    def __init__(
        self, builder: GraphBuilder, p_DN: ir.Value, q_powers: ir.Value, gamma_DN2: ir.Value, levels: int
    ) -> None:
        """`levels`: the highest k for which q^(2^k) is needed."""
        self.builder = builder
        sizes = builder.op("Shape", p_DN, name="sizes")
        self.dim = builder.op("Shape", p_DN, start=0, end=1, name="dim")
        width = builder.constant([-1], "rest")
        self.channel_shape = builder.op("Concat", self.dim, width, axis=0, name="channel_shape")
        self.state_shape = builder.op(
            "Concat", builder.constant([0], "keep"), sizes, builder.constant([2], "pair"), axis=0, name="state_shape"
        )
        real, imaginary = self._power_rows(q_powers, levels)
        self._tables = (real, imaginary)
        self._conjugate_tables = (real, builder.op("Neg", imaginary, name="power_im_negated"))
        drive = builder.op("Unsqueeze", p_DN, width, name="p_pairs")
        zero = builder.op("Sub", drive, drive, name="p_zeros")
        self.drive_DN2 = builder.op("Concat", drive, zero, axis=-1, name="drive")  # (p, 0)
        signs = builder.constant(np.array([1.0, -1.0], np.float32), "conjugate")
        # (re, -im): the real part of gamma h is then a plain sum of products
        self.readout_DN2 = builder.op("Mul", gamma_DN2, signs, name="readout")

    def _power_rows(self, q_powers: ir.Value, levels: int) -> Sequence[ir.Value]:
        """Real and imaginary part of q^(2^k), k = 0..levels, [levels + 1, DN] each."""
        builder = self.builder
        bounds = [builder.constant([n], f"row_{n}") for n in (0, levels + 1)]
        rows = builder.op("Slice", q_powers, *bounds, name="powers")
        parts = builder.multi("Split", rows, names=["powers_re", "powers_im"], axis=-1, num_outputs=2)
        flat = builder.constant([0, -1], "row_width")
        return [builder.op("Reshape", part, flat, name="power_rows") for part in parts]

    def rotate(
        self, builder: GraphBuilder, rows: ir.Value, level_B1: ir.Value, name: str, *, conjugate: bool = False
    ) -> ir.Value:
        """rows [B, R, 1, 2DN] times q^(2^k), or its conjugate; k from `level_B1` [B, 1] int64."""
        tables = self._conjugate_tables if conjugate else self._tables
        return builder.op("RotaryEmbedding", rows, *tables, level_B1, interleaved=1, name=name)

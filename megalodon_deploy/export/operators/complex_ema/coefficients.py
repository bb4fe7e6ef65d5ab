"""The operator's coefficients, as its bodies read them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from megalodon_deploy.export.builder import GraphBuilder
from megalodon_deploy.export.operators.complex_ema.arithmetic import Complex, split_pairs


@dataclass(frozen=True)
class Coefficients:
    """Inputs of the function, all float32."""

    p: ir.Value  # [D, N]
    q_powers: ir.Value  # [K, D, N, 2]: q^(2^k)
    gamma: ir.Value  # [D, N, 2]

    def power(self, builder: GraphBuilder, exponent: int) -> Complex:
        """q^(2^exponent) as parts [D, N, 1]; a product of these is as exact as one rounding a factor."""
        index = builder.scalar(exponent, np.int64, f"exponent_{exponent}")
        return split_pairs(builder, builder.op("Gather", self.q_powers, index, axis=0), f"q_{1 << exponent}")

    def drive(self, builder: GraphBuilder) -> ir.Value:
        """p as [D, N, 1]."""
        return builder.op("Unsqueeze", self.p, builder.constant([-1], "last_axis"), name="drive")

    def readout(self, builder: GraphBuilder) -> Complex:
        """gamma as parts [D, N, 1]."""
        return split_pairs(builder, self.gamma, "gamma")

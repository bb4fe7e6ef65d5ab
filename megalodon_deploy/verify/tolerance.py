"""The one table of tolerances: by precision of the arithmetic and by kind of tensor.

An error is measured against a scale taken from the reference, never against single elements: a logit near zero has no
relative precision. Scales:

- logits, activations, key and value rows, CEMA state: the largest magnitude of that tensor in that row of the batch;
- a norm's mean: the root mean square sqrt(mean^2 + var) of what the group has seen. An input error dx moves the mean
  by at most dx, and dx is relative to the inputs' own size;
- a norm's variance: sqrt(var + eps) * sqrt(mean^2 + var + eps), since dvar = 2 * std * dx. Both are float64 numbers
  (hi + lo) and are compared as such.

Tolerances:

- fp32: 2e-5, the agreement that any two float32 paths of this model owe each other, for every kind. Roundings of a
  12-layer model add up to about 2^-24 * sqrt(12 * 12) = 7e-7, sums of a thousand products to twenty times that.
- fp16, bf16: every activation that a layer writes is rounded to half a unit in the last place, u = 2^-11 or 2^-8;
  independent roundings add as the root of their number. `ROUNDINGS_PER_LAYER` counts the tensors a layer writes, and
  `CONDITIONING` is what normalising, softmax and gating may magnify them by. The reference computes in float32 on
  weights rounded to the same precision, so rounding of weights is no part of the error.
- products with int8 activations, as ONNX Runtime computes those with quantised matrices: each rounds its input once, to
  steps of a block's largest activation over 127, which errs by step / sqrt(12) in the root mean square. The largest of
  a block, of 128 at most, is about 3 times a usual one. Measured on the CPU in models of 2 to 12 layers, of random
  weights and trained, int8 by columns and int4: errors of 0.1 to 2.2 times `INT8_ROUNDOFF` times the root of the number
  of products; `CONDITIONING` allows 4.
- quantised keys and values: where two paths come down on either side of the middle between two codes, they keep
  different ones. So a code may be off by one `CODE_STEP`. With an error e before rounding, about e/step of the codes
  are; what follows from independent flips grows as the root of their share: `CONDITIONING` * step * sqrt(e/step).

A norm's statistics over n tokens, of which only the last k were computed apart, can differ by k/n of an input's error;
the rest is the start state that both sides were given. To this comes `PAIR_ROUNDOFF` for the (hi, lo) pair. Deep in a
stream this demands float64 updates and a lo part that is carried: float32 state misses it by orders of magnitude.
"""

from __future__ import annotations

import math

from megalodon_deploy.bundle import Precision
from megalodon_deploy.config import MegalodonConfig

KINDS = ("logits", "activation", "key", "value", "key_scale", "value_scale", "cema", "norm mean", "norm var")
ROW_KINDS = ("key", "value", "key_scale", "value_scale")

FLOAT32_AGREEMENT = 2e-5
UNIT_ROUNDOFF: dict[Precision, float] = {"fp16": 2.0**-11, "bf16": 2.0**-8}
ROUNDINGS_PER_LAYER = 12  # u, m, z, q, k, v, g, a, y, n, f, out
CONDITIONING = 4.0
INT8_ROUNDOFF = 3 / (127 * math.sqrt(12))
PRODUCTS_PER_LAYER = 5
PAIR_ROUNDOFF = 2.0**-44  # two float32 hold 48 bits; sixteen roundings of the last
CODE_STEP = {
    "fp8": 32 / 448,
    "int8": 1 / 127,
}  # of quantised rows: the largest step between codes over the largest code
SCALE_FLOOR = 1e-3  # of an all-zero tensor, where a scale of 0 would allow nothing


def tolerances(config: MegalodonConfig, precision: Precision, *, int8_products: bool = False) -> dict[str, float]:
    """Allowed error over scale, by kind, for arithmetic of `precision`.

    `int8_products`: matrix products round their activations to int8.
    """
    allowed = FLOAT32_AGREEMENT
    if precision != "fp32":
        num_roundings = ROUNDINGS_PER_LAYER * config.num_layers + 2  # the embedding and the final norm
        allowed = CONDITIONING * UNIT_ROUNDOFF[precision] * math.sqrt(num_roundings)
    if int8_products:
        allowed += CONDITIONING * INT8_ROUNDOFF * math.sqrt(PRODUCTS_PER_LAYER * config.num_layers + 1)
    if config.kv_dtype == "activation":
        return dict.fromkeys(KINDS, allowed)
    step = CODE_STEP[config.kv_dtype]
    flipped = CONDITIONING * step * math.sqrt(min(1.0, allowed / step))
    return dict.fromkeys(KINDS, allowed + flipped) | {"key": allowed + step, "value": allowed + step}


def norm_tolerance(tolerance: float, *, fed_tokens: int, count: int) -> float:
    """Tolerance of a norm's statistics over `count` tokens, the last `fed_tokens` of which were computed apart."""
    return tolerance * min(1.0, fed_tokens / count) + PAIR_ROUNDOFF

"""The ONNX operators of domain `megalodon`, version 1, each as a function in standard operators.

    ComplexEMA(x [B, T, D], past_cema [B, D, N, 2], position [B], p [D, N], q_powers [K, D, N, 2], gamma [D, N, 2],
               omega [D]) -> y [B, T, D], present_cema [B, D, N, 2]
    TimestepNorm(x [B, T, D], past_norm [B, G, 4], position [B], weight [D], bias [D]; epsilon = 1e-5)
               -> y [B, T, D], present_norm [B, G, 4]

x and y have the activation type, position is int64, everything else float32. A TensorRT plugin of the same name takes
the same inputs in the same order.
"""

DOMAIN = "megalodon"
DOMAIN_VERSION = 1

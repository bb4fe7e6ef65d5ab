"""The ONNX operators of domain `megalodon`, version 1, each as a function in standard operators.

    ComplexEMA(x [B, T, D], past_cema [B, D, N, 2], position [B], p [D, N], q_powers [K, D, N, 2], gamma [D, N, 2],
               omega [D]) -> y [B, T, D], present_cema [B, D, N, 2]
    TimestepNorm(x [B, T, D], past_norm [B, G, 4], position [B], weight [D], bias [D]; epsilon = 1e-5)
               -> y [B, T, D], present_norm [B, G, 4]
    ChunkAttention(q [B, H, T, dz], k [B, H, T, dz], v [B, H, T, dv], past_key [B, H, S, dz], past_value [B, H, S, dv],
               position [B], past_key_scale [B, H, S], past_value_scale [B, H, S]; chunk_size) -> out [B, H, T, dv]
    QuantizedMatMul(x [..., K], codes [K, N], scales [K / block_size, N] or [N]; axis, block_size) -> y [..., N]

x, y, q, k, v and out have the activation type, position is int64, everything else float32. Past keys and values have
the activation type, or one of 8 bits: then they come with a scale for each row, two inputs that are otherwise absent. A
TensorRT plugin of the same name takes the same inputs in the same order. QuantizedMatMul is for the CPU alone: see
`megalodon_deploy.export.cpu_graph`.
"""

DOMAIN = "megalodon"
DOMAIN_VERSION = 1

"""How much of a device's arithmetic a run uses."""

from __future__ import annotations

from megalodon_deploy.config import MegalodonConfig
from megalodon_deploy.parameters import parameter_specs

# Dense bfloat16 matrix products as their maker states them, TFLOP/s, by a part of the name that PyTorch reports.
_PEAK_TFLOPS = {
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "H200": 989.0,
    "GH200": 989.0,
    "B200": 2250.0,
    "A100": 312.0,
    "L40S": 362.0,
    "RTX 4090": 165.2,
}


def flops_per_token(config: MegalodonConfig) -> float:
    """Floating-point operations of matrix products, forward and backward, per token; two for a multiply-add.

    Attention sees half a chunk on average. The moving average and the norms are not counted.
    """
    matrices = sum(
        spec.shape[0] * spec.shape[1]
        for spec in parameter_specs(config)
        if len(spec.shape) == 2 and spec.name.endswith(".weight") and spec.name != "embed.weight"
    )
    if config.share_emb:
        matrices += config.vocab_size * config.model_dim
    attention = config.num_layers * (config.z_dim + config.value_dim) * config.chunk_size / 2
    return 6.0 * (matrices + attention)


def peak_flops(device_name: str, stated_tflops: float | None) -> float | None:
    """FLOP/s of a device; None where nobody said."""
    if stated_tflops is not None:
        return stated_tflops * 1e12
    return next((peak * 1e12 for name, peak in _PEAK_TFLOPS.items() if name in device_name), None)

"""The operators of Megalodon as `torch.library` custom ops, namespace `megalodon`."""

from megalodon_deploy.model.operators.chunk_attention import chunk_attention
from megalodon_deploy.model.operators.complex_ema import complex_ema
from megalodon_deploy.model.operators.timestep_norm import timestep_norm

__all__ = ["chunk_attention", "complex_ema", "timestep_norm"]

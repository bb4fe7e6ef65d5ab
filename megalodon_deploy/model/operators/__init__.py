"""The two recurrent operators of Megalodon as `torch.library` custom ops, namespace `megalodon`."""

from megalodon_deploy.model.operators.complex_ema import complex_ema
from megalodon_deploy.model.operators.timestep_norm import timestep_norm

__all__ = ["complex_ema", "timestep_norm"]

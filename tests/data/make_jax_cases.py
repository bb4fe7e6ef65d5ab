"""Writes jax_v2 and jax_v3: tiny random models saved by megalodon-jax, with the logits that it computes for them.

Run once per format version, in an environment that has the published package:

    pip install megalodon-jax==0.2.1 jax && python make_jax_cases.py jax_v2
    pip install megalodon-jax==0.2.2 jax && python make_jax_cases.py jax_v3
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from megalodon_jax import MegalodonConfig, MegalodonForCausalLM
from megalodon_jax.checkpoint import apply_model_state_dict, model_state_dict, save_checkpoint

SHARED = {
    "vocab_size": 40,
    "model_dim": 16,
    "num_layers": 2,
    "num_heads": 2,
    "z_dim": 8,
    "value_dim": 20,
    "ffn_hidden_dim": 24,
    "cema_ndim": 4,
    "chunk_size": 8,
    "norm_num_groups": 4,
}
CASES = {
    "jax_v2": {"swiglu": True, "rescale_nffn": True, "rope_base": 100000.0},
    "jax_v3": {"share_emb": True, "scale_emb": True, "norm_affine": False, "norm_eps": 1e-4},
}
NUM_TOKENS = 29  # three chunks and a part


def main(name: str) -> None:
    """Every weight is random, those that start at zero included, so that a dropped term shows."""
    config = MegalodonConfig(**SHARED, **CASES[name])
    model = MegalodonForCausalLM(config, key=jax.random.PRNGKey(0))
    random = np.random.default_rng(0)
    weights = {
        key: jnp.asarray(random.normal(0.0, 0.5, value.shape), value.dtype)
        for key, value in model_state_dict(model).items()
    }
    model, _ = apply_model_state_dict(model, weights)
    tokens = random.integers(0, config.vocab_size, (2, NUM_TOKENS))
    logits, _ = model(jnp.asarray(tokens, jnp.int32))
    directory = Path(__file__).parent / name
    directory.mkdir(exist_ok=True)
    save_checkpoint(model, directory / "model.safetensors")
    np.savez_compressed(directory / "expected.npz", tokens=tokens, logits=np.asarray(logits))


if __name__ == "__main__":
    main(sys.argv[1])

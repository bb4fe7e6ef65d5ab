"""Writes hf_*: tiny random models saved by megalodon-hf, with the logits that it computes for them.

The package is published as a repository (github.com/pszemraj/megalodon-hf, commit 082db4b), in a copy of which:

    pip install torch==2.13.0 transformers==4.57.6 && PYTHONPATH=src python make_hf_cases.py OUTPUT_DIRECTORY
"""

import sys
from pathlib import Path

import numpy as np
import torch
from megalodon import MegalodonConfig, MegalodonForCausalLM

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
    "hf_biases": {"swiglu": True, "rescale_nffn": True, "rope_base": 100000.0},
    "hf_sharded": {"scale_emb": True, "norm_affine": False, "norm_eps": 1e-4},
    "hf_no_ffn_bias": {"swiglu": True},
}
NUM_TOKENS = 29  # three chunks and a part


def main(root: Path) -> None:
    """Every weight is random, those that start at zero included, so that a dropped term shows."""
    for name, overrides in CASES.items():
        torch.manual_seed(0)
        config = MegalodonConfig(**SHARED, **overrides)
        model = MegalodonForCausalLM(config).eval()
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                parameter.normal_(0.0, 0.5)
                if key.endswith("ffn.norm.weight"):
                    parameter.add_(1.0)
                if name == "hf_no_ffn_bias" and ".ffn.fc" in key and key.endswith("bias"):
                    parameter.zero_()
            tokens = torch.randint(config.vocab_size, (2, NUM_TOKENS))
            logits = model(tokens, use_cache=False).logits
        max_shard_size = "10KB" if name == "hf_sharded" else "5GB"
        # As safetensors, the package's shared embedding cannot be saved with these versions.
        model.save_pretrained(root / name, safe_serialization=False, max_shard_size=max_shard_size)
        (root / name / "generation_config.json").unlink(missing_ok=True)
        np.savez_compressed(root / name / "expected.npz", tokens=tokens.numpy(), logits=logits.numpy())


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""megalodon-jax, written by others, computes the same: random models, checkpoints both ways, logits and gradients.

The package is optional: `pip install 'megalodon-deploy[jax]'`. A float32 program of another order of operations is
compared with PyTorch in float64.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import assert_close

from megalodon_deploy.config import MegalodonConfig
from megalodon_deploy.model.checkpoint import load_checkpoint, save_checkpoint
from megalodon_deploy.model.megalodon import Megalodon

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # small models run once: compiling is what takes time
jax = pytest.importorskip("jax", reason="megalodon-jax is not installed: pip install 'megalodon-deploy[jax]'")
equinox = pytest.importorskip("equinox", reason="pip install 'megalodon-deploy[jax]'")
megalodon_jax = pytest.importorskip("megalodon_jax", reason="pip install 'megalodon-deploy[jax]'")

BATCH, SEEDS = 2, range(2)


@dataclass(frozen=True)
class Case:
    """A random model as both packages have it."""

    config: MegalodonConfig
    theirs: Any
    ours: Megalodon
    tokens: np.ndarray  # [B, T]
    logits: np.ndarray  # theirs, [B, T, V]
    gradients: Any  # their model with gradients for weights


def random_config(seed: int) -> MegalodonConfig:
    """Any switch, any size that both packages take; no two sizes alike on purpose."""
    random = np.random.default_rng(seed)
    heads, groups = int(random.integers(1, 4)), int(random.integers(1, 4))
    switches = {name: bool(random.integers(2)) for name in ("swiglu", "rescale_nffn", "scale_emb", "share_emb")}
    return MegalodonConfig(
        vocab_size=int(random.integers(20, 60)),
        model_dim=groups * int(random.integers(3, 9)),
        num_layers=int(random.integers(1, 3)),
        num_heads=heads,
        z_dim=heads * 2 * int(random.integers(1, 5)),
        value_dim=heads * int(random.integers(2, 9)),
        ffn_hidden_dim=int(random.integers(8, 40)),
        cema_ndim=int(random.integers(1, 6)),
        chunk_size=int(random.integers(3, 11)),
        norm_num_groups=groups,
        norm_eps=float(10 ** random.uniform(-6, -3)),
        rope_base=float(10 ** random.uniform(2, 5)),
        norm_affine=bool(random.integers(2)),
        **switches,
    )


@pytest.fixture(scope="module", params=SEEDS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    from megalodon_jax.checkpoint import apply_model_state_dict, model_state_dict

    seed: int = request.param
    config, random = random_config(seed), np.random.default_rng(seed)
    values = {name: value for name, value in config.to_dict().items() if name in field_names()}
    create = equinox.filter_jit(megalodon_jax.MegalodonForCausalLM)
    theirs = create(megalodon_jax.MegalodonConfig(**values), key=jax.random.PRNGKey(0))
    weights = {
        name: jax.numpy.asarray(random.normal(0, 0.4, value.shape), value.dtype)
        for name, value in model_state_dict(theirs).items()
    }
    theirs, _ = apply_model_state_dict(theirs, weights)
    path = tmp_path_factory.mktemp("jax") / "model.safetensors"
    megalodon_jax.save_checkpoint(theirs, path)
    num_tokens = int(random.integers(2 * config.chunk_size + 1, 4 * config.chunk_size))
    tokens_BT = random.integers(0, config.vocab_size, (BATCH, num_tokens))
    logits, gradients = compute(theirs, jax.numpy.asarray(tokens_BT, jax.numpy.int32))
    return Case(config, theirs, load_checkpoint(path), tokens_BT, np.asarray(logits), gradients)


def field_names() -> set[str]:
    return set(megalodon_jax.MegalodonConfig.__dataclass_fields__)


@equinox.filter_jit
def compute(model: Any, tokens: Any) -> tuple[Any, Any]:
    """Logits, and the gradients of the loss, in one program."""
    logits, _ = model(tokens)
    return logits, equinox.filter_grad(lambda model: model.compute_loss(tokens, tokens))(model)


def test_logits_are_the_same(case: Case) -> None:
    assert case.ours.config == case.config
    with torch.no_grad():
        logits, _ = case.ours.double()(torch.from_numpy(case.tokens))
    assert_close(case.logits, logits.numpy(), 2e-5, str(case.config))


def test_gradients_are_the_same(case: Case, tmp_path: Path) -> None:
    filled = equinox.combine(case.gradients, case.theirs)  # what is no float has no gradient
    megalodon_jax.save_checkpoint(filled, tmp_path / "grads.safetensors")
    expected = dict(load_checkpoint(tmp_path / "grads.safetensors").named_parameters())

    ours = case.ours.double()
    ours.zero_grad()
    logits, _ = ours(torch.from_numpy(case.tokens))
    following = torch.from_numpy(case.tokens[:, 1:]).flatten()
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), following).backward()
    found = dict(ours.named_parameters())
    assert set(found) == set(expected)
    for name, parameter in found.items():
        gradient, theirs = parameter.grad, expected[name].detach().numpy()
        assert gradient is not None, name
        scale = max(float(np.abs(theirs).max()), 1e-6)
        assert_close(gradient.numpy() / scale, theirs / scale, 2e-4, f"{name}, {case.config}")


def test_a_checkpoint_survives_the_way_there_and_back(case: Case, tmp_path: Path) -> None:
    from megalodon_jax.convert import load_upstream_state_dict

    ours = case.ours.float()
    save_checkpoint(ours, tmp_path / "released", "released")
    state = torch.load(tmp_path / "released" / "consolidated.pth", weights_only=True)
    zeros = jax.tree.map(lambda leaf: leaf * 0 if equinox.is_inexact_array(leaf) else leaf, case.theirs)
    megalodon_jax.save_checkpoint(load_upstream_state_dict(zeros, state), tmp_path / "theirs.safetensors")
    back = load_checkpoint(tmp_path / "theirs.safetensors")
    assert back.config == ours.config
    returned = dict(back.named_parameters())
    for name, parameter in ours.named_parameters():
        assert parameter.any(), name
        assert torch.equal(parameter, returned[name]), name

"""Variants for studies: what each computes, that they stream, and that only released arithmetic leaves PyTorch."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import small_config
from torch.nn import functional

from megalodon_deploy import Megalodon, MegalodonConfig, load_checkpoint, save_checkpoint
from megalodon_deploy.errors import ConfigError
from megalodon_deploy.export import export_checkpoint
from megalodon_deploy.model.checkpoint import read_checkpoint
from megalodon_deploy.parameters import parameter_specs

VARIANTS: list[dict[str, Any]] = [
    {"ema": "real"},
    {"ema": "none"},
    {"stream_norm": "layer"},
    {"attention_norm": False},
    {"two_hop": False},
]
UNRELEASED = VARIANTS[1:]


def random_model(**overrides: Any) -> Megalodon:
    torch.manual_seed(0)
    model = Megalodon(small_config(**overrides)).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "theta" not in name:
                parameter += 0.2 * torch.randn_like(parameter)
    return model


def name_of(variant: dict[str, Any]) -> str:
    return "-".join(f"{key}-{value}" for key, value in variant.items())


@pytest.mark.parametrize("variant", VARIANTS, ids=name_of)
def test_a_variant_differs_streams_and_is_saved(variant: dict[str, Any], tmp_path: Path) -> None:
    model, released = random_model(**variant), random_model()
    assert set(model.state_dict()) == {spec.name for spec in parameter_specs(model.config)}
    released.load_state_dict(model.state_dict() | (released.state_dict() if variant == {"ema": "none"} else {}))
    if "ema" not in variant:
        tokens = torch.randint(50, (1, 9))
        assert (model(tokens)[0] - released(tokens)[0]).abs().max() > 1e-3
    tokens = torch.randint(50, (2, 31))
    whole, _ = model(tokens)
    state, parts = None, []
    for part in tokens.split([1, 6, 13, 11], 1):  # chunks of 12
        logits, state = model(part, state)
        parts.append(logits)
    assert torch.allclose(torch.cat(parts, 1), whole, rtol=1e-9, atol=1e-9)
    save_checkpoint(model.float(), tmp_path / "saved")
    assert read_checkpoint(tmp_path / "saved").config == model.config
    assert torch.equal(load_checkpoint(tmp_path / "saved")(tokens)[0], model(tokens)[0])


def test_a_real_average_does_not_rotate() -> None:
    cema = random_model(ema="real").layers[0].mega.cema
    assert cema is not None
    x = torch.randn(1, 7, 24, dtype=torch.float64)
    past = torch.full((1, 24, 4, 2), math.nan, dtype=torch.float64)
    y, present = cema(x, past, torch.zeros(1, dtype=torch.int64))
    p, d = (torch.sigmoid(value[:, :, 0]) for value in (cema.alpha, cema.delta))
    h = torch.zeros(24, 4, dtype=torch.float64)
    for t in range(7):
        h = (1 - p * d) * h + p * x[0, t, :, None]
        expected = (h * cema.gamma[..., 0]).sum(-1) / 2 + cema.omega[:, 0] * x[0, t]  # sqrt(N) = 2
        assert torch.allclose(y[0, t], expected, rtol=1e-10)
    assert torch.allclose(present[0, ..., 0], h)
    assert present[0, ..., 1].abs().max() < 1e-40
    y.sum().backward()
    assert cema.theta.grad is None


def test_no_average_is_an_average_of_the_newest_token_alone() -> None:
    without, released = random_model(ema="none"), random_model()
    released.load_state_dict({**released.state_dict(), **without.state_dict()})
    with torch.no_grad():
        for layer in released.layers:
            layer.mega.cema.gamma.zero_()
            layer.mega.cema.omega.fill_(1)
    tokens = torch.randint(50, (2, 20))
    assert torch.allclose(without(tokens)[0], released(tokens)[0], rtol=1e-9)


def test_a_layer_norm_looks_at_one_token() -> None:
    norm = random_model(stream_norm="layer").layers[0].mega.timenorm
    x, past = torch.randn(2, 5, 24, dtype=torch.float64), torch.randn(2, 3, 4)
    y, present = norm(x, past, torch.zeros(2, dtype=torch.int64))
    assert torch.allclose(y, functional.layer_norm(x, (24,), norm.weight + 1, norm.bias, 1e-5))
    assert present is past


def test_one_hop_adds_to_the_feed_forward_parts_own_input() -> None:
    model = random_model(two_hop=False)
    block = model.layers[0]
    inputs: list[torch.Tensor] = []
    block.nffn.register_forward_hook(lambda module, arguments, out: inputs.extend([arguments[0], out]))
    block.register_forward_hook(lambda module, arguments, out: inputs.append(out[0]))
    model(torch.randint(50, (1, 5)))
    y, fed_forward, out = inputs
    assert torch.allclose(out, y + fed_forward)


def test_without_its_norm_attention_sees_the_size_of_z() -> None:
    """Scaling wz and bz changes scores only where z is not normalised (but for eps)."""
    tokens = torch.randint(50, (1, 12))
    for attention_norm in (True, False):
        model = random_model(attention_norm=attention_norm, norm_eps=1e-12)
        before = model(tokens)[0]
        with torch.no_grad():
            for layer in model.layers:
                layer.mega.wz.weight *= 3
                layer.mega.wz.bias *= 3
        change = float((model(tokens)[0] - before).detach().abs().max())
        assert change < 1e-6 if attention_norm else change > 1e-6


def test_a_real_average_is_exported_as_the_released_model(tmp_path: Path) -> None:
    model = random_model(ema="real").float()
    save_checkpoint(model, tmp_path / "checkpoint")
    bundle = export_checkpoint(tmp_path / "checkpoint", tmp_path / "bundle")
    assert bundle.config == small_config()
    tokens = list(range(30))
    with torch.no_grad():
        expected = model(torch.tensor([tokens]))[0][0, -1].numpy()
    found = bundle.session("onnxruntime").stream().prefill(tokens)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max(), equal_nan=False)


@pytest.mark.parametrize("variant", UNRELEASED, ids=name_of)
def test_an_unreleased_variant_stays_in_pytorch(variant: dict[str, Any], tmp_path: Path) -> None:
    save_checkpoint(random_model(**variant), tmp_path / "checkpoint")
    (name,) = variant
    with pytest.raises(ConfigError, match=f"{name} = .* is not the released model") as caught:
        export_checkpoint(tmp_path / "checkpoint", tmp_path / "bundle")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "bundle").exists()
    with pytest.raises(ConfigError, match="is not the released model"):
        save_checkpoint(random_model(**variant), tmp_path / "released", "released")


def test_the_released_model_names_no_variant() -> None:
    assert not {"ema", "stream_norm", "attention_norm", "two_hop", "kv_dtype"} & set(small_config().to_dict())
    assert MegalodonConfig.from_dict(small_config(ema="real").to_dict()) == small_config(ema="real")
    with pytest.raises(ConfigError, match="ema = 'imaginary' is none of complex, real, none"):
        small_config(ema="imaginary")

"""Presets to the unit, and configurations that no model can have."""

from __future__ import annotations

import pytest
from helpers import small_config

from megalodon_deploy.config import PRESETS, MegalodonConfig
from megalodon_deploy.errors import ConfigError
from megalodon_deploy.parameters import num_parameters, parameter_specs

# Published counts at a vocabulary of 32,000.
PARAMETERS = {
    "mega200M": 220_627_968,
    "mega1.3B": 1_342_832_640,
    "mega1.3B_pg19": 1_327_628_288,
    "mega7.1B": 7_117_381_632,
    "mega7.3B": 7_385_817_088,
    "paper-7B": 7_385_817_088,
}


def test_every_preset_has_its_published_size() -> None:
    assert {name: num_parameters(config) for name, config in PRESETS.items()} == PARAMETERS


def test_preset_with_one_field_replaced() -> None:
    config = MegalodonConfig.preset("mega200M", vocab_size=256)
    assert num_parameters(config) == PARAMETERS["mega200M"] - 2 * (32000 - 256) * 1024


def test_json_round_trip() -> None:
    config = small_config(swiglu=True, rope_base=100000.0, share_emb=True)
    assert MegalodonConfig.from_dict(config.to_dict()) == config


def test_switches_add_and_remove_tensors() -> None:
    names = {spec.name for spec in parameter_specs(small_config(swiglu=True, rescale_nffn=True, share_emb=True))}
    assert {"layers.1.nffn.fc3.weight", "layers.1.nffn.alpha"} <= names
    assert "output.output.weight" not in names
    without_affine = {spec.name for spec in parameter_specs(small_config(norm_affine=False))}
    assert not {name for name in without_affine if "rmsnorm" in name or "nffn.norm" in name}
    assert "layers.0.mega.timenorm.weight" in without_affine


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_heads": 3}, "z_dim = 16 is not a multiple of num_heads = 3"),
        ({"norm_num_groups": 5}, "model_dim = 24 is not a multiple of norm_num_groups = 5"),
        ({"z_dim": 6}, "odd"),
        ({"chunk_size": 0}, "chunk_size = 0"),
        ({"chunk_size": True}, "chunk_size = True"),
        ({"vocab_size": 50.0}, "vocab_size = 50.0"),
        ({"norm_eps": float("nan")}, "norm_eps = nan"),
        ({"swiglu": 1}, "swiglu = 1"),
    ],
)
def test_contradictions_are_refused(overrides: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        small_config(**overrides)


def test_unknown_and_missing_keys_are_named() -> None:
    values = small_config().to_dict()
    with pytest.raises(ConfigError, match="unknown key 'model_dims'"):
        MegalodonConfig.from_dict(values | {"model_dims": 1})
    values.pop("chunk_size")
    with pytest.raises(ConfigError, match="'chunk_size' is missing"):
        MegalodonConfig.from_dict(values)
    with pytest.raises(ConfigError, match="mega200M"):
        MegalodonConfig.preset("mega201M")

"""Checkpoints written by other packages' own code compute here what they computed there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import assert_close
from safetensors.torch import load_file, save_file

from megalodon_deploy.errors import CheckpointError
from megalodon_deploy.model.checkpoint import TokenizerSource, load_checkpoint, read_checkpoint

DATA = Path(__file__).parent.parent / "data"
JAX_CASES = ["jax_v2", "jax_v3"]


@pytest.mark.parametrize("case", JAX_CASES)
def test_logits_are_those_of_megalodon_jax(case: str) -> None:
    with np.load(DATA / case / "expected.npz") as arrays:
        tokens, expected = torch.from_numpy(arrays["tokens"]), arrays["logits"]
    assert read_checkpoint(DATA / case).layout == "megalodon-jax"
    with torch.no_grad():
        logits, _ = load_checkpoint(DATA / case)(tokens)
    assert_close(logits.numpy(), expected, 2e-6, case)


def test_jax_path_of_the_file() -> None:
    file = DATA / "jax_v3" / "model.safetensors"
    assert read_checkpoint(file).fingerprint == read_checkpoint(file.parent).fingerprint


def test_jax_tokenizer_beside_the_file(tmp_path: Path) -> None:
    """eos_token_id of the configuration stops a stream."""
    shutil.copy(DATA / "jax_v2" / "model.safetensors", tmp_path / "step_100.safetensors")
    (tmp_path / "tokenizer.json").write_text("{}")
    expected = TokenizerSource("tokenizer.json", tmp_path / "tokenizer.json", (2,))
    assert read_checkpoint(tmp_path).tokenizer == expected


def edit_jax(tmp_path: Path, metadata: dict[str, str] | None = None, config: dict[str, Any] | None = None) -> Path:
    from safetensors import safe_open

    source = DATA / "jax_v3" / "model.safetensors"
    with safe_open(source, "pt") as file:
        values = file.metadata()
    values["config_json"] = json.dumps(json.loads(values["config_json"]) | (config or {}))
    save_file(load_file(source), tmp_path / "model.safetensors", metadata=values | (metadata or {}))
    return tmp_path


@pytest.mark.parametrize(
    ("metadata", "config", "message"),
    [
        ({"format_version": "1"}, {}, "format version 1, expected a megalodon-jax model of version 2 or 3"),
        ({"format": "megalodon-jax-cache"}, {}, "is megalodon-jax-cache format version 3, expected a megalodon-jax"),
        ({"rope_layout": "half_split"}, {}, "rope_layout is 'half_split', expected 'adjacent_pair'"),
        ({"normalization_storage": "direct"}, {}, "normalization_storage is 'direct', expected 'plus_one'"),
        ({"config_json": "{"}, {}, "no readable config_json"),
        ({"config_json": "[]"}, {}, "config_json is not an object"),
        ({}, {"attention_window": 64}, "attention_window = 64 is sliding attention"),
        ({}, {"output_size": 12}, "output_size is 12, expected -1 or vocab_size = 40"),
        ({}, {"ffn_hidden_dim": 25}, r"tensor model.layers.0.ffn.fc1.weight has shape \[24, 16\], expected \[25, 16\]"),
        ({}, {"share_emb": False}, "tensor lm_head.weight is missing"),
        ({}, {"qk_norm": True}, "setting qk_norm = True is not known here"),
    ],
)
def test_jax_refusals(tmp_path: Path, metadata: dict[str, str], config: dict[str, Any], message: str) -> None:
    path = edit_jax(tmp_path, metadata, config)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_checkpoint(path)
    assert str(path / "model.safetensors") in str(caught.value)
    assert "\n" not in str(caught.value)

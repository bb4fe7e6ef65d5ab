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
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from megalodon_deploy.errors import CheckpointError
from megalodon_deploy.model.checkpoint import CheckpointWarning, TokenizerSource, load_checkpoint, read_checkpoint
from megalodon_deploy.model.megalodon import Megalodon

DATA = Path(__file__).parent.parent / "data"
JAX_CASES = ["jax_v2", "jax_v3"]
HF_CASES = ["hf_biases", "hf_sharded", "hf_no_ffn_bias"]


def logits_and_expected(model: Megalodon, case: str) -> tuple[np.ndarray, np.ndarray]:
    with np.load(DATA / case / "expected.npz") as arrays, torch.no_grad():
        logits, _ = model.double()(torch.from_numpy(arrays["tokens"]))
        return logits.numpy(), arrays["logits"]


@pytest.mark.parametrize("case", JAX_CASES)
def test_logits_are_those_of_megalodon_jax(case: str) -> None:
    assert read_checkpoint(DATA / case).layout == "megalodon-jax"
    assert_close(*logits_and_expected(load_checkpoint(DATA / case), case), 2e-6, case)


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


def group_mean_norm(
    x_BTD: torch.Tensor, past: torch.Tensor, _: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """TimestepNorm as megalodon-hf has it: the variance of group means, plus 1 / tokens, at least 1e-6."""
    groups = past.shape[1]
    x_BTGs = x_BTD.unflatten(-1, (groups, -1))
    m = x_BTGs.mean(-1)
    count = torch.arange(1, x_BTD.shape[1] + 1, dtype=m.dtype).unsqueeze(-1)
    mean = m.cumsum(1) / count
    before = torch.cat([torch.zeros_like(mean[:, :1]), mean[:, :-1]], 1)
    var = ((1 + ((m - before) * (m - mean)).cumsum(1)) / count).clamp(min=1e-6)
    y_BTGs = (x_BTGs - mean.unsqueeze(-1)) * (var + eps).rsqrt().unsqueeze(-1)
    return y_BTGs.flatten(-2) * weight + bias, past


@pytest.mark.parametrize("case", HF_CASES)
def test_logits_are_those_of_megalodon_hf_but_for_its_norm(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With that package's statistics in place of the released ones, every logit is what it computed."""
    with pytest.warns(CheckpointWarning, match="group means only"):
        model = load_checkpoint(DATA / case)
    monkeypatch.setattr("megalodon_deploy.model.layers.timestep_norm", group_mean_norm)
    assert_close(*logits_and_expected(model, case), 2e-6, case)


@pytest.mark.filterwarnings("ignore::megalodon_deploy.model.checkpoint.CheckpointWarning")
class TestHuggingFace:
    def test_the_warning_is_true(self) -> None:
        logits, expected = logits_and_expected(load_checkpoint(DATA / "hf_no_ffn_bias"), "hf_no_ffn_bias")
        assert np.abs(logits - expected).max() > 0.1 * np.abs(expected).max()

    def test_biases_widen_the_hidden_layer_only_where_they_are(self) -> None:
        widths = [read_checkpoint(DATA / case).config.ffn_hidden_dim for case in HF_CASES]
        assert widths == [32, 32, 24]

    def test_safetensors_without_the_shared_output(self, tmp_path: Path) -> None:
        state = torch.load(DATA / "hf_biases" / "pytorch_model.bin", weights_only=True)
        del state["lm_head.weight"]
        save_file(state, tmp_path / "model.safetensors")
        shutil.copy(DATA / "hf_biases" / "config.json", tmp_path)
        found, expected = read_checkpoint(tmp_path / "model.safetensors"), read_checkpoint(DATA / "hf_biases")
        assert found.config == expected.config
        for name in expected.tensors:
            assert torch.equal(found.tensor(name), expected.tensor(name)), name

    def test_output_of_its_own(self, tmp_path: Path) -> None:
        path = edit_hf(tmp_path, {"lm_head.weight": torch.ones(40, 16)})
        checkpoint = read_checkpoint(path)
        assert not checkpoint.config.share_emb
        assert torch.equal(checkpoint.tensor("output.output.weight"), torch.ones(40, 16))

    def test_half_precision(self, tmp_path: Path) -> None:
        """Sums and folds are made in float32, whatever is stored."""
        state = torch.load(DATA / "hf_biases" / "pytorch_model.bin", weights_only=True)
        halved = read_checkpoint(edit_hf(tmp_path, {name: tensor.bfloat16() for name, tensor in state.items()}))
        for name in ("layers.0.mega.wh1.bias", "layers.1.nffn.fc1.weight", "layers.1.nffn.fc2.weight"):
            assert halved.tensor(name).dtype == halved.tensors[name].dtype == torch.float32
        assert halved.tensor("layers.0.mega.wz.weight").dtype == torch.bfloat16

    @pytest.mark.parametrize(("eos", "stop_tokens"), [(2, (2,)), ([2, 5], (2, 5)), (None, ())])
    def test_tokenizer(self, tmp_path: Path, eos: Any, stop_tokens: tuple[int, ...]) -> None:
        path = edit_hf(tmp_path, {}, {"eos_token_id": eos})
        (path / "tokenizer.json").write_text("{}")
        expected = TokenizerSource("tokenizer.json", path / "tokenizer.json", stop_tokens)
        assert read_checkpoint(path).tokenizer == expected

    @pytest.mark.parametrize(
        ("tensors", "config", "message"),
        [
            ({}, {"cache_unbounded": True}, "config.json: cache_unbounded = true is attention over another range"),
            ({}, {"max_cache_len": 64}, "config.json: max_cache_len = 64 is attention over another range"),
            ({}, {"output_size": 12}, "config.json: output_size is 12, expected -1 or vocab_size = 40"),
            ({}, {"z_dim": None}, "config.json: config: 'z_dim' is missing"),
            ({}, {"norm_affine": False}, "unexpected tensor model.layers.0.attn.timenorm.weight"),
            ({}, {"swiglu": False}, "unexpected tensor model.layers.0.ffn.fc3.weight"),
            ({"model.norm.bias": None}, {}, "pytorch_model.bin: tensor model.norm.bias is missing"),
            (
                {"model.norm.bias": torch.zeros(3)},
                {},
                r"pytorch_model.bin: tensor model.norm.bias has shape \[3\], expected \[16\]",
            ),
            (
                {"model.layers.1.attn.wh2.bias": torch.full((16,), torch.nan)},
                {},
                r"pytorch_model.bin: tensor model.layers.1.attn.wh2.bias holds nan at \[0\]",
            ),
        ],
    )
    def test_refusals(self, tmp_path: Path, tensors: dict[str, Any], config: dict[str, Any], message: str) -> None:
        path = edit_hf(tmp_path, tensors, config)
        with pytest.raises(CheckpointError, match=message) as caught:
            checkpoint = read_checkpoint(path)
            for name in checkpoint.tensors:
                checkpoint.tensor(name)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("pytorch_model-00002-of-00003.bin", "pytorch_model-00002-of-00003.bin: No such file"),
            ("pytorch_model.bin.index.json", "no model.safetensors and no pytorch_model.bin"),
        ],
    )
    def test_part_is_gone(self, tmp_path: Path, name: str, message: str) -> None:
        shutil.copytree(DATA / "hf_sharded", tmp_path / "c")
        (tmp_path / "c" / name).unlink()
        with pytest.raises(CheckpointError, match=message):
            read_checkpoint(tmp_path / "c")

    def test_index_never_leaves_the_directory(self, tmp_path: Path) -> None:
        shutil.copytree(DATA / "hf_sharded", tmp_path / "c")
        index = tmp_path / "c" / "pytorch_model.bin.index.json"
        index.write_text(json.dumps({"weight_map": {"a": "../../outside.bin"}}))
        with pytest.raises(CheckpointError, match=str(tmp_path / "c" / "outside.bin")):
            read_checkpoint(tmp_path / "c")


def edit_hf(tmp_path: Path, tensors: dict[str, Any], config: dict[str, Any] | None = None) -> Path:
    """The case `hf_biases` with tensors replaced, or removed where None."""
    source = DATA / "hf_biases"
    state = torch.load(source / "pytorch_model.bin", weights_only=True) | tensors
    torch.save({name: tensor for name, tensor in state.items() if tensor is not None}, tmp_path / "pytorch_model.bin")
    document = json.loads((source / "config.json").read_text()) | (config or {})
    (tmp_path / "config.json").write_text(json.dumps(document))
    return tmp_path

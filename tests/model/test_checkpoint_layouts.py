"""Native and released checkpoints: what is written is read back bit for bit, and dimensions come from the file."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from checkpoint_cases import State, edit_torch, random_state, write_case
from helpers import small_config

from megalodon_deploy.errors import CheckpointError
from megalodon_deploy.model.checkpoint import Checkpoint, TokenizerSource, read_checkpoint, save_checkpoint
from megalodon_deploy.model.checkpoint.native import write_native
from megalodon_deploy.model.checkpoint.released_writer import write_released
from megalodon_deploy.model.megalodon import Megalodon
from megalodon_deploy.parameters import parameter_specs

if TYPE_CHECKING:
    from conftest import GoldenCase

CONFIGS = {
    "plain": {},
    "swiglu_rescaled": {"swiglu": True, "rescale_nffn": True, "rope_base": 100000.0},
    "shared": {"share_emb": True, "scale_emb": True},
    "no_affine": {"norm_affine": False, "norm_eps": 1e-6},
}


def sharded_config(**overrides: Any) -> Any:
    """Like `small_config`, with dimensions that split over four shards."""
    return small_config(**({"num_heads": 4, "norm_num_groups": 4} | overrides))


def assert_holds(checkpoint: Checkpoint, state: State) -> None:
    assert list(checkpoint.tensors) == [spec.name for spec in parameter_specs(checkpoint.config)]
    for name, expected in state.items():
        found = checkpoint.tensor(name)
        assert found.dtype == expected.dtype == checkpoint.tensors[name].dtype
        assert found.is_contiguous()
        assert torch.equal(found, expected), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("overrides", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize(("layout", "shards"), [("native", 1), ("released", 1), ("released", 2), ("released", 4)])
def test_written_is_read_back(
    tmp_path: Path, layout: str, shards: int, overrides: dict[str, Any], dtype: torch.dtype
) -> None:
    config = sharded_config(**overrides)
    state = random_state(config, dtype=dtype)
    checkpoint = read_checkpoint(write_case(tmp_path / "c", layout, config, state, shards))
    assert (checkpoint.layout, checkpoint.config) == (layout, config)
    assert len(checkpoint.files) == shards
    assert_holds(checkpoint, state)


def test_native_keeps_float64(tmp_path: Path) -> None:
    state = random_state(small_config(), dtype=torch.float64)
    assert_holds(read_checkpoint(write_case(tmp_path / "c", "native", small_config(), state)), state)


def test_golden_names_and_values(golden_case: GoldenCase) -> None:
    checkpoint = read_checkpoint(golden_case.path)
    stated = json.loads((golden_case.path / "config.json").read_text())["model"]
    assert checkpoint.layout == "released"
    assert {key: value for key, value in checkpoint.config.to_dict().items() if key in stated} == {
        key: value for key, value in stated.items() if key in checkpoint.config.to_dict()
    }
    assert sorted(checkpoint.tensors) == sorted(golden_case.gradients)
    for name, gradient in golden_case.gradients.items():
        assert checkpoint.tensor(name).shape == gradient.shape


def test_golden_shards_are_joined_in_rank_order(tmp_path: Path, golden_case: GoldenCase) -> None:
    """Each rank's part, cut out of the joined tensor again, is what its file holds."""
    checkpoint = read_checkpoint(golden_case.path)
    for rank, file in enumerate(checkpoint.files):
        stored = torch.load(file.path, weights_only=True)
        for spec in parameter_specs(checkpoint.config):
            joined = checkpoint.tensor(spec.name)
            part = joined if spec.shard_dim is None else joined.chunk(len(checkpoint.files), spec.shard_dim)[rank]
            assert torch.equal(part, stored[spec.name]), spec.name


def test_dimensions_come_from_the_tensors(tmp_path: Path) -> None:
    """Only what no shape shows is left in config.json."""
    config = sharded_config(chunk_size=7, swiglu=True)
    path = write_case(tmp_path / "c", "released", config, random_state(config), shards=2)
    document = {"model": {"chunk_size": 7, "swiglu": True, "vocab_size": -1, "rope_base": None}, "optim": {"lr": 1.0}}
    (path / "config.json").write_text(json.dumps(document))
    assert read_checkpoint(path).config == config


def test_settings_of_training_are_ignored(tmp_path: Path) -> None:
    config = small_config()
    path = write_case(tmp_path / "c", "released", config, random_state(config))
    document = json.loads((path / "config.json").read_text())
    document["model"] |= {"dropout": 0.1, "efficient_attn": "swift", "init_mode": "xavier", "layerwise_ckpt": True}
    document |= {"optim": {"lr": 1e-3}, "slurm": {"world_size": 8}}
    (path / "config.json").write_text(json.dumps(document))
    assert read_checkpoint(path).config == config


@pytest.mark.parametrize("present", [True, False])
def test_shared_output_matrix_may_be_present(tmp_path: Path, present: bool) -> None:
    config = sharded_config(share_emb=True)
    state = random_state(config)
    path = write_case(tmp_path / "c", "released", config, state, shards=2)
    for file in path.glob("*.pth"):
        assert "output.output.weight" in torch.load(file, weights_only=True)
        if not present:
            edit_torch(file, lambda tensors: tensors.pop("output.output.weight"))
    assert_holds(read_checkpoint(path), state)


def test_buffers_may_be_absent(tmp_path: Path) -> None:
    """They follow from config.json: a converter that writes trainable tensors only has lost nothing."""
    config = small_config()
    state = random_state(config)
    path = write_case(tmp_path / "c", "released", config, state)
    torch.save(state, path / "consolidated.pth")
    assert_holds(read_checkpoint(path), state)


def test_file_from_before_zip(tmp_path: Path) -> None:
    config = small_config()
    state = random_state(config)
    path = write_case(tmp_path / "c", "released", config, state)
    torch.save(state, path / "consolidated.pth", _use_new_zipfile_serialization=False)
    assert_holds(read_checkpoint(path), state)


@pytest.mark.parametrize(
    ("layout", "shards", "name"),
    [("native", 1, "model.safetensors"), ("released", 1, "consolidated.pth"), ("released", 2, "consolidated.01.pth")],
)
def test_path_of_a_weight_file(tmp_path: Path, layout: str, shards: int, name: str) -> None:
    config = sharded_config()
    state = random_state(config)
    assert_holds(read_checkpoint(write_case(tmp_path / "c", layout, config, state, shards) / name), state)


def test_weight_file_of_another_name(tmp_path: Path) -> None:
    """The content tells the format."""
    config = small_config()
    state = random_state(config)
    path = write_case(tmp_path / "c", "released", config, state)
    (path / "consolidated.pth").rename(path / "best.weights")
    assert_holds(read_checkpoint(path / "best.weights"), state)


def test_released_code_could_load_it(tmp_path: Path) -> None:
    """A released file is a flat dictionary with the buffers that `load_state_dict(strict=True)` asks for."""
    config = sharded_config(rope_base=500.0)
    path = write_case(tmp_path / "c", "released", config, random_state(config), shards=4)
    tensors = torch.load(path / "consolidated.03.pth", weights_only=True)
    assert tensors["embed.weight"].shape == (50, 6)
    assert tensors["layers.1.mega.timenorm.prior_count"].shape == ()
    assert tensors["layers.1.mega.timenorm.prior_count"].dtype == torch.int64
    assert tensors["output.final_norm.prior_mean"].shape == (1,)
    exponents = np.arange(0, config.key_head_dim, 2) / config.key_head_dim
    np.testing.assert_allclose(tensors["rope.freqs"].numpy(), 500.0**-exponents, rtol=1e-6, equal_nan=False)
    assert json.loads((path / "consolidate_config.json").read_text()) == {"model_parallel_size": 4, "dtype": "fp32"}


def test_released_file_holds_no_bytes_beside_its_tensors(tmp_path: Path) -> None:
    """A view of a larger storage must not drag the rest along."""
    config = sharded_config()
    base = {name: torch.cat([tensor, tensor]) for name, tensor in random_state(config).items()}
    state = {name: tensor[: len(tensor) // 2] for name, tensor in base.items()}
    views = write_case(tmp_path / "views", "released", config, state, shards=2)
    own = write_case(tmp_path / "own", "released", config, random_state(config), shards=2)
    for name in ("consolidated.00.pth", "consolidated.01.pth"):
        assert (views / name).stat().st_size == (own / name).stat().st_size


def test_fingerprint_follows_content(tmp_path: Path) -> None:
    config = sharded_config()
    paths = [write_case(tmp_path / str(seed), "native", config, random_state(config, seed)) for seed in (0, 1)]
    first, second = (read_checkpoint(path).fingerprint for path in paths)
    assert first == hashlib.sha256((paths[0] / "model.safetensors").read_bytes()).hexdigest() != second
    shards = [write_case(tmp_path / f"s{seed}", "released", config, random_state(config, seed), 2) for seed in (0, 1)]
    assert len({read_checkpoint(path).fingerprint for path in shards}) == 2


@pytest.mark.parametrize("layout", ["native", "released"])
@pytest.mark.parametrize(("kind", "name"), [("sentencepiece", "tokenizer.model"), ("tokenizer.json", "tokenizer.json")])
def test_tokenizer_is_found(tmp_path: Path, layout: str, kind: Any, name: str) -> None:
    (tmp_path / name).write_text("{}")
    source = TokenizerSource(kind, tmp_path / name, (2,) if layout == "native" else ())
    config, directory = small_config(), tmp_path / "c"
    directory.mkdir()
    if layout == "native":
        write_native(directory, config, random_state(config), source)
    else:
        write_released(directory, config, random_state(config), source, 1)
    (directory / name).write_text("{}")
    assert read_checkpoint(directory).tokenizer == TokenizerSource(kind, directory / name, source.stop_tokens)


def test_tokenizer_of_a_byte_vocabulary(tmp_path: Path) -> None:
    for vocab_size, expected in ((256, TokenizerSource("bytes")), (50, None)):
        config = small_config(vocab_size=vocab_size)
        path = write_case(tmp_path / str(vocab_size), "released", config, random_state(config))
        assert read_checkpoint(path).tokenizer == expected


def test_tokenizer_named_elsewhere_is_not_fetched(tmp_path: Path) -> None:
    outside = tmp_path / "secret.model"
    outside.write_text("outside")
    config = small_config()
    path = write_case(tmp_path / "c", "released", config, random_state(config))
    document = json.loads((path / "config.json").read_text())
    document["tokenizer"]["path"] = str(outside)
    (path / "config.json").write_text(json.dumps(document))
    assert read_checkpoint(path).tokenizer is None


def test_only_a_checkpoint_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("irreplaceable")
    with pytest.raises(CheckpointError, match="notes is no checkpoint"):
        save_checkpoint(Megalodon(small_config()), tmp_path / "notes", overwrite=True)
    assert (tmp_path / "notes" / "thesis.txt").read_text() == "irreplaceable"

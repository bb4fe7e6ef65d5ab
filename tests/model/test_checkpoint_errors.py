"""Every damage is one line that names the file, the tensor, and what was expected and found."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_cases import State, edit_torch, random_state, write_case
from helpers import small_config
from safetensors.torch import load_file, save_file

from megalodon_deploy.errors import CheckpointError
from megalodon_deploy.model.checkpoint import read_checkpoint

WV = "layers.1.mega.wv.weight"
LAYOUTS = [("native", "model.safetensors"), ("released", "consolidated.pth"), ("released", "consolidated.01.pth")]


@pytest.fixture
def message(tmp_path: Path) -> Callable[..., str]:
    """Write a checkpoint, let the test damage it, and return the error of reading all of it."""

    def run(damage: Callable[[Path], object], layout: str = "native", shards: int = 1, **overrides: Any) -> str:
        config = small_config(**({"norm_num_groups": 4} | overrides))
        path = write_case(tmp_path / "ckpt", layout, config, random_state(config), shards)
        read_all(path)  # sound before it is damaged
        damage(path)
        with pytest.raises(CheckpointError) as caught:
            read_all(path)
        assert "\n" not in str(caught.value)
        return str(caught.value).replace(str(tmp_path), "")

    return run


def read_all(path: Path) -> None:
    checkpoint = read_checkpoint(path)
    for name in checkpoint.tensors:
        checkpoint.tensor(name)


def edit(path: Path, change: Callable[[State], object]) -> None:
    if path.suffix == ".pth":
        edit_torch(path, change)
        return
    state = load_file(path)
    change(state)
    save_file(state, path)


def edit_config(path: Path, section: str, **values: Any) -> None:
    document = json.loads((path / "config.json").read_text())
    document[section] |= values
    (path / "config.json").write_text(json.dumps(document))


def shards_of(name: str) -> int:
    return 2 if name == "consolidated.01.pth" else 1


@pytest.mark.parametrize(("layout", "name"), LAYOUTS)
class TestTensors:
    def test_missing(self, message: Callable[..., str], layout: str, name: str) -> None:
        text = message(lambda path: edit(path / name, lambda s: s.pop(WV)), layout, shards_of(name))
        rows = 20 // shards_of(name)
        assert text == f"/ckpt/{name}: tensor {WV} is missing; expected shape [{rows}, 24]"

    def test_extra(self, message: Callable[..., str], layout: str, name: str) -> None:
        extra = {"layers.2.mega.beta": torch.zeros(2, 3)}
        text = message(lambda path: edit(path / name, lambda s: s.update(extra)), layout, shards_of(name))
        assert text.startswith(f"/ckpt/{name}: unexpected tensor layers.2.mega.beta of shape [2, 3]")

    def test_misshapen(self, message: Callable[..., str], layout: str, name: str) -> None:
        text = message(
            lambda path: edit(path / name, lambda s: s.update({WV: s[WV].T.contiguous()})), layout, shards_of(name)
        )
        rows = 20 // shards_of(name)
        assert text == f"/ckpt/{name}: tensor {WV} has shape [24, {rows}], expected [{rows}, 24]"

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
    def test_not_finite(self, message: Callable[..., str], layout: str, name: str, value: float) -> None:
        text = message(lambda path: edit(path / name, lambda s: s[WV][3].fill_(value)), layout, shards_of(name))
        assert text == f"/ckpt/{name}: tensor {WV} holds {value} at [3, 0], expected finite numbers"

    def test_integers(self, message: Callable[..., str], layout: str, name: str) -> None:
        text = message(lambda path: edit(path / name, lambda s: s.update({WV: s[WV].long()})), layout, shards_of(name))
        assert text == f"/ckpt/{name}: tensor {WV} has type torch.int64, expected floating point"

    @pytest.mark.parametrize("kept", [0, 4, 100, 0.5, 0.999])
    def test_truncated(self, message: Callable[..., str], layout: str, name: str, kept: float) -> None:
        def truncate(path: Path) -> None:
            content = (path / name).read_bytes()
            (path / name).write_bytes(content[: kept if isinstance(kept, int) else int(kept * len(content))])

        assert f"/ckpt/{name}: " in message(truncate, layout, shards_of(name))

    def test_gone(self, message: Callable[..., str], layout: str, name: str) -> None:
        assert f"/ckpt/{name}" in message(lambda path: (path / name).unlink(), layout, shards_of(name)) or (
            name == "consolidated.pth"
        )


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("pwned"),)


@pytest.mark.parametrize("zip_format", [True, False])
def test_pickle_with_code(message: Callable[..., str], zip_format: bool, monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)

    def damage(path: Path) -> None:
        state = torch.load(path / "consolidated.pth", weights_only=True) | {WV: Evil()}
        torch.save(state, path / "consolidated.pth", _use_new_zipfile_serialization=zip_format)

    text = message(damage, "released")
    assert text.startswith("/ckpt/consolidated.pth: holds more than tensors (its pickle asks for code")
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (pickle.dumps([1, 2]), "consolidated.pth: "),
        (b"hello world, hello world", "neither a safetensors nor a PyTorch file"),
        (b"", "neither a safetensors nor a PyTorch file"),
    ],
)
def test_not_weights_at_all(message: Callable[..., str], content: bytes, expected: str) -> None:
    assert expected in message(lambda path: (path / "consolidated.pth").write_bytes(content), "released")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ([torch.zeros(2)], "holds a list, expected a dictionary of tensors"),
        ({"model": {WV: torch.zeros(2)}}, "entry 'model' is a dict, expected a flat dictionary of tensors"),
        ({WV: 3}, f"entry '{WV}' is a int, expected a flat dictionary of tensors"),
        ({}, "tensor embed.weight is missing; expected shape [50, 24]"),
    ],
)
def test_not_a_flat_dictionary(message: Callable[..., str], value: Any, expected: str) -> None:
    text = message(lambda path: torch.save(value, path / "consolidated.pth"), "released")
    assert text == f"/ckpt/consolidated.pth: {expected}"


class TestShards:
    def test_replicas_differ(self, message: Callable[..., str]) -> None:
        def damage(path: Path) -> None:
            edit(path / "consolidated.01.pth", lambda s: s["layers.0.mega.rmsnorm.weight"][5].fill_(7.5))

        text = message(damage, "released", 2)
        assert text.startswith("/ckpt/consolidated.01.pth: tensor layers.0.mega.rmsnorm.weight is 7.5 at [5], expected")
        assert "as in consolidated.00.pth" in text

    def test_types_differ(self, message: Callable[..., str]) -> None:
        def damage(path: Path) -> None:
            edit(path / "consolidated.01.pth", lambda s: s.update({WV: s[WV].half()}))

        text = message(damage, "released", 2)
        assert f"/ckpt/consolidated.01.pth: tensor {WV} is torch.float16, consolidated.00.pth has" in text

    @pytest.mark.parametrize("stated", [1, 3, 4])
    def test_wrong_number(self, message: Callable[..., str], stated: int) -> None:
        def damage(path: Path) -> None:
            (path / "consolidate_config.json").write_text(json.dumps({"model_parallel_size": stated, "dtype": "fp32"}))

        first_missing = {1: "consolidated.pth", 3: "consolidated.02.pth", 4: "consolidated.02.pth"}[stated]
        text = message(damage, "released", 2)
        assert text.startswith(f"/ckpt/{first_missing} is missing; expected {stated} model-parallel shard(s)")
        assert text.endswith("found consolidated.00.pth, consolidated.01.pth")

    def test_one_too_many(self, message: Callable[..., str]) -> None:
        def damage(path: Path) -> None:
            (path / "consolidated.02.pth").write_bytes((path / "consolidated.00.pth").read_bytes())

        text = message(damage, "released", 2)
        assert text.startswith("/ckpt/consolidated.02.pth: unexpected shard; consolidate_config.json says 2")

    @pytest.mark.parametrize("stated", [0, "two", None])
    def test_count_is_no_number(self, message: Callable[..., str], stated: Any) -> None:
        def damage(path: Path) -> None:
            (path / "consolidate_config.json").write_text(json.dumps({"model_parallel_size": stated}))

        assert f"consolidate_config.json: model_parallel_size is {stated!r}" in message(damage, "released", 2)

    def test_shard_of_another_model(self, message: Callable[..., str]) -> None:
        def damage(path: Path) -> None:
            edit(path / "consolidated.01.pth", lambda s: s.update({"embed.weight": torch.zeros(51, 12)}))

        text = message(damage, "released", 2)
        assert text == "/ckpt/consolidated.01.pth: tensor embed.weight has shape [51, 12], expected [50, 12]"

    def test_heads_do_not_split(self, message: Callable[..., str]) -> None:
        def damage(path: Path) -> None:
            edit_config(path, "model", num_heads=1)

        assert "num_heads = 1 does not split over 2 shards" in message(damage, "released", 2)


class TestBuffers:
    @pytest.mark.parametrize("name", ["prior_count", "prior_mean", "prior_logv"])
    @pytest.mark.parametrize("prefix", ["layers.1.mega.timenorm", "output.final_norm"])
    def test_prior(self, message: Callable[..., str], prefix: str, name: str) -> None:
        key = f"{prefix}.{name}"
        text = message(lambda path: edit(path / "consolidated.pth", lambda s: s[key].fill_(3)), "released")
        assert text.startswith(f"/ckpt/consolidated.pth: tensor {key} is not zero; a norm that starts from a prior")

    def test_rope_base_disagrees(self, message: Callable[..., str]) -> None:
        text = message(lambda path: edit_config(path, "model", rope_base=None), "released", rope_base=500000.0)
        assert "tensor rope.freqs is not that of rope_base = 10000 (they look like base 500000)" in text

    def test_number_of_heads_disagrees(self, message: Callable[..., str]) -> None:
        text = message(lambda path: edit_config(path, "model", num_heads=1), "released")
        assert text == "/ckpt/consolidated.pth: tensor rope.freqs has shape [4], expected [8]"

    def test_groups_disagree(self, message: Callable[..., str]) -> None:
        text = message(lambda path: edit_config(path, "model", norm_num_groups=8), "released")
        assert text == "/ckpt/consolidated.pth: tensor layers.0.mega.timenorm.prior_mean has shape [4], expected [8]"

    def test_shared_output_differs(self, message: Callable[..., str]) -> None:
        def damage(path: Path) -> None:
            edit(path / "consolidated.pth", lambda s: s.update({"output.output.weight": s["embed.weight"] + 1}))

        text = message(damage, "released", share_emb=True)
        assert text.startswith("/ckpt/consolidated.pth: tensor output.output.weight is ")
        assert "as in embed.weight" in text


@pytest.mark.parametrize("layout", ["native", "released"])
class TestConfig:
    def test_not_json(self, message: Callable[..., str], layout: str) -> None:
        text = message(lambda path: (path / "config.json").write_text("{,}"), layout)
        assert text.startswith("/ckpt/config.json: not JSON")

    def test_not_an_object(self, message: Callable[..., str], layout: str) -> None:
        text = message(lambda path: (path / "config.json").write_text("[1]"), layout)
        assert text == "/ckpt/config.json: holds a list, expected a JSON object"

    def test_unknown_setting(self, message: Callable[..., str], layout: str) -> None:
        section = {"native": "config", "released": "model"}[layout]
        text = message(lambda path: edit_config(path, section, attention_sinks=4), layout)
        assert "/ckpt/config.json: " in text
        assert "attention_sinks" in text

    def test_impossible_value(self, message: Callable[..., str], layout: str) -> None:
        section = {"native": "config", "released": "model"}[layout]
        text = message(lambda path: edit_config(path, section, chunk_size=0), layout)
        assert text == "/ckpt/config.json: config: chunk_size = 0 is not a positive integer"

    def test_wrong_dimension(self, message: Callable[..., str], layout: str) -> None:
        section = {"native": "config", "released": "model"}[layout]
        text = message(lambda path: edit_config(path, section, vocab_size=51), layout)
        assert text.endswith("tensor embed.weight has shape [50, 24], expected [51, 24]")


def test_native_of_a_later_version(message: Callable[..., str]) -> None:
    def damage(path: Path) -> None:
        document = json.loads((path / "config.json").read_text()) | {"format_version": 2}
        (path / "config.json").write_text(json.dumps(document))

    assert message(damage) == "/ckpt/config.json: format version 2, this release reads 1"


@pytest.mark.parametrize(
    "tokenizer", ["bytes", {"kind": "bpe"}, {"kind": "bytes", "file": "t"}, {"kind": "sentencepiece", "file": "../t"}]
)
def test_native_with_a_bad_tokenizer(message: Callable[..., str], tokenizer: Any) -> None:
    def damage(path: Path) -> None:
        document = json.loads((path / "config.json").read_text()) | {"tokenizer": tokenizer}
        (path / "config.json").write_text(json.dumps(document))

    assert message(damage).startswith("/ckpt/config.json: tokenizer")


@pytest.mark.parametrize("output_size", [49, 0])
def test_output_of_another_size(message: Callable[..., str], output_size: int) -> None:
    text = message(lambda path: edit_config(path, "model", output_size=output_size), "released")
    assert text == f"/ckpt/config.json: output_size is {output_size}, expected -1 or vocab_size = 50"


def test_released_without_config(message: Callable[..., str]) -> None:
    text = message(lambda path: (path / "config.json").unlink(), "released")
    assert text == "/ckpt/config.json: No such file or directory"


@pytest.mark.parametrize("dimension", ["embed.weight", "layers.0.mega.wz.weight", "rope.freqs"])
def test_dimension_that_nothing_gives(message: Callable[..., str], dimension: str) -> None:
    def damage(path: Path) -> None:
        (path / "config.json").write_text(json.dumps({"model": {"chunk_size": 12}}))
        edit(path / "consolidated.pth", lambda s: s.pop(dimension))

    text = message(damage, "released")
    assert text == f"/ckpt/consolidated.pth: tensor {dimension} is missing; it gives a dimension that config.json omits"


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda path: path.mkdir(), "is an empty directory"),
        (lambda path: None, "does not exist"),
        (lambda path: (path.mkdir(), (path / "readme.txt").write_text("x")), "is not a checkpoint of a known layout"),
        (lambda path: path.write_text("some text, no weights"), "neither a safetensors nor a PyTorch file"),
        (lambda path: path.write_bytes(b""), "neither a safetensors nor a PyTorch file"),
        (lambda path: torch.save({"a": torch.zeros(1)}, path), "config.json"),
        (lambda path: save_file({"a": torch.zeros(1)}, path), "config.json"),
    ],
)
def test_no_checkpoint_at_all(tmp_path: Path, make: Callable[[Path], object], expected: str) -> None:
    path = tmp_path / "thing"
    make(path)
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path)
    assert str(path.parent) in str(caught.value)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)

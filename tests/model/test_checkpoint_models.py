"""From checkpoint to model and back: values, memory, and files that are there whole or not at all."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from checkpoint_cases import random_state, write_case
from helpers import assert_close, small_config

from megalodon_deploy.config import MegalodonConfig
from megalodon_deploy.errors import CheckpointError
from megalodon_deploy.model.checkpoint import TokenizerSource, load_checkpoint, read_checkpoint, save_checkpoint
from megalodon_deploy.model.megalodon import Megalodon
from megalodon_deploy.parameters import num_parameters

if TYPE_CHECKING:
    from conftest import GoldenCase

LAYOUTS = [("native", 1), ("released", 1), ("released", 2), ("released", 4)]


def seeded_model(**overrides: Any) -> Megalodon:
    torch.manual_seed(0)
    return Megalodon(small_config(**({"num_heads": 4, "norm_num_groups": 4} | overrides)))


def assert_same_weights(found: Megalodon, expected: Megalodon) -> None:
    assert found.config == expected.config
    states = found.state_dict(), expected.state_dict()
    assert list(states[0]) == list(states[1])
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name


def test_golden_logits(golden_case: GoldenCase) -> None:
    model = load_checkpoint(golden_case.path)
    with torch.no_grad():
        logits, _ = model(torch.from_numpy(golden_case.expected["tokens"]))
    assert_close(logits.numpy(), golden_case.expected["logits"], 2e-5)


@pytest.mark.parametrize("overrides", [{}, {"share_emb": True}, {"swiglu": True, "rescale_nffn": True}], ids=str)
def test_round_trip_through_all_layouts(tmp_path: Path, overrides: dict[str, Any]) -> None:
    """Each save starts from the previous load, so weights are then views of mapped files."""
    first = model = seeded_model(**overrides)
    for number, (layout, shards) in enumerate([*LAYOUTS, *reversed(LAYOUTS)]):
        save_checkpoint(model, tmp_path / str(number), layout, shards=shards)
        model = load_checkpoint(tmp_path / str(number))
        assert_same_weights(model, first)


def test_loaded_model_is_ready_for_use(tmp_path: Path) -> None:
    save_checkpoint(seeded_model(), tmp_path / "c")
    model = load_checkpoint(tmp_path / "c")
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not [name for name, tensor in model.named_buffers() if tensor.is_meta]
    logits, _ = model(torch.tensor([[1, 2, 3]]))
    logits.sum().backward()


def test_training_never_reaches_the_file(tmp_path: Path) -> None:
    save_checkpoint(seeded_model(), tmp_path / "c")
    content = (tmp_path / "c" / "model.safetensors").read_bytes()
    model = load_checkpoint(tmp_path / "c")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert (tmp_path / "c" / "model.safetensors").read_bytes() == content


@pytest.mark.parametrize(("layout", "shards"), LAYOUTS)
def test_saving_over_the_file_that_is_mapped(tmp_path: Path, layout: Any, shards: int) -> None:
    save_checkpoint(seeded_model(), tmp_path / "c", layout, shards=shards)
    model = load_checkpoint(tmp_path / "c")
    with torch.no_grad():
        model.embed.weight.mul_(2.0)
    save_checkpoint(model, tmp_path / "c", layout, shards=shards, overwrite=True)
    assert_same_weights(load_checkpoint(tmp_path / "c"), model)
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


@pytest.mark.parametrize("layout", ["native", "released"])
def test_half_precision_model(tmp_path: Path, layout: Any) -> None:
    """Saved with the model's own types, loaded as float32."""
    model = seeded_model().to(torch.bfloat16)
    save_checkpoint(model, tmp_path / "c", layout)
    stored = read_checkpoint(tmp_path / "c")
    for name, tensor in model.state_dict().items():
        assert stored.tensors[name].dtype == tensor.dtype
        assert torch.equal(load_checkpoint(tmp_path / "c").state_dict()[name], tensor.float())


def test_tokenizer_travels_along(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"a": 1}')
    source = TokenizerSource("tokenizer.json", tmp_path / "tokenizer.json", (7,))
    for layout, stop_tokens in (("native", (7,)), ("released", ())):
        directory = tmp_path / layout
        save_checkpoint(seeded_model(), directory, layout, tokenizer=source)  # type: ignore[arg-type]
        expected = TokenizerSource("tokenizer.json", directory / "tokenizer.json", stop_tokens)
        assert read_checkpoint(directory).tokenizer == expected
        assert (directory / "tokenizer.json").read_text() == '{"a": 1}'


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layout": "released", "shards": 3}, "num_heads = 4 does not split over 3 shards"),
        ({"layout": "released", "shards": 0}, "shards = 0; expected 1 or more"),
        ({"layout": "native", "shards": 2}, "the native layout is one file"),
        ({"layout": "megalodon-jax"}, "cannot be written; there are: native, released"),
        ({"tokenizer": TokenizerSource("sentencepiece", Path("absent.model"))}, "absent.model"),
    ],
)
def test_refused_saves_leave_nothing(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        save_checkpoint(seeded_model(), tmp_path / "c", **arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("layout", ["native", "released"])
def test_files_have_ordinary_permissions(tmp_path: Path, layout: Any) -> None:
    (tmp_path / "ordinary").touch()
    save_checkpoint(seeded_model(), tmp_path / "c", layout)
    expected = (tmp_path / "ordinary").stat().st_mode
    assert {
        path.name: path.stat().st_mode for path in (tmp_path / "c").iterdir() if path.stat().st_mode != expected
    } == {}


def test_existing_path_is_kept(tmp_path: Path) -> None:
    save_checkpoint(seeded_model(), tmp_path / "c")
    with pytest.raises(CheckpointError, match="exists already"):
        save_checkpoint(seeded_model(swiglu=True), tmp_path / "c")
    assert_same_weights(load_checkpoint(tmp_path / "c"), seeded_model())


def test_interrupted_save_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(seeded_model(), tmp_path / "c")

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("megalodon_deploy.model.checkpoint.native.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(seeded_model(swiglu=True), tmp_path / "c", overwrite=True)
    assert_same_weights(load_checkpoint(tmp_path / "c"), seeded_model())
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_released_file_of_float64_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no torch\.float64"):
        save_checkpoint(seeded_model().double(), tmp_path / "c", "released")


PEAK_SCRIPT = """
import sys, torch
from megalodon_deploy.model.checkpoint import load_checkpoint, read_checkpoint, save_checkpoint
from megalodon_deploy.model.megalodon import Megalodon

def peak_bytes():  # not ru_maxrss: a child begins with its parent's
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))

config = read_checkpoint(sys.argv[1]).config
with torch.device("meta"):  # whatever PyTorch imports for it is not the checkpoint's
    Megalodon(config)
before = peak_bytes()
model = load_checkpoint(sys.argv[1])
for parameter in model.parameters():
    parameter.detach().sum()  # touch every page
print(peak_bytes() - before)
save_checkpoint(model, sys.argv[2], "native")
print(peak_bytes() - before)
"""
LARGE_CASES = [("native", 1, "float32"), ("released", 2, "float32"), ("native", 1, "bfloat16")]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
@pytest.mark.parametrize(("layout", "shards", "dtype"), LARGE_CASES)
def test_weights_are_never_held_twice(tmp_path: Path, layout: str, shards: int, dtype: str) -> None:
    """Peak resident memory, mapped file pages included, while 164 MB of float32 weights are loaded and saved.

    The bound leaves 40% for one matrix with its copy (26 MB) and for pages that wait to be unmapped (16 MB a file); a
    second copy of the weights, or a file that stays mapped beside joined weights, would add 50 to 100%.
    """
    config = MegalodonConfig.preset("mega200M", num_layers=3, vocab_size=2000, num_heads=2)
    path = write_case(tmp_path / "c", layout, config, random_state(config, dtype=getattr(torch, dtype)), shards)
    arguments = [sys.executable, "-c", PEAK_SCRIPT, str(path), str(tmp_path / "again")]
    output = subprocess.run(arguments, check=True, capture_output=True, text=True, timeout=120).stdout
    weight_bytes = 4 * num_parameters(config)
    for peak_bytes in map(int, output.split()):
        assert 0.9 * weight_bytes < peak_bytes < 1.4 * weight_bytes

"""Checkpoints whose weights lie in parts: joined they are the whole ones, and what is missing is named."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoint_cases import State, random_state
from helpers import small_config
from safetensors.torch import load_file, save_file

from megalodon_deploy.errors import CheckpointError
from megalodon_deploy.export import export_checkpoint
from megalodon_deploy.model.checkpoint import read_checkpoint
from megalodon_deploy.model.checkpoint.native import PARTS_FOLDER, write_config, write_native
from megalodon_deploy.parameters import parameter_specs

NAMES = ["a.safetensors", "b.safetensors", "c.safetensors"]
WV = "layers.1.mega.wv.weight"  # [20, 24]


def cuts_of(name: str, tensor: torch.Tensor) -> list[tuple[int, int, int]]:
    """(axis, begin, end) of a tensor's part in each file: uneven, empty in one, and along the last axis for some."""
    axis = tensor.ndim - 1 if name.endswith("wh2.weight") else 0
    size = tensor.shape[axis]
    edges = [0, size // 3, size - size // 4, size]
    return [(axis, begin, end) for begin, end in itertools.pairwise(edges)]


def write_parts(path: Path, state: State) -> Path:
    """A checkpoint of three files, written by hand."""
    folder = path / PARTS_FOLDER
    folder.mkdir(parents=True)
    for number, file in enumerate(NAMES):
        tensors, places = {}, {}
        for name, tensor in state.items():
            axis, begin, end = cuts_of(name, tensor)[number]
            tensors[name] = tensor.narrow(axis, begin, end - begin).contiguous()
            places[name] = {"saved_offsets": [begin if each == axis else 0 for each in range(tensor.ndim)]}
        save_file(tensors, folder / file, metadata={"DCP_SHARDING_INFO": json.dumps(places)})
    write_config(path, small_config(), None, NAMES)
    return path


def read_all(path: Path) -> State:
    checkpoint = read_checkpoint(path)
    return {name: checkpoint.tensor(name) for name in checkpoint.tensors}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_joined_parts_are_the_whole(tmp_path: Path, dtype: torch.dtype) -> None:
    state = random_state(small_config(), dtype=dtype)
    found = read_all(write_parts(tmp_path / "c", state))
    assert list(found) == [spec.name for spec in parameter_specs(small_config())]
    for name, expected in state.items():
        assert found[name].dtype == dtype
        assert torch.equal(found[name], expected), name


def test_the_export_is_that_of_the_whole(tmp_path: Path) -> None:
    state = random_state(small_config())
    whole = tmp_path / "whole"
    whole.mkdir()
    write_native(whole, small_config(), state, None)
    bundles = [
        export_checkpoint(path, tmp_path / f"{path.name}-bundle")
        for path in (whole, write_parts(tmp_path / "c", state))
    ]
    for name in bundles[0].manifest.files:
        assert (bundles[0].path / name).read_bytes() == (bundles[1].path / name).read_bytes(), name


def edit(path: Path, change: Callable[[State, dict[str, dict[str, list[int]]]], object]) -> None:
    from safetensors import safe_open

    state = load_file(path)
    with safe_open(path, "pt") as file:
        places = json.loads(file.metadata()["DCP_SHARDING_INFO"])
    change(state, places)
    save_file(state, path, metadata={"DCP_SHARDING_INFO": json.dumps(places)})


def state_without(path: Path, name: str) -> None:
    edit(path, lambda state, places: state.pop(name))


def moved(path: Path, begin: list[int]) -> None:
    edit(path, lambda state, places: places[WV].update(saved_offsets=begin))


def unlisted(path: Path, names: list[str]) -> None:
    write_config(path, small_config(), None, names)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (
        lambda path: (path / "weights/b.safetensors").unlink(),
        "/c/weights/b.safetensors is missing; config.json lists 3 parts of the weights",
    ),
    "truncated": (
        lambda path: (path / "weights/b.safetensors").write_bytes((path / "weights/b.safetensors").read_bytes()[:-9]),
        "/c/weights/b.safetensors: damaged or truncated safetensors file",
    ),
    "not listed": (
        lambda path: unlisted(path, NAMES[:2]),
        "/c/weights: the parts of tensor embed.weight hold 912 of its 1200 values; a file is missing",
    ),
    "listed twice": (
        lambda path: unlisted(path, [*NAMES, NAMES[2]]),
        "/c/weights: parts of tensor embed.weight overlap",
    ),
    "nothing listed": (lambda path: unlisted(path, []), "no file: the parts of tensor embed.weight hold 0 of its 1200"),
    "a path": (lambda path: unlisted(path, ["../x"]), "/c/config.json: parts is ['../x'], expected a list of names"),
    "a tensor less": (
        lambda path: state_without(path / "weights/a.safetensors", WV),
        f"/c/weights: the parts of tensor {WV} hold 336 of its 480 values; a file is missing",
    ),
    "a tensor more": (
        lambda path: edit(path / "weights/a.safetensors", lambda state, places: state.update(odd=torch.zeros(1))),
        "/c/weights/a.safetensors: unexpected tensor odd",
    ),
    "moved": (
        lambda path: moved(path / "weights/b.safetensors", [5, 0]),
        f"/c/weights: parts of tensor {WV} overlap; files of several checkpoints are mixed",
    ),
    "moved out": (
        lambda path: moved(path / "weights/b.safetensors", [12, 0]),
        f"/c/weights/b.safetensors: tensor {WV} has a part of shape [9, 24] at [12, 0], expected it within [20, 24]",
    ),
    "no place": (
        lambda path: save_file(load_file(path / "weights/a.safetensors"), path / "weights/a.safetensors"),
        "/c/weights/a.safetensors: does not say where its parts of tensors belong",
    ),
    "another type": (
        lambda path: edit(path / "weights/c.safetensors", lambda state, _: state.update({WV: state[WV].half()})),
        f"/c/weights: parts of tensor {WV} have several types: ",
    ),
    "not a number": (
        lambda path: edit(path / "weights/c.safetensors", lambda state, _: state[WV].fill_(torch.nan)),
        f"/c/weights/c.safetensors: tensor {WV} holds nan at [0, 0], expected finite numbers",
    ),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_damage_is_named(tmp_path: Path, damage: Callable[[Path], object], message: str) -> None:
    path = write_parts(tmp_path / "c", random_state(small_config()))
    damage(path)
    with pytest.raises(CheckpointError) as caught:
        read_all(path)
    found = str(caught.value)
    assert "\n" not in found
    assert found.replace(str(tmp_path), "").startswith(message)

"""Checkpoints that every rank writes a part of: whole models for all who read them, on any number of processes."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import distributed as dist
from train.parallel_helpers import losses, parallel_run, run_cli, save
from train.training_helpers import moved, weights

from megalodon_deploy.cli import cli
from megalodon_deploy.errors import TrainError
from megalodon_deploy.train import TrainConfig, train
from megalodon_deploy.train.checkpoints import RunFolder
from megalodon_deploy.train.parts import save_parts

OFTEN = {"checkpoint__every_steps": 3, "log__sample_tokens": 3, "run__micro_batch_size": 1}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainConfig, TrainConfig]:
    """The same run on one process, and on two that share the weights out."""
    folder = tmp_path_factory.mktemp("sharded")
    alone = parallel_run(folder, "alone", 1, **OFTEN)
    train(alone)
    together = parallel_run(folder, "together", 1, parallel__shard=True, **OFTEN)
    run_cli(2, together, folder)
    return alone, together


def copied(config: TrainConfig, out: Path) -> TrainConfig:
    shutil.copytree(config.run.out, out, symlinks=True)
    return moved(config, out)


def test_a_run_with_shared_weights_is_that_of_one_process(runs: tuple[TrainConfig, TrainConfig]) -> None:
    alone, together = (config.run.out for config in runs)
    assert [len(list(together.rglob(f"step-*/{name}/*"))) for name in ("weights", "training/moments")] == [4, 4]
    assert not list(together.rglob("model.safetensors"))
    torch.testing.assert_close(losses(together), losses(alone), rtol=2e-5, atol=0)
    expected = weights(alone)
    for name, found in weights(together).items():
        torch.testing.assert_close(found, expected[name], rtol=0, atol=2e-3, msg=name)  # Adam divides small numbers
    assert (together / "samples/step-00000006.txt").read_text() == (alone / "samples/step-00000006.txt").read_text()


def test_it_goes_on_on_one_process(runs: tuple[TrainConfig, TrainConfig], tmp_path: Path) -> None:
    alone, together = runs
    config = copied(together, tmp_path / "run")
    folder = RunFolder(config.run.out, keep=2)
    shutil.rmtree(folder.path(6))
    train(config, resume=True)
    assert (folder.path(6) / "model.safetensors").is_file()
    torch.testing.assert_close(losses(config.run.out), losses(alone.run.out), rtol=2e-5, atol=0)


def test_a_checkpoint_in_parts_is_exported(runs: tuple[TrainConfig, TrainConfig], tmp_path: Path) -> None:
    _, together = runs
    arguments = ["export", "--ckpt", str(together.run.out / "latest"), "--out", str(tmp_path / "bundle")]
    CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert (tmp_path / "bundle" / "manifest.json").is_file()


@pytest.mark.parametrize("name", ["weights", "training/moments"])
@pytest.mark.parametrize("damage", ["absent", "cut"])
def test_damaged_parts_are_named(runs: tuple[TrainConfig, TrainConfig], tmp_path: Path, name: str, damage: str) -> None:
    """PyTorch's reader leaves values as they were that no file has."""
    config = copied(runs[1], tmp_path / "run")
    path = next((config.run.out / "latest" / name).glob("shard-00002*"))
    content = path.read_bytes()
    path.unlink()
    if damage == "cut":
        path.write_bytes(content[:-20])
    found = "a file is missing" if damage == "absent" else "damaged or truncated"
    with pytest.raises(TrainError, match=rf"step-00000006: damaged .*{found}.* remove it") as caught:
        train(config, resume=True)
    assert "\n" not in str(caught.value)


def test_a_stage_reads_its_own_tensors(runs: tuple[TrainConfig, TrainConfig]) -> None:
    _, together = runs
    name, expected = "layers.1.mega.wv.weight", weights(together.run.out)["layers.1.mega.wv.weight"]
    found, moment = torch.zeros_like(expected), torch.zeros_like(expected)
    RunFolder(together.run.out, keep=2).read_tensors(6, {name: found}, {f"exp_avg_sq.{name}": moment})
    assert torch.equal(found, expected)
    assert (moment > 0).all()


def test_parts_that_cannot_be_written_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(
            TrainError, match=r"file/weights: the checkpoint cannot be written \(.*Not a directory"
        ) as caught:
            save_parts(tmp_path / "file" / "weights", {"weight": torch.zeros(3)}, dist.group.WORLD)
    finally:
        dist.destroy_process_group()
    assert "\n" not in str(caught.value)


def test_a_killed_run_goes_on_on_other_processes(tmp_path: Path) -> None:
    """Two processes that share the weights out are killed; one goes on, and then four that cut matrices besides."""
    settings: dict[str, Any] = {"run__steps": 12, "evaluation__every_steps": 12, "checkpoint__every_steps": 1}
    whole = train(parallel_run(tmp_path, "whole", 1, **settings, checkpoint__keep=1))
    config = parallel_run(tmp_path, "killed", 1, **settings, checkpoint__keep=12, parallel__shard=True)
    folder = RunFolder(config.run.out, keep=12)
    kill_after(2, 3, config, tmp_path)
    latest = max(folder.steps())
    assert 3 <= latest < 12
    assert all(torch.isfinite(tensor).all() for tensor in weights(config.run.out).values())
    train(config, resume=True)
    assert not [path for path in folder.folder.iterdir() if path.name.startswith(".")]
    for step in range(latest + 2, 13):
        shutil.rmtree(folder.path(step))
    cut = {"parallel__shard": True, "parallel__tensor": 2}
    run_cli(4, parallel_run(tmp_path, "killed", 1, **settings, **cut), tmp_path, "--resume")
    assert len(list((folder.path(12) / "weights").iterdir())) == 4
    torch.testing.assert_close(losses(config.run.out), losses(whole.path), rtol=2e-5, atol=0)
    expected = weights(whole.path)
    for name, found in weights(config.run.out).items():
        torch.testing.assert_close(found, expected[name], rtol=0, atol=2e-3, msg=name)  # Adam divides small numbers


def kill_after(num_processes: int, step: int, config: TrainConfig, folder: Path) -> None:
    """Start a run and kill all of its processes when it has written the checkpoint of a step."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_processes}"]
    command += ["-m", "megalodon_deploy.cli", "train", save(config, folder / "killed.toml")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    with open(folder / "output.txt", "w") as output:
        run = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
    try:
        while not RunFolder(config.run.out, 1).path(step).is_dir():
            assert run.poll() is None, (folder / "output.txt").read_text()
            time.sleep(1e-3)
    finally:
        workers = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
        for process in (run.pid, *map(int, workers)):  # in this order nobody can react
            os.kill(process, signal.SIGKILL)
        run.wait()

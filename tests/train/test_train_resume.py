"""A run that is cut anywhere goes on as if it had not been: the same losses and weights, bit for bit."""

from __future__ import annotations

import os
import random
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
from safetensors.torch import load_file
from train.training_helpers import moved, tiny_run, weights

from megalodon_deploy.cli import cli
from megalodon_deploy.errors import TrainError
from megalodon_deploy.train import TrainConfig, train
from megalodon_deploy.train.checkpoints import RunFolder
from megalodon_deploy.train.log import read_log


def curve(path: Path) -> list[tuple[str, str, str, str]]:
    columns = ("step", "loss", "gradient_norm", "held_out_loss")
    return [tuple(row[name] for name in columns) for row in read_log(path / "log.csv")]  # type: ignore[misc]


def assert_same_run(found: Path, expected: Path) -> None:
    assert curve(found) == curve(expected)
    for name in ("model.safetensors", "training/moments.safetensors", "training/stream.safetensors"):
        first, second = load_file(found / "latest" / name), load_file(expected / "latest" / name)
        assert first.keys() == second.keys()
        for key, tensor in second.items():
            assert torch.equal(first[key], tensor), f"{name}: {key}"


def stop_after(steps: int, config: TrainConfig) -> Any:
    """A progress callback that sends SIGTERM once `steps` steps are done."""
    assert config.run.steps is not None

    def watch(stage: str, fraction: float) -> None:
        if "loss" in stage and fraction == steps / config.run.steps:
            os.kill(os.getpid(), signal.SIGTERM)

    return watch


@pytest.mark.parametrize(
    "settings",
    [
        {"data__rows": "documents", "model__ema": "real"},  # theta has no moments
        {"data__rows": "windows", "run__micro_batch_size": 3},
        {"data__rows": "streams", "run__seq_len": 48},
        {"data__rows": "streams", "run__seq_len": 12, "run__micro_batch_size": 2},  # rows within their chunks
    ],
    ids=["documents", "windows", "streams", "streams-in-chunk"],
)
def test_an_interrupted_run_equals_an_uninterrupted_one(tmp_path: Path, settings: dict[str, Any]) -> None:
    config = tiny_run(tmp_path, run__steps=12, evaluation__times=3, **settings)
    train(moved(config, tmp_path / "whole"))
    cut = moved(config, tmp_path / "cut")
    for steps in (3, 8):
        assert train(cut, resume=True, progress=stop_after(steps, config)).interrupted
    assert train(cut, resume=True).steps == 12
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    """SIGKILL at random moments of a run that does little but write checkpoints."""
    config = tiny_run(tmp_path, run__steps=40, evaluation__times=4, checkpoint__every_steps=1, checkpoint__keep=1)
    train(moved(config, tmp_path / "whole"))
    killed, moments = moved(config, tmp_path / "killed"), random.Random(5)
    folder, file = RunFolder(killed.run.out, 1), tmp_path / "killed.toml"
    file.write_text(killed.to_toml())
    command = [sys.executable, "-m", "megalodon_deploy.cli", "train", str(file), "--resume"]
    for _ in range(4):
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wanted = max(folder.steps(), default=0) + moments.randint(1, 8)
        while max(folder.steps(), default=0) < wanted:
            assert child.poll() is None, "the run ended before it was killed"
            time.sleep(1e-3)
        time.sleep(moments.uniform(0, 0.02))  # somewhere in the next steps and their checkpoints
        child.kill()
        child.wait()
        assert all(torch.isfinite(tensor).all() for tensor in weights(killed.run.out / "latest").values())
    assert max(folder.steps()) < 40
    train(killed, resume=True)
    assert_same_run(tmp_path / "killed", tmp_path / "whole")
    assert not [path for path in (killed.run.out / "checkpoints").iterdir() if path.name.startswith(".")]


def test_the_latest_and_the_best_are_kept(tmp_path: Path) -> None:
    def steps_of(**settings: Any) -> tuple[list[int], Path]:
        config = tiny_run(tmp_path, run__steps=8, checkpoint__every_steps=1, **settings)
        out = train(config, overwrite=True).path
        return RunFolder(out, 1).steps(), out

    steps, out = steps_of(checkpoint__keep=3)
    assert steps == [6, 7, 8]
    assert (out / "latest").resolve().name == (out / "best").resolve().name == "step-00000008"
    # A rate that destroys what was learned: the first checkpoint stays the best.
    worse = {"optimizer__learning_rate": 0.3, "optimizer__warmup": 0, "evaluation__times": 8}
    steps, out = steps_of(checkpoint__keep=2, **worse)
    best = int((out / "best").resolve().name.removeprefix("step-"))
    losses = {row["step"]: float(row["held_out_loss"]) for row in read_log(out / "log.csv")}
    assert losses[str(best)] == min(losses.values())
    assert steps == sorted({best, 7, 8})


def test_checkpoints_have_ordinary_permissions(tmp_path: Path) -> None:
    (tmp_path / "ordinary").touch()
    latest = train(tiny_run(tmp_path, run__steps=2)).path / "latest"
    expected = (tmp_path / "ordinary").stat().st_mode
    modes = {file.name: file.stat().st_mode for file in latest.resolve().rglob("*") if file.is_file()}
    assert len(modes) > 4
    assert {name: mode for name, mode in modes.items() if mode != expected} == {}


def test_the_best_model_is_on_disk_whenever_it_was_found(tmp_path: Path) -> None:
    times = {"checkpoint__every_steps": 4, "checkpoint__keep": 1, "evaluation__every_steps": 3}
    out = train(tiny_run(tmp_path, run__steps=8, **times)).path
    losses = {int(row["step"]): row["held_out_loss"] for row in read_log(out / "log.csv") if row["held_out_loss"]}
    best = min(losses, key=lambda step: float(losses[step]))
    assert (out / "best").resolve().name == f"step-{best:08d}"
    assert RunFolder(out, 1).steps() == sorted({best, 8})


def test_links_that_a_kill_left_behind_are_mended(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, run__steps=3, evaluation__times=3)
    out = train(config).path
    for name in ("latest", "best"):
        (out / name).unlink()
        (out / name).symlink_to("checkpoints/step-00000002")
    train(config, resume=True)
    assert (out / "latest").resolve().name == (out / "best").resolve().name == "step-00000003"


def test_a_finished_run_may_be_made_longer(tmp_path: Path) -> None:
    train(tiny_run(tmp_path, run__steps=4))
    assert train(tiny_run(tmp_path, run__steps=6), resume=True).steps == 6
    assert [step for step, *_ in curve(tmp_path / "run")] == [str(step) for step in range(1, 7)]
    assert train(tiny_run(tmp_path, run__steps=6), resume=True).steps == 6  # nothing is left to do


def test_nothing_held_out_is_a_run_without_evaluations(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, run__steps=4, data__held_out_fraction=0)
    result = train(config)
    assert (result.held_out_loss, result.bits_per_byte, result.curve) == (None, None, ())
    before = curve(result.path)
    assert [step for step, *_ in before] == ["1", "2", "3", "4"]
    assert train(config, resume=True).steps == 4
    assert curve(result.path) == before
    assert weights(result.path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"run__seed": 9}, r"run\.seed = 9, the earlier run had 0"), ({"run__seq_len": 24}, r"run\.seq_len = 24")],
)
def test_another_run_is_not_gone_on_with(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    train(tiny_run(tmp_path, run__steps=2))
    with pytest.raises(TrainError, match=message) as caught:
        train(tiny_run(tmp_path, run__steps=4, **settings), resume=True)
    assert "\n" not in str(caught.value)


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, run__steps=2)
    train(config)
    moments = tmp_path / "run" / "latest" / "training" / "moments.safetensors"
    moments.write_bytes(moments.read_bytes()[:-7])
    with pytest.raises(TrainError, match=r"step-00000002: damaged .* remove it"):
        train(config, resume=True)


def test_a_run_goes_on_without_the_weights_that_it_started_from(tmp_path: Path) -> None:
    first = moved(tiny_run(tmp_path, run__steps=1), tmp_path / "first")
    train(first)
    train(tiny_run(tmp_path, run__steps=2, run__start_from=str(first.run.out)))
    shutil.rmtree(first.run.out)
    arguments = ["train", "--resume", "--out", str(tmp_path / "run"), "--steps", "3"]
    assert "3 steps" in CliRunner().invoke(cli, arguments, catch_exceptions=False).stdout


def test_the_command_goes_on_with_its_own_settings(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(tiny_run(tmp_path, run__steps=3).to_toml())

    def invoke(*arguments: str) -> Any:
        return CliRunner().invoke(cli, ["train", *arguments], catch_exceptions=False)

    assert "3 steps" in invoke(str(tmp_path / "run.toml"), "run.batch_size=2").stdout
    out = str(tmp_path / "run")
    assert "5 steps" in invoke("--resume", "--out", out, "--steps", "5").stdout
    printed = invoke("--resume", "--out", out, "--print-config").stdout
    assert "batch_size = 2" in printed
    assert "steps = 5" in printed

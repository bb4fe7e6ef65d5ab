"""Training runs under torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from train.training_helpers import tiny_run

from megalodon_deploy.train import TrainConfig
from megalodon_deploy.train.checkpoints import RunFolder
from megalodon_deploy.train.log import read_log


def launch(num_processes: int, *command: str) -> subprocess.CompletedProcess[str]:
    """Under torchrun, one thread each."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_processes}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run([*torchrun, *command], capture_output=True, text=True, check=False, env=environment)


def save(config: TrainConfig, path: Path) -> str:
    path.write_text(config.to_toml())
    return str(path)


def run_cli(num_processes: int, config: TrainConfig, folder: Path, *options: str) -> None:
    file = save(config, folder / f"run{num_processes}.toml")
    done = launch(num_processes, "-m", "megalodon_deploy.cli", "train", file, *options)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("held-out loss") == 1


def parallel_run(folder: Path, name: str, chunk: int, **settings: Any) -> TrainConfig:
    """Four streams of 96 tokens, 6 steps; the run lies in `folder`/`name`."""
    shape = {"run__seq_len": 96, "run__steps": 6, "run__batch_size": 4, "evaluation__every_steps": 3}
    config = tiny_run(folder, **{**shape, "data__rows": "streams", "parallel__chunk": chunk, **settings})
    return TrainConfig.from_tables({**_tables(config), "run": {**_tables(config)["run"], "out": str(folder / name)}})


def _tables(config: TrainConfig) -> dict[str, Any]:
    return tomllib.loads(config.to_toml())


def losses(path: Path) -> torch.Tensor:
    return torch.tensor([float(row["loss"]) for row in read_log(path / "log.csv")], dtype=torch.float64)


def assert_same_run(found: RunFolder, expected: RunFolder) -> None:
    """Logs, and the latest checkpoints to what Adam makes of rounding."""
    logs = [read_log(folder.out / "log.csv") for folder in (found, expected)]
    for name in ("loss", "gradient_norm", "held_out_loss"):
        values, wanted = ([float(row[name] or 0) for row in log] for log in logs)
        assert values == pytest.approx(wanted, rel=2e-5), name
    step = expected.steps()[-1]
    whole = [load_file(expected.path(step) / file) for file in ("model.safetensors", "training/moments.safetensors")]
    tensors = [{name: torch.full_like(tensor, torch.nan) for name, tensor in kind.items()} for kind in whole]
    found.read_tensors(step, *tensors)  # of a checkpoint in parts or not
    for values, wanted in zip([*tensors, found.read_stream(step)], [*whole, expected.read_stream(step)], strict=True):
        assert values.keys() == wanted.keys()
        for name, tensor in wanted.items():
            torch.testing.assert_close(values[name], tensor, rtol=1e-3, atol=1e-4, msg=name)

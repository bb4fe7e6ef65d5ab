"""Training runs under torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import torch
from train.training_helpers import tiny_run

from megalodon_deploy.train import TrainConfig
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

"""A tiny model on real text that every machine has: one step takes milliseconds."""

from __future__ import annotations

import argparse
import dataclasses
import shutil
from pathlib import Path
from typing import Any

import torch

from megalodon_deploy.model.checkpoint import load_checkpoint
from megalodon_deploy.train import TrainConfig

SOURCES = [str(Path(argparse.__file__)), str(Path(shutil.__file__))]
TINY = {"num_layers": 2, "model_dim": 32, "chunk_size": 24}


def tiny_run(folder: Path, **settings: Any) -> TrainConfig:
    """Settings by `section__key`; the run lies in `folder`/run."""
    tables: dict[str, dict[str, Any]] = {
        "model": dict(TINY),
        "data": {"paths": SOURCES, "cache": str(folder / "cache")},
        "run": {"out": str(folder / "run"), "seq_len": 60, "steps": 30, "threads": 1},
        "optimizer": {"learning_rate": 1e-2},
        "evaluation": {"rows": 6},
    }
    if "run__minutes" in settings:
        del tables["run"]["steps"]
    for name, value in settings.items():
        section, key = name.split("__")
        tables.setdefault(section, {})[key] = value
    return TrainConfig.from_tables(tables)


def moved(config: TrainConfig, out: Path) -> TrainConfig:
    """The same run in another folder."""
    return dataclasses.replace(config, run=dataclasses.replace(config.run, out=out))


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(path).state_dict()

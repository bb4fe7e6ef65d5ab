"""Tensor parallelism gives what one process gives: losses, gradients, states, checkpoints."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from train.parallel_helpers import assert_same_run, launch, parallel_run, run_cli

from megalodon_deploy.config import MegalodonConfig
from megalodon_deploy.errors import TrainError
from megalodon_deploy.train import train
from megalodon_deploy.train.checkpoints import RunFolder
from megalodon_deploy.train.parallel.layout import Layout, supported_ways


def test_tensor_parallel_gradients_are_those_of_one_process(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    done = launch(4, str(Path(__file__).with_name("tensor_parallel_check.py")), str(report))
    assert done.returncode == 0, done.stderr
    errors: dict[str, dict[str, float]] = json.loads(report.read_text())
    assert len(errors) == 10
    for case, found in errors.items():
        assert set(found) == {"loss", "evaluation", "gradient", "state", "bytes"}
        for name, error in found.items():
            tolerance = 0 if name == "bytes" else 1e-12 if "float64" in case else 1e-5
            assert error <= tolerance, f"{case}, {name}: {error:.3g}"  # False for NaN


def test_a_run_goes_on_over_tensor_and_data_ranks(tmp_path: Path) -> None:
    """From the middle of a chunk, so that heads of key/value memory are cut and joined; to the checkpoint of one."""
    settings: dict[str, Any] = {
        "run__seq_len": 12,
        "run__steps": 5,
        "checkpoint__every_steps": 3,
        "log__sample_tokens": 3,
    }
    alone = RunFolder(train(parallel_run(tmp_path, "alone", 1, **settings)).path, keep=2)
    together = RunFolder(tmp_path / "together", keep=2)
    shutil.copytree(alone.out, together.out, symlinks=True)
    shutil.rmtree(together.path(5))
    run_cli(4, parallel_run(tmp_path, "together", 1, parallel__tensor=2, **settings), tmp_path, "--resume")
    assert_same_run(together, alone)
    assert load_file(together.path(5) / "training/stream.safetensors")["past_value.0"].shape[2] == 12


def test_supported_ways_cut_heads_and_widths_evenly() -> None:
    assert supported_ways(MegalodonConfig.preset("mega1.3B", value_dim=12, ffn_hidden_dim=24)) == [1, 2, 4, 6, 12]
    assert supported_ways(MegalodonConfig.preset("mega7.3B"))[:5] == [1, 2, 4, 8, 16]


def test_what_cannot_be_cut_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainError, match=r"parallel.tensor = 3 does not cut .* these do: 1, 2, 4, 8, 16, 32$"):
        Layout.of(parallel_run(tmp_path, "run", 1, parallel__tensor=3, model__ffn_hidden_dim=32), 3)
    with pytest.raises(TrainError, match=r"parallel.chunk = 2 x parallel.tensor = 2 does not divide .* processes, 6;"):
        Layout.of(parallel_run(tmp_path, "run", 2, parallel__tensor=2), 6)

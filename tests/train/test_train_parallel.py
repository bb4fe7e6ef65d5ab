"""Training on several processes gives what one process gives: losses, gradients, states, checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from train.parallel_helpers import launch, losses, parallel_run, run_cli
from train.training_helpers import weights

from megalodon_deploy.errors import TrainError
from megalodon_deploy.train import train
from megalodon_deploy.train.parallel.layout import Layout

TWO = ["data", "data accumulated", "chunk", "chunk accumulated", "chunk recomputed", "chunk compiled", "chunk bfloat16"]
TWO += ["chunk real", "chunk none", "chunk layer", "chunk without memory"]
TWO += [
    "shard",
    "shard accumulated",
    "shard exact",
    "shard compiled",
    "shard bfloat16",
    "shard real",
    "shard documents",
]
FOUR = ["chunk", "four chunks", "four chunks recomputed", "shard", "shard chunk", "shard tensor chunk"]
FOUR += ["tensor recomputed", "tensor compiled", "tensor bfloat16", "tensor documents"]


@pytest.mark.parametrize(("num_processes", "cases"), [(2, TWO), (4, FOUR)], ids=["2", "4"])
def test_gradients_are_those_of_one_process(num_processes: int, cases: list[str], tmp_path: Path) -> None:
    """And losses, states and the bytes that each mode is said to move."""
    report = tmp_path / "report.json"
    done = launch(num_processes, str(Path(__file__).with_name("parallel_check.py")), str(report), *cases)
    assert done.returncode == 0, done.stderr
    errors: dict[str, dict[str, float]] = json.loads(report.read_text())
    assert list(errors) == cases
    for case in cases:
        assert set(errors[case]) == {"loss", "norm", "evaluation", "gradient", "state", "bytes"}
        for name, error in errors[case].items():
            assert error <= 1, f"{case}: {name} {error:.3g} times the tolerance"  # False for NaN


@pytest.mark.parametrize(("num_processes", "chunk"), [(2, 1), (2, 2), (4, 2)], ids=["data", "chunk", "data x chunk"])
def test_a_run_is_the_same_on_any_number_of_processes(num_processes: int, chunk: int, tmp_path: Path) -> None:
    """Streams carry their state from step to step, so a wrong state shows in the second loss."""
    alone = train(parallel_run(tmp_path, "alone", 1))
    run_cli(num_processes, parallel_run(tmp_path, "together", chunk), tmp_path)
    torch.testing.assert_close(losses(tmp_path / "together"), losses(alone.path), rtol=2e-5, atol=0)
    expected = weights(alone.path)
    for name, found in weights(tmp_path / "together").items():
        torch.testing.assert_close(found, expected[name], rtol=0, atol=2e-3, msg=name)  # Adam divides small numbers


@pytest.mark.parametrize(
    ("world_size", "settings", "message"),
    [
        (3, {"chunk": 2}, r"parallel.chunk = 2 does not divide the number of processes, 3"),
        (8, {"chunk": 1}, r"run.batch_size = 4 is not a multiple of 8 data-parallel processes"),
        (2, {"chunk": 2, "run__seq_len": 72}, r"a multiple of 48; found streams, 72"),
        (2, {"chunk": 2, "data__rows": "documents"}, r"needs data.rows = windows or streams .*; found documents, 96"),
    ],
)
def test_what_does_not_fit_is_refused(world_size: int, settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(TrainError, match=message):
        Layout.of(parallel_run(tmp_path, "run", settings.pop("chunk"), **settings), world_size)

"""Stages of a pipeline give what one process gives: losses, gradients, states, checkpoints."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from train.parallel_helpers import assert_same_run, launch, parallel_run, run_cli

from megalodon_deploy.errors import TrainError
from megalodon_deploy.train import train
from megalodon_deploy.train.checkpoints import RunFolder
from megalodon_deploy.train.parallel.layout import Layout
from megalodon_deploy.train.parallel.pipeline import own_layers


def test_gradients_over_stages_are_those_of_one_process(tmp_path: Path) -> None:
    """And losses, clipping, evaluation, the checkpoint after an update, and the bytes that stages are said to move."""
    report = tmp_path / "report.json"
    done = launch(4, str(Path(__file__).with_name("pipeline_check.py")), str(report))
    assert done.returncode == 0, done.stderr
    ranks: list[dict[str, dict[str, float]]] = json.loads(report.read_text())
    assert [len(cases) for cases in ranks] == [7] * 4
    for rank, cases in enumerate(ranks):
        for case, errors in cases.items():
            assert {"loss", "norm", "evaluation", "gradient"} <= set(errors)
            assert ("bytes" in errors) != ("tensor" in case)
            assert ("weights" in errors) == ("moments" in errors) == ("stream" in errors) == (rank == 0)
            for name, error in errors.items():
                tolerance = 0 if name == "bytes" else 1e-5 if "float32" in case else 1e-12
                assert error <= tolerance, f"rank {rank}, {case}, {name}: {error:.3g}"  # False for NaN


def test_a_run_goes_on_over_two_stages(tmp_path: Path) -> None:
    """From the checkpoint of one process, in the middle of a chunk, to a checkpoint in parts."""
    settings: dict[str, Any] = {"run__seq_len": 12, "run__steps": 5, "checkpoint__every_steps": 3}
    settings |= {"run__micro_batch_size": 2, "model__num_layers": 3, "model__share_emb": True, "evaluation__rows": 3}
    alone = RunFolder(train(parallel_run(tmp_path, "alone", 1, **settings)).path, keep=2)
    together = RunFolder(tmp_path / "together", keep=2)
    shutil.copytree(alone.out, together.out, symlinks=True)
    shutil.rmtree(together.path(5))
    run_cli(
        2,
        parallel_run(tmp_path, "together", 1, parallel__pipeline=2, checkpoint__sharded=True, **settings),
        tmp_path,
        "--resume",
    )
    assert not (together.path(5) / "model.safetensors").exists()
    assert_same_run(together, alone)


def test_layers_that_do_not_divide_go_to_the_first_stages() -> None:
    assert [list(own_layers(5, place, 3)) for place in range(3)] == [[0, 1], [2, 3], [4]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"parallel__pipeline": 3}, r"parallel.pipeline = 3 is more than model.num_layers = 2"),
        ({"run__micro_batch_size": 3}, r"run.micro_batch_size = 3 does not divide the 4 rows"),
        ({"parallel__chunk": 2}, r"parallel.pipeline = 2 with parallel.chunk = 2: choose one"),
        ({"parallel__shard": True}, r"parallel.pipeline = 2 with parallel.shard = true: choose one"),
        ({"log__sample_tokens": 4}, r"parallel.pipeline = 2 with log.sample_tokens: .* set it to 0"),
    ],
)
def test_what_a_pipeline_cannot_run_is_refused(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    chunk = settings.pop("parallel__chunk", 1)
    config = parallel_run(tmp_path, "run", chunk, **{"parallel__pipeline": 2, **settings})
    with pytest.raises(TrainError, match=message):
        Layout.of(config, config.parallel.pipeline * chunk)

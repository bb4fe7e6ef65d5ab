"""Layers over tensor ranks and stages give what one process gives: losses, gradients, states, checkpoints."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from train.parallel_helpers import assert_same_run, launch, parallel_run, run_cli

from megalodon_deploy.config import MegalodonConfig
from megalodon_deploy.errors import TrainError
from megalodon_deploy.train import train
from megalodon_deploy.train.checkpoints import RunFolder
from megalodon_deploy.train.parallel.layout import Layout, supported_ways
from megalodon_deploy.train.parallel.pipeline import own_layers

Ranks = list[dict[str, dict[str, dict[str, float]]]]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    """What four ranks found: errors by mode, case and quantity."""
    report = tmp_path_factory.mktemp("layers") / "report.json"
    done = launch(4, str(Path(__file__).with_name("layers_check.py")), str(report))
    assert done.returncode == 0, done.stderr
    found: Ranks = json.loads(report.read_text())
    assert len(found) == 4
    return found


def check(found: dict[str, dict[str, float]], num_cases: int) -> None:
    assert len(found) == num_cases
    for case, errors in found.items():
        assert {"loss", "evaluation", "gradient"} <= set(errors)
        for name, error in errors.items():
            tolerance = 0 if name == "bytes" else 1e-5 if "float32" in case else 1e-12
            assert error <= tolerance, f"{case}, {name}: {error:.3g}"  # False for NaN


def test_tensor_ranks_compute_what_one_process_does(ranks: Ranks) -> None:
    """Losses, gradients and joined states; and they sum as many bytes as stated."""
    for rank in ranks:
        check(rank["tensor"], 10)
        assert all({"state", "bytes"} <= set(errors) for errors in rank["tensor"].values())


def test_stages_compute_what_one_process_does(ranks: Ranks) -> None:
    """Losses, gradients, clipping, evaluation, the snapshot after an update; and they send as many bytes as stated."""
    for place, rank in enumerate(ranks):
        check(rank["pipeline"], 7)
        for case, errors in rank["pipeline"].items():
            assert ("bytes" in errors) != ("tensor" in case)
            assert ({"weights", "moments", "stream"} <= set(errors)) == (place == 0)


def test_a_run_goes_on_over_stages_and_tensor_ranks(tmp_path: Path) -> None:
    """From the checkpoint of one process to one in parts, within a chunk: heads are cut and joined."""
    settings: dict[str, Any] = {"run__seq_len": 12, "run__steps": 5, "checkpoint__every_steps": 3}
    settings |= {"run__micro_batch_size": 2, "model__num_layers": 3, "model__share_emb": True, "evaluation__rows": 3}
    alone = RunFolder(train(parallel_run(tmp_path, "alone", 1, **settings)).path, keep=2)
    together = RunFolder(tmp_path / "together", keep=2)
    shutil.copytree(alone.out, together.out, symlinks=True)
    shutil.rmtree(together.path(5))
    settings |= {"parallel__pipeline": 2, "parallel__tensor": 2, "checkpoint__sharded": True}
    run_cli(4, parallel_run(tmp_path, "together", 1, **settings), tmp_path, "--resume")
    assert not (together.path(5) / "model.safetensors").exists()
    assert_same_run(together, alone)
    assert together.read_stream(5)["past_value.0"].shape[2] == 12


def test_layers_that_do_not_divide_go_to_the_first_stages() -> None:
    assert [list(own_layers(5, place, 3)) for place in range(3)] == [[0, 1], [2, 3], [4]]


def test_supported_ways_cut_heads_and_widths_evenly() -> None:
    assert supported_ways(MegalodonConfig.preset("mega1.3B", value_dim=12, ffn_hidden_dim=24)) == [1, 2, 4, 6, 12]
    assert supported_ways(MegalodonConfig.preset("mega7.3B"))[:5] == [1, 2, 4, 8, 16]


def test_what_cannot_be_cut_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainError, match=r"parallel.tensor = 3 does not cut .* these do: 1, 2, 4, 8, 16, 32$"):
        Layout.of(parallel_run(tmp_path, "run", 1, parallel__tensor=3, model__ffn_hidden_dim=32), 3)
    with pytest.raises(TrainError, match=r"parallel.chunk = 2 x parallel.tensor = 2 does not divide .* processes, 6;"):
        Layout.of(parallel_run(tmp_path, "run", 2, parallel__tensor=2), 6)


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

"""What a run may be told, and its learning rate."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from megalodon_deploy.cli import cli
from megalodon_deploy.config import MegalodonConfig
from megalodon_deploy.errors import ConfigError, TrainError
from megalodon_deploy.parameters import num_parameters
from megalodon_deploy.train import Measurement, OptimizerConfig, RunConfig, TrainConfig, TrainResult, byte_model
from megalodon_deploy.train.config import setting_docs
from megalodon_deploy.train.schedule import learning_rate, run_fraction
from megalodon_deploy.train.settings import read_toml

REQUIRED = ["data.paths=text", "run.out=out", "run.steps=100"]


def test_the_default_model_has_about_a_million_parameters() -> None:
    assert 0.9e6 < num_parameters(byte_model()) < 1.2e6
    assert byte_model().vocab_size == 256


def test_dimensions_reach_the_model() -> None:
    model = TrainConfig.load(None, [*REQUIRED, "model.num_layers=3", "model.model_dim=96", "model.chunk_size=40"]).model
    assert (model.num_layers, model.model_dim, model.chunk_size) == (3, 96, 40)
    assert (model.z_dim, model.value_dim, model.ffn_hidden_dim, model.norm_num_groups) == (48, 192, 288, 6)


def test_a_preset_keeps_its_dimensions() -> None:
    assert byte_model("mega200M") == MegalodonConfig.preset("mega200M", vocab_size=256)
    tables = [*REQUIRED, "model.preset=mega200M", "model.num_layers=2"]
    assert TrainConfig.load(None, tables).model == MegalodonConfig.preset("mega200M", vocab_size=256, num_layers=2)
    with pytest.raises(ConfigError, match="unknown preset"):
        byte_model("mega2M")


@pytest.mark.parametrize("dim", [8, 100, 0, -16])
def test_a_dim_that_groups_cannot_divide_is_refused(dim: int) -> None:
    with pytest.raises(ConfigError, match=f"model_dim = {dim} "):
        byte_model(model_dim=dim)


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (["run.steps=none"], r"either as run\.steps or as run\.minutes"),
        (["run.minutes=1.0"], r"either as run\.steps or as run\.minutes"),
        (["run.steps=0"], r"run\.steps = 0 is below 1"),
        (["run.steps=none", "run.minutes=-1"], r"run\.minutes = -1\.0 is not above 0"),
        (["data.paths=[]"], r"data\.paths is empty"),
        (["optimizer.learning_rate=inf"], r"optimizer\.learning_rate = inf is not a finite number"),
        (["data.held_out_fraction=1.0"], r"data\.held_out_fraction = 1\.0 is not below 1"),
        (["model.modle_dim=32"], r"unknown setting model\.modle_dim; did you mean model\.model_dim\?"),
        (["runs.seed=1"], r"unknown setting runs; did you mean run\?"),
        (["data.rows=streams", "run.seq_len=100"], r"run\.seq_len = 100: streams need a multiple or a divisor"),
        (["data.end_token=300", "model.vocab_size=256"], r"data\.end_token = 300 is not below vocab_size 256"),
    ],
)
def test_senseless_settings_are_refused_in_one_line(assignments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        TrainConfig.load(None, [*REQUIRED, *assignments])
    assert "\n" not in str(caught.value)


def test_an_end_token_beyond_the_bytes_widens_the_vocabulary() -> None:
    assert TrainConfig.load(None, [*REQUIRED, "data.end_token=256"]).model.vocab_size == 257


def test_a_tokenizer_that_does_not_exist_is_named() -> None:
    with pytest.raises(TrainError, match=r"data\.tokenizer = 'none\.json': no such file"):
        TrainConfig.load(None, [*REQUIRED, "data.tokenizer=none.json"])


def test_a_printed_configuration_is_the_same_run(tmp_path: Path) -> None:
    values = ["data.exclude=[\"a\", 'b']", "optimizer.betas=[0.8, 0.9]", "run.micro_batch_size=2", "model.swiglu=true"]
    config = TrainConfig.load(None, [*REQUIRED, *values])
    (tmp_path / "config.toml").write_text(config.to_toml())
    assert TrainConfig.load(tmp_path / "config.toml") == config
    assert TrainConfig.load(tmp_path / "config.toml", ["run.seed=5"]).run.seed == 5


def test_every_setting_is_documented_in_what_is_printed() -> None:
    text = TrainConfig.load(None, REQUIRED).to_toml()
    tables = tomllib.loads(text)
    for name, _, doc in setting_docs():
        section, key = name.split(".")
        assert len(doc) > 5, name
        assert key in tables[section] or f"# {key} =" in text, name
        assert doc in text, name


def rates(**values: Any) -> list[float]:
    optimizer = OptimizerConfig(learning_rate=2.0, final_lr_fraction=0.25, **values)
    return [learning_rate(optimizer, step / 100, step) for step in range(101)]


def test_learning_rate_rises_to_the_peak_and_falls_to_its_fraction() -> None:
    found = rates(warmup=0.1)
    assert 0 < found[0] < 0.1
    assert found[5] == pytest.approx(1.0)
    assert max(found) == found[10] == pytest.approx(2.0)
    assert found[55] == pytest.approx((2.0 + 0.5) / 2)
    assert found[100] == pytest.approx(0.5)
    assert found[:11] == sorted(found[:11])
    assert found[10:] == sorted(found[10:], reverse=True)


def test_a_warm_up_may_be_given_in_steps() -> None:
    found = rates(warmup=4)
    assert found[:3] == pytest.approx([0.5, 1.0, 1.5])
    assert found[4] == pytest.approx(rates(warmup=0)[4])


def test_without_warm_up_the_peak_comes_first() -> None:
    assert rates(warmup=0)[0] == 2.0


def test_a_run_is_measured_in_steps_or_in_time() -> None:
    by_steps, by_time = RunConfig(out=Path("x"), steps=40), RunConfig(out=Path("x"), minutes=2.0)
    assert run_fraction(by_steps, 10, 1e6) == 0.25
    assert run_fraction(by_steps, 50, 0.0) == 1.0
    assert run_fraction(by_time, 1000, 30.0) == 0.25
    assert run_fraction(by_time, 1, 121.0) == 1.0


def test_a_result_is_json() -> None:
    point = Measurement(step=5, seconds=3.0, train_loss=2.0, held_out_loss=2.1, bits_per_byte=3.0)
    result = TrainResult(
        path=Path("demo/checkpoint"),
        num_parameters=1,
        num_train_tokens=3,
        num_held_out_tokens=4,
        steps=5,
        tokens=60,
        seconds=3.0,
        first_loss=5.5,
        train_loss=2.0,
        held_out_loss=None,
        bits_per_byte=None,
        interrupted=True,
        curve=(point,),
    )
    document = json.loads(json.dumps(result.to_dict()))
    assert document["path"] == "demo/checkpoint"
    assert document["tokens_per_second"] == 20.0
    expected = {"step": 5, "seconds": 3.0, "train_loss": 2.0, "held_out_loss": 2.1, "bits_per_byte": 3.0}
    assert document["curve"] == [expected]


@pytest.mark.parametrize("arguments", [[], ["--minutes", "5"], ["--data", "pyproject.toml", "run.batch_size=3"]])
def test_printed_settings_are_a_file_to_begin_with(arguments: list[str], tmp_path: Path) -> None:
    printed = CliRunner().invoke(cli, ["train", "--print-config", *arguments], catch_exceptions=False)
    (tmp_path / "run.toml").write_text(printed.stdout)
    config = TrainConfig.from_tables(read_toml(tmp_path / "run.toml"))
    assert config.data.paths == (Path("pyproject.toml" if "--data" in arguments else "text"),)
    assert (config.run.steps, config.run.minutes) == ((None, 5) if "--minutes" in arguments else (1000, None))
    assert config.run.batch_size == (3 if "run.batch_size=3" in arguments else RunConfig.batch_size)

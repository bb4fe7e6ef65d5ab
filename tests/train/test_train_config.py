"""What a run may be told, and its learning rate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megalodon_deploy.config import MegalodonConfig
from megalodon_deploy.errors import ConfigError
from megalodon_deploy.parameters import num_parameters
from megalodon_deploy.train import Measurement, TrainConfig, TrainResult, byte_model
from megalodon_deploy.train.schedule import learning_rate, run_fraction


def config(**values: Any) -> TrainConfig:
    return TrainConfig(**({"data": (Path("text"),), "out": Path("out"), "steps": 100} | values))


def test_the_default_model_has_about_a_million_parameters() -> None:
    assert 0.9e6 < num_parameters(byte_model()) < 1.2e6
    assert byte_model().vocab_size == 256


def test_dimensions_reach_the_model() -> None:
    model = byte_model(layers=3, dim=96, heads=2, chunk_size=40)
    assert (model.num_layers, model.model_dim, model.num_heads, model.chunk_size) == (3, 96, 2, 40)


def test_a_preset_keeps_its_dimensions() -> None:
    assert byte_model(preset="mega200M") == MegalodonConfig.preset("mega200M", vocab_size=256)
    with pytest.raises(ConfigError, match=r"mega200M .* leave out layers, heads"):
        byte_model(preset="mega200M", layers=2, heads=1)
    with pytest.raises(ConfigError, match="unknown preset"):
        byte_model(preset="mega2M")


@pytest.mark.parametrize("dim", [8, 100, 0, -16])
def test_a_dim_that_groups_cannot_divide_is_refused(dim: int) -> None:
    with pytest.raises(ConfigError, match=f"dim = {dim} "):
        byte_model(dim=dim)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": None}, "either in steps or in minutes"),
        ({"minutes": 1.0}, "either in steps or in minutes"),
        ({"steps": 0}, "steps = 0"),
        ({"steps": None, "minutes": -1.0}, "minutes = -1.0"),
        ({"steps": None, "minutes": float("nan")}, "minutes = nan"),
        ({"data": ()}, "no data"),
        ({"batch_size": 0}, "batch_size = 0"),
        ({"learning_rate": float("inf")}, "learning_rate = inf"),
        ({"held_out_fraction": 1.0}, "held_out_fraction = 1.0"),
        ({"model": MegalodonConfig.preset("mega200M", vocab_size=257)}, "vocab_size = 257"),
    ],
)
def test_senseless_numbers_are_refused_in_one_line(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        config(**values)
    assert "\n" not in str(caught.value)


def test_learning_rate_rises_to_the_peak_and_falls_to_its_fraction() -> None:
    run = config(learning_rate=2.0, warmup_fraction=0.1, final_lr_fraction=0.25)
    rates = [learning_rate(run, percent / 100) for percent in range(101)]
    assert 0 < rates[0] < 0.1
    assert rates[5] == pytest.approx(1.0)
    assert max(rates) == rates[10] == pytest.approx(2.0)
    assert rates[55] == pytest.approx((2.0 + 0.5) / 2)
    assert rates[100] == pytest.approx(0.5)
    assert rates[:11] == sorted(rates[:11])
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_without_warm_up_the_peak_comes_first() -> None:
    assert learning_rate(config(learning_rate=2.0, warmup_fraction=0.0), 0.0) == 2.0


def test_a_run_is_measured_in_steps_or_in_time() -> None:
    assert run_fraction(config(steps=40), 10, 1e6) == 0.25
    assert run_fraction(config(steps=40), 50, 0.0) == 1.0
    assert run_fraction(config(steps=None, minutes=2.0), 1000, 30.0) == 0.25
    assert run_fraction(config(steps=None, minutes=2.0), 1, 121.0) == 1.0


def test_a_result_is_json() -> None:
    result = TrainResult(
        path=Path("demo/checkpoint"),
        num_parameters=1,
        num_train_files=2,
        num_train_bytes=3,
        num_held_out_bytes=4,
        steps=5,
        tokens=60,
        seconds=3.0,
        first_loss=5.5,
        train_loss=2.0,
        held_out_loss=None,
        interrupted=True,
        curve=(Measurement(step=5, seconds=3.0, train_loss=2.0, held_out_loss=2.1),),
    )
    document = json.loads(json.dumps(result.to_dict()))
    assert document["path"] == "demo/checkpoint"
    assert document["tokens_per_second"] == 20.0
    assert document["curve"] == [{"step": 5, "seconds": 3.0, "train_loss": 2.0, "held_out_loss": 2.1}]

"""A run from files to a checkpoint: it learns, repeats itself, survives signals and stops when it diverges."""

from __future__ import annotations

import argparse
import math
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from megalodon_deploy.errors import MissingDependencyError, TrainError, UserError
from megalodon_deploy.model.checkpoint import load_checkpoint, read_checkpoint
from megalodon_deploy.train import TrainConfig, byte_model, loop, train
from megalodon_deploy.train.data import read_corpus, spread_windows

SOURCES = (Path(argparse.__file__), Path(shutil.__file__))  # real text that every machine has
TINY = byte_model(layers=2, dim=32, chunk_size=24)
UNIFORM = math.log(256)


@pytest.fixture
def make_config(tmp_path: Path) -> Callable[..., TrainConfig]:
    def make(**values: Any) -> TrainConfig:
        defaults: dict[str, Any] = {
            "data": SOURCES,
            "out": tmp_path / "checkpoint",
            "model": TINY,
            "batch_size": 4,
            "seq_len": 60,  # two chunks and a half
            "learning_rate": 1e-2,
            "evaluation_windows": 6,
        }
        length = {} if "minutes" in values else {"steps": 30}
        return TrainConfig(**(defaults | length | values))

    return make


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(path).state_dict()


def test_a_short_run_lowers_the_loss_on_real_text(make_config: Callable[..., TrainConfig]) -> None:
    config = make_config(evaluations=3)
    result = train(config)
    assert result.first_loss is not None
    assert result.held_out_loss is not None
    assert UNIFORM - 0.3 < result.first_loss < UNIFORM + 0.8
    assert result.held_out_loss < result.first_loss - 1.5
    assert result.steps == 30
    assert result.tokens == 30 * 4 * 60
    assert [point.step for point in result.curve] == [10, 20, 30]
    assert not result.interrupted


def test_the_checkpoint_has_the_reported_loss(make_config: Callable[..., TrainConfig]) -> None:
    config = make_config(steps=12)
    result = train(config)
    corpus = read_corpus(SOURCES, glob=config.glob, exclude=config.exclude, held_out_fraction=config.held_out_fraction)
    windows = spread_windows(corpus.held_out, count=config.evaluation_windows, length=config.seq_len + 1)
    tokens = torch.from_numpy(windows)
    checkpoint = read_checkpoint(result.path)
    assert checkpoint.config == TINY
    assert checkpoint.layout == "native"
    assert checkpoint.tokenizer is not None
    assert checkpoint.tokenizer.kind == "bytes"
    with torch.no_grad():
        logits, _ = load_checkpoint(result.path)(tokens[:, :-1])
    loss = functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item()
    assert result.held_out_loss == pytest.approx(loss, abs=1e-5)


def test_one_seed_is_one_run(make_config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    first, second, other = (tmp_path / name for name in ("first", "second", "other"))
    curves = [train(make_config(out=out, steps=8)).curve for out in (first, second)]
    train(make_config(out=other, steps=8, seed=1))
    assert [point.train_loss for point in curves[0]] == [point.train_loss for point in curves[1]]
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()
    assert (first / "model.safetensors").read_bytes() != (other / "model.safetensors").read_bytes()


def test_a_run_by_time_ends_and_is_evaluated(make_config: Callable[..., TrainConfig]) -> None:
    result = train(make_config(minutes=0.02, evaluations=2))
    assert result.steps >= 1
    assert result.curve[-1].step == result.steps
    assert weights(result.path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_first(make_config: Callable[..., TrainConfig], number: signal.Signals) -> None:
    before = signal.getsignal(number)

    def interrupt(stage: str, fraction: float) -> None:
        if fraction >= 0.1 and signal.getsignal(number) is not before:
            os.kill(os.getpid(), number)

    result = train(make_config(evaluations=1), progress=interrupt)
    assert result.interrupted
    assert result.steps == 3
    assert result.held_out_loss is None
    assert weights(result.path)
    assert signal.getsignal(number) is before


def test_a_diverging_run_keeps_the_last_good_checkpoint(
    make_config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(steps=10, evaluations=5)
    monkeypatch.setattr(loop, "learning_rate", lambda run, fraction: 1e-2 if fraction < 0.5 else math.inf)
    with pytest.raises(TrainError, match="loss nan") as caught:
        train(config)
    assert "\n" not in str(caught.value)
    assert f"{config.out} keeps the last good checkpoint" in str(caught.value)
    assert all(torch.isfinite(tensor).all() for tensor in weights(config.out).values())


def test_a_run_that_diverges_at_once_writes_nothing(make_config: Callable[..., TrainConfig]) -> None:
    config = make_config(learning_rate=1e9, warmup_fraction=0.0, evaluations=1)
    with pytest.raises(TrainError, match=r"diverged at step \d+.* no checkpoint was written") as caught:
        train(config)
    assert "--lr" in str(caught.value)
    assert not config.out.exists()


def test_gradients_that_are_not_finite_leave_the_weights_alone(make_config: Callable[..., TrainConfig]) -> None:
    config = make_config()
    corpus = read_corpus(SOURCES, glob="*", exclude=(), held_out_fraction=0.05)
    trainer = loop.Trainer(config, corpus)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer.model.layers[0].mega.wh1.weight.register_hook(lambda grad: grad * math.nan)
    with pytest.raises(TrainError, match="gradient norm nan"):
        trainer.step()
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_an_existing_output_is_kept_unless_told(make_config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    short = {"steps": 2, "evaluations": 1}
    train(make_config(**short))
    with pytest.raises(TrainError, match=r"exists already.*--overwrite"):
        train(make_config(**short, seed=1))
    first = weights(tmp_path / "checkpoint")
    train(make_config(**short, seed=1, overwrite=True))
    second = weights(tmp_path / "checkpoint")
    assert not torch.equal(first["embed.weight"], second["embed.weight"])


def test_only_a_checkpoint_is_overwritten(make_config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "cat.jpg").write_bytes(b"meow")
    with pytest.raises(TrainError, match="no checkpoint"):
        train(make_config(out=photos, overwrite=True))
    assert (photos / "cat.jpg").read_bytes() == b"meow"


@pytest.mark.parametrize("values", [{"data": (Path("missing"),)}, {"seq_len": 10**7}])
def test_bad_data_is_one_line_and_leaves_nothing(
    make_config: Callable[..., TrainConfig], values: dict[str, Any]
) -> None:
    config = make_config(**values)
    with pytest.raises(UserError) as caught:
        train(config)
    assert "\n" not in str(caught.value)
    assert not config.out.exists()


def test_threads_are_given_back(make_config: Callable[..., TrainConfig]) -> None:
    before = torch.get_num_threads()
    used: list[int] = []
    train(
        make_config(steps=1, threads=before + 1),
        progress=lambda stage, fraction: used.append(torch.get_num_threads()),
    )
    assert used[-1] == before + 1
    assert torch.get_num_threads() == before


def test_progress_tells_the_loss_and_ends_at_one(make_config: Callable[..., TrainConfig]) -> None:
    seen: list[tuple[str, float]] = []
    train(make_config(steps=5), progress=lambda stage, fraction: seen.append((stage, fraction)))
    fractions = [fraction for _, fraction in seen]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0
    assert all(word in seen[-1][0] for word in ("loss", "held out", "tokens/s", "left"))


def test_missing_pytorch_names_the_extra(
    make_config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingDependencyError, match=r"megalodon-deploy\[train\]"):
        train(make_config())


def test_the_first_windows_follow_the_seed(make_config: Callable[..., TrainConfig]) -> None:
    corpus = read_corpus(SOURCES, glob="*", exclude=(), held_out_fraction=0.05)
    draws = [loop.Trainer(make_config(seed=seed), corpus).rng.integers(0, 1000, 8) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(draws[0], draws[1])
    assert not np.array_equal(draws[0], draws[2])

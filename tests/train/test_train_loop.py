"""A run from files to a checkpoint: it learns, repeats itself, survives signals and stops when it diverges."""

from __future__ import annotations

import functools
import math
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from train.training_helpers import SOURCES, TINY, moved, tiny_run, weights

from megalodon_deploy.errors import MissingDependencyError, TrainError, UserError
from megalodon_deploy.model.checkpoint import load_checkpoint, read_checkpoint
from megalodon_deploy.train import byte_model, train, trainer
from megalodon_deploy.train.checkpoints import BackgroundWriter, RunFolder
from megalodon_deploy.train.data.rows import evaluation_batches, split
from megalodon_deploy.train.data.tokens import open_tokens
from megalodon_deploy.train.log import read_log

UNIFORM = math.log(256)


def losses(path: Path) -> list[str]:
    return [row["loss"] for row in read_log(path / "log.csv")]


def test_a_short_run_lowers_the_loss_on_real_text(tmp_path: Path) -> None:
    result = train(tiny_run(tmp_path, evaluation__times=3))
    assert result.first_loss is not None
    assert result.held_out_loss is not None
    assert result.bits_per_byte is not None
    assert UNIFORM - 0.3 < result.first_loss < UNIFORM + 0.8
    assert result.held_out_loss < result.first_loss - 1.5
    assert result.bits_per_byte == pytest.approx(result.held_out_loss / math.log(2))  # a token is a byte
    assert result.steps == 30
    assert result.tokens == 30 * 4 * 60
    assert [point.step for point in result.curve] == [10, 20, 30]
    assert not result.interrupted


def test_three_hundred_steps_reach_the_stated_loss(tmp_path: Path) -> None:
    """The bands hold seeds 0 to 2 with room for other Python versions, whose source is the text."""
    shape = {"run__seq_len": 128, "model__model_dim": 48, "model__chunk_size": 64}
    settings = {"evaluation__times": 1, "evaluation__rows": 32, "log__every_steps": 100}
    result = train(tiny_run(tmp_path, run__steps=300, **shape, **settings))
    assert result.train_loss is not None
    assert result.held_out_loss is not None
    assert 0.9 < result.train_loss < 1.5  # measured: 1.16 to 1.20
    assert 2.2 < result.held_out_loss < 2.8  # of a module that it has not seen; measured: 2.48 to 2.50


@pytest.mark.parametrize("rows", ["documents", "windows", "streams"])
def test_the_checkpoint_has_the_reported_loss(tmp_path: Path, rows: str) -> None:
    config = tiny_run(tmp_path, run__steps=4, data__rows=rows, run__seq_len=48)
    result = train(config)
    _, held_out = split(open_tokens(config.data, lambda stage, fraction: None), config.data.held_out_fraction)
    batches = evaluation_batches(rows, held_out, seq_len=48, num_rows=6, batch_size=4)
    checkpoint = read_checkpoint(result.path)
    assert checkpoint.config == byte_model(**TINY)
    assert checkpoint.layout == "native"
    assert checkpoint.tokenizer is not None
    assert checkpoint.tokenizer.kind == "bytes"
    model, total, count = load_checkpoint(result.path), 0.0, 0
    for batch in batches:
        spans = [(row, 0, 48) for row in range(len(batch.tokens))] if batch.documents is None else batch.documents
        for row, begin, length in spans:
            tokens, targets = (torch.from_numpy(x[row, begin : begin + length]) for x in (batch.tokens, batch.targets))
            with torch.no_grad():
                logits, _ = model(tokens[None])
            total += functional.cross_entropy(logits[0], targets, reduction="sum").item()
            count += int(length)
    assert result.held_out_loss == pytest.approx(total / count, abs=1e-5)


def test_one_seed_is_one_run(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, run__steps=8)
    first, second, other = (tmp_path / name for name in ("first", "second", "other"))
    train(moved(config, first))
    train(moved(config, second))
    train(moved(tiny_run(tmp_path, run__steps=8, run__seed=1), other))
    assert losses(first) == losses(second)
    content = [(path / "latest" / "model.safetensors").read_bytes() for path in (first, second, other)]
    assert content[0] == content[1]
    assert content[0] != content[2]


def test_micro_batches_recomputation_and_loss_blocks_change_nothing_but_rounding(tmp_path: Path) -> None:
    plain = tiny_run(tmp_path, run__steps=5)
    train(moved(plain, tmp_path / "plain"))
    for name, settings in {
        "micro": {"run__micro_batch_size": 3},
        "recompute": {"run__checkpoint_activations": True},
        "blocks": {"run__logits_at_once": 7},
    }.items():
        config = tiny_run(tmp_path, run__steps=5, **settings)
        train(moved(config, tmp_path / name))
        found, expected = map(losses, (tmp_path / name, tmp_path / "plain"))
        assert [float(x) for x in found] == pytest.approx([float(x) for x in expected], abs=2e-4), name


@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_blocks_compute_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recompute: bool) -> None:
    """With the compiler's tracer and without its code generator, which takes minutes."""
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    plain = tiny_run(tmp_path, run__steps=3, data__rows="windows", evaluation__times=1)
    train(moved(plain, tmp_path / "plain"))
    settings = {"run__compile": True, "run__checkpoint_activations": recompute}
    config = tiny_run(tmp_path, run__steps=3, data__rows="windows", evaluation__times=1, **settings)
    train(moved(config, tmp_path / "compiled"))
    assert graphs
    found, expected = map(losses, (tmp_path / "compiled", tmp_path / "plain"))
    assert [float(x) for x in found] == pytest.approx([float(x) for x in expected], abs=1e-4)


def test_bfloat16_follows_float32_with_float32_weights(tmp_path: Path) -> None:
    curves = {}
    for precision in ("float32", "bfloat16"):
        config = tiny_run(tmp_path, run__steps=12, run__precision=precision, optimizer__learning_rate=3e-3)
        train(moved(config, tmp_path / precision))
        curves[precision] = [float(loss) for loss in losses(tmp_path / precision)]
    assert curves["bfloat16"] != curves["float32"]
    assert curves["bfloat16"] == pytest.approx(curves["float32"], abs=0.1)
    assert all(tensor.dtype == torch.float32 for tensor in weights(tmp_path / "bfloat16").values())


def test_streams_carry_state_over_long_documents(tmp_path: Path) -> None:
    """Loss of the second segment must depend on the first: the same run without state differs from there on."""
    config = tiny_run(tmp_path, run__steps=4, data__rows="streams", run__seq_len=48)
    train(moved(config, tmp_path / "carried"))

    micro_batch = trainer.Trainer.micro_batch

    def forget(self: Any, batch: Any, state: Any) -> Any:
        return micro_batch(self, batch, None)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.Trainer, "micro_batch", forget)
        train(moved(config, tmp_path / "forgotten"))
    carried, forgotten = losses(tmp_path / "carried"), losses(tmp_path / "forgotten")
    assert carried[0] == forgotten[0]
    assert carried[1] != forgotten[1]


def test_a_run_by_time_ends_and_is_evaluated(tmp_path: Path) -> None:
    result = train(tiny_run(tmp_path, run__minutes=0.02, evaluation__times=2))
    assert result.steps >= 1
    assert result.curve[-1].step == result.steps
    assert weights(result.path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_first(tmp_path: Path, number: signal.Signals) -> None:
    before = signal.getsignal(number)

    def interrupt(stage: str, fraction: float) -> None:
        if "loss" in stage and fraction >= 0.1 and signal.getsignal(number) is not before:
            os.kill(os.getpid(), number)

    result = train(tiny_run(tmp_path, evaluation__times=1), progress=interrupt)
    assert result.interrupted
    assert result.steps == 3
    assert result.held_out_loss is None
    assert weights(result.path)
    assert signal.getsignal(number) is before


def test_a_diverging_run_keeps_the_last_good_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_run(tmp_path, run__steps=10, evaluation__times=5)
    monkeypatch.setattr(trainer, "learning_rate", lambda settings, fraction, step: 1e-2 if step < 5 else math.inf)
    with pytest.raises(TrainError, match="loss nan") as caught:
        train(config)
    assert "\n" not in str(caught.value)
    assert "step-00000004 keeps the last good checkpoint" in str(caught.value)
    assert all(torch.isfinite(tensor).all() for tensor in weights(config.run.out).values())


def test_a_run_that_diverges_at_once_says_so(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, optimizer__learning_rate=1e9, optimizer__warmup=0, evaluation__times=1)
    with pytest.raises(TrainError, match=r"diverged at step \d+.* no checkpoint was written") as caught:
        train(config)
    assert "optimizer.learning_rate" in str(caught.value)


def test_gradients_that_are_not_finite_leave_the_weights_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[dict[str, torch.Tensor]] = []
    build = trainer.build_model

    def build_and_break(config: Any) -> Any:
        model = build(config)
        made.extend([model.state_dict(), {name: tensor.clone() for name, tensor in model.state_dict().items()}])
        model.layers[0].mega.wh1.weight.register_hook(lambda grad: grad * math.nan)
        return model

    monkeypatch.setattr(trainer, "build_model", build_and_break)
    with pytest.raises(TrainError, match="gradient norm nan"):
        train(tiny_run(tmp_path))
    assert all(torch.equal(made[0][name], tensor) for name, tensor in made[1].items())


def test_a_run_may_start_from_a_checkpoint(tmp_path: Path) -> None:
    first = train(moved(tiny_run(tmp_path), tmp_path / "first"))
    config = tiny_run(tmp_path, run__start_from=str(tmp_path / "first"), run__steps=2, model__num_layers=2)
    second = train(config)
    assert second.first_loss is not None
    assert first.train_loss is not None
    assert second.first_loss < first.train_loss
    with pytest.raises(UserError, match=r"model\.num_layers is not that of run\.start_from"):
        tiny_run(tmp_path, run__start_from=str(tmp_path / "first"), model__num_layers=3)


def test_a_tokenizer_file_travels_with_the_checkpoint(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train(SOURCES, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False))
    tokenizer.save(str(tmp_path / "bpe.json"))
    settings = {"data__tokenizer": str(tmp_path / "bpe.json"), "data__end_token": 400, "data__workers": 3}
    config = tiny_run(tmp_path, run__steps=2, **settings)
    assert config.model.vocab_size == 401
    result = train(config)
    source = read_checkpoint(result.path).tokenizer
    assert source is not None
    assert source.file is not None
    assert (source.kind, source.stop_tokens) == ("tokenizer.json", (400,))
    assert source.file.read_bytes() == (tmp_path / "bpe.json").read_bytes()
    assert source.file.parent == result.path / "latest"
    assert result.held_out_loss is not None
    assert result.bits_per_byte is not None
    bytes_per_token = result.held_out_loss / math.log(2) / result.bits_per_byte
    assert 1.5 < bytes_per_token < 4


def test_an_existing_run_is_kept_unless_told(tmp_path: Path) -> None:
    train(tiny_run(tmp_path, run__steps=2))
    with pytest.raises(TrainError, match=r"exists already.*--resume or --overwrite"):
        train(tiny_run(tmp_path, run__steps=2, run__seed=1))
    first = weights(tmp_path / "run")
    train(tiny_run(tmp_path, run__steps=2, run__seed=1), overwrite=True)
    assert not torch.equal(first["embed.weight"], weights(tmp_path / "run")["embed.weight"])
    assert RunFolder(tmp_path / "run", 2).steps() == [1, 2]


def test_only_a_run_is_removed(tmp_path: Path) -> None:
    photos = tmp_path / "run"
    photos.mkdir()
    (photos / "cat.jpg").write_bytes(b"meow")
    for options in ({"overwrite": True}, {"resume": True}, {}):
        with pytest.raises(TrainError, match="is no training run"):
            train(tiny_run(tmp_path), **options)
    assert (photos / "cat.jpg").read_bytes() == b"meow"


@pytest.mark.parametrize(
    "settings",
    [
        {"data__paths": ["missing"]},
        {"data__rows": "windows", "run__seq_len": 10**7},
        {"model__vocab_size": 255},
        {"run__device": "nonsense"},
        {"data__paths": [sys.executable]},
    ],
)
def test_bad_data_is_one_line_and_an_earlier_run_stays(tmp_path: Path, settings: dict[str, Any]) -> None:
    train(tiny_run(tmp_path, run__steps=1))
    before = weights(tmp_path / "run")
    with pytest.raises(UserError) as caught:
        train(tiny_run(tmp_path, **settings), overwrite=True)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(tmp_path / "run").items())


def test_threads_are_given_back(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    used: list[int] = []
    train(
        tiny_run(tmp_path, run__steps=1, run__threads=before + 1),
        progress=lambda stage, fraction: used.append(torch.get_num_threads()),
    )
    assert used[-1] == before + 1
    assert torch.get_num_threads() == before


def test_progress_tells_the_loss_and_ends_at_one(tmp_path: Path) -> None:
    seen: list[tuple[str, float]] = []
    config = tiny_run(tmp_path, run__steps=5, log__peak_tflops=0.1)
    train(config, progress=lambda stage, fraction: seen.append((stage, fraction)))
    fractions = [fraction for stage, fraction in seen if "loss" in stage]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0
    assert all(word in seen[-1][0] for word in ("loss", "held out", "tokens/s", "left", "% of peak"))


def test_logs_plot_board_and_samples_are_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    settings = {"log__plot": True, "log__tensorboard": True, "log__sample_tokens": 12, "log__sample_prompt": "def "}
    result = train(tiny_run(tmp_path, run__steps=6, evaluation__times=2, log__every_steps=2, **settings))
    rows = read_log(tmp_path / "run" / "log.csv")
    assert [int(row["step"]) for row in rows] == [2, 3, 4, 6]  # every second one and the evaluations
    assert float(rows[-1]["held_out_loss"]) == result.held_out_loss
    assert b"<svg" in (tmp_path / "run" / "loss.svg").read_bytes()
    assert [path.stat().st_size > 100 for path in (tmp_path / "run" / "tensorboard").iterdir()] == [True]
    samples = [path.read_text() for path in sorted((tmp_path / "run" / "samples").iterdir())]
    assert len(samples) == 2
    assert all(text.startswith("def ") and len(text.encode()) >= 4 + 12 for text in samples)


def test_samples_and_logs_do_not_touch_the_training(tmp_path: Path) -> None:
    train(moved(tiny_run(tmp_path, run__steps=6), tmp_path / "plain"))
    config = tiny_run(tmp_path, run__steps=6, log__sample_tokens=5, checkpoint__every_steps=1, evaluation__times=6)
    train(moved(config, tmp_path / "watched"))
    assert losses(tmp_path / "plain") == losses(tmp_path / "watched")


@pytest.mark.parametrize(("package", "setting"), [("matplotlib", "log__plot"), ("tensorboard", "log__tensorboard")])
def test_a_missing_package_is_one_line_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, setting: str
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == package else object())
    with pytest.raises(MissingDependencyError, match=rf"{package}: pip install 'megalodon-deploy\[plots\]'"):
        train(tiny_run(tmp_path, **{setting: True}))
    assert not (tmp_path / "run").exists()


def test_missing_pytorch_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_run(tmp_path)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingDependencyError, match=r"megalodon-deploy\[train\]"):
        train(config)


def test_the_step_goes_on_while_a_checkpoint_is_written() -> None:
    """The second write waits for the first; an error in the background is not lost."""
    writer, begun, release, written = BackgroundWriter(), threading.Event(), threading.Event(), []

    def slow() -> None:
        begun.set()
        release.wait(10)
        written.append("first")

    writer.submit(slow)
    assert begun.wait(10)
    assert written == []
    release.set()
    writer.submit(lambda: written.append("second"))
    writer.wait()
    assert written == ["first", "second"]
    writer.submit(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        writer.wait()
    writer.close()


def test_the_text_of_the_tests_is_there() -> None:
    assert all(Path(source).stat().st_size > 10_000 for source in SOURCES)

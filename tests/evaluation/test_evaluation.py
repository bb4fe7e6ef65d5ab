"""Scores of documents: against one pass over all of it, for checkpoints and bundles alike."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch.nn import functional

from megalodon_deploy import Megalodon, load_checkpoint, save_checkpoint
from megalodon_deploy.cli import cli
from megalodon_deploy.errors import UserError
from megalodon_deploy.evaluation import evaluate, open_language_model
from megalodon_deploy.evaluation.evaluate import score
from megalodon_deploy.export import export_checkpoint
from megalodon_deploy.model.checkpoint import TokenizerSource
from megalodon_deploy.train import DataConfig, byte_model

TEXTS = ["def f(x):\n    return x\n" * 60, "caf\u00e9 " * 100, "x"]  # 1320 and 600 bytes, and nothing to predict


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("evaluation")
    torch.manual_seed(0)
    model = Megalodon(byte_model(num_layers=1, model_dim=32, chunk_size=50))
    save_checkpoint(model, root / "checkpoint", tokenizer=TokenizerSource("bytes"))
    export_checkpoint(root / "checkpoint", root / "bundle")
    for index, text in enumerate(TEXTS):
        (root / "texts").mkdir(exist_ok=True)
        (root / "texts" / f"{index}.txt").write_text(text, encoding="utf-8")
    return root


def losses_of(place: Path, text: bytes) -> np.ndarray:
    """In one call of the model."""
    tokens = torch.tensor([list(text)])
    with torch.no_grad():
        logits, _ = load_checkpoint(place / "checkpoint")(tokens[:, :-1])
    return functional.cross_entropy(logits[0].double(), tokens[0, 1:], reduction="none").numpy()


def data(place: Path) -> DataConfig:
    return DataConfig(paths=(place / "texts",))


@pytest.mark.parametrize("kind", ["checkpoint", "bundle"])
def test_a_document_is_one_stream(place: Path, kind: str) -> None:
    result = evaluate(open_language_model(place / kind), data(place))
    expected = [losses_of(place, text.encode()) for text in TEXTS[:2]]
    joined = np.concatenate(expected)
    assert (result.num_documents, result.num_tokens, result.num_bytes) == (2, len(joined), len(joined))
    assert result.loss == pytest.approx(joined.mean(), abs=1e-5)
    assert result.perplexity == pytest.approx(math.exp(joined.mean()), rel=1e-4)
    assert result.bits_per_byte == pytest.approx(joined.mean() / math.log(2), abs=1e-5)
    early = np.concatenate([part[:1023] for part in expected])  # positions 1 to 1023
    first, second = result.positions
    assert (first.begin, first.end, first.num_tokens) == (0, 1024, len(early))
    assert first.loss == pytest.approx(early.mean(), abs=1e-5)
    assert (second.begin, second.num_tokens) == (1024, len(expected[0]) - 1023)
    assert second.loss == pytest.approx(expected[0][1023:].mean(), abs=1e-5)


def test_a_limited_context_forgets(place: Path) -> None:
    model, text = open_language_model(place / "checkpoint"), TEXTS[0].encode()[:200]
    found = np.concatenate(list(score(model, list(text), context=70)))
    expected = [losses_of(place, text[begin : begin + 71]) for begin in (0, 70, 140)]
    np.testing.assert_allclose(found, np.concatenate(expected), atol=1e-5, equal_nan=False)
    assert np.abs(found - losses_of(place, text)).max() > 1e-3


def test_a_limit_cuts_the_last_document(place: Path) -> None:
    result = evaluate(open_language_model(place / "checkpoint"), data(place), max_tokens=1400)
    assert result.num_documents == 2
    assert result.num_tokens == 1319 + 79
    only = evaluate(open_language_model(place / "checkpoint"), data(place), max_tokens=100)
    assert (only.num_documents, only.num_tokens) == (1, 99)


def test_bytes_are_counted_in_utf8_whatever_a_token_is(place: Path) -> None:
    """A model that knows nothing gives log2 V bits for each token."""

    class Uniform:
        name, vocab_size, stop_tokens = "uniform", 512, ()

        class tokenizer:  # noqa: N801
            @staticmethod
            def encode(text: str, *, start: bool = True) -> list[int]:
                return [ord(c) for c in text]

        def open(self) -> Any:
            return self

        def read(self, tokens: Any) -> np.ndarray:
            return np.zeros((len(tokens), 512), np.float32)

    source = DataConfig(paths=(place / "texts" / "1.txt",))
    result = evaluate(Uniform(), source)  # 500 characters in 600 bytes
    assert result.num_tokens == 499
    assert result.bits_per_byte == pytest.approx(9 * 500 / 600)


def test_a_model_that_is_not_finite_is_named(place: Path) -> None:
    model = open_language_model(place / "checkpoint")

    class Broken:
        name, vocab_size, tokenizer, stop_tokens = "broken", 256, model.tokenizer, ()

        def open(self) -> Any:
            return self

        def read(self, tokens: Any) -> np.ndarray:
            return np.full((len(tokens), 256), np.nan, np.float32)

    with pytest.raises(UserError, match="broken: the loss at position 1 is not a finite number"):
        evaluate(Broken(), data(place))


def test_the_command_prints_and_draws(place: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    command = ["eval", str(place / "checkpoint"), "--data", str(place / "texts"), "--max-tokens", "300"]
    shown = CliRunner().invoke(cli, [*command, "--plot", str(tmp_path / "loss.svg")], catch_exceptions=False)
    assert "299 tokens of 1 documents" in shown.stdout
    assert b"<svg" in (tmp_path / "loss.svg").read_bytes()
    document = json.loads(CliRunner().invoke(cli, [*command, "--json"], catch_exceptions=False).stdout)
    assert document["num_tokens"] == 299
    assert document["positions"][0]["loss"] == document["loss"]


def test_a_picture_that_cannot_be_drawn_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    command = ["eval", str(tmp_path), "--data", str(tmp_path), "--plot", str(tmp_path / "loss.foo")]
    with pytest.raises(UserError, match=r"--plot .*loss.foo: its name has to end with .svg, .png, .pdf"):
        CliRunner().invoke(cli, command, catch_exceptions=False)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [({"max_tokens": 1}, "max tokens = 1: at least 2"), ({"context": 0}, "context = 0: at least 1")],
)
def test_senseless_limits_are_refused(place: Path, options: dict[str, int], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        evaluate(open_language_model(place / "checkpoint"), data(place), **options)


def test_text_without_predictions_is_refused(place: Path) -> None:
    with pytest.raises(UserError, match="no document has two tokens"):
        evaluate(open_language_model(place / "checkpoint"), DataConfig(paths=(place / "texts" / "2.txt",)))


def test_a_checkpoint_without_a_tokenizer_is_named(place: Path, tmp_path: Path) -> None:
    save_checkpoint(load_checkpoint(place / "checkpoint"), tmp_path / "silent")
    with pytest.raises(UserError, match="silent: the checkpoint does not say its tokenizer"):
        open_language_model(tmp_path / "silent")

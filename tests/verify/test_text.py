"""Agreement over text: right numbers on known distributions, and a wrong executor shows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import small_config
from verify import graph_faults as faults
from verify.graph_faults import change_weight, spoil

from megalodon_deploy.bundle import Bundle
from megalodon_deploy.errors import BundleError, UserError
from megalodon_deploy.export import export_checkpoint, load_bundle_model
from megalodon_deploy.model.checkpoint import save_checkpoint
from megalodon_deploy.model.megalodon import Megalodon
from megalodon_deploy.runtime.session import open_session
from megalodon_deploy.verify import text as text_module
from megalodon_deploy.verify import verify_bundle
from megalodon_deploy.verify.text import compare_text, divergences, read_text


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text("To be, or not to be: that is the question. " * 3)
    return path


def test_a_right_executor_agrees(bundle: Bundle, model: Megalodon, text: Path) -> None:
    reading = read_text(bundle, model, text)
    agreement = compare_text(open_session(bundle, "onnxruntime"), reading, "it")
    assert agreement.num_tokens == len(text.read_bytes()) - 1
    assert agreement.largest_divergence < 1e-9
    assert agreement.same_choice == 1
    assert agreement.agreed == agreement.continued == 48
    assert agreement.lead is None
    with torch.inference_mode():
        logits, _ = model(torch.tensor([list(text.read_bytes())]))
    loss = torch.nn.functional.cross_entropy(logits[0, :-1], torch.tensor(list(text.read_bytes()[1:]))).item()
    assert agreement.reference_loss == pytest.approx(loss, rel=1e-5)
    assert agreement.loss == pytest.approx(loss, rel=1e-5)


def test_a_wrong_executor_shows_in_text(bundle: Bundle, model: Megalodon, text: Path, tmp_path: Path) -> None:
    fault = change_weight("output.output.weight", faults.swap_tokens)
    spoilt = spoil(bundle, tmp_path / "spoilt", fault)
    agreement = compare_text(open_session(spoilt, "onnxruntime", native=False), read_text(bundle, model, text), "it")
    assert agreement.mean_divergence > 1e-4
    assert agreement.same_choice < 0.1
    assert agreement.agreed == 0
    assert agreement.lead is not None
    assert f"{agreement.agreed} of 48 tokens the same" in agreement.describe()


def test_divergence_of_known_distributions() -> None:
    uniform, certain = np.zeros((1, 4)), np.log([[0.7, 0.1, 0.1, 0.1]])
    expected = sum(0.25 * np.log(0.25 / p) for p in (0.7, 0.1, 0.1, 0.1))
    assert divergences(uniform, certain + 5)[0] == pytest.approx(expected)
    assert divergences(certain, certain)[0] == 0
    assert np.isnan(divergences(certain, np.full((1, 4), np.nan)))[0]


def test_the_report_says_what_the_error_means(bundle: Bundle, text: Path) -> None:
    report = verify_bundle(bundle, text=text)
    (agreement,) = report.text
    assert agreement.text == str(text)
    assert any(line.startswith("text: onnxruntime session on") for line in report.notes())
    assert report.to_dict()["text"][0]["same_choice"] == 1


def test_what_cannot_be_read_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "short").write_text("a")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00" * 10)
    for name, complaint in (("short", "1 tokens, two are needed"), ("binary", "as UTF-8"), ("none", "cannot be read")):
        with pytest.raises(UserError, match=complaint):
            verify_bundle(bundle, text=tmp_path / name)


def test_a_tokenizer_that_cannot_be_read_is_not_taken_for_a_model_without_one(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged(bundle: Bundle) -> None:
        raise BundleError("tokenizer.json: not readable")

    monkeypatch.setattr(text_module, "open_tokenizer", damaged)
    with pytest.raises(BundleError, match="not readable"):
        verify_bundle(bundle)


def test_a_model_without_a_fitting_tokenizer_is_verified_without_text(tmp_path: Path) -> None:
    save_checkpoint(Megalodon(small_config(vocab_size=50)), tmp_path / "checkpoint")
    bundle = export_checkpoint(tmp_path / "checkpoint", tmp_path / "bundle")
    report = verify_bundle(bundle)
    assert report.passed
    assert report.text == ()
    assert "text" in {item.what for item in report.not_run}
    assert load_bundle_model(bundle) is not None

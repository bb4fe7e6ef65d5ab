"""Whole verifications of an exported bundle: right ones pass, every planted fault is found under its name."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from helpers import assert_close, small_config
from verify import graph_faults as faults
from verify.conftest import Verify
from verify.graph_faults import Fault, change_weight, spoil

from megalodon_deploy.bundle import Bundle, Precision
from megalodon_deploy.errors import CheckpointError, ConfigError
from megalodon_deploy.export import export_checkpoint
from megalodon_deploy.model.checkpoint import save_checkpoint
from megalodon_deploy.model.megalodon import Megalodon
from megalodon_deploy.verify import verify_bundle
from megalodon_deploy.verify.report import VerifyReport
from megalodon_deploy.verify.tolerance import tolerances
from megalodon_deploy.verify.weights import load_reference


def test_a_right_bundle_passes(report: VerifyReport) -> None:
    assert [miss.describe() for miss in report.misses] == []
    assert report.passed
    assert report.verdict().startswith("passed")
    assert set(report.candidates) == {"onnxruntime", "onnxruntime session"}
    assert report.reference["checks_mapping"]
    assert report.reference["note"] == ""
    assert {finding.schedule for finding in report.findings} == {schedule.name for schedule in report.schedules}
    assert_tolerances_say_something(report)


def test_nothing_compared_is_nothing_passed(report: VerifyReport) -> None:
    empty = dataclasses.replace(report, findings=())
    assert not empty.passed
    assert empty.verdict() == "failed: nothing was compared"


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_error_that_is_no_number_fails_and_shows_as_the_worst(report: VerifyReport, value: float) -> None:
    spoilt = dataclasses.replace(report.findings[7], relative_error=value)
    failed = dataclasses.replace(report, findings=(*report.findings[:7], spoilt, *report.findings[8:]))
    assert not failed.passed
    assert spoilt in failed.worst
    document = json.loads(json.dumps(failed.to_dict(), allow_nan=False))
    assert [miss["relative_error"] for miss in document["misses"]] == [None]


def assert_tolerances_say_something(report: VerifyReport) -> None:
    """Each candidate's worst logits use up a hundredth of their tolerance at least."""
    worst = {finding.candidate: finding.share for finding in report.worst if finding.kind == "logits"}
    assert set(worst) == set(report.candidates)
    assert min(worst.values()) > 0.01, worst


def test_the_report_is_json_and_a_table(report: VerifyReport, bundle: Bundle) -> None:
    document = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert document["passed"]
    assert document["bundle"]["fingerprint"] == bundle.manifest.fingerprint
    assert document["misses"] == []
    assert {item["what"] for item in document["not_run"]} == {"TensorRT"}
    assert {"torch", "onnxruntime", "polygraphy"} <= set(document["versions"])
    calls = {(item["schedule"], item["call"]) for item in document["comparisons"]}
    assert len(calls) == sum(len(schedule["calls"]) for schedule in document["schedules"])
    rows = report.table_rows()
    assert {len(row) for row in rows} == {len(report.table_header())}
    assert {row[1] for row in rows if row[0] == "onnxruntime"} == {
        "logits",
        "key",
        "value",
        "cema",
        "norm mean",
        "norm var",
    }
    assert report.notes()[-1].startswith(report.verdict())


def test_without_a_checkpoint_the_report_says_what_was_not_checked(bundle: Bundle) -> None:
    stages: list[tuple[str, float]] = []
    report = verify_bundle(bundle, progress=lambda stage, fraction: stages.append((stage, fraction)))
    assert report.passed
    assert not report.reference["checks_mapping"]
    assert any("not checked" in line for line in report.notes())
    fractions = [fraction for _, fraction in stages]
    assert fractions == sorted(fractions)
    assert fractions[0] == 0
    assert fractions[-1] <= 1


def test_logits_of_all_positions_are_compared(checkpoint: Path, tmp_path: Path) -> None:
    report = verify_bundle(export_checkpoint(checkpoint, tmp_path / "all", logits="all"), ckpt=checkpoint)
    assert report.passed, report.verdict()


def test_another_checkpoint_is_refused_or_missed(bundle: Bundle, model: Megalodon, tmp_path: Path) -> None:
    other = Megalodon(small_config(vocab_size=256, cema_ndim=5))
    save_checkpoint(other, tmp_path / "shape")
    with pytest.raises(CheckpointError, match="cema_ndim is 5, the bundle has 4"):
        verify_bundle(bundle, ckpt=tmp_path / "shape")
    save_checkpoint(Megalodon(small_config(vocab_size=256, ema="none")), tmp_path / "variant")
    with pytest.raises(ConfigError, match="ema = 'none' is not the released model"):
        verify_bundle(bundle, ckpt=tmp_path / "variant")
    save_checkpoint(Megalodon(model.config), tmp_path / "values")
    report = verify_bundle(bundle, ckpt=tmp_path / "values")
    assert not report.passed
    assert "not the file" in report.reference["note"]


def test_a_real_moving_average_is_the_same_model_in_the_bundle(tmp_path: Path) -> None:
    model = Megalodon(small_config(vocab_size=256, ema="real"))
    save_checkpoint(model, tmp_path / "checkpoint")
    bundle = export_checkpoint(tmp_path / "checkpoint", tmp_path / "bundle")
    tokens = torch.arange(30)[None]
    with torch.inference_mode():
        expected, _ = model(tokens)
        for reference in (load_reference(bundle, tmp_path / "checkpoint")[0], load_reference(bundle, None)[0]):
            assert_close(reference(tokens)[0].numpy(), expected.numpy(), 1e-5)


@pytest.mark.parametrize(
    ("precision", "candidates", "not_run"),
    [
        ("fp16", {"onnxruntime", "onnxruntime, widened", "onnxruntime session"}, {"TensorRT"}),
        ("bf16", {"onnxruntime, widened", "torch session"}, {"TensorRT", "onnxruntime on the graph as it is"}),
    ],
)
def test_half_precision(
    checkpoint: Path, tmp_path: Path, precision: Precision, candidates: set[str], not_run: set[str]
) -> None:
    bundle = export_checkpoint(checkpoint, tmp_path / precision, precision=precision)
    report = verify_bundle(bundle, ckpt=checkpoint)
    assert report.passed, report.verdict()
    assert set(report.candidates) == candidates == {finding.candidate for finding in report.findings}
    assert {item.what for item in report.not_run} == not_run
    assert_tolerances_say_something(report)
    for finding in report.findings:
        if finding.kind == "logits":
            is_sharp = finding.tolerance == tolerances(bundle.config, "fp32")["logits"]
            assert is_sharp == (finding.candidate == "onnxruntime, widened")


def test_a_model_with_every_switch(tmp_path: Path) -> None:
    switches = dict.fromkeys(("swiglu", "rescale_nffn", "scale_emb", "share_emb"), True) | {"norm_affine": False}
    config = small_config(vocab_size=256, num_heads=1, chunk_size=5, rope_base=100.0, **switches)
    save_checkpoint(Megalodon(config), tmp_path / "checkpoint")
    bundle = export_checkpoint(tmp_path / "checkpoint", tmp_path / "bundle")
    report = verify_bundle(bundle, ckpt=tmp_path / "checkpoint")
    assert report.passed, report.verdict()


@pytest.mark.parametrize(
    ("fault", "tensor", "name"),
    [
        (
            change_weight("layers.0.mega.cema.q_powers", faults.conjugate),
            "present_cema.0",
            "recurrence of the moving",
        ),
        (faults.lose_state, "present_cema.1", "state not carried"),
        (faults.read_wrong_state, "present_cema.1", "state not carried"),
        (faults.read_the_first_rows_state, "present_cema.1", "mixed rows"),
        (faults.freeze_state, "present_cema.1", "NaN"),
        (faults.rotate_from_the_wrong_row, "new_key.0", "RoPE offset at a chunk edge"),
        (change_weight("layers.0.mega.wz_wr_wh1.weight", faults.swap_key_heads), "new_key.0", "swapped heads"),
        (change_weight("layers.1.mega.wv.weight", faults.swap_value_heads), "new_value.1", "head 0 holds what head 1"),
        (faults.keep_norms_in_float32, "present_norm.0", "float32 norm state"),
        (faults.start_in_used_memory("ComplexEMA"), "present_cema.0", "stale slot"),
        (faults.start_in_used_memory("TimestepNorm"), "present_norm.0", "stale slot"),
        (faults.look_one_row_too_far, "present_norm.1", "norm"),
        (change_weight("layers.0.nffn.fc1.weight", faults.one_nan), "present_norm.1", "not finite"),
        (faults.rename_output, "present_norm.final", "this output is missing"),
        (faults.drop_output, "new_value.1", "this output is missing"),
        (faults.rename_input, "all outputs", "old_value.0"),
        (faults.break_graph, "all outputs", "NoSuchOperator"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_fault_is_found_where_it_is_and_named(
    bundle: Bundle, checkpoint: Path, verify_copy: Verify, tmp_path: Path, fault: Fault, tensor: str, name: str
) -> None:
    report = verify_copy(spoil(bundle, tmp_path / "spoilt", fault), checkpoint)
    assert not report.passed
    diagnosis = next(diagnosis for diagnosis in report.diagnoses if diagnosis.candidate == "onnxruntime")
    assert diagnosis.first.tensor == tensor, report.verdict()
    assert name in diagnosis.describe()
    assert diagnosis.describe() in " ".join(report.notes())
    assert tensor in report.verdict()
    document = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert not document["passed"]
    assert diagnosis.name in {item["name"] for item in document["diagnoses"]}
    assert any(row[-1].startswith("MISSED") for row in report.table_rows())


def test_only_the_checkpoint_shows_a_wrong_weight(bundle: Bundle, tmp_path: Path) -> None:
    fault = change_weight("layers.0.mega.wz_wr_wh1.weight", faults.swap_key_heads)
    assert verify_bundle(spoil(bundle, tmp_path / "spoilt", fault)).passed


def test_what_is_not_finite_in_the_bundle_fails_without_the_checkpoint_too(bundle: Bundle, tmp_path: Path) -> None:
    report = verify_bundle(
        spoil(bundle, tmp_path / "spoilt", change_weight("layers.0.nffn.fc1.weight", faults.one_nan))
    )
    assert not report.passed
    assert report.misses[0].tensor == "present_norm.1"

"""Whole verifications of an exported bundle: right ones pass, every planted fault is found under its name."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from helpers import small_config
from onnx import helper, numpy_helper
from onnx.external_data_helper import set_external_data

from megalodon_deploy.bundle import (
    MANIFEST_FILE,
    MODEL_FILE,
    WEIGHTS_FILE,
    Bundle,
    FileEntry,
    Precision,
    open_bundle,
)
from megalodon_deploy.errors import CheckpointError
from megalodon_deploy.export import export_checkpoint
from megalodon_deploy.model.checkpoint import save_checkpoint
from megalodon_deploy.model.megalodon import Megalodon
from megalodon_deploy.verify import verify_bundle
from megalodon_deploy.verify.report import VerifyReport
from megalodon_deploy.verify.tolerance import tolerances

Fault = Callable[[onnx.ModelProto], None]


@pytest.fixture(scope="session")
def report(bundle: Bundle, checkpoint: Path) -> VerifyReport:
    return verify_bundle(bundle, ckpt=checkpoint)


def test_a_right_bundle_passes(report: VerifyReport) -> None:
    assert report.misses == []
    assert report.passed
    assert report.verdict().startswith("passed")
    assert set(report.candidates) == {"onnxruntime", "onnxruntime session"}
    assert report.reference["checks_mapping"]
    assert report.reference["note"] == ""
    assert {finding.schedule for finding in report.findings} == {schedule.name for schedule in report.schedules}


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
    assert fractions[-1] < 1


def test_logits_of_all_positions_are_compared(checkpoint: Path, tmp_path: Path) -> None:
    report = verify_bundle(export_checkpoint(checkpoint, tmp_path / "all", logits="all"), ckpt=checkpoint)
    assert report.passed, report.verdict()


def test_another_checkpoint_is_refused_or_missed(bundle: Bundle, model: Megalodon, tmp_path: Path) -> None:
    other = Megalodon(small_config(vocab_size=256, cema_ndim=5))
    save_checkpoint(other, tmp_path / "shape")
    with pytest.raises(CheckpointError, match="cema_ndim is 5, the bundle has 4"):
        verify_bundle(bundle, ckpt=tmp_path / "shape")
    save_checkpoint(Megalodon(model.config), tmp_path / "values")
    report = verify_bundle(bundle, ckpt=tmp_path / "values")
    assert not report.passed
    assert "not the file" in report.reference["note"]


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


def spoil(bundle: Bundle, target: Path, fault: Fault) -> Bundle:
    """A copy with a changed graph, hashes and fingerprint in order."""
    shutil.copytree(bundle.path, target)
    model = onnx.load(target / MODEL_FILE)
    fault(model)
    (target / WEIGHTS_FILE).unlink()
    for tensor in model.graph.initializer:
        if not tensor.name.startswith("constants."):  # ONNX Runtime reads shapes from the graph file only
            set_external_data(tensor, WEIGHTS_FILE)
    onnx.save(model, target / MODEL_FILE)
    files = {name: FileEntry.of(target / name) for name in bundle.manifest.files}
    manifest = dataclasses.replace(bundle.manifest, files=files)
    (target / MANIFEST_FILE).write_text(manifest.to_json())
    return open_bundle(target, verify_hashes=True)


def change_weight(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Fault:
    def apply(model: onnx.ModelProto) -> None:
        (tensor,) = (tensor for tensor in model.graph.initializer if tensor.name == name)
        changed = change(numpy_helper.to_array(tensor).copy())
        tensor.CopyFrom(numpy_helper.from_array(changed, name))

    apply.__name__ = change.__name__
    return apply


def conjugate(q_powers: np.ndarray) -> np.ndarray:
    return q_powers * np.array([1, -1], np.float32)


def swap_heads(weight: np.ndarray) -> np.ndarray:
    config = small_config()
    wz, rest = np.split(weight, [config.z_dim], axis=1)
    return np.concatenate([np.roll(wz, config.key_head_dim, axis=1), rest], axis=1)


def one_nan(weight: np.ndarray) -> np.ndarray:
    weight[0, 0] = np.nan
    return weight


def node(model: onnx.ModelProto, output: str) -> onnx.NodeProto:
    (found,) = (node for node in model.graph.node if output in node.output)
    return found


def rename_in(model: onnx.ModelProto, op_type: str, old: str, new: str) -> None:
    """Let nodes of a type read `new` where they read `old`."""
    readers = [node for node in model.graph.node if node.op_type == op_type and old in node.input]
    assert readers
    for reader in readers:
        reader.input[list(reader.input).index(old)] = new


def freeze_state(model: onnx.ModelProto) -> None:
    producer = node(model, "present_cema.1")
    producer.output[list(producer.output).index("present_cema.1")] = "unused"
    model.graph.node.append(helper.make_node("Identity", ["past_cema.1"], ["present_cema.1"]))


def read_wrong_state(model: onnx.ModelProto) -> None:
    rename_in(model, "ComplexEMA", "past_cema.1", "past_cema.0")


def rotate_from_the_wrong_row(model: onnx.ModelProto) -> None:
    """One row too far from the second chunk on."""
    rename_in(model, "RotaryEmbedding", "call.rows", "wrong_rows")
    chunk = small_config().chunk_size
    new = [
        helper.make_node("Constant", [], ["chunk"], value_ints=[chunk]),
        helper.make_node("GreaterOrEqual", ["position", "chunk"], ["past_edge"]),
        helper.make_node("Cast", ["past_edge"], ["one_or_zero"], to=onnx.TensorProto.INT64),
        helper.make_node("Constant", [], ["axis"], value_ints=[1]),
        helper.make_node("Unsqueeze", ["one_or_zero", "axis"], ["offset"]),
        helper.make_node("Add", ["call.rows", "offset"], ["shifted"]),
        helper.make_node("Mod", ["shifted", "chunk"], ["wrong_rows"]),
    ]
    place = list(model.graph.node).index(node(model, "call.rows")) + 1
    for index, extra in enumerate(new):
        model.graph.node.insert(place + index, extra)


def look_one_row_too_far(model: onnx.ModelProto) -> None:
    node(model, "call.past_is_filled").op_type = "LessOrEqual"


def rename_output(model: onnx.ModelProto) -> None:
    node(model, "present_norm.final").output[1] = "present_norm.last"
    (output,) = (output for output in model.graph.output if output.name == "present_norm.final")
    output.name = "present_norm.last"


def drop_output(model: onnx.ModelProto) -> None:
    (output,) = (output for output in model.graph.output if output.name == "new_value.1")
    model.graph.output.remove(output)


def rename_input(model: onnx.ModelProto) -> None:
    for graph_node in model.graph.node:
        for index, name in enumerate(graph_node.input):
            if name == "past_value.0":
                graph_node.input[index] = "old_value.0"
    (graph_input,) = (graph_input for graph_input in model.graph.input if graph_input.name == "past_value.0")
    graph_input.name = "old_value.0"


def break_graph(model: onnx.ModelProto) -> None:
    node(model, "call.past_is_filled").op_type = "NoSuchOperator"


@pytest.mark.parametrize(
    ("fault", "tensor", "problem"),
    [
        (change_weight("layers.0.mega.cema.q_powers", conjugate), "present_cema.0", None),
        (change_weight("layers.0.mega.wz_wr_wh1.weight", swap_heads), "new_key.0", None),
        (change_weight("layers.0.nffn.fc1.weight", one_nan), "present_norm.1", "NaN"),
        (freeze_state, "present_cema.1", "NaN"),
        (read_wrong_state, "present_cema.1", None),
        (rotate_from_the_wrong_row, "new_key.0", None),
        (look_one_row_too_far, "present_norm.1", None),
        (rename_output, "present_norm.final", "this output is missing"),
        (drop_output, "new_value.1", "this output is missing"),
        (rename_input, "all outputs", "old_value.0"),
        (break_graph, "all outputs", "NoSuchOperator"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_fault_is_found_where_it_is(
    bundle: Bundle, checkpoint: Path, tmp_path: Path, fault: Fault, tensor: str, problem: str | None
) -> None:
    report = verify_bundle(spoil(bundle, tmp_path / "spoilt", fault), ckpt=checkpoint)
    assert not report.passed
    miss = next(miss for miss in report.misses if miss.candidate == "onnxruntime")
    assert miss.tensor == tensor, report.verdict()
    assert (miss.problem is None) == (problem is None)
    assert problem is None or problem in str(miss.problem)
    assert tensor in report.verdict()
    assert not json.loads(json.dumps(report.to_dict(), allow_nan=False))["passed"]
    assert any(row[-1].startswith("MISSED") for row in report.table_rows())


def test_only_the_checkpoint_shows_a_wrong_weight(bundle: Bundle, tmp_path: Path) -> None:
    spoilt = spoil(bundle, tmp_path / "spoilt", change_weight("layers.0.mega.wz_wr_wh1.weight", swap_heads))
    assert verify_bundle(spoilt).passed


def test_what_is_not_finite_in_the_bundle_fails_without_the_checkpoint_too(bundle: Bundle, tmp_path: Path) -> None:
    spoilt = spoil(bundle, tmp_path / "spoilt", change_weight("layers.0.nffn.fc1.weight", one_nan))
    report = verify_bundle(spoilt)
    assert not report.passed
    assert report.misses[0].tensor == "present_norm.1"

"""Faults in a graph of every option at once: half precision, 4-bit matrices, quantised keys and values.
Each is found under its name, and the first wrong tensor inside the graph, too."""

from __future__ import annotations

from pathlib import Path

import pytest
from verify import graph_faults as faults
from verify.conftest import Verify
from verify.graph_faults import Fault, bend, change_weight, spoil

from megalodon_deploy.bundle import Bundle
from megalodon_deploy.export import export_checkpoint


@pytest.fixture(scope="module")
def quantized(quantized_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    target = tmp_path_factory.mktemp("bundle") / "quantized"
    options = {"precision": "fp16", "quantize": "int4", "kv_dtype": "int8"}
    return export_checkpoint(quantized_checkpoint, target, **options)


def test_a_right_one_passes(quantized: Bundle, quantized_checkpoint: Path, verify_copy: Verify) -> None:
    report = verify_copy(quantized, quantized_checkpoint, bisect=True)
    assert report.passed, report.verdict()
    assert list(report.candidates) == ["onnxruntime, widened", "onnxruntime", "onnxruntime session"]
    assert report.bisection is None
    for kind in ("key_scale", "value_scale"):
        assert kind in {finding.kind for finding in report.findings}


@pytest.mark.parametrize(
    ("fault", "name", "state", "inner"),
    [
        (
            faults.rotate_from_the_wrong_row,
            "RoPE offset at a chunk edge",
            "new_key.0",
            "layers.0.mega.attention.query",
        ),
        (faults.swap_quantised_value_heads, "swapped heads", "new_value.1", "layers.1.mega.wv_biased"),
        (
            change_weight("layers.0.mega.wv.weight.codes", faults.move_rows),
            "values",
            "new_value.0",
            "layers.0.mega.wv_biased",
        ),
        (faults.truncate_codes, "queries and keys", "new_key.0", "new_key.0"),
        (faults.swap_past_scales, "state or past rows", "present_norm.1", "layers.0.mega.attention.context"),
        (faults.attend_at_the_next_position, "input of a norm", "present_norm.1", "layers.0.mega.attention.context"),
        (faults.lose_state, "state not carried", "present_cema.1", "layers.1.mega.cema"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_fault_is_named_outside_and_inside(
    quantized: Bundle,
    quantized_checkpoint: Path,
    verify_copy: Verify,
    tmp_path: Path,
    fault: Fault,
    name: str,
    state: str,
    inner: str,
) -> None:
    report = verify_copy(spoil(quantized, tmp_path / "spoilt", fault), quantized_checkpoint, bisect=True)
    diagnosis = report.diagnoses[0]
    assert (diagnosis.candidate, diagnosis.name, diagnosis.first.tensor) == ("onnxruntime, widened", name, state)
    assert report.bisection is not None
    assert report.bisection.precision == "fp32"
    assert report.bisection.first is not None, report.bisection.describe()
    assert report.bisection.first.tensor == inner, report.bisection.describe()


def test_what_only_the_widened_graph_shows_is_looked_for_there(
    checkpoint: Path, verify_copy: Verify, tmp_path: Path
) -> None:
    half = export_checkpoint(checkpoint, tmp_path / "half", precision="fp16")
    report = verify_copy(spoil(half, tmp_path / "spoilt", bend("layers.1.mega.gated")), checkpoint, bisect=True)
    assert {miss.candidate for miss in report.misses} == {"onnxruntime, widened"}
    assert report.bisection is not None
    assert report.bisection.first is not None, report.bisection.describe()
    assert report.bisection.first.tensor == "layers.1.mega.wh2_unscaled"


@pytest.mark.parametrize("fault", [faults.drop_output, faults.break_graph, faults.rename_input])
def test_a_broken_contract_is_not_bisected(
    bundle: Bundle, checkpoint: Path, verify_copy: Verify, tmp_path: Path, fault: Fault
) -> None:
    report = verify_copy(spoil(bundle, tmp_path / "spoilt", fault), checkpoint, bisect=True)
    assert report.diagnoses[0].name == "contract"
    assert report.bisection is None
    assert [(item.what, item.why) for item in report.not_run[-1:]] == [("bisection", "onnxruntime breaks the contract")]

"""`verify --bisect`: the first tensor that is off, inside the graph, with the bundle left alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from export_helpers import export_seeded
from helpers import small_config
from verify import graph_faults as faults
from verify.conftest import Verify
from verify.graph_faults import Fault, bend, change_weight, spoil

from megalodon_deploy.bundle import Bundle, Precision
from megalodon_deploy.export import load_bundle_model
from megalodon_deploy.files import sha256_file
from megalodon_deploy.verify import verify_bundle
from megalodon_deploy.verify.bisection import bisect
from megalodon_deploy.verify.schedule import plan_schedules
from megalodon_deploy.verify.taps import collect, tapped_names


@pytest.mark.parametrize(
    ("fault", "tensor"),
    [
        (bend("layers.0.mega.cema"), "layers.0.mega.cema"),
        (bend("layers.1.mega.gated"), "layers.1.mega.gated"),
        (bend("layers.1.mega.hop"), "layers.1.mega.hop"),
        (bend("layers.0.nffn.hidden"), "layers.0.nffn.hidden"),
        (bend("layers.1.nffn.out"), "layers.1.nffn.out"),
        (change_weight("layers.0.nffn.fc1.weight", faults.one_nan), "layers.0.nffn.fc1"),
        (faults.rotate_from_the_wrong_row, "layers.0.mega.attention.query"),
        (faults.look_one_row_too_far, "layers.0.mega.attention.context"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_the_first_wrong_tensor_is_named(
    bundle: Bundle, checkpoint: Path, verify_copy: Verify, tmp_path: Path, fault: Fault, tensor: str
) -> None:
    spoilt = spoil(bundle, tmp_path / "spoilt", fault)
    before = {path.name: sha256_file(path) for path in spoilt.path.iterdir()}
    report = verify_copy(spoilt, checkpoint, bisect=True)
    assert {path.name: sha256_file(path) for path in spoilt.path.iterdir()} == before
    assert report.bisection is not None
    first = report.bisection.first
    assert first is not None
    missed_calls = [miss.call for miss in report.misses if miss.schedule == report.bisection.schedule]
    assert report.bisection.call <= min(missed_calls)
    assert first.tensor == tensor, report.bisection.describe()
    assert f"{first.found:.6g} instead of {first.expected:.6g}" in first.describe() or first.problem is not None
    assert f"layer {tensor.split('.')[1]} ({tensor})" in report.notes()[-2]
    rows = report.bisection_rows()
    names = [row[0] for row in rows]
    assert all(row[-1] == "passed" for row in rows[: next(i for i, n in enumerate(names) if f"({tensor})" in n)])


SWITCHES = {"swiglu": True, "scale_emb": True, "norm_affine": False}
SIZES = {"model_dim": 64, "z_dim": 32, "value_dim": 64, "ffn_hidden_dim": 96, "norm_num_groups": 4}


@pytest.mark.parametrize(
    ("precision", "config", "options"),
    [
        ("fp32", {}, {}),
        ("fp32", SWITCHES | {"share_emb": True}, {}),
        ("fp32", SIZES, {"quantize": "int8", "kv_dtype": "fp8"}),
        ("fp16", {}, {}),
        ("fp16", SWITCHES, {"kv_dtype": "int8"}),
        ("fp16", SIZES, {"quantize": "int4", "kv_dtype": "fp8"}),
        ("bf16", {}, {"kv_dtype": "int8"}),
        ("bf16", SWITCHES | SIZES, {"quantize": "int4"}),
    ],
    ids=str,
)
def test_in_a_right_graph_every_tensor_is_right(
    tmp_path: Path, precision: Precision, config: dict[str, Any], options: dict[str, Any]
) -> None:
    bundle = export_seeded(tmp_path, small_config(vocab_size=256, **config), precision=precision, **options)
    model = load_bundle_model(bundle)
    graph = onnx.load(bundle.model_path, load_external_data=False).graph
    for seed, schedule in enumerate(plan_schedules(bundle.config)[:2]):
        bisection = bisect(bundle, model, schedule, seed, widened=precision == "bf16")
        assert bisection.first is None, bisection.describe()
        assert bisection.call == len(schedule.calls) - 1
        assert {finding.tensor for finding in bisection.findings} == set(tapped_names(graph, bundle.config))
        assert "executor's optimisation" in bisection.describe()


def test_every_tensor_of_the_table_is_in_the_graph_and_in_pytorch(bundle: Bundle) -> None:
    names = tapped_names(onnx.load(bundle.model_path, load_external_data=False).graph, bundle.config)
    model = load_bundle_model(bundle)
    with collect(model) as taken, torch.inference_mode():
        model(torch.zeros(1, 3, dtype=torch.int64))
    inner = {counterpart for name, counterpart in names.items() if name != counterpart or name in taken}
    assert inner <= set(taken)
    assert set(taken) <= set(names.values())
    assert len(names) == 4 + 20 * bundle.config.num_layers
    with torch.inference_mode():
        model(torch.ones(1, 3, dtype=torch.int64))
    assert not taken["embed"].any() or np.array_equal(taken["embed"], model.embed.weight[[0, 0, 0]].detach()[None])


def test_nothing_is_bisected_where_nothing_missed(bundle: Bundle) -> None:
    assert verify_bundle(bundle, bisect=True).bisection is None

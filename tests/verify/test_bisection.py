"""`verify --bisect`: the first tensor that is off, inside the graph, with the bundle left alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from export_helpers import export_seeded
from helpers import small_config
from onnx import helper
from verify import graph_faults as faults
from verify.graph_faults import Fault, change_weight, node, spoil

from megalodon_deploy.bundle import Bundle, Precision
from megalodon_deploy.export import load_bundle_model
from megalodon_deploy.files import sha256_file
from megalodon_deploy.verify import verify_bundle
from megalodon_deploy.verify.bisection import bisect
from megalodon_deploy.verify.schedule import plan_schedules
from megalodon_deploy.verify.taps import collect, tapped_names


def bend(value: str) -> Fault:
    """x + x^2/100 instead of x, inside the graph; a mere factor would not show behind a norm."""

    def apply(model: onnx.ModelProto) -> None:
        producer = node(model, value)
        producer.output[list(producer.output).index(value)] = f"{value}.right"
        right, square, part = f"{value}.right", f"{value}.square", f"{value}.part"
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.float32(0.01), "constants.part"))
        wrong = [
            helper.make_node("Mul", [right, right], [square]),
            helper.make_node("Mul", [square, "constants.part"], [part]),
            helper.make_node("Add", [right, part], [value]),
        ]
        place = list(model.graph.node).index(producer) + 1
        for index, extra in enumerate(wrong):
            model.graph.node.insert(place + index, extra)

    apply.__name__ = value
    return apply


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
    bundle: Bundle, checkpoint: Path, tmp_path: Path, fault: Fault, tensor: str
) -> None:
    spoilt = spoil(bundle, tmp_path / "spoilt", fault)
    before = {path.name: sha256_file(path) for path in spoilt.path.iterdir()}
    report = verify_bundle(spoilt, ckpt=checkpoint, bisect=True)
    assert {path.name: sha256_file(path) for path in spoilt.path.iterdir()} == before
    assert report.bisection is not None
    first = report.bisection.first
    assert first is not None
    assert first.tensor == tensor, report.bisection.describe()
    assert f"{first.found:.6g} instead of {first.expected:.6g}" in first.describe() or first.problem is not None
    assert f"layer {tensor.split('.')[1]} ({tensor})" in report.notes()[-2]
    rows = report.bisection_rows()
    names = [row[0] for row in rows]
    assert all(row[-1] == "passed" for row in rows[: next(i for i, n in enumerate(names) if f"({tensor})" in n)])


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("switches", [{}, {"swiglu": True, "scale_emb": True, "norm_affine": False}])
def test_in_a_right_graph_every_tensor_is_right(
    tmp_path: Path, precision: Precision, switches: dict[str, bool]
) -> None:
    bundle = export_seeded(tmp_path, small_config(vocab_size=256, **switches), precision=precision)
    model = load_bundle_model(bundle)
    for seed, schedule in enumerate(plan_schedules(bundle.config)[:2]):
        bisection = bisect(bundle, model, schedule, seed)
        assert bisection.first is None, bisection.describe()
        assert bisection.call == len(schedule.calls) - 1
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

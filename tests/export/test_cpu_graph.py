"""The graph for ONNX Runtime's CPU provider beside the one for everybody."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from export_helpers import export_seeded, random_call, run_session
from helpers import small_config

from megalodon_deploy.bundle import CPU_MODEL_FILE, open_bundle
from megalodon_deploy.config import MegalodonConfig
from megalodon_deploy.export.cpu_graph import fuse_products
from megalodon_deploy.verify.onnx_values import open_exact


def blocks_config(**overrides: Any) -> MegalodonConfig:
    dims = {"model_dim": 64, "value_dim": 128, "ffn_hidden_dim": 96, "z_dim": 32, "norm_num_groups": 4}
    return small_config(**(dims | overrides))


def operators(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path, load_external_data=False).graph.node)


@pytest.mark.parametrize(
    ("options", "num_kept"),
    [
        ({"quantize": "int4"}, 0),
        ({"quantize": "int8", "block_size": 32}, 0),
        ({"quantize": "int4", "quantize_output": "none"}, 1),
    ],
    ids=str,
)
def test_every_product_with_codes_is_one_node(tmp_path: Path, options: dict[str, Any], num_kept: int) -> None:
    config = blocks_config()
    bundle = export_seeded(tmp_path, config, **options)
    onnx.checker.check_model(bundle.cpu_model_path, full_check=True)
    standard, fused = operators(bundle.model_path), operators(bundle.cpu_model_path)
    num_products = 5 * config.num_layers + 1 - num_kept
    assert standard["MatMul"] == 5 * config.num_layers + 1
    assert fused == standard - Counter(MatMul=num_products, DequantizeLinear=num_products) + Counter(
        QuantizedMatMul=num_products
    )
    graph = onnx.load(bundle.cpu_model_path, load_external_data=False).graph
    made = {name for node in graph.node for name in node.output} | {tensor.name for tensor in graph.initializer}
    assert {value.name for value in graph.value_info} <= made


@pytest.mark.parametrize(
    "readers",
    [
        "y = MatMul(w, x)",
        "y = MatMul(x, w) z = Transpose(w)",
        "y = Add(x, w)",
        "v = Cast <to = 1> (codes) y = MatMul(x, v)",
        "v = MatMul(x, w) y = MatMul(v, w)",
    ],
)
def test_a_matrix_that_is_read_otherwise_stays(readers: str) -> None:
    graph = onnx.parser.parse_graph(
        "one (float[2, 2] x) => (float[2, 2] y) <int8[2, 2] codes = {1, 2, 3, 4}, float[2] scales = {1, 2}>"
        f"{{ w = DequantizeLinear <axis = 1> (codes, scales) {readers} }}"
    )
    before = graph.SerializeToString()
    assert fuse_products(graph) == 0
    assert graph.SerializeToString() == before


def test_both_graphs_compute_the_same(tmp_path: Path) -> None:
    config = blocks_config()
    bundle = export_seeded(tmp_path, config, quantize="int4", quantize_embedding="int8")
    call = random_call(config, [4, 7], 3, seed=1)
    outputs = [run_session(open_exact(path), call) for path in (bundle.model_path, bundle.cpu_model_path)]
    assert outputs[0].keys() == outputs[1].keys()
    for name, expected in outputs[0].items():
        assert np.isfinite(np.asarray(expected, np.float64)).all()
        np.testing.assert_array_equal(outputs[1][name], expected)


@pytest.mark.parametrize("options", [{}, {"quantize": "fp8"}, {"quantize": "int4", "precision": "fp16"}], ids=str)
def test_where_nothing_is_replaced_there_is_no_second_graph(tmp_path: Path, options: dict[str, Any]) -> None:
    bundle = export_seeded(tmp_path, blocks_config(), **options)
    assert not (bundle.path / CPU_MODEL_FILE).exists()
    assert bundle.cpu_model_path == bundle.model_path


def test_odd_rows_of_four_bits_stay(tmp_path: Path) -> None:
    bundle = export_seeded(tmp_path, blocks_config(vocab_size=51), quantize="int4", quantize_output="int4")
    assert operators(bundle.cpu_model_path)["MatMul"] == 1
    assert np.isfinite(bundle.session("onnxruntime").stream().prefill([1, 2, 3])).all()


def test_a_session_opens_it_and_not_the_other(tmp_path: Path) -> None:
    bundle = open_bundle(export_seeded(tmp_path, blocks_config(), quantize="int4").path, verify_hashes=True)
    bundle.model_path.unlink()
    assert np.isfinite(bundle.session("onnxruntime").stream().prefill([1, 2, 3])).all()

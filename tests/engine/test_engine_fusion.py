"""One node in the place of a TimestepNorm and the ComplexEMA behind it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from export_helpers import assert_outputs_close, export_seeded, random_call, run_onnx, run_session
from helpers import small_config
from onnx import helper, parser

from megalodon_deploy.engine.fusion import fuse_norm_and_ema
from megalodon_deploy.engine.graph import prepare_graph
from megalodon_deploy.export.operators import DOMAIN
from megalodon_deploy.export.operators.schema import SIGNATURES
from megalodon_deploy.state import COMPLEX_EMA, TIMESTEP_NORM, TIMESTEP_NORM_COMPLEX_EMA

OPERATORS = {COMPLEX_EMA, TIMESTEP_NORM, TIMESTEP_NORM_COMPLEX_EMA}


def fused_function(epsilon: float) -> onnx.FunctionProto:
    """What the fused operator means: the two, one after the other."""
    names = [parameter for parameter, _, _ in SIGNATURES[TIMESTEP_NORM_COMPLEX_EMA]]
    ema_inputs = ["u", "past_cema", "position", *names[6:]]
    nodes = [
        helper.make_node(TIMESTEP_NORM, names[:5], ["u", "present_norm"], domain=DOMAIN, epsilon=epsilon),
        helper.make_node(COMPLEX_EMA, ema_inputs, ["y", "present_cema"], domain=DOMAIN),
    ]
    outputs = ["u", "present_norm", "y", "present_cema"]
    imports = [helper.make_opsetid(DOMAIN, 1)]
    return helper.make_function(DOMAIN, TIMESTEP_NORM_COMPLEX_EMA, names, outputs, nodes, imports)


@pytest.mark.parametrize("num_tokens", [1, 7])
def test_the_fused_graph_computes_the_same(tmp_path: Path, num_tokens: int) -> None:
    config = small_config()
    bundle = export_seeded(tmp_path, config)
    graph = prepare_graph(bundle.model_path, OPERATORS, config.chunk_size)
    assert graph.plugin_nodes == {TIMESTEP_NORM_COMPLEX_EMA: config.num_layers, TIMESTEP_NORM: 1}
    model = onnx.load_from_string(graph.model)
    removed = {TIMESTEP_NORM, COMPLEX_EMA}
    functions = onnx.load(bundle.model_path, load_external_data=False).functions
    model.functions.extend([function for function in functions if function.name in removed])
    model.functions.append(fused_function(config.norm_eps))
    path = bundle.path / "fused.onnx"
    path.write_bytes(model.SerializeToString())
    feeds = random_call(config, [5, 0], num_tokens)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert_outputs_close(run_session(session, feeds), run_onnx(bundle, feeds), 1e-6)


def test_without_the_fused_plugin_nothing_changes(tmp_path: Path) -> None:
    config = small_config()
    graph = prepare_graph(export_seeded(tmp_path, config).model_path, {COMPLEX_EMA, TIMESTEP_NORM}, config.chunk_size)
    assert graph.plugin_nodes == {TIMESTEP_NORM: config.num_layers + 1, COMPLEX_EMA: config.num_layers}


PAIR = """
<ir_version: 10, opset_import: ["": 23, "megalodon": 1]>
pair (float[B, T, 4] x, float[B, 2, 4] past_norm, int64[B] position, int64[B] other, float[B, 4, 3, 2] past,
      float[4] w, float[4] b, float[4, 3] p, float[1, 4, 3, 2] q, float[4, 3, 2] gamma, float[4] omega)
     => (float[B, T, 4] y, float[B, 4, 3, 2] present, float[B, T, 4] copy)
{{
    computed = Add (omega, omega)
    u, present_norm = megalodon.TimestepNorm <epsilon = 0.5> (x, past_norm, position, w, b)
    copy = Identity (u)
    y, present = megalodon.ComplexEMA ({average}, past, {position}, p, q, gamma, {omega})
    {more}
}}
"""


@pytest.mark.parametrize(
    ("changes", "count"),
    [
        ({}, 1),
        ({"average": "x"}, 0),  # not behind the norm
        ({"average": "copy"}, 0),
        ({"position": "other"}, 0),
        ({"omega": "computed"}, 0),  # might be computed behind the norm
        ({"more": "z, twice = megalodon.ComplexEMA (u, past, position, p, q, gamma, omega)"}, 1),
    ],
    ids=str,
)
def test_only_pairs_that_fit_are_fused(changes: dict[str, str], count: int) -> None:
    places = {"average": "u", "position": "position", "omega": "omega", "more": ""} | changes
    graph = parser.parse_model(PAIR.format(**places)).graph
    before = len(graph.node)
    assert fuse_norm_and_ema(graph) == count
    assert len(graph.node) == before - count
    fused = [node for node in graph.node if node.op_type == TIMESTEP_NORM_COMPLEX_EMA]
    assert len(fused) == count
    for node in fused:
        assert list(node.input) == ["x", "past_norm", "position", "w", "b", "past", "p", "q", "gamma", "omega"]
        assert list(node.output) == ["u", "present_norm", "y", "present"]
        assert helper.get_node_attr_value(node, "epsilon") == 0.5
    defined = {value.name for value in graph.input}
    for node in graph.node:
        assert defined.issuperset(node.input), node.name
        defined |= set(node.output)
    assert np.all([value.name in defined for value in graph.output])

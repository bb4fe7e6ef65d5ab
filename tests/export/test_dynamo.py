"""An independent export: torch.export and torch.onnx trace the PyTorch model, and both graphs must agree.

Tracing knows nothing of our graph emitter or weight folding; only the operators are translated, to the same ONNX
functions.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from export_helpers import Arrays, assert_outputs_close, export_seeded, random_call, run_onnx, run_session, run_torch
from helpers import small_config
from onnxscript import opset23 as op
from onnxscript.values import Opset

from megalodon_deploy.bundle import open_bundle
from megalodon_deploy.config import MegalodonConfig
from megalodon_deploy.export.builder import IR_VERSION, OPSET
from megalodon_deploy.export.operators import DOMAIN, DOMAIN_VERSION
from megalodon_deploy.export.operators.chunk_attention import chunk_attention_function
from megalodon_deploy.export.operators.complex_ema import complex_ema_function
from megalodon_deploy.export.operators.timestep_norm import timestep_norm_function
from megalodon_deploy.model.checkpoint import load_checkpoint
from megalodon_deploy.model.megalodon import Megalodon
from megalodon_deploy.state import LOGITS, POSITION, TOKENS, state_specs

TOLERANCE = 5e-6


class OneCall(torch.nn.Module):
    """`Megalodon.forward_one_chunk` with the state as positional tensors."""

    def __init__(self, model: Megalodon) -> None:
        super().__init__()
        self.model = model
        self.past_names = [spec.past for spec in state_specs(model.config)]

    def forward(self, tokens: torch.Tensor, position: torch.Tensor, past: list[torch.Tensor]) -> list[torch.Tensor]:
        logits, present = self.model.forward_one_chunk(tokens, position, dict(zip(self.past_names, past, strict=True)))
        return [logits, *(present[spec.present] for spec in state_specs(self.model.config))]


def translations(num_powers: int) -> dict[Any, Any]:
    """How the two custom operators become ONNX nodes; the traced model holds q, ours wants its powers."""
    ours = Opset(DOMAIN, DOMAIN_VERSION)

    def complex_ema(x: Any, past: Any, position: Any, p: Any, q: Any, gamma: Any, omega: Any) -> Any:
        real, imaginary = op.Split(op.Cast(q, to=int(ir.DataType.DOUBLE)), num_outputs=2, axis=-1)
        powers = []
        for _ in range(num_powers):
            pairs = op.Cast(op.Concat(real, imaginary, axis=-1), to=int(ir.DataType.FLOAT))
            powers.append(op.Unsqueeze(pairs, op.Constant(value_ints=[0])))
            real, imaginary = (
                op.Sub(op.Mul(real, real), op.Mul(imaginary, imaginary)),
                op.Mul(op.Mul(real, imaginary), op.Constant(value=onnx.numpy_helper.from_array(np.array(2.0)))),
            )
        return ours.ComplexEMA(x, past, position, p, op.Concat(*powers, axis=0), gamma, omega, _outputs=2)

    def timestep_norm(x: Any, past: Any, position: Any, weight: Any, bias: Any, eps: float) -> Any:
        return ours.TimestepNorm(x, past, position, weight, bias, epsilon=eps, _outputs=2)

    def chunk_attention(q: Any, k: Any, v: Any, past_key: Any, past_value: Any, position: Any, chunk_size: int) -> Any:
        return ours.ChunkAttention(q, k, v, past_key, past_value, position, chunk_size=chunk_size)

    operators = torch.ops.megalodon
    return {
        operators.complex_ema.default: complex_ema,
        operators.timestep_norm.default: timestep_norm,
        operators.chunk_attention.default: chunk_attention,
    }


@pytest.fixture(scope="module")
def config() -> MegalodonConfig:
    return small_config(chunk_size=40, num_layers=1, swiglu=True, rescale_nffn=True, scale_emb=True)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, config: MegalodonConfig) -> Path:
    root = tmp_path_factory.mktemp("dynamo")
    export_seeded(root, config, logits="all")
    return root


@pytest.fixture(scope="module")
def traced(root: Path, config: MegalodonConfig) -> onnxruntime.InferenceSession:
    """The traced graph; its inputs and outputs get our names, since it has the same order."""
    specs = list(state_specs(config))
    example = {name: torch.from_numpy(value) for name, value in random_call(config, [7, 20], 5, capacity=30).items()}
    dynamic = torch.export.Dim.DYNAMIC
    program = torch.export.export(
        OneCall(load_checkpoint(root / "ckpt")),
        (example[TOKENS], example[POSITION], [example[spec.past] for spec in specs]),
        dynamic_shapes={
            "tokens": {0: dynamic, 1: dynamic},
            "position": {0: dynamic},
            "past": [{0: dynamic, 2: dynamic} if spec.is_activation else {0: dynamic} for spec in specs],
        },
    )
    table = translations(config.chunk_size.bit_length())
    exported = torch.onnx.export(program, dynamo=True, custom_translation_table=table, opset_version=23, verbose=False)
    assert exported is not None
    model = exported.model
    model.graph.opset_imports[""], model.ir_version = OPSET, IR_VERSION
    functions = [
        complex_ema_function(config.chunk_size),
        timestep_norm_function(config.norm_num_groups, config.group_dim),
        chunk_attention_function(),
    ]
    model.functions.update({function.identifier(): function for function in functions})
    for value, name in zip(model.graph.inputs, [TOKENS, POSITION, *(spec.past for spec in specs)], strict=True):
        value.name = name
    for value, name in zip(model.graph.outputs, [LOGITS, *(spec.present for spec in specs)], strict=True):
        value.name = name
    path = root / "traced.onnx"
    ir.save(model, path)
    onnx.checker.check_model(path, full_check=True)
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize(
    ("positions", "num_tokens", "capacity"),
    [([0], 1, 0), ([0, 3, 39], 1, 39), ([7, 20], 5, 30), ([3, 0], 33, 3), ([80], 40, 0)],
)
def test_traced_graph_agrees(
    root: Path,
    config: MegalodonConfig,
    traced: onnxruntime.InferenceSession,
    positions: list[int],
    num_tokens: int,
    capacity: int,
) -> None:
    feeds: Arrays = random_call(config, positions, num_tokens, capacity=capacity)
    expected = run_torch(root / "ckpt", feeds, all_logits=True)
    from_trace = run_session(traced, feeds)
    assert_outputs_close(from_trace, expected, TOLERANCE)
    assert_outputs_close(run_onnx(open_bundle(root / "bundle"), feeds), from_trace, TOLERANCE)

"""A hand-made bundle: the smallest graph with our operators, their functions and every state tensor.

It computes nothing of use. It stands for what export writes where only the build is on trial.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from helpers import small_config
from onnx import numpy_helper, parser

from megalodon_deploy.bundle import (
    MANIFEST_FILE,
    MODEL_FILE,
    WEIGHTS_FILE,
    Bundle,
    FileEntry,
    Manifest,
    Precision,
    TokenizerInfo,
    open_bundle,
)
from megalodon_deploy.config import MegalodonConfig
from megalodon_deploy.state import state_specs

ONNX_TYPES = {"fp32": "float", "fp16": "float16", "bf16": "bfloat16"}

EMA_NODE = "megalodon.ComplexEMA ({x}, {past}, position, p, q_powers, gamma, omega)"
NORM_NODE = "megalodon.{norm} <epsilon = 0.00001> ({x}, {past}, position, w, b)"
FUNCTIONS = """
<domain: "megalodon", opset_import: ["": 23]>
TimestepNorm <epsilon> (x, past, position, weight, bias) => (y, present)
{
    wide = Cast <to = 11> (x)
    half = Constant <value = double {0.5}> ()
    shift = Mul (wide, half)
    centred = Sub (wide, shift)
    scaled = Mul (centred, half)
    y = CastLike (scaled, x)
    present = Identity (past)
}
<domain: "megalodon", opset_import: ["": 23]>
ComplexEMA (x, past, position, p, q_powers, gamma, omega) => (y, present)
{
    wide = Cast <to = 1> (x)
    scaled = Mul (wide, omega)
    y = CastLike (scaled, x)
    present = Identity (past)
}
"""


def _model_text(config: MegalodonConfig, dtype: str, norm: str) -> str:
    """The graph in ONNX's text syntax, where a state is called past_norm_0 instead of past_norm.0."""
    inputs, outputs = ["int64[B, T] tokens", "int64[B] position"], ["float[B, 1, V] logits"]
    nodes, x = ["x = Gather (embed, tokens)"], "x"
    for index, spec in enumerate(state_specs(config)):
        past, present = _text_name(spec.past), _text_name(spec.present)
        kind = dtype if spec.is_activation else "float"
        inputs.append(f"{kind}[{', '.join(map(str, spec.past_shape))}] {past}")
        outputs.append(f"{kind}[{', '.join(map(str, spec.present_shape))}] {present}")
        if not spec.is_activation:
            node = EMA_NODE if spec.kind == "cema" else NORM_NODE
            nodes.append(f"x{index}, {present} = " + node.format(norm=norm, x=x, past=past))
            x = f"x{index}"
        else:
            nodes.append(f"{present} = Identity ({past})")
    nodes += [f"last = Slice ({x}, minus_one, end, one)", "narrow = MatMul (last, output)"]
    nodes.append("logits = Cast <to = 1> (narrow)")
    header = '<ir_version: 10, opset_import: ["": 23, "megalodon": 1]>'
    body = "\n".join(nodes)
    return f"{header}\nhand_made ({', '.join(inputs)}) => ({', '.join(outputs)})\n{{\n{body}\n}}\n{FUNCTIONS}"


def _text_name(name: str) -> str:
    return name.replace(".", "_")


def _restore_names(model: onnx.ModelProto, config: MegalodonConfig) -> None:
    names = {_text_name(name): name for spec in state_specs(config) for name in (spec.past, spec.present)}
    for value in (*model.graph.input, *model.graph.output):
        value.name = names.get(value.name, value.name)
    for node in model.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]


def _initializers(config: MegalodonConfig, dtype: str) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    dim, modes, vocabulary = config.model_dim, config.cema_ndim, config.vocab_size
    activation = onnx.helper.tensor_dtype_to_np_dtype(getattr(onnx.TensorProto, dtype.upper()))
    powers = config.chunk_size.bit_length()
    return {
        "embed": rng.normal(size=(vocabulary, dim)).astype(activation),
        "output": rng.normal(size=(dim, vocabulary)).astype(activation),
        "w": np.ones(dim, np.float32),
        "b": np.zeros(dim, np.float32),
        "p": np.full((dim, modes), 0.5, np.float32),
        "q_powers": np.full((powers, dim, modes, 2), 0.25, np.float32),
        "gamma": rng.normal(size=(dim, modes, 2)).astype(np.float32),
        "omega": rng.normal(size=dim).astype(np.float32),
        "minus_one": np.array([-1]),
        "end": np.array([2**31 - 1]),
        "one": np.array([1]),
    }


def write_bundle(path: Path, config: MegalodonConfig, precision: Precision, norm: str = "TimestepNorm") -> Bundle:
    dtype = ONNX_TYPES[precision]
    model = parser.parse_model(_model_text(config, dtype, norm))
    _restore_names(model, config)
    for name, array in _initializers(config, dtype).items():
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    path.mkdir()
    onnx.save(model, path / MODEL_FILE, save_as_external_data=True, location=WEIGHTS_FILE, size_threshold=64)
    manifest = Manifest(
        name=path.name,
        config=config,
        precision=precision,
        logits="last",
        tokenizer=TokenizerInfo("bytes"),
        files={name: FileEntry.of(path / name) for name in (MODEL_FILE, WEIGHTS_FILE)},
        tools={},
        source={},
    )
    (path / MANIFEST_FILE).write_text(manifest.to_json(), encoding="utf-8")
    return open_bundle(path)


@pytest.fixture
def hand_made(tmp_path: Path) -> Callable[..., Bundle]:
    """`hand_made("fp16", norm="Misspelt")` makes a bundle of two layers: 2 ComplexEMA and 3 TimestepNorm nodes."""

    def make(precision: Precision = "fp16", norm: str = "TimestepNorm") -> Bundle:
        return write_bundle(tmp_path / "bundle", small_config(), precision, norm)

    return make

"""Tensors between a call's inputs and outputs, in the order in which the model computes them, on both sides.

The graph's have names and are marked as outputs of a copy in memory, which reads its weights from the bundle's own
file. PyTorch's come from hooks on its modules. What both sides have is compared.

Shapes: B rows, T tokens, D channels, H heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from torch import Tensor, nn

from megalodon_deploy.config import MegalodonConfig
from megalodon_deploy.model.megalodon import Megalodon
from megalodon_deploy.verify.onnx_values import open_exact

# Of a layer, in the order of its block: the graph's names below `layers.{i}.`, the last one that is there counts (a
# half-precision graph has casts and factors behind some), and the same tensor in PyTorch; "": a state output.
_LAYER: tuple[tuple[tuple[str, ...], str], ...] = (
    (("mega.timenorm",), "mega.timenorm"),
    (("present_norm",), ""),
    (("mega.cema",), "mega.cema"),
    (("present_cema",), ""),
    (("mega.rmsnorm", "mega.rmsnorm_cast"), "mega.rmsnorm"),
    (("mega.wv_biased",), "mega.wv"),
    (("new_value_scale",), ""),
    (("new_value",), ""),
    (("mega.wz",), "mega.wz"),
    (("mega.attention.query",), "query"),
    (("new_key_scale",), ""),
    (("new_key",), ""),
    (("mega.attention.context",), "attended"),
    (("mega.gated",), "gated"),
    (("mega.wh2", "mega.wh2_unscaled"), "mega.wh2"),
    (("mega.wh1",), "mega.wh1"),
    (("mega.hop",), "mega"),
    (("nffn.norm", "nffn.norm_cast"), "nffn.norm"),
    (("nffn.fc1",), "nffn.fc1"),
    (("nffn.hidden",), "hidden"),
    (("nffn.fc2", "nffn.fc2_unscaled"), "nffn.fc2"),
    (("nffn.out",), "out"),
)
# Tensors that a half-precision graph keeps in range by a factor, with the graph's tensor that tells: PyTorch's differ.
_SCALED = {"gated": "mega.gate_headroom", "hidden": "nffn.hidden_gate_headroom"}
_HOOKED = ("timenorm", "cema", "rmsnorm", "wv", "wz", "wh1", "wh2")  # modules of a block's attention part
Arrays = dict[str, np.ndarray]


def tapped_names(graph: onnx.GraphProto, config: MegalodonConfig) -> dict[str, str]:
    """Names of the graph's tensors in the model's order, each with the name of its counterpart in `collect`'s dict;
    a state output and the logits are their own."""
    there = {output for node in graph.node for output in node.output}
    names: dict[str, str] = {}

    def add(alternatives: list[str], counterpart: str) -> None:
        if found := [name for name in alternatives if name in there]:
            names[found[-1]] = counterpart or found[-1]

    add(["embed", "embed_scaled"], "embed")
    for layer in range(config.num_layers):
        for alternatives, counterpart in _LAYER:
            if counterpart in _SCALED and f"layers.{layer}.{_SCALED[counterpart]}" in there:
                continue
            if counterpart:
                add([f"layers.{layer}.{name}" for name in alternatives], f"layers.{layer}.{counterpart}")
            else:
                add([f"{name}.{layer}" for name in alternatives], "")
    add(["output.final_norm"], "output.final_norm")
    add(["present_norm.final"], "")
    add(["logits"], "")
    return names


def load_tapped(model_path: Path, names: Iterator[str]) -> onnxruntime.InferenceSession:
    """The graph with more outputs, on the CPU. Nothing is written: the weights are read from beside `model_path`."""
    model = onnx.load(model_path, load_external_data=False)
    present = {output.name for output in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in present)
    return open_exact(model.SerializeToString(), model_path.parent)


@contextmanager
def collect(model: Megalodon) -> Iterator[Arrays]:
    """Tensors of the next call of `model`, float32, by the counterparts' names of `tapped_names`."""
    taken: Arrays = {}
    handles = [model.layers[0].register_forward_pre_hook(_input_hook(taken, "embed"))]
    assert model.output is not None, "Bug: a stage of a pipeline"
    handles.append(model.output.final_norm.register_forward_hook(_output_hook(taken, "output.final_norm")))
    layer: Any  # PyTorch types a module list's items as modules without attributes
    for index, layer in enumerate(model.layers):
        prefix = f"layers.{index}"
        handles.append(layer.mega.register_forward_pre_hook(_attend_hook(taken, prefix)))
        handles.append(layer.mega.wh2.register_forward_pre_hook(_input_hook(taken, f"{prefix}.gated")))
        handles.append(layer.nffn.fc2.register_forward_pre_hook(_input_hook(taken, f"{prefix}.hidden")))
        modules = {f"mega.{name}": getattr(layer.mega, name) for name in _HOOKED}
        modules |= {f"nffn.{name}": getattr(layer.nffn, name) for name in ("norm", "fc1", "fc2")}
        modules |= {"mega": layer.mega, "out": layer}
        for name, module in modules.items():
            handles.append(module.register_forward_hook(_output_hook(taken, f"{prefix}.{name}")))
    try:
        yield taken
    finally:
        for handle in handles:
            handle.remove()


def _keep(taken: Arrays, name: str, tensor: Tensor) -> None:
    taken[name] = tensor.detach().float().cpu().numpy().copy()


def _output_hook(taken: Arrays, name: str) -> Callable[[nn.Module, Any, Any], None]:
    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        _keep(taken, name, output[0] if isinstance(output, tuple) else output)

    return hook


def _input_hook(taken: Arrays, name: str) -> Callable[[nn.Module, Any], None]:
    def hook(module: nn.Module, inputs: Any) -> None:
        _keep(taken, name, inputs[0])

    return hook


def _attend_hook(taken: Arrays, prefix: str) -> Callable[[nn.Module, Any], Any]:
    """What goes into attention and comes out of it passes through a function of the call, not a module."""

    def hook(module: nn.Module, inputs: Any) -> Any:
        x_BTD, past, call = inputs
        attend = call.attend

        def attend_and_keep(q_BHTd: Tensor, *others: Tensor) -> Tensor:
            out_BHTe: Tensor = attend(q_BHTd, *others)
            _keep(taken, f"{prefix}.query", q_BHTd)
            _keep(taken, f"{prefix}.attended", out_BHTe.transpose(1, 2).flatten(2))
            return out_BHTe

        return x_BTD, past, call._replace(attend=attend_and_keep)

    return hook

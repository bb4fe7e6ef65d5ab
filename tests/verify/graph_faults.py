"""Faults to plant in an exported graph, each of a kind that exporters, plugins and runtimes have had."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from helpers import small_config
from onnx import helper, numpy_helper
from onnx.external_data_helper import set_external_data

from megalodon_deploy.bundle import MANIFEST_FILE, MODEL_FILE, WEIGHTS_FILE, Bundle, FileEntry, open_bundle

Fault = Callable[[onnx.ModelProto], None]


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

    apply.__name__ = f"{change.__name__}_of_{name}"
    return apply


def conjugate(q_powers: np.ndarray) -> np.ndarray:
    return q_powers * np.array([1, -1], np.float32)


def swap_key_heads(weight: np.ndarray) -> np.ndarray:
    config = small_config()
    wz, rest = np.split(weight, [config.z_dim], axis=1)
    return np.concatenate([np.roll(wz, config.key_head_dim, axis=1), rest], axis=1)


def swap_value_heads(weight: np.ndarray) -> np.ndarray:
    return np.roll(weight, small_config().value_head_dim, axis=1)


def swap_tokens(weight: np.ndarray) -> np.ndarray:
    return np.roll(weight, 1, axis=1)


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


def lose_state(model: onnx.ModelProto) -> None:
    rename_in(model, "ComplexEMA", "past_cema.1", "no_past")
    model.graph.node.insert(0, helper.make_node("Sub", ["past_cema.1", "past_cema.1"], ["no_past"]))


def keep_norms_in_float32(model: onnx.ModelProto) -> None:
    """The low halves are dropped on their way out."""
    model.graph.initializer.append(numpy_helper.from_array(np.array([1, 0, 1, 0], np.float32), "constants.halves"))
    for name in [output.name for output in model.graph.output if output.name.startswith("present_norm")]:
        producer = node(model, name)
        producer.output[list(producer.output).index(name)] = f"whole.{name}"
        model.graph.node.append(helper.make_node("Mul", [f"whole.{name}", "constants.halves"], [name]))


def start_in_used_memory(op_type: str) -> Fault:
    """No row is ever taken for fresh."""

    def apply(model: onnx.ModelProto) -> None:
        (function,) = (function for function in model.functions if function.name == op_type)
        (fresh,) = (node for node in function.node if node.op_type == "Equal" and node.input[0] == "position")
        fresh.input[1] = "never"
        function.node.insert(0, helper.make_node("Constant", [], ["never"], value_int=-1))

    apply.__name__ = f"start_{op_type}_in_used_memory"
    return apply


def read_the_first_rows_state(model: onnx.ModelProto) -> None:
    """Every row of the batch goes on from the state of the first."""
    rename_in(model, "ComplexEMA", "past_cema.1", "first_past")
    model.graph.initializer.append(numpy_helper.from_array(np.array([0]), "constants.first"))
    steps = [
        helper.make_node("Gather", ["past_cema.1", "constants.first"], ["first_row"], axis=0),
        helper.make_node("Shape", ["past_cema.1"], ["shape_of_all"]),
        helper.make_node("Expand", ["first_row", "shape_of_all"], ["first_past"]),
    ]
    for place, step in enumerate(steps):
        model.graph.node.insert(place, step)


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
    (function,) = (function for function in model.functions if function.name == "ChunkAttention")
    (filled,) = (node for node in function.node if "past_is_filled" in node.output)
    filled.op_type = "LessOrEqual"


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
    node(model, "call.rows").op_type = "NoSuchOperator"


def replace_value(model: onnx.ModelProto, value: str, steps: list[onnx.NodeProto]) -> None:
    """Let `steps` make `value` of what its node makes, which they read as `VALUE.right`."""
    producer = node(model, value)
    producer.output[list(producer.output).index(value)] = f"{value}.right"
    place = list(model.graph.node).index(producer) + 1
    for index, extra in enumerate(steps):
        model.graph.node.insert(place + index, extra)


def bend(value: str) -> Fault:
    """x + x^2/20 instead of x, inside the graph; a mere factor would not show behind a norm."""

    def apply(model: onnx.ModelProto) -> None:
        right, square, part = f"{value}.right", f"{value}.square", f"{value}.part"
        model.graph.initializer.append(numpy_helper.from_array(np.float32(0.05), "constants.part"))
        steps = [
            helper.make_node("CastLike", ["constants.part", right], ["part"]),
            helper.make_node("Mul", [right, right], [square]),
            helper.make_node("Mul", [square, "part"], [part]),
            helper.make_node("Add", [right, part], [value]),
        ]
        replace_value(model, value, steps)

    apply.__name__ = value
    return apply


def truncate_codes(model: onnx.ModelProto) -> None:
    """Towards zero, where the nearest code is due."""
    value = "layers.0.mega.attention.key_scaled"
    steps = [
        helper.make_node("Sign", [f"{value}.right"], ["sign"]),
        helper.make_node("Abs", [f"{value}.right"], ["magnitude"]),
        helper.make_node("Floor", ["magnitude"], ["floor"]),
        helper.make_node("Mul", ["floor", "sign"], [value]),
    ]
    replace_value(model, value, steps)


def swap_past_scales(model: onnx.ModelProto) -> None:
    rename_in(model, "ChunkAttention", "past_key_scale.0", "kept")
    rename_in(model, "ChunkAttention", "past_value_scale.0", "past_key_scale.0")
    rename_in(model, "ChunkAttention", "kept", "past_value_scale.0")


def attend_at_the_next_position(model: onnx.ModelProto) -> None:
    rename_in(model, "ChunkAttention", "position", "next_position")
    model.graph.node.insert(0, helper.make_node("Add", ["position", "constants.one"], ["next_position"]))


def swap_quantised_value_heads(model: onnx.ModelProto) -> None:
    for part in ("codes", "scales"):
        change_weight(f"layers.1.mega.wv.weight.{part}", swap_halves)(model)


def swap_halves(values: np.ndarray) -> np.ndarray:
    """The columns of two heads."""
    return np.roll(values, values.shape[1] // 2, axis=1)


def move_rows(codes: np.ndarray) -> np.ndarray:
    return np.roll(codes, 1, axis=0)

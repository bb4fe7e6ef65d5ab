"""TensorRT-RTX builds engines with every plugin that the library has, in every activation and memory type.

One network holds a node for each of them; what it is made of comes from the operators' schemas, so that a new operator
is covered once it has one.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from megalodon_deploy.bundle import Precision
from megalodon_deploy.engine.child import run_job
from megalodon_deploy.engine.job import BuildJob
from megalodon_deploy.engine.library import find_plugin_library
from megalodon_deploy.engine.profile import ShapeRange
from megalodon_deploy.export.operators import DOMAIN, DOMAIN_VERSION
from megalodon_deploy.export.operators.schema import ACTIVATION, FLOAT, MEMORY, SIGNATURES, register_schemas
from megalodon_deploy.state import CHUNK_SIZE, TOKENS

TYPES: dict[Precision, int] = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
QUANTISED = {"int8": TensorProto.INT8, "fp8": TensorProto.FLOAT8E4M3FN}
CHUNK = 40
MAX_BATCH = 3
FIXED = {"D": 24, "N": 4, "K": 6, "G": 3, "H": 2, "dz": 16, "dv": 32}
RANGES = {"B": (1, 2, MAX_BATCH), "T": (1, 1, CHUNK), "S": (0, CHUNK, CHUNK)}  # smallest, usual, largest


def plugin_names() -> list[str]:
    """What TensorRT-RTX registers when it loads the library, from a process of its own."""
    program = f"""
import tensorrt_rtx as trt
registry = trt.get_plugin_registry()
before = {{creator.name for creator in registry.all_creators}}
registry.load_library({str(find_plugin_library())!r})
print(*sorted({{creator.name for creator in registry.all_creators}} - before))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return done.stdout.split()


class Network:
    """Nodes with inputs of their own, and the profile of those inputs."""

    def __init__(self, activation: int) -> None:
        self.activation = activation
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self.nodes: list[onnx.NodeProto] = []
        self.profile: dict[str, ShapeRange] = {}

    def add_input(self, name: str, kind: int, dims: tuple[str | int, ...]) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, kind, [FIXED.get(str(dim), dim) for dim in dims]))
        shapes = (
            [RANGES[str(dim)][i] if str(dim) in RANGES else FIXED.get(str(dim), dim) for dim in dims] for i in range(3)
        )
        self.profile[name] = ShapeRange(*(tuple(int(dim) for dim in shape) for shape in shapes))
        return name

    def add_operator(self, operator: str, memory: int, suffix: str) -> None:
        """A node with all inputs, or without the scales where memory has the activation type."""
        is_quantised = memory != self.activation
        names = []
        for parameter, kind, dims in SIGNATURES[operator]:
            if parameter.endswith("_scale") and not is_quantised:
                continue
            types = {ACTIVATION: self.activation, MEMORY: memory, FLOAT: TensorProto.FLOAT}
            names.append(self.add_input(f"{operator}{suffix}.{parameter}", types.get(kind, TensorProto.INT64), dims))
        schema = onnx.defs.get_schema(operator, DOMAIN_VERSION, DOMAIN)
        outputs = [f"{operator}{suffix}.{output.name}" for output in schema.outputs]
        attributes = {CHUNK_SIZE: CHUNK} if CHUNK_SIZE in schema.attributes else {}
        self.nodes.append(helper.make_node(operator, names, outputs, domain=DOMAIN, **attributes))
        self.outputs += [helper.make_empty_tensor_value_info(name) for name in outputs]

    def save(self, path: Path) -> None:
        """With `tokens`, which every network of ours has."""
        self.add_input(TOKENS, TensorProto.INT64, ("B", "T"))
        self.nodes.append(helper.make_node("Identity", [TOKENS], ["same"]))
        self.outputs.append(helper.make_empty_tensor_value_info("same"))
        graph = helper.make_graph(self.nodes, "plugins", self.inputs, self.outputs)
        imports = [helper.make_opsetid("", 23), helper.make_opsetid(DOMAIN, DOMAIN_VERSION)]
        model = onnx.shape_inference.infer_shapes(
            helper.make_model(graph, opset_imports=imports, ir_version=11), check_type=True, strict_mode=True
        )
        onnx.save(model, path)


def memory_types(operator: str, activation: int) -> Iterator[tuple[str, int]]:
    yield "", activation
    if any(kind == MEMORY for _, kind, _ in SIGNATURES[operator]):
        yield from ((f"_{name}", kind) for name, kind in QUANTISED.items())


def job_for(network: Network, folder: Path, precision: Precision) -> BuildJob:
    network.save(folder / "model.onnx")
    return BuildJob(
        flavour="tensorrt-rtx",
        model_path=str(folder / "model.onnx"),
        engine_path=str(folder / "model.engine"),
        engines_dir=str(folder / "engines"),
        overwrite=False,
        precision=precision,
        max_batch=MAX_BATCH,
        capabilities=(89, 120),  # the first has fp8, which earlier ones refuse
        profile=network.profile,
        plugin_library=str(find_plugin_library()),
        attention="plugin",
    )


@pytest.fixture(scope="module", autouse=True)
def _schemas() -> None:
    register_schemas()


def test_every_plugin_has_a_schema() -> None:
    assert plugin_names() == sorted(SIGNATURES)


@pytest.mark.parametrize("precision", TYPES)
def test_every_plugin_builds(tmp_path: Path, precision: Precision) -> None:
    network = Network(TYPES[precision])
    for operator in SIGNATURES:
        for suffix, memory in memory_types(operator, network.activation):
            network.add_operator(operator, memory, suffix)
    counts = Counter(node.op_type for node in network.nodes)
    result = run_job(job_for(network, tmp_path, precision))
    assert result.plugins == tuple(sorted(SIGNATURES))
    assert result.num_plugin_layers == sum(counts[operator] for operator in SIGNATURES)
    engine = (tmp_path / "model.engine").read_bytes()
    assert all(operator.encode() in engine for operator in SIGNATURES)


def test_the_types_are_all_that_operators_take() -> None:
    """A type that a schema allows and that no network here has would go untested."""
    schemas = [onnx.defs.get_schema(name, DOMAIN_VERSION, DOMAIN) for name in SIGNATURES]
    allowed = set(
        itertools.chain.from_iterable(
            constraint.allowed_type_strs for schema in schemas for constraint in schema.type_constraints
        )
    )
    names = {TensorProto.FLOAT8E4M3FN: "float8e4m3fn"}
    tested = {
        names.get(kind, TensorProto.DataType.Name(kind).lower()) for kind in (*TYPES.values(), *QUANTISED.values())
    }
    assert allowed == {f"tensor({name})" for name in tested}

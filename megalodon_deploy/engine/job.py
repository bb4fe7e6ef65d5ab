"""What passes between a build and its child process: a job in, events out, both JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megalodon_deploy.bundle import AttentionKind, Precision
from megalodon_deploy.engine.profile import ShapeRange
from megalodon_deploy.engine.targets import EngineWeights, Flavour
from megalodon_deploy.engine.weight_inputs import WeightPlace


@dataclass(frozen=True, kw_only=True)
class BuildJob:
    """Everything the child needs; paths are absolute."""

    flavour: Flavour
    model_path: str
    engine_path: str  # where the child writes the engine
    engines_dir: str  # where the finished engine will go, under a name that holds TensorRT's version
    overwrite: bool
    precision: Precision
    max_batch: int
    capabilities: tuple[int, ...]  # empty: the GPU of this machine
    profile: Mapping[str, ShapeRange]
    plugin_library: str | None
    weights: EngineWeights = "engine"
    attention: AttentionKind = "standard"
    hardware_compatible: bool = False  # full TensorRT: for Ampere and later
    version_compatible: bool = False

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> BuildJob:
        values = json.loads(text)
        values["capabilities"] = tuple(values["capabilities"])
        values["profile"] = {name: ShapeRange.from_lists(value) for name, value in values["profile"].items()}
        return cls(**values)


@dataclass(frozen=True, kw_only=True)
class BuildResult:
    """What the child reports when the engine is written."""

    engine_id: str
    version: str  # of TensorRT
    capabilities: tuple[int, ...]
    plugins: tuple[str, ...]  # operators that a plugin computes
    num_plugin_layers: int
    narrowed: bool  # float64 arithmetic became float32
    bundle_weights: Mapping[str, WeightPlace]  # those that the engine lacks
    peak_memory_bytes: int

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> BuildResult:
        converted = {name: tuple(values[name]) for name in ("capabilities", "plugins")}
        places = {name: WeightPlace.from_dict(place) for name, place in values["bundle_weights"].items()}
        return cls(**(dict(values) | converted | {"bundle_weights": places}))


def engine_id(job: BuildJob, version: str, capabilities: Sequence[int]) -> str:
    """A readable name that differs between engines that may stand side by side: `tensorrt-rtx-1.7.1-sm80+86-fp16`."""
    release = ".".join(version.split(".")[:3])
    devices = "sm" + "+".join(map(str, capabilities)) + ("-up" if job.hardware_compatible else "")
    parts = [job.flavour, release, devices, job.precision]
    if job.max_batch > 1:
        parts.append(f"b{job.max_batch}")
    if job.plugin_library is None:
        parts.append("no-plugins")
    if job.attention == "plugin":
        parts.append("attention-plugin")
    if job.weights != "engine":
        parts.append({"bundle": "bundle-weights", "streamed": "streamed"}[job.weights])
    if job.version_compatible:
        parts.append("version-compatible")
    return "-".join(parts)

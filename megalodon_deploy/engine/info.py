"""What `engine.json` says about an engine, and whether the engine beside it may be loaded."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megalodon_deploy.bundle import ENGINE_FILE, ENGINE_INFO_FILE, ENGINES_DIR, AttentionKind, Bundle, FileEntry
from megalodon_deploy.engine.library import abi_version, find_plugin_library
from megalodon_deploy.engine.profile import ShapeRange
from megalodon_deploy.engine.targets import EngineWeights
from megalodon_deploy.engine.weight_inputs import WeightPlace
from megalodon_deploy.errors import EngineError
from megalodon_deploy.files import sha256_file
from megalodon_deploy.state import CHUNK_ATTENTION

FORMAT_VERSION = 1
REBUILD = "build it again with `megalodon-deploy build`"


@dataclass(frozen=True)
class PluginLibraryInfo:
    """The library whose plugins an engine calls."""

    name: str
    abi_version: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> PluginLibraryInfo:
        return cls(path.name, abi_version(path), sha256_file(path))


@dataclass(frozen=True, kw_only=True)
class EngineInfo:
    """The content of `engine.json`."""

    id: str  # name of its directory under engines/
    flavour: str  # tensorrt-rtx or tensorrt
    version: str  # of that TensorRT
    compute_capabilities: tuple[int, ...]  # 89 for 8.9
    hardware_compatible: bool  # it runs on any of Ampere and later
    version_compatible: bool  # it runs in later releases of the same major version
    precision: str
    max_batch: int
    profile: Mapping[str, ShapeRange]  # by input name
    plugins: tuple[str, ...]  # operators that plugins compute; none: all are standard operators
    num_plugin_layers: int
    plugin_library: PluginLibraryInfo | None
    weights: EngineWeights
    bundle_weights: Mapping[str, WeightPlace]  # inputs that hold weights of the bundle's weight file, by name
    norm_update: str  # arithmetic of TimestepNorm's update; float32 drifts on streams of millions of tokens
    bundle_fingerprint: str
    engine: FileEntry
    build_seconds: float
    peak_memory_bytes: int

    @property
    def attention(self) -> AttentionKind:
        """What computes it."""
        return "plugin" if CHUNK_ATTENTION in self.plugins else "standard"

    def to_json(self) -> str:
        text = json.dumps({"format_version": FORMAT_VERSION, **asdict(self)}, indent=2)
        return re.sub(r"\[[\d,\s]+\]", lambda shape: " ".join(shape[0].split()), text) + "\n"  # a shape is one line

    @classmethod
    def from_json(cls, text: str, where: Path) -> EngineInfo:
        """Parse and check; raises `EngineError` naming `where`."""
        try:
            values: dict[str, Any] = json.loads(text)
            version = values.pop("format_version")
            if version != FORMAT_VERSION:
                raise ValueError(f"format version {version!r}, this release reads {FORMAT_VERSION}")
            library = values["plugin_library"]
            values |= {
                "compute_capabilities": tuple(int(value) for value in values["compute_capabilities"]),
                "profile": {name: ShapeRange.from_lists(shapes) for name, shapes in values["profile"].items()},
                "plugins": tuple(str(name) for name in values["plugins"]),
                "bundle_weights": {name: WeightPlace.from_dict(at) for name, at in values["bundle_weights"].items()},
                "plugin_library": PluginLibraryInfo(**library) if library else None,
                "engine": FileEntry(**values["engine"]),
            }
            return cls(**values)
        except KeyError as error:
            raise EngineError(f"{where}: key {error} is missing; {REBUILD}") from error
        except (TypeError, ValueError, AttributeError) as error:
            raise EngineError(f"{where}: {error}; {REBUILD}") from error


def list_engines(bundle: Bundle) -> list[EngineInfo]:
    """Engines of the bundle, sorted by name. Raises `EngineError` on an engine.json that cannot be read."""
    return [_read(directory) for directory in bundle.engine_dirs()]


def _read(directory: Path) -> EngineInfo:
    path = directory / ENGINE_INFO_FILE
    info = EngineInfo.from_json(path.read_text(encoding="utf-8", errors="replace"), path)
    if info.id != directory.name:
        raise EngineError(f"{path}: it describes {info.id!r}, but lies in {directory.name!r}; {REBUILD}")
    return info


def check_engine(bundle: Bundle, info: EngineInfo) -> Path:
    """The engine file, after its hash is checked: an engine is code.

    Raises `EngineError` when the file is missing or differs, was built from another export, or calls plugins that the
    installed library does not have.
    """
    path = engine_path(bundle, info)
    if not path.is_file():
        raise EngineError(f"{path} is missing; {REBUILD}")
    size_bytes = path.stat().st_size
    if size_bytes != info.engine.size_bytes:
        raise EngineError(f"{path} has {size_bytes} bytes, engine.json says {info.engine.size_bytes}; {REBUILD}")
    if info.bundle_fingerprint != bundle.manifest.fingerprint:
        raise EngineError(
            f"{path} was built from export {info.bundle_fingerprint[:12]}..., the bundle is "
            f"{bundle.manifest.fingerprint[:12]}...; {REBUILD}"
        )
    if (found := sha256_file(path)) != info.engine.sha256:
        raise EngineError(
            f"{path}: sha256 is {found[:12]}..., engine.json says {info.engine.sha256[:12]}...; {REBUILD}"
        )
    if info.plugin_library is not None:
        _check_library(path, info.plugin_library)
    return path


def engine_path(bundle: Bundle, info: EngineInfo) -> Path:
    return bundle.path / ENGINES_DIR / info.id / ENGINE_FILE


def _check_library(path: Path, expected: PluginLibraryInfo) -> None:
    library = find_plugin_library()
    if (found := abi_version(library)) != expected.abi_version:
        raise EngineError(
            f"{path} calls plugins of ABI version {expected.abi_version}, {library} has {found}; {REBUILD}"
        )

"""A bundle: the directory that `export` writes and that deployment needs.

    NAME/
      manifest.json     what this module reads and checks
      model.onnx        graph and functions
      model.cpu.onnx    the same graph for ONNX Runtime on a CPU, where it has matrices of codes
      model.onnx.data   weights, one external file
      tokenizer.*       what the model was trained with (bytes need none)
      engines/ID/       model.engine + engine.json

Opening checks the manifest, and that every file has the stated size; `verify_hashes` reads them all. Nothing here
imports PyTorch or ONNX.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

from megalodon_deploy.config import MegalodonConfig
from megalodon_deploy.errors import BundleError, UserError
from megalodon_deploy.files import sha256_file
from megalodon_deploy.quality import Quality
from megalodon_deploy.quantization import Quantization
from megalodon_deploy.state import state_specs

if TYPE_CHECKING:
    from megalodon_deploy.runtime.session import Session

FORMAT = "megalodon-bundle"
FORMAT_VERSION = 1
MANIFEST_FILE = "manifest.json"
MODEL_FILE = "model.onnx"
CPU_MODEL_FILE = "model.cpu.onnx"
WEIGHTS_FILE = "model.onnx.data"
ENGINES_DIR = "engines"
ENGINE_FILE = "model.engine"
ENGINE_INFO_FILE = "engine.json"

Precision = Literal["fp32", "fp16", "bf16"]
LogitsMode = Literal["last", "all"]
AttentionKind = Literal["standard", "plugin"]  # what computes it in engines: TensorRT's own operators, or ours
TokenizerKind = Literal["bytes", "tokenizer.json", "sentencepiece", "none"]  # none: token numbers only


@dataclass(frozen=True)
class FileEntry:
    """Size and hash of one file of the bundle."""

    sha256: str
    size_bytes: int

    @classmethod
    def of(cls, path: Path) -> FileEntry:
        return cls(sha256_file(path), path.stat().st_size)


@dataclass(frozen=True)
class TokenizerInfo:
    """Which tokenizer the model was trained with; `file` lies in the bundle. Bytes: token = byte value."""

    kind: TokenizerKind
    file: str | None = None
    stop_tokens: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The content of `manifest.json`."""

    name: str
    config: MegalodonConfig
    precision: Precision
    logits: LogitsMode
    quantization: Quantization | None = None
    attention: AttentionKind = "standard"  # in engines, where `build` is not told
    tokenizer: TokenizerInfo
    files: Mapping[str, FileEntry]  # by path relative to the bundle, with forward slashes
    tools: Mapping[str, str]  # versions of what wrote it
    source: Mapping[str, str]  # layout and fingerprint of the checkpoint
    quality: Quality | None = None  # what the quality gate measured

    @property
    def fingerprint(self) -> str:
        """sha256 over configuration, precision and file hashes: which model this is, engines and names apart."""
        identity = {
            "config": self.config.to_dict(),
            "precision": self.precision,
            "files": {path: entry.sha256 for path, entry in self.files.items()},
        }
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()

    @property
    def weight_kinds(self) -> set[str]:
        """Kinds of quantised weights; empty when there are none."""
        chosen = self.quantization
        forms = (chosen.weights, chosen.output) if chosen else ()
        return {form.kind for form in forms if form is not None}

    @property
    def model_fingerprint(self) -> str:
        """sha256 over configuration and checkpoint: which model this is, whatever it was exported to.

        Equal for all precisions and row types; that of the bundle alone when its checkpoint is not known.
        """
        checkpoint = self.source.get("fingerprint")
        if checkpoint is None:
            return self.fingerprint
        identity = {"config": replace(self.config, kv_dtype="activation").to_dict(), "checkpoint": checkpoint}
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()

    def to_json(self) -> str:
        document = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "name": self.name,
            "fingerprint": self.fingerprint,
            "model_fingerprint": self.model_fingerprint,
            "config": self.config.to_dict(),
            "precision": self.precision,
            "logits": self.logits,
            "quantization": None if self.quantization is None else self.quantization.to_dict(),
            "attention": self.attention,
            "tokenizer": asdict(self.tokenizer),
            "state": _state_table(self.config),
            "files": {path: asdict(entry) for path, entry in self.files.items()},
            "tools": dict(self.tools),
            "source": dict(self.source),
            "quality": None if self.quality is None else self.quality.to_dict(),
        }
        return json.dumps(document, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str, where: Path) -> Manifest:
        """Parse and check; raises `BundleError` naming `where`."""
        document = _parse(text, where)
        try:
            manifest = cls(
                name=_string(document["name"]),
                config=MegalodonConfig.from_dict(document["config"]),
                precision=_choice(document["precision"], Precision),
                logits=_choice(document["logits"], LogitsMode),
                quantization=_quantization(document["quantization"]),
                attention=_choice(document["attention"], AttentionKind),
                tokenizer=_tokenizer(document["tokenizer"]),
                files={path: _file_entry(path, entry) for path, entry in document["files"].items()},
                tools=dict(document["tools"]),
                source=dict(document["source"]),
                quality=_quality(document["quality"]),
            )
        except UserError as error:
            raise BundleError(f"{where}: {error}") from error
        except KeyError as error:
            raise BundleError(f"{where}: key {error} is missing; export the checkpoint again") from error
        except (TypeError, ValueError, AttributeError) as error:
            raise BundleError(f"{where}: {error}") from error
        if manifest.tokenizer.file is not None and manifest.tokenizer.file not in manifest.files:
            raise BundleError(f"{where}: {manifest.tokenizer.file} is not listed in its files")
        if document.get("state") != _state_table(manifest.config):
            raise BundleError(f"{where}: the state table does not follow from its config; export the checkpoint again")
        if document.get("fingerprint") != manifest.fingerprint:
            raise BundleError(f"{where}: fingerprint does not match its content; the manifest was changed")
        return manifest


class Bundle:
    """An opened bundle: manifest checked, files present with the stated sizes."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self.config = manifest.config
        self.is_verified = False  # whether every hash was compared

    @property
    def model_path(self) -> Path:
        return self.path / MODEL_FILE

    @property
    def cpu_model_path(self) -> Path:
        """What ONNX Runtime's CPU provider opens: products with codes are one operator where it can be compiled."""
        return self.path / (CPU_MODEL_FILE if CPU_MODEL_FILE in self.manifest.files else MODEL_FILE)

    def verify_hashes(self) -> None:
        """Read every file; raises `BundleError` on the first whose hash differs."""
        for relative, entry in self.manifest.files.items():
            found = sha256_file(self.path / relative)
            if found != entry.sha256:
                raise BundleError(
                    f"{self.path / relative}: sha256 is {found[:12]}..., manifest says {entry.sha256[:12]}...; "
                    "the file is damaged: export or copy it again"
                )
        self.is_verified = True

    def engine_dirs(self) -> list[Path]:
        """Directories of finished engines, sorted by name; one that is being written begins with a dot."""
        return sorted(path.parent for path in (self.path / ENGINES_DIR).glob(f"[!.]*/{ENGINE_INFO_FILE}"))

    def session(self, backend: str = "onnxruntime", **options: Any) -> Session:
        """Open an executor: see `megalodon_deploy.runtime.session.open_session`."""
        from megalodon_deploy.runtime.session import open_session

        return open_session(self, backend, **options)


def open_bundle(path: str | Path, *, verify_hashes: bool = False) -> Bundle:
    """Open the bundle at `path`. Raises `BundleError` naming the file when it is incomplete or damaged."""
    root = Path(path)
    manifest_path = root / MANIFEST_FILE
    if not manifest_path.is_file():
        raise BundleError(f"{root} is not a bundle: it has no {MANIFEST_FILE}; make one with `megalodon-deploy export`")
    manifest = Manifest.from_json(manifest_path.read_text(encoding="utf-8", errors="replace"), manifest_path)
    for relative in (MODEL_FILE, WEIGHTS_FILE):
        if relative not in manifest.files:
            raise BundleError(f"{manifest_path}: {relative} is not listed in its files")
    for relative, entry in manifest.files.items():
        _check_size(root / relative, entry)
    bundle = Bundle(root, manifest)
    if verify_hashes:
        bundle.verify_hashes()
    return bundle


def _check_size(path: Path, entry: FileEntry) -> None:
    if not path.is_file():
        raise BundleError(f"{path} is missing; export or copy the bundle again")
    size_bytes = path.stat().st_size
    if size_bytes != entry.size_bytes:
        raise BundleError(f"{path} has {size_bytes} bytes, manifest says {entry.size_bytes}; copy it again")


def _state_table(config: MegalodonConfig) -> list[dict[str, Any]]:
    return [
        {
            "past": spec.past,
            "present": spec.present,
            "past_shape": list(spec.past_shape),
            "present_shape": list(spec.present_shape),
            "dtype": spec.dtype,
        }
        for spec in state_specs(config)
    ]


def _parse(text: str, where: Path) -> dict[str, Any]:
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        raise BundleError(f"{where}: not JSON ({error}); export the checkpoint again") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise BundleError(f"{where}: not a manifest of a {FORMAT}")
    if document.get("format_version") != FORMAT_VERSION:
        raise BundleError(
            f"{where}: format version {document.get('format_version')!r}, this release reads {FORMAT_VERSION}; "
            "export the checkpoint again"
        )
    return document


def _string(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not a string")
    return value


def _choice(value: Any, literal: Any) -> Any:
    if value not in get_args(literal):
        raise ValueError(f"{value!r} is none of {', '.join(get_args(literal))}")
    return value


def _quantization(values: Mapping[str, Any] | None) -> Quantization | None:
    return None if values is None else Quantization.from_dict(values)


def _quality(values: Mapping[str, Any] | None) -> Quality | None:
    return None if values is None else Quality.from_dict(values)


def _tokenizer(values: Mapping[str, Any]) -> TokenizerInfo:
    kind = cast(TokenizerKind, _choice(values["kind"], TokenizerKind))
    file = values["file"]
    if (file is None) != (kind in ("bytes", "none")):
        raise ValueError(f"tokenizer {kind} with file {file!r}")
    return TokenizerInfo(kind, _inside(file) if file else None, tuple(int(token) for token in values["stop_tokens"]))


def _file_entry(path: str, values: Mapping[str, Any]) -> FileEntry:
    _inside(path)
    return FileEntry(_string(values["sha256"]), int(values["size_bytes"]))


def _inside(path: str) -> str:
    """A path of a manifest never leaves the bundle."""
    pure = PurePosixPath(_string(path))
    if pure.is_absolute() or ".." in pure.parts or "\\" in path or not pure.parts:
        raise ValueError(f"path {path!r} leaves the bundle")
    return path

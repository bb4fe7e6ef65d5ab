"""Write a bundle: graph, weights, tokenizer, manifest, into a temporary directory that is renamed at the end."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import get_args

import onnx
import onnx_ir as ir

import megalodon_deploy
from megalodon_deploy.bundle import (
    CPU_MODEL_FILE,
    FORMAT,
    MANIFEST_FILE,
    MODEL_FILE,
    WEIGHTS_FILE,
    AttentionKind,
    Bundle,
    FileEntry,
    LogitsMode,
    Manifest,
    Precision,
    TokenizerInfo,
    TokenizerKind,
    open_bundle,
)
from megalodon_deploy.config import KeyValueType, MegalodonConfig
from megalodon_deploy.errors import BundleError, MissingDependencyError, UserError
from megalodon_deploy.export.calibration import Calibration
from megalodon_deploy.export.cpu_graph import write_cpu_graph
from megalodon_deploy.export.graph import build_model
from megalodon_deploy.export.operators.schema import register_schemas
from megalodon_deploy.export.quality import TORCH_TYPES, measure_quality, read_gate_text
from megalodon_deploy.export.stream import WeightStream
from megalodon_deploy.export.weight_file import write_weights
from megalodon_deploy.export.weights import check_quantization, matrix_inputs
from megalodon_deploy.files import atomic_directory
from megalodon_deploy.model.checkpoint import Checkpoint, TokenizerSource, read_checkpoint
from megalodon_deploy.quantization import Quantization, plan_quantization
from megalodon_deploy.tokenizers import read_tokenizer

Progress = Callable[[str, float], None]

_WEIGHTS_SHARE = 0.8  # of the time; the rest is what is left to hash of the checkpoint
_HASHED_SHARE = 0.9
_TOOLS = ("numpy", "onnx", "onnx-ir", "torch")


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What the user chose; see `export_checkpoint`."""

    precision: Precision = "fp32"
    logits: LogitsMode = "last"
    kv_dtype: KeyValueType = "activation"
    quantize: str | None = None
    block_size: int | None = None
    quantize_output: str | None = None
    quantize_embedding: str | None = None
    calibrate: Path | None = None
    gate: Path | None = None
    attention: AttentionKind = "standard"
    name: str | None = None
    tokenizer: Path | None = None
    overwrite: bool = False


def write_bundle(ckpt: Path, out: Path, options: ExportOptions, progress: Progress) -> Bundle:
    """See `export_checkpoint`."""
    _check_options(options)
    _check_target(out, overwrite=options.overwrite)
    checkpoint = read_checkpoint(ckpt)
    config = replace(checkpoint.config.released(), kv_dtype=options.kv_dtype)
    quantization = _plan(config, options)
    tokenizer = _tokenizer(checkpoint, options.tokenizer)
    text = read_gate_text(options.gate, tokenizer, config.vocab_size) if options.gate else None
    calibrated = _calibration(checkpoint, tokenizer, options, quantization)
    try:
        with (
            atomic_directory(out, overwrite=options.overwrite) as directory,
            checkpoint.fingerprinting() as fingerprint,
        ):
            stream = WeightStream(checkpoint, calibrated)
            files = _write_model(stream, config, directory, options, quantization, progress)
            info = _copy_tokenizer(tokenizer, directory)
            if info.file is not None:
                files[info.file] = FileEntry.of(directory / info.file)
            progress("hashing", _WEIGHTS_SHARE)
            source = {"layout": checkpoint.layout, "fingerprint": fingerprint.result()}
            name = options.name or out.resolve().name
            manifest = _manifest(config, source, files, info, options, quantization, name)
            if text is not None:
                progress("measuring quality", _HASHED_SHARE)
                manifest = replace(manifest, quality=measure_quality(Bundle(directory, manifest), checkpoint, text))
            (directory / MANIFEST_FILE).write_text(manifest.to_json(), encoding="utf-8")
    except OSError as error:
        raise BundleError(f"{out}: cannot be written ({error.strerror or error}); nothing was left behind") from error
    progress("done", 1.0)
    return open_bundle(out)


def _check_options(options: ExportOptions) -> None:
    for what, value, known in (
        ("precision", options.precision, get_args(Precision)),
        ("logits", options.logits, get_args(LogitsMode)),
        ("kv_dtype", options.kv_dtype, get_args(KeyValueType)),
        ("attention", options.attention, get_args(AttentionKind)),
    ):
        if value not in known:
            raise UserError(f"{what} {value!r} cannot be exported; there are: {', '.join(known)}")
    if options.tokenizer is not None and not options.tokenizer.is_file():
        raise UserError(f"{options.tokenizer} is not a file; expected a tokenizer.json or a SentencePiece model")


def _plan(config: MegalodonConfig, options: ExportOptions) -> Quantization | None:
    """Formats of the matrices, fit for the model. Raises `UserError` naming what there is."""
    if options.quantize is None:
        details = (options.block_size, options.quantize_output, options.quantize_embedding, options.calibrate)
        if any(value is not None for value in details):
            raise UserError(
                "a block size, formats of output and embedding, and calibration go with a kind of quantisation "
                "(--quantize)"
            )
        return None
    quantization = plan_quantization(
        options.quantize,
        in_dims=matrix_inputs(config),
        block_size=options.block_size,
        output=options.quantize_output,
        embedding=options.quantize_embedding,
        method="nearest" if options.calibrate is None else "gptq",
        shares_embedding=config.share_emb,
    )
    check_quantization(config, quantization)
    return quantization


def _calibration(
    checkpoint: Checkpoint, tokenizer: TokenizerSource, options: ExportOptions, quantization: Quantization | None
) -> Calibration | None:
    if options.calibrate is None or quantization is None:
        return None
    return Calibration(checkpoint, options.calibrate, tokenizer, quantization, TORCH_TYPES[options.precision])


def _check_target(out: Path, *, overwrite: bool) -> None:
    """Never replace what is not a bundle, whatever the user says."""
    if not out.exists():
        return
    manifest = out / MANIFEST_FILE
    if not manifest.is_file() or FORMAT not in manifest.read_text(encoding="utf-8", errors="replace"):
        raise BundleError(f"{out} exists and is not a bundle; choose another name")
    if not overwrite:
        raise BundleError(f"{out} exists already; choose another name or overwrite it (--overwrite)")


def _write_model(
    stream: WeightStream,
    config: MegalodonConfig,
    directory: Path,
    options: ExportOptions,
    quantization: Quantization | None,
    progress: Progress,
) -> dict[str, FileEntry]:
    """Returns the entries of the files that it writes."""
    model = build_model(
        config,
        stream,
        precision=options.precision,
        logits=options.logits,
        quantization=quantization,
    )

    def show(name: str, fraction: float) -> None:
        progress(f"writing {name}", _WEIGHTS_SHARE * fraction)

    weights = write_weights(model.graph, directory / WEIGHTS_FILE, show)
    path = directory / MODEL_FILE
    ir.save(model, path)
    _add_shapes(path)
    files = {MODEL_FILE: FileEntry.of(path), WEIGHTS_FILE: weights}
    cpu_path = directory / CPU_MODEL_FILE
    if options.precision == "fp32" and write_cpu_graph(path, cpu_path):  # the compiled operators are float32
        files[CPU_MODEL_FILE] = FileEntry.of(cpu_path)
    return files


def _add_shapes(path: Path) -> None:
    """Infer the shapes of all values, store them for readers such as Netron, and check the model fully."""
    register_schemas()
    model = onnx.load(path, load_external_data=False)
    inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    path.write_bytes(inferred.SerializeToString(deterministic=True))
    onnx.checker.check_model(path, full_check=True)


def _tokenizer(checkpoint: Checkpoint, chosen: Path | None) -> TokenizerSource:
    """Raises `BundleError` for a file that is no tokenizer, as far as the packages that are installed can tell."""
    source = checkpoint.tokenizer or TokenizerSource("none")
    if chosen is not None:
        kind: TokenizerKind = "tokenizer.json" if chosen.suffix == ".json" else "sentencepiece"
        source = TokenizerSource(kind, chosen, source.stop_tokens)
    if source.file is not None:
        with suppress(MissingDependencyError):
            read_tokenizer(source.file, sentencepiece=source.kind == "sentencepiece")
    return source


def _copy_tokenizer(source: TokenizerSource, directory: Path) -> TokenizerInfo:
    if source.file is None:
        return TokenizerInfo(source.kind, None, source.stop_tokens)
    name = "tokenizer.json" if source.kind == "tokenizer.json" else "tokenizer.model"
    shutil.copyfile(source.file, directory / name)
    return TokenizerInfo(source.kind, name, source.stop_tokens)


def _manifest(
    config: MegalodonConfig,
    source: Mapping[str, str],
    files: Mapping[str, FileEntry],
    tokenizer: TokenizerInfo,
    options: ExportOptions,
    quantization: Quantization | None,
    name: str,
) -> Manifest:
    return Manifest(
        name=name,
        config=config,
        precision=options.precision,
        logits=options.logits,
        quantization=quantization,
        attention=options.attention,
        tokenizer=tokenizer,
        files=files,
        tools={"megalodon-deploy": megalodon_deploy.__version__} | {tool: version(tool) for tool in _TOOLS},
        source=source,
    )

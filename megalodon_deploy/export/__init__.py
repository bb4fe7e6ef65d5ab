"""From a checkpoint to a bundle, and back to a PyTorch model.

The graph is emitted node by node from the configuration, weights are streamed from the checkpoint into one file.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from megalodon_deploy.bundle import AttentionKind, Bundle, LogitsMode, Precision
from megalodon_deploy.config import KeyValueType
from megalodon_deploy.errors import MissingDependencyError

if TYPE_CHECKING:
    from megalodon_deploy.model.megalodon import Megalodon

Progress = Callable[[str, float], None]

_PACKAGES = ("torch", "onnx", "onnx_ir")


def export_checkpoint(
    ckpt: str | Path,
    out: str | Path,
    *,
    precision: Precision = "fp32",
    logits: LogitsMode = "last",
    kv_dtype: KeyValueType = "activation",
    quantize: str | None = None,
    block_size: int | None = None,
    quantize_output: str | None = None,
    quantize_embedding: str | None = None,
    calibrate: str | Path | None = None,
    gate: str | Path | None = None,
    attention: AttentionKind = "standard",
    name: str | None = None,
    tokenizer: str | Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Bundle:
    """Write the bundle `out` from the checkpoint `ckpt`, and open it.

    Args:
        ckpt: a checkpoint of any layout that `read_checkpoint` knows.
        out: the bundle's directory; it is there whole or not at all.
        precision: type of activations and matrices. Norms, CEMA coefficients and states are float32 always.
        logits: of the last token of a call, or of all.
        kv_dtype: type in which streams keep keys and values; fp8 and int8 take a scale for each row of each head.
        quantize: kind of the matrices' codes (`WeightKind`); default: matrices have the type of the activations.
        block_size: weights that share a scale along a column, 0 for all; default the kind's.
        quantize_output: the same for the output matrix, or "none"; default int8 beside 4 bits, else like the others.
        quantize_embedding: "int8", with a scale for each token's row, or "none", the default.
        calibrate: a text on which to choose codes with GPTQ, so that the matrices' outputs stay.
        gate: a held-out text on which to compare the bundle with the checkpoint in float32; the manifest keeps the
            numbers, and a bundle that fails its limits (`Quality`) passes no verification.
        attention: what computes it in engines, where `build` is not told: TensorRT's operators or our plugin. The
            graph is the same.
        name: the model's name in the manifest; default the name of `out`.
        tokenizer: a `tokenizer.json` or SentencePiece file; default the checkpoint's own.
        overwrite: replace a bundle that is there. Anything else that is there is never replaced.
        progress: called with a stage and the fraction done.

    Raises:
        UserError: an unknown precision, kind of logits or attention, a tokenizer file that is not there.
        CheckpointError: a checkpoint that is incomplete or damaged, or weights beyond the range of fp16.
        BundleError: `out` exists or cannot be written.
        MissingDependencyError: without the packages of the extra `export`.
    """
    _require_packages()
    from megalodon_deploy.export.writer import ExportOptions, write_bundle

    options = ExportOptions(
        precision=precision,
        logits=logits,
        kv_dtype=kv_dtype,
        quantize=quantize,
        block_size=block_size,
        quantize_output=quantize_output,
        quantize_embedding=quantize_embedding,
        calibrate=Path(calibrate) if calibrate is not None else None,
        gate=Path(gate) if gate is not None else None,
        attention=attention,
        name=name,
        tokenizer=Path(tokenizer) if tokenizer is not None else None,
        overwrite=overwrite,
    )
    return write_bundle(Path(ckpt), Path(out), options, progress or (lambda stage, fraction: None))


def load_bundle_model(bundle: Bundle) -> Megalodon:
    """The PyTorch model of a bundle, in float32: its weights, as far as they were rounded, are the bundle's.

    Raises `BundleError` when the graph lacks a weight or has one of another shape.
    """
    _require_packages()
    from megalodon_deploy.export.reader import read_model

    return read_model(bundle)


def _require_packages() -> None:
    missing = [package for package in _PACKAGES if find_spec(package) is None]
    if missing:
        raise MissingDependencyError(
            f"export needs {', '.join(missing)}: install with `pip install 'megalodon-deploy[export]'`"
        )

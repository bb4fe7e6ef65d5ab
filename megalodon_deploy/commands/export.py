"""`megalodon-deploy export`: checkpoint in, bundle out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from megalodon_deploy.commands.common import EXISTING, OUTPUT, echo_json, json_option
from megalodon_deploy.console import format_bytes, progress_bar
from megalodon_deploy.errors import CheckFailedError


@click.command()
@click.option("--ckpt", required=True, type=EXISTING, help="Checkpoint: a directory or a file, any supported layout.")
@click.option("--out", required=True, type=OUTPUT, help="Bundle directory to write.")
@click.option(
    "--precision",
    type=click.Choice(["fp32", "fp16", "bf16"]),
    default="fp32",
    show_default=True,
    help="Type of matrices and activations; state and norms stay float32.",
)
@click.option(
    "--logits",
    type=click.Choice(["last", "all"]),
    default="last",
    show_default=True,
    help="Of which tokens of a call logits come out.",
)
@click.option(
    "--kv-dtype",
    type=click.Choice(["activation", "fp8", "int8"]),
    default="activation",
    show_default=True,
    help="Type in which streams keep keys and values.",
)
@click.option(
    "--quantize", type=click.Choice(["int8", "int4", "fp8", "nvfp4"]), help="Store the matrices as codes and scales."
)
@click.option("--block-size", type=int, help="Weights to a scale: 32, 64 or 128; 0: a whole column (int8, fp8).")
@click.option(
    "--quantize-output",
    type=click.Choice(["none", "int8", "int4", "fp8", "nvfp4"]),
    help="The output matrix; default: int8 beside 4-bit weights, else like them.",
)
@click.option("--quantize-embedding", type=click.Choice(["none", "int8"]), help="The embedding; default: none.")
@click.option(
    "--attention",
    type=click.Choice(["standard", "plugin"]),
    default="standard",
    show_default=True,
    help="What computes it in engines, unless build is told: TensorRT's operators or our plugin.",
)
@click.option("--calibrate", type=EXISTING, metavar="FILE", help="Choose codes with GPTQ on this text.")
@click.option(
    "--gate", type=EXISTING, metavar="FILE", help="Measure quality on this held-out text; exit 1 if it fails."
)
@click.option("--name", help="Name of the model in the bundle; default: the directory's.")
@click.option("--tokenizer", type=EXISTING, help="tokenizer.json or SentencePiece model; default: the checkpoint's.")
@click.option("--overwrite", is_flag=True, help="Replace an existing bundle.")
@json_option
def export(ckpt: Path, out: Path, as_json: bool, **options: Any) -> None:
    """Write a checkpoint as a bundle: ONNX graph, weights, manifest."""
    from megalodon_deploy.export import export_checkpoint
    from megalodon_deploy.inspection import inspect_bundle

    with progress_bar("export") as progress:
        bundle = export_checkpoint(ckpt, out, progress=progress, **options)
    report = inspect_bundle(bundle)
    quality = bundle.manifest.quality
    if as_json:
        echo_json(report)
    else:
        weights = format_bytes(report["weights_bytes"])
        types = report["precision"] + (f", {report['quantization']}" if report["quantization"] else "")
        click.echo(f"{out}: {report['num_parameters']:,} parameters, {weights} of weights, {types}")
        if quality is not None and quality.passed:
            click.echo(quality.describe())
    if quality is not None and not quality.passed:
        raise CheckFailedError(f"{out}: {quality.describe()}")

"""`megalodon-deploy build`: TensorRT engines into the bundle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from megalodon_deploy.commands.common import bundle_argument, json_option
from megalodon_deploy.console import format_bytes, progress_bar


@click.command()
@bundle_argument
@click.option(
    "--target",
    type=click.Choice(["tensorrt-rtx", "tensorrt"]),
    default="tensorrt-rtx",
    show_default=True,
    help="tensorrt-rtx builds on any x86-64 machine, tensorrt on the machine that has the GPU.",
)
@click.option(
    "--sm",
    metavar="LIST",
    help="Compute capabilities, an engine for each: 80,86,89,120 (tensorrt-rtx); default: one engine for all.",
)
@click.option("--hardware-compatible", is_flag=True, help="One engine for all of --sm, or for Ampere and later.")
@click.option("--version-compatible", is_flag=True, help="An engine for later TensorRT releases too (tensorrt).")
@click.option(
    "--weights",
    type=click.Choice(["engine", "bundle", "streamed"]),
    default="engine",
    show_default=True,
    help="Where matrices are: in the engine, in the bundle's file, or streamed from main memory.",
)
@click.option("--no-plugins", is_flag=True, help="Standard operators only, without our CUDA kernels.")
@click.option(
    "--attention",
    type=click.Choice(["standard", "plugin"]),
    help="What computes attention: TensorRT's operators or our plugin; default: as exported.",
)
@click.option("--max-batch", type=int, default=1, show_default=True, help="Most streams in one call.")
@click.option("--overwrite", is_flag=True, help="Replace engines of the same names.")
@json_option
def build(
    bundle_path: Path,
    target: str,
    sm: str | None,
    weights: Any,
    hardware_compatible: bool,
    no_plugins: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Build TensorRT engines into the bundle."""
    from megalodon_deploy.bundle import open_bundle
    from megalodon_deploy.engine import build_engines
    from megalodon_deploy.engine.needs import estimate_needs
    from megalodon_deploy.engine.targets import one_engine_each, parse_capabilities

    bundle = open_bundle(bundle_path)
    capabilities = None if sm is None else parse_capabilities(sm)
    groups = one_engine_each(target, capabilities, hardware_compatible=hardware_compatible)
    needs = estimate_needs(bundle, plugins=not no_plugins, weights=weights, num_engines=len(groups))
    click.echo(needs.describe(), err=True)
    with progress_bar("build") as progress:
        infos = build_engines(
            bundle,
            target=target,
            sm=capabilities,
            plugins=not no_plugins,
            weights=weights,
            hardware_compatible=hardware_compatible,
            progress=progress,
            **options,
        )
    if as_json:
        click.echo(json.dumps({"engines": [json.loads(info.to_json()) for info in infos]}, indent=2))
    else:
        for info in infos:
            size, memory = format_bytes(info.engine.size_bytes), format_bytes(info.peak_memory_bytes)
            path = bundle_path / "engines" / info.id
            click.echo(f"{path}: {size}, built in {info.build_seconds:.1f} s, peak {memory}")
    if any(info.norm_update == "float32" for info in infos):
        click.echo("note: norms are updated in float32, which drifts over millions of tokens", err=True)

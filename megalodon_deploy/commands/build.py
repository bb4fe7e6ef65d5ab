"""`megalodon-deploy build`: a TensorRT engine into the bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from megalodon_deploy.commands.common import bundle_argument, json_option
from megalodon_deploy.console import format_bytes, progress_bar


@click.command()
@bundle_argument
@click.option("--target", type=click.Choice(["tensorrt-rtx", "tensorrt"]), default="tensorrt-rtx", show_default=True)
@click.option("--sm", metavar="LIST", help="Compute capabilities, like 80,86,89,120 (tensorrt-rtx).")
@click.option("--no-plugins", is_flag=True, help="Standard operators only, without our CUDA kernels.")
@click.option("--max-batch", type=int, default=1, show_default=True, help="Most streams in one call.")
@click.option("--overwrite", is_flag=True, help="Replace the engine of the same name.")
@json_option
def build(bundle_path: Path, target: str, sm: str | None, no_plugins: bool, as_json: bool, **options: Any) -> None:
    """Build a TensorRT engine into the bundle."""
    from megalodon_deploy.bundle import open_bundle
    from megalodon_deploy.engine import build_engine
    from megalodon_deploy.engine.needs import estimate_needs
    from megalodon_deploy.engine.targets import parse_capabilities

    bundle = open_bundle(bundle_path)
    click.echo(estimate_needs(bundle, plugins=not no_plugins).describe(), err=True)
    capabilities = None if sm is None else parse_capabilities(sm)
    with progress_bar("build") as progress:
        info = build_engine(
            bundle,
            target=target,
            sm=capabilities,
            plugins=not no_plugins,
            progress=progress,
            **options,
        )
    if as_json:
        click.echo(info.to_json(), nl=False)
    else:
        size, memory = format_bytes(info.engine.size_bytes), format_bytes(info.peak_memory_bytes)
        click.echo(f"{bundle_path / 'engines' / info.id}: {size}, built in {info.build_seconds:.1f} s, peak {memory}")
    if info.norm_update == "float32":
        click.echo("note: norms are updated in float32, which drifts over millions of tokens", err=True)

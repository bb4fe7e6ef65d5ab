"""`megalodon-deploy verify`: the bundle against PyTorch."""

from __future__ import annotations

from pathlib import Path

import click

from megalodon_deploy.commands.common import EXISTING, OUTPUT, bundle_argument, echo_json, json_option
from megalodon_deploy.console import print_table, progress_bar
from megalodon_deploy.cpus import limit_spinning
from megalodon_deploy.errors import CheckFailedError


@click.command()
@bundle_argument
@click.option("--ckpt", type=EXISTING, help="The checkpoint; proves the weights' way into the bundle too.")
@click.option(
    "--emit-polygraphy",
    type=OUTPUT,
    metavar="DIR",
    help="Write files and commands for stock Polygraphy; compare nothing.",
)
@json_option
def verify(bundle_path: Path, ckpt: Path | None, emit_polygraphy: Path | None, as_json: bool) -> None:
    """Compare the bundle with PyTorch, call by call, across chunk edges. Exit code 1 on a miss."""
    limit_spinning()
    from megalodon_deploy import verify as verification
    from megalodon_deploy.bundle import open_bundle

    bundle = open_bundle(bundle_path, verify_hashes=True)
    if emit_polygraphy is not None:
        verification.emit_polygraphy(bundle, emit_polygraphy, ckpt=ckpt)
        click.echo(f"written: {emit_polygraphy}; see: bash {emit_polygraphy / 'polygraphy.sh'}")
        return
    with progress_bar("verify") as progress:
        report = verification.verify_bundle(bundle, ckpt=ckpt, progress=progress)
    if as_json:
        echo_json(report.to_dict())
    else:
        print_table(report.table_rows(), header=report.table_header())
        for line in report.notes():
            click.echo(line)
    if not report.passed:
        raise CheckFailedError(f"{bundle_path}: {report.verdict()}")

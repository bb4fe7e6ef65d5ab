"""`megalodon-deploy verify`: the bundle against PyTorch."""

from __future__ import annotations

from pathlib import Path

import click

from megalodon_deploy.commands.common import EXISTING, bundle_argument, echo_json, json_option
from megalodon_deploy.console import print_table, progress_bar
from megalodon_deploy.cpus import limit_spinning
from megalodon_deploy.errors import CheckFailedError


@click.command()
@bundle_argument
@click.option("--ckpt", type=EXISTING, help="The checkpoint; proves the weights' way into the bundle too.")
@json_option
def verify(bundle_path: Path, ckpt: Path | None, as_json: bool) -> None:
    """Compare the bundle with PyTorch, call by call, across chunk edges. Exit code 1 on a miss."""
    limit_spinning()
    from megalodon_deploy.bundle import open_bundle
    from megalodon_deploy.verify import verify_bundle

    with progress_bar("verify") as progress:
        report = verify_bundle(open_bundle(bundle_path, verify_hashes=True), ckpt=ckpt, progress=progress)
    if as_json:
        echo_json(report.to_dict())
    else:
        print_table(report.table_rows(), header=report.table_header())
        for line in report.notes():
            click.echo(line)
    if not report.passed:
        raise CheckFailedError(f"{bundle_path}: {report.verdict()}")

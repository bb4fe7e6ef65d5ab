"""`megalodon-deploy inspect`: what a bundle holds."""

from __future__ import annotations

from pathlib import Path

import click

from megalodon_deploy.commands.common import bundle_argument, echo_json, json_option
from megalodon_deploy.console import print_table


@click.command()
@bundle_argument
@json_option
def inspect(bundle_path: Path, as_json: bool) -> None:
    """Show what a bundle holds: sizes, engines, origin."""
    from megalodon_deploy.bundle import open_bundle
    from megalodon_deploy.inspection import inspect_bundle, inspection_rows

    report = inspect_bundle(open_bundle(bundle_path))
    if as_json:
        echo_json(report)
    else:
        print_table(inspection_rows(report))

"""`megalodon-deploy doctor`: what this machine has."""

from __future__ import annotations

import click

from megalodon_deploy.commands.common import echo_json, json_option
from megalodon_deploy.console import print_table


@click.command()
@json_option
def doctor(as_json: bool) -> None:
    """Show what this machine has, and what it lacks for what."""
    from megalodon_deploy.doctor import diagnose

    findings = diagnose()
    if as_json:
        echo_json([finding.to_dict() for finding in findings])
    else:
        rows = [(f.part, f.found or "missing", f.enables, "" if f.found else f.remedy) for f in findings]
        print_table(rows, header=("part", "found", "enables", "to get it"))

"""`megalodon-deploy verify`: the bundle against PyTorch."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from megalodon_deploy.commands.common import EXISTING, OUTPUT, OUTPUT_FILE, bundle_argument, echo_json, json_option
from megalodon_deploy.console import print_table, progress_bar
from megalodon_deploy.cpus import limit_spinning
from megalodon_deploy.errors import CheckFailedError, UserError

if TYPE_CHECKING:
    from megalodon_deploy.verify.report import VerifyReport


@click.command()
@bundle_argument
@click.option("--ckpt", type=EXISTING, help="The checkpoint; proves the weights' way into the bundle too.")
@click.option("--bisect", is_flag=True, help="On a miss, name the first tensor inside the graph that is off.")
@click.option("--tokens", metavar="N", help="Stream N tokens (500K, 10M) against float64, too.")
@click.option("--text", type=EXISTING, help="A UTF-8 text to compare over; default one of Python's own modules.")
@click.option("--html", type=OUTPUT_FILE, metavar="FILE", help="Write a report with plots, one file for any browser.")
@click.option("--emit-polygraphy", type=OUTPUT, metavar="DIR", help="Only write files for stock Polygraphy.")
@json_option
def verify(
    bundle_path: Path,
    ckpt: Path | None,
    bisect: bool,
    tokens: str | None,
    text: Path | None,
    html: Path | None,
    emit_polygraphy: Path | None,
    as_json: bool,
) -> None:
    """Compare a bundle with PyTorch, call by call.

    Every logit and every state tensor, across chunk edges, in every executor that this machine can run. Exit code 1 on
    a miss.
    """
    limit_spinning()
    from megalodon_deploy import verify as verification
    from megalodon_deploy.bundle import open_bundle

    bundle = open_bundle(bundle_path, verify_hashes=True)
    if emit_polygraphy is not None:
        if bisect or tokens or text or html or as_json:
            raise UserError("--emit-polygraphy only writes files and compares nothing: give --ckpt beside it at most")
        verification.emit_polygraphy(bundle, emit_polygraphy, ckpt=ckpt)
        click.echo(f"written: {emit_polygraphy}; see: bash {shlex.quote(str(emit_polygraphy / 'polygraphy.sh'))}")
        return
    num_tokens = None if tokens is None else verification.parse_count(tokens)
    with progress_bar("verify") as progress:
        report = verification.verify_bundle(
            bundle, ckpt=ckpt, bisect=bisect, text=text, tokens=num_tokens, progress=progress
        )
    if as_json:
        echo_json(report.to_dict())
    else:
        _print(report)
    if html is not None:
        verification.write_html(report, html)
    if not report.passed:
        raise CheckFailedError(f"{bundle_path}: {report.verdict()}")


def _print(report: VerifyReport) -> None:
    print_table(report.table_rows(), header=report.table_header())
    if report.bisection is not None:
        print_table(report.bisection_rows(), header=("tensor", "error", "tolerance", "verdict"), title="bisection")
    if report.long_stream is not None:
        title = f"{report.long_stream.tokens:,} tokens; {report.long_stream.model}"
        header = ("what", "state", "first error", "last error", "worst error")
        print_table(report.long_stream.table_rows(), header=header, title=title)
    for line in report.notes():
        click.echo(line)

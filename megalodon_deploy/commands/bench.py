"""`megalodon-deploy bench`: speed against the bandwidth limit."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from megalodon_deploy.commands.common import (
    BACKEND,
    OUTPUT_FILE,
    backend_option,
    bundle_argument,
    device_option,
    echo_json,
    json_option,
    threads_option,
)
from megalodon_deploy.console import format_bytes, print_table, progress_bar
from megalodon_deploy.errors import UserError

if TYPE_CHECKING:
    from megalodon_deploy.runtime.bench import BenchReport


@click.command()
@bundle_argument
@backend_option
@click.option("--compare", type=BACKEND, help="Measure this backend in turns with the first.")
@click.option("--decode-tokens", type=int, default=200, show_default=True, help="Steps to time in a turn.")
@click.option("--prompt-tokens", type=int, default=256, show_default=True, help="Prefill to time in a turn.")
@click.option("--rounds", type=int, default=5, show_default=True, help="Turns; each starts a fresh stream.")
@click.option("--batches", metavar="LIST", help="Also steps of so many streams in a call, like 1,2,4,8.")
@click.option("--positions", metavar="LIST", help="Also steps so far into a stream, like 10,10000,1000000.")
@threads_option
@device_option
@click.option("--plot", type=OUTPUT_FILE, help="Draw time by position and throughput by batch (SVG, PNG or PDF).")
@json_option
def bench(
    bundle_path: Path, batches: str | None, positions: str | None, plot: Path | None, as_json: bool, **options: Any
) -> None:
    """Measure speed against this machine's memory bandwidth."""
    from megalodon_deploy.bundle import open_bundle
    from megalodon_deploy.runtime.bench import bench_bundle
    from megalodon_deploy.runtime.bench.plot import check_plot_path, write_plot

    if plot is not None:
        check_plot_path(plot)
        batches, positions = batches or "1,2,4,8", positions or "10,10000,1000000"
    options |= {"batches": _numbers("--batches", batches), "positions": _numbers("--positions", positions)}
    with progress_bar("bench") as progress:
        report = bench_bundle(open_bundle(bundle_path), progress=progress, **options)
    if as_json:
        echo_json(report.to_dict())
    else:
        _print(report)
    if plot is not None:
        write_plot(report, plot)


def _numbers(option: str, text: str | None) -> list[int]:
    """`"1,2,4"` -> [1, 2, 4]."""
    parts = [part.strip() for part in text.split(",")] if text else []
    if not all(part.isdecimal() and int(part) for part in parts):
        raise UserError(f"{option} {text!r}: write positive numbers with commas, like 1,2,4,8")
    return [int(part) for part in parts]


def _print(report: BenchReport) -> None:
    header = ("backend", "ms/token", "p95", "p99", "of bandwidth limit", "prefill tokens/s", "first token ms", "load s")
    print_table([_bench_row(times) for times in report.times], header=header)
    limit, weights, state = (
        report.bandwidth_bytes_per_second,
        report.weight_bytes_per_token,
        report.state_bytes_per_token,
    )
    click.echo(
        f"a token reads {format_bytes(weights)} of weights and {format_bytes(state)} of state; "
        f"at {limit / 1e9:.1f} GB/s {1000 * (weights + state) / limit:.2f} ms is the limit"
    )
    if report.ratio is not None:
        click.echo(f"{report.times[0].backend} is {report.ratio:.2f} times as fast as {report.times[1].backend}")
    batches = [
        (times.backend, f"{b.batch:,}", f"{b.median_ms:.2f}", f"{b.tokens_per_second:,.0f}")
        for times in report.times
        for b in times.by_batch
    ]
    positions = [
        (times.backend, f"{p.position:,}", f"{p.median_ms:.2f}", f"{p.p95_ms:.2f}")
        for times in report.times
        for p in times.by_position
    ]
    if batches:
        print_table(batches, header=("backend", "streams in a call", "ms/step", "tokens/s"))
    if positions:
        print_table(positions, header=("backend", "position", "ms/token", "p95"))
    click.echo(f"a stream's state takes {format_bytes(report.times[0].state_bytes_per_stream)} with a full chunk")
    for line in report.stock_tools:
        click.echo(line)


def _bench_row(times: Any) -> tuple[str, ...]:
    return (
        times.backend,
        f"{times.decode_median_ms:.2f}",
        f"{times.decode_p95_ms:.2f}",
        f"{times.decode_p99_ms:.2f}",
        f"{times.share_of_bandwidth:.0%}",
        f"{times.prefill_tokens_per_second:,.0f}",
        f"{1000 * times.first_token_seconds:,.0f}",
        f"{times.load_seconds:.2f}",
    )

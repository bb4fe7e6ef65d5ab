"""`megalodon-deploy bench`: speed against the bandwidth limit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from megalodon_deploy.commands.common import BACKEND, bundle_argument, echo_json, json_option
from megalodon_deploy.console import format_bytes, print_table, progress_bar


@click.command()
@bundle_argument
@click.option("--backend", type=BACKEND, default="onnxruntime", show_default=True)
@click.option("--compare", type=BACKEND, help="Measure this backend in turns with the first.")
@click.option("--decode-tokens", type=int, default=200, show_default=True)
@click.option("--prompt-tokens", type=int, default=256, show_default=True)
@click.option("--rounds", type=int, default=5, show_default=True, help="Turns; each starts a fresh stream.")
@click.option("--threads", type=int)
@json_option
def bench(bundle_path: Path, as_json: bool, **options: Any) -> None:
    """Measure prefill and decode against this machine's memory bandwidth."""
    from megalodon_deploy.bundle import open_bundle
    from megalodon_deploy.runtime.bench import bench_bundle

    with progress_bar("bench") as progress:
        report = bench_bundle(open_bundle(bundle_path), progress=progress, **options)
    if as_json:
        echo_json(report.to_dict())
        return
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

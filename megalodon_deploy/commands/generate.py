"""`megalodon-deploy generate`: text as it is computed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from megalodon_deploy.commands.common import (
    EXISTING,
    OUTPUT_FILE,
    backend_option,
    bundle_argument,
    device_option,
    threads_option,
)
from megalodon_deploy.console import format_bytes
from megalodon_deploy.files import atomic_file


@click.command()
@bundle_argument
@click.option("--prompt", help="Text to go on from; '-' reads standard input.")
@click.option("--resume", type=EXISTING, help="Saved stream to go on from.")
@click.option("--save", type=OUTPUT_FILE, help="Write the stream here at the end.")
@click.option("--max-new-tokens", type=int, default=256, show_default=True, help="Stop after so many.")
@click.option(
    "--temperature", type=float, help="0: the most probable token, the default without other sampling options."
)
@click.option("--top-k", type=int, help="Choose among so many most probable tokens.")
@click.option("--top-p", type=float, help="Choose among the fewest tokens that have this probability together.")
@click.option("--min-p", type=float, help="Leave out tokens below this share of the best one's probability.")
@click.option("--repetition-penalty", type=float, help="Above 1: tokens seen lately become less likely.")
@click.option("--seed", type=int, help="The same seed gives the same text.")
@click.option("--stop", "stop_strings", multiple=True, help="Text to end before; repeatable.")
@backend_option
@threads_option
@device_option
@click.option("--stats", is_flag=True, help="Print speed and memory on stderr at the end.")
@click.option("--stats-json", type=OUTPUT_FILE, help="Write speed and memory here.")
def generate(
    bundle_path: Path,
    prompt: str | None,
    resume: Path | None,
    save: Path | None,
    max_new_tokens: int,
    stop_strings: tuple[str, ...],
    backend: str,
    threads: int | None,
    device: str | None,
    stats: bool,
    stats_json: Path | None,
    **sampling: Any,
) -> None:
    """Stream a completion to stdout as it is computed."""
    from megalodon_deploy.bundle import open_bundle
    from megalodon_deploy.runtime.sampling import SamplingParams

    given = {name: value for name, value in sampling.items() if value is not None}
    if not {"temperature", "top_k", "top_p", "min_p", "seed"} & set(given):
        given["temperature"] = 0.0
    params = SamplingParams(**given)
    stream = open_bundle(bundle_path).session(backend, threads=threads, device=device).stream(resume=resume)
    text = sys.stdin.read() if prompt == "-" else prompt or ""
    for piece in stream.generate(text, max_new_tokens=max_new_tokens, sampling=params, stop_strings=stop_strings):
        click.echo(piece.text, nl=False)
    click.echo()
    if save:
        stream.save(save)
    measured = stream.stats.to_dict()
    if stats_json:
        with atomic_file(stats_json) as path:
            path.write_text(json.dumps(measured, indent=2) + "\n")
    if stats:
        click.echo(_stats_line(measured), err=True)


def _stats_line(stats: dict[str, Any]) -> str:
    speeds = [
        f"{name} {stats[f'{name}_tokens']:,} tokens" + (f", {speed:,.1f} tokens/s" if speed else "")
        for name in ("prefill", "decode")
        for speed in [stats[f"{name}_tokens_per_second"]]
    ]
    memory = stats["peak_memory_bytes"]
    sizes = [
        f"state {format_bytes(stats['state_bytes'])}",
        *([f"peak memory {format_bytes(memory)}"] if memory else []),
    ]
    return "; ".join([*speeds, *sizes])

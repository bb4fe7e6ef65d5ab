"""`megalodon-deploy eval`: perplexity and bits per byte of long documents."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from megalodon_deploy.commands.common import BACKEND, EXISTING, OUTPUT_FILE, echo_json, json_option, threads_option
from megalodon_deploy.console import print_table, progress_bar

if TYPE_CHECKING:
    from megalodon_deploy.evaluation import Evaluation


@click.command("eval")
@click.argument("model", type=EXISTING)
@click.option("--data", required=True, multiple=True, type=EXISTING, help="Text file or folder; repeatable.")
@click.option("--glob", default="**/*", show_default=True, help="Files taken in a folder.")
@click.option("--text-field", default="text", show_default=True, help="Of JSON lines and data sets.")
@click.option("--max-tokens", type=int, help="Stop after so many tokens; default: all.")
@click.option("--context", type=int, help="Forget everything after so many tokens; default: never.")
@click.option("--backend", type=BACKEND, default="onnxruntime", show_default=True, help="For a bundle.")
@click.option("--device", default="cpu", show_default=True, help="For a checkpoint.")
@threads_option
@click.option("--plot", type=OUTPUT_FILE, help="Draw loss against position (SVG, PNG or PDF).")
@json_option
def evaluate(
    model: Path,
    data: tuple[Path, ...],
    glob: str,
    text_field: str,
    max_tokens: int | None,
    context: int | None,
    backend: str,
    device: str,
    threads: int | None,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Measure how well a checkpoint or bundle predicts text."""
    from megalodon_deploy.evaluation import evaluate as run_evaluation
    from megalodon_deploy.evaluation import open_language_model
    from megalodon_deploy.evaluation.evaluate import draw_positions
    from megalodon_deploy.runtime.bench.plot import check_plot_path
    from megalodon_deploy.train.config import DataConfig

    if plot:
        check_plot_path(plot)
    source = DataConfig(paths=data, glob=glob, text_field=text_field)
    opened = open_language_model(model, backend=backend, device=device, threads=threads)
    with progress_bar("eval") as progress:
        result = run_evaluation(opened, source, max_tokens=max_tokens, context=context, progress=progress)
    if as_json:
        echo_json(result.to_dict())
    else:
        _print(result)
    if plot:
        draw_positions([result], plot)


def _print(result: Evaluation) -> None:
    rows = [
        (f"{part.begin:,} to {'' if part.end is None else f'{part.end:,}'}", f"{part.num_tokens:,}", f"{part.loss:.4f}")
        for part in result.positions
    ]
    print_table(rows, header=("position", "tokens", "nats/token"))
    click.echo(
        f"{result.model}: {result.num_tokens:,} tokens of {result.num_documents} documents, "
        f"{result.loss:.4f} nats/token, perplexity {result.perplexity:.2f}, {result.bits_per_byte:.4f} bits/byte"
    )

"""`megalodon-deploy train`: text in, checkpoint out."""

from __future__ import annotations

from typing import Any

import click

from megalodon_deploy.commands.common import EXISTING, OUTPUT, echo_json, json_option
from megalodon_deploy.console import progress_bar
from megalodon_deploy.cpus import limit_spinning
from megalodon_deploy.errors import InterruptedRunError


@click.command()
@click.option("--data", required=True, multiple=True, type=EXISTING, help="File or directory of text; repeatable.")
@click.option("--out", required=True, type=OUTPUT, help="Checkpoint directory to write.")
@click.option("--glob", help="Files taken in a directory; default: **/*.py.")
@click.option("--exclude", multiple=True, help="Name of files and directories to leave out; repeatable, wildcards.")
@click.option("--steps", type=int, help="Length of the run in steps; or:")
@click.option("--minutes", type=float, help="Length of the run in minutes.")
@click.option("--preset", help="A published model's dimensions, at vocabulary 256.")
@click.option("--layers", type=int)
@click.option("--dim", type=int, help="Model width D; the other widths follow.")
@click.option("--heads", type=int)
@click.option("--chunk-size", type=int)
@click.option("--batch-size", type=int, help="Windows of a step.")
@click.option("--seq-len", type=int, help="Tokens of a window.")
@click.option("--lr", "learning_rate", type=float, help="Peak learning rate.")
@click.option("--seed", type=int)
@click.option("--threads", type=int)
@click.option("--overwrite", is_flag=True, help="Replace an existing checkpoint.")
@json_option
def train(as_json: bool, **options: Any) -> None:
    """Train a byte-level model on text and write its checkpoint."""
    limit_spinning()
    from megalodon_deploy.train import TrainConfig, byte_model
    from megalodon_deploy.train import train as run_training

    given = {name: value for name, value in options.items() if value not in (None, ())}
    shape = {name: given.pop(name) for name in ("preset", "layers", "dim", "heads", "chunk_size") if name in given}
    with progress_bar("train") as progress:
        result = run_training(TrainConfig(model=byte_model(**shape), **given), progress=progress)
    if as_json:
        echo_json(result.to_dict())
    else:
        loss = "not measured" if result.held_out_loss is None else f"{result.held_out_loss:.3f} nats/byte"
        click.echo(f"{result.path}: {result.num_parameters:,} parameters, {result.steps} steps, held-out loss {loss}")
    if result.interrupted:
        raise InterruptedRunError(f"interrupted after {result.steps} steps; the checkpoint is saved")

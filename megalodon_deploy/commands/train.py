"""`megalodon-deploy train`: text in, checkpoint out."""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click

from megalodon_deploy.commands.common import EXISTING, OUTPUT, echo_json, json_option
from megalodon_deploy.console import progress_bar
from megalodon_deploy.cpus import limit_spinning
from megalodon_deploy.errors import InterruptedRunError

# What a run has to be told, as examples for a printed file.
_TO_FILL_IN: dict[str, dict[str, Any]] = {"data": {"paths": ["text"]}, "run": {"out": "run", "steps": 1000}}


@click.command()
@click.argument("settings", nargs=-1, metavar="[CONFIG.toml] [SECTION.KEY=VALUE]...")
@click.option("--data", multiple=True, type=EXISTING, help="data.paths: file or folder of text; repeatable.")
@click.option("--out", type=OUTPUT, help="run.out: folder of the run.")
@click.option("--steps", type=int, help="run.steps: length of the run in steps; or:")
@click.option("--minutes", type=float, help="run.minutes: length of the run in minutes.")
@click.option("--preset", help="model.preset: a published model's dimensions.")
@click.option("--resume", is_flag=True, help="Go on where the run in this folder was, if there is one.")
@click.option("--overwrite", is_flag=True, help="Remove an earlier run in this folder.")
@click.option("--print-config", is_flag=True, help="Print all settings with their meaning as TOML, and stop.")
@json_option
def train(
    settings: tuple[str, ...], resume: bool, overwrite: bool, print_config: bool, as_json: bool, **options: Any
) -> None:
    """Train a model on text.

    Settings come from a TOML file, then from SECTION.KEY=VALUE, then from options.

    \b
    megalodon-deploy train --data books --out run --steps 1000 model.model_dim=256 run.batch_size=16
    megalodon-deploy train --resume --out run
    """
    limit_spinning()
    from megalodon_deploy.train import train as run_training
    from megalodon_deploy.train.config import TrainConfig

    tables = _tables(settings, options, resume=resume)
    if print_config:
        click.echo(TrainConfig.from_tables(_filled(tables)).to_toml(), nl=False)
        return
    config = TrainConfig.from_tables(tables)
    is_first = os.environ.get("RANK", "0") == "0"  # of the processes that torchrun starts
    with progress_bar("train") if is_first else nullcontext() as progress:
        result = run_training(config, resume=resume, overwrite=overwrite, progress=progress)
    if not is_first:
        return
    if as_json:
        echo_json(result.to_dict())
    else:
        loss = "not measured"
        if result.held_out_loss is not None:
            loss = f"{result.held_out_loss:.3f} nats/token, {result.bits_per_byte:.3f} bits/byte"
        click.echo(f"{result.path}: {result.num_parameters:,} parameters, {result.steps} steps, held-out loss {loss}")
    if result.interrupted:
        raise InterruptedRunError(f"interrupted after {result.steps} steps; go on with --resume")


def _tables(settings: tuple[str, ...], options: dict[str, Any], *, resume: bool) -> dict[str, dict[str, Any]]:
    """The run's settings; one that goes on has its own file to begin with."""
    from megalodon_deploy.train.config import CONFIG_FILE
    from megalodon_deploy.train.settings import override, read_toml

    file = Path(settings[0]) if settings and "=" not in settings[0] else None
    tables = override(read_toml(file) if file else {}, settings[1:] if file else settings)
    places = {"data": "data.paths", "out": "run.out", "steps": "run.steps", "minutes": "run.minutes"}
    for option, place in {**places, "preset": "model.preset"}.items():
        if options[option] not in (None, ()):
            section, key = place.split(".")
            tables.setdefault(section, {})[key] = options[option]
    out = tables.get("run", {}).get("out")
    if resume and file is None and out is not None and (Path(out) / CONFIG_FILE).is_file():
        earlier = read_toml(Path(out) / CONFIG_FILE)
        earlier.get("run", {}).pop("start_from", None)  # its weights are in the run's checkpoints
        tables = {name: {**earlier.get(name, {}), **tables.get(name, {})} for name in {**earlier, **tables}}
    return tables


def _filled(tables: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """With examples of what a run has to be told."""
    filled = {**tables, **{name: {**values, **tables.get(name, {})} for name, values in _TO_FILL_IN.items()}}
    if "minutes" in filled["run"] and "steps" not in tables["run"]:
        del filled["run"]["steps"]
    return filled

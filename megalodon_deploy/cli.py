"""The command line: one thin command per verb over the public Python functions.

Exit codes: 0 done, 1 a check failed, 2 a mistake of the user (one line on stderr, no traceback). Imports of a verb
happen when it runs, so that `--help` answers at once.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from megalodon_deploy import __version__
from megalodon_deploy.console import format_bytes, progress_bar
from megalodon_deploy.errors import CheckFailedError, UserError

Command = TypeVar("Command", bound=Callable[..., Any])
EXISTING = click.Path(exists=True, path_type=Path)
json_option = click.option("--json", "as_json", is_flag=True, help="Print machine-readable results on stdout.")
bundle_argument = click.argument("bundle_path", metavar="BUNDLE", type=EXISTING)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, package_name="megalodon-deploy")
def cli() -> None:
    """From a Megalodon checkpoint to a verified, streaming engine."""


def main() -> None:
    """Entry point: turn a user's mistake into one line and exit code 2."""
    try:
        cli(standalone_mode=False)
    except CheckFailedError as failure:
        _stop(str(failure), 1)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except (click.Abort, KeyboardInterrupt):
        _stop("interrupted", 130)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except UserError as error:
        _stop(str(error), 2)
    except BrokenPipeError:
        sys.exit(0)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _stop(f"{where}{error.strerror or error}", 2)


def _stop(message: str, exit_code: int) -> None:
    click.echo(f"megalodon-deploy: {' '.join(message.split())}", err=True)
    sys.exit(exit_code)


def _echo_json(document: Any) -> None:
    click.echo(json.dumps(document, indent=2))


@cli.command()
@click.option("--ckpt", required=True, type=EXISTING, help="Checkpoint: a directory or a file, any supported layout.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Bundle directory to write.")
@click.option("--precision", type=click.Choice(["fp32", "fp16", "bf16"]), default="fp32", show_default=True)
@click.option(
    "--logits",
    type=click.Choice(["last", "all"]),
    default="last",
    show_default=True,
    help="Positions that return logits.",
)
@click.option("--name", help="Name of the model in the bundle; default: the directory's.")
@click.option("--tokenizer", type=EXISTING, help="tokenizer.json or SentencePiece model; default: the checkpoint's.")
@click.option("--overwrite", is_flag=True, help="Replace an existing bundle.")
@json_option
def export(ckpt: Path, out: Path, as_json: bool, **options: Any) -> None:
    """Write a checkpoint as a bundle: an ONNX graph, its weights and a manifest."""
    from megalodon_deploy.export import export_checkpoint
    from megalodon_deploy.inspection import inspect_bundle

    with progress_bar("export", quiet=as_json) as progress:
        bundle = export_checkpoint(ckpt, out, progress=progress, **options)
    report = inspect_bundle(bundle)
    if as_json:
        _echo_json(report)
    else:
        click.echo(
            f"{out}: {report['num_parameters']:,} parameters, {format_bytes(report['weights_bytes'])} of weights"
        )


if __name__ == "__main__":
    main()

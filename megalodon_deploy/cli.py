"""The command line: exit codes and the list of verbs, which live in `commands/`.

Exit codes: 0 done, 1 a check failed, 2 a mistake of the user (one line on stderr, no traceback), 130 interrupted.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any

import click

from megalodon_deploy import __version__
from megalodon_deploy.commands.bench import bench
from megalodon_deploy.commands.build import build
from megalodon_deploy.commands.doctor import doctor
from megalodon_deploy.commands.eval import evaluate
from megalodon_deploy.commands.export import export
from megalodon_deploy.commands.generate import generate
from megalodon_deploy.commands.inspect import inspect
from megalodon_deploy.commands.train import train
from megalodon_deploy.commands.verify import verify
from megalodon_deploy.errors import CheckFailedError, InterruptedRunError, UserError


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, package_name="megalodon-deploy")
def cli() -> None:
    """From a Megalodon checkpoint to a verified, streaming engine."""


for command in (train, evaluate, export, build, verify, generate, bench, inspect, doctor):
    cli.add_command(command)


def main() -> None:
    """Entry point: turn a user's mistake into one line and exit code 2."""
    warnings.showwarning = _show_warning
    try:
        cli(standalone_mode=False)
    except CheckFailedError as failure:
        _stop(str(failure), 1)
    except InterruptedRunError as stop:
        _stop(str(stop), 130)
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


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: Any, **__: Any
) -> None:
    """Our own warnings are for the user, in one line; those of libraries are for developers."""
    if category.__module__.startswith("megalodon_deploy"):
        click.echo(f"megalodon-deploy: warning: {message}", err=True)


def _stop(message: str, exit_code: int) -> None:
    click.echo(f"megalodon-deploy: {' '.join(message.split())}", err=True)
    sys.exit(exit_code)


if __name__ == "__main__":
    main()

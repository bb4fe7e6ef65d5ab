"""Options and output that the verbs share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

EXISTING = click.Path(exists=True, path_type=Path)
OUTPUT = click.Path(path_type=Path)
OUTPUT_FILE = click.Path(dir_okay=False, path_type=Path)
BACKEND = click.Choice(["onnxruntime", "torch", "tensorrt", "tensorrt-rtx"])
backend_option = click.option(
    "--backend", type=BACKEND, default="onnxruntime", show_default=True, help="What runs the bundle."
)
threads_option = click.option("--threads", type=int, help="CPU threads of one call; default: one for each core.")
device_option = click.option("--device", metavar="NAME", help="cpu, cuda or cuda:1; default: what the backend is for.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print machine-readable results on stdout.")
bundle_argument = click.argument("bundle_path", metavar="BUNDLE", type=EXISTING)


def echo_json(document: Any) -> None:
    """Print `document` as JSON on stdout."""
    click.echo(json.dumps(document, indent=2))

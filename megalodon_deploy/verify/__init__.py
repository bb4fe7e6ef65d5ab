"""Verification of a bundle: PyTorch against whatever runs it, over calls that cross chunk edges, state included.

`verify_bundle` plans schedules of calls (`schedule`), computes them with PyTorch twice, each row's whole stream in one
parallel call and call by call (`reference`), runs the graph in ONNX Runtime and the public runtime over the same calls
(`candidates`), and compares every logit and every state tensor of every call (`compare`, `tolerance`). Runners and the
comparison loop are Polygraphy's.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from megalodon_deploy.bundle import Bundle
from megalodon_deploy.errors import MissingDependencyError

if TYPE_CHECKING:
    from megalodon_deploy.verify.report import VerifyReport

_PACKAGES = ("torch", "onnxruntime", "polygraphy", "onnx", "onnx_ir")


def verify_bundle(
    bundle: Bundle,
    *,
    ckpt: str | Path | None = None,
    bisect: bool = False,
    text: str | Path | None = None,
    tokens: int | None = None,
    progress: Callable[[str, float], None] | None = None,
) -> VerifyReport:
    """Compare a bundle with PyTorch.

    Args:
        bundle: an opened bundle.
        ckpt: the checkpoint it was exported from, which checks the weights' way into the bundle too. Without it the
            reference computes with the weights that lie in the bundle.
        bisect: on a miss, name the first tensor inside the graph that is off.
        text: a UTF-8 file that executors read and go on from; default a module of Python's standard library.
        tokens: stream so many tokens through both operators and a small model, against float64.
        progress: called with a stage and the fraction done.

    Raises `CheckpointError` for a checkpoint that cannot be read or is of another model, `BundleError` for a graph
    that lacks weights, `UserError` for a text that cannot be read, `MissingDependencyError` without the packages of
    the extra `verify`. A miss is not raised: the report's `passed` says it.
    """
    _require_packages()
    from megalodon_deploy.verify.verification import VerifyOptions, run_verification

    return run_verification(bundle, VerifyOptions(ckpt=ckpt, bisect=bisect, text=text, tokens=tokens), progress)


def emit_polygraphy(bundle: Bundle, directory: str | Path, *, ckpt: str | Path | None = None) -> None:
    """Write what the stock `polygraphy` tool needs to check a bundle: see `megalodon_deploy.verify.polygraphy_files`.

    Raises `UserError` when `directory` exists, and for a bf16 bundle.
    """
    _require_packages()
    from megalodon_deploy.verify.polygraphy_files import write_polygraphy_files

    write_polygraphy_files(bundle, Path(directory), ckpt)


def write_html(report: VerifyReport, path: str | Path) -> None:
    """Write a report as one HTML file with plots that needs nothing else."""
    from megalodon_deploy.verify.html_report import write_html_report

    write_html_report(report, Path(path))


def parse_count(text: str) -> int:
    """A number of tokens such as `500K` or `10M`. Raises `UserError` for anything else."""
    from megalodon_deploy.verify.signals import parse_count

    return parse_count(text)


def _require_packages() -> None:
    if missing := [package for package in _PACKAGES if find_spec(package) is None]:
        raise MissingDependencyError(
            f"verify needs {', '.join(missing)}: install with `pip install 'megalodon-deploy[verify]'`"
        )

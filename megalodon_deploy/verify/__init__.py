"""Verification of a bundle: PyTorch against whatever runs it, over calls that cross chunk edges, state included.

`verify_bundle` plans schedules of calls (`schedule`), computes them with PyTorch twice, each row's whole stream in one
parallel call and call by call (`reference`), runs the graph in ONNX Runtime and the public runtime over the same calls
(`candidates`), and compares every logit and every state tensor of every call (`compare`, `tolerance`). Misses are
named (`diagnosis`) and looked into (`bisection`); long streams are held against float64 (`long_stream`). Runners and
the comparison loop are Polygraphy's, and open to comparisons of a user's own (`library`).
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megalodon_deploy.bundle import Bundle
from megalodon_deploy.errors import MissingDependencyError

if TYPE_CHECKING:
    from megalodon_deploy.verify.candidates import graph_contract as graph_contract
    from megalodon_deploy.verify.compare import Contract as Contract
    from megalodon_deploy.verify.compare import ContractCompare as ContractCompare
    from megalodon_deploy.verify.finding import Finding as Finding
    from megalodon_deploy.verify.library import onnxruntime_runner as onnxruntime_runner
    from megalodon_deploy.verify.library import pytorch_runner as pytorch_runner
    from megalodon_deploy.verify.library import session_runner as session_runner
    from megalodon_deploy.verify.library import tensorrt_runner as tensorrt_runner
    from megalodon_deploy.verify.report import VerifyReport
    from megalodon_deploy.verify.runners import feeds_of as feeds_of
    from megalodon_deploy.verify.runners import make_feeds as make_feeds
    from megalodon_deploy.verify.schedule import Schedule as Schedule
    from megalodon_deploy.verify.schedule import Stretch as Stretch
    from megalodon_deploy.verify.schedule import walk as walk

_PUBLIC = {  # for comparisons of a user's own, with the module that each comes from; loaded on use
    "Contract": "compare",
    "ContractCompare": "compare",
    "Finding": "finding",
    "Schedule": "schedule",
    "Stretch": "schedule",
    "feeds_of": "runners",
    "graph_contract": "candidates",
    "make_feeds": "runners",
    "onnxruntime_runner": "library",
    "pytorch_runner": "library",
    "session_runner": "library",
    "tensorrt_runner": "library",
    "walk": "schedule",
}

_PACKAGES = ("torch", "onnxruntime", "polygraphy", "onnx", "onnx_ir")


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    _require_packages()
    return getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)


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

    Raises `UserError` when `directory` exists, and for a bundle with bf16 or fp8 inputs.
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

"""Run a build's child process: its surroundings, its events, and what its death means."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from megalodon_deploy.engine.job import BuildJob, BuildResult
from megalodon_deploy.engine.targets import FLAVOURS, Flavour
from megalodon_deploy.errors import EngineError, MissingDependencyError

Progress = Callable[[str, float], None]

_ERRORS_SHOWN = 3
_CRASH_SIGNALS = (signal.SIGABRT, signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE)


def check_installed(flavour: Flavour) -> None:
    """Raise `MissingDependencyError` when a build cannot even begin."""
    info = FLAVOURS[flavour]
    for module in (info.module, "polygraphy", "onnx"):
        if find_spec(module) is None:
            raise MissingDependencyError(f"target {flavour} needs the Python module {module}: {info.install}")


def run_job(job: BuildJob, progress: Progress | None = None) -> BuildResult:
    """Build in a child process. Raises `EngineError` in one line for whatever TensorRT objects to or dies of."""
    with tempfile.TemporaryDirectory(prefix="megalodon-build.") as folder:
        log_path = Path(folder) / "log"
        with open(log_path, "wb") as log:
            # Its working directory is empty, so that `-m` finds no stray onnx.py there, and a core dump goes with it.
            process = subprocess.Popen(
                [sys.executable, "-u", "-m", "megalodon_deploy.engine.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=folder,
                env=_environment(job.flavour, Path(folder)),
                encoding="utf-8",
            )
        try:
            final = _follow(process, job, progress)
        except BaseException:
            process.kill()
            raise
        finally:
            process.__exit__(None, None, None)
        return _conclude(job, final, process.returncode, log_path.read_text(encoding="utf-8", errors="replace"))


def _environment(flavour: Flavour, folder: Path) -> dict[str, str]:
    """TensorRT-RTX's parser opens a library by a name that its package lacks, and aborts: provide the name."""
    info = FLAVOURS[flavour]
    environment = dict(os.environ, POLYGRAPHY_USE_TENSORRT_RTX=str(int(flavour == "tensorrt-rtx")))
    if info.parser_needs and (library := find_library(info.library_package, info.parser_needs)):
        (folder / info.parser_needs).symlink_to(library)
        paths = [str(folder), *filter(None, [environment.get("LD_LIBRARY_PATH")])]
        environment["LD_LIBRARY_PATH"] = os.pathsep.join(paths)
    return environment


def find_library(package: str, name: str) -> Path | None:
    """The file `name.*` in an installed package; None where TensorRT did not come as that package."""
    spec = find_spec(package)
    folders = spec.submodule_search_locations if spec else None
    return next((path for folder in folders or () for path in sorted(Path(folder).glob(f"{name}.*"))), None)


def _follow(process: subprocess.Popen[str], job: BuildJob, progress: Progress | None) -> dict[str, Any]:
    """Hand over the job, pass progress on; the child's last word, or {} if it died without one."""
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(job.to_json())
        process.stdin.close()
    except BrokenPipeError:
        pass  # it died early: its exit status says more
    final: dict[str, Any] = {}
    for line in process.stdout:
        event = json.loads(line)
        if "progress" not in event:
            final = event
        elif progress is not None:
            progress(*event["progress"])
    process.wait()
    return final


def _conclude(job: BuildJob, final: dict[str, Any], status: int, log: str) -> BuildResult:
    what = f"{job.flavour} build of {job.model_path}"
    if status == 0 and "result" in final:
        return BuildResult.from_dict(final["result"])
    if status == 0 and "refused" in final:
        raise EngineError(final["refused"])
    if status == 0 and "failed" in final:
        raise EngineError(f"{what}: {final['failed'] or _errors(log)}")
    if status == -signal.SIGKILL:
        raise EngineError(f"{what}: the process was killed, as happens when memory runs out: {_memory(job)}")
    if -status in _CRASH_SIGNALS:
        raise EngineError(f"{what}: TensorRT crashed ({signal.Signals(-status).name}): {_errors(log)}")
    if status < 0:
        raise EngineError(f"{what}: stopped by {signal.Signals(-status).name}")
    raise RuntimeError(f"Bug: the build process of {job.model_path} ended with status {status}:\n{log}")


def _errors(log: str) -> str:
    """The last error messages of TensorRT, else its last line, on one line."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line.removeprefix("[E]").strip() for line in lines if line.startswith("[E]")]
    shown = list(dict.fromkeys(errors))[-_ERRORS_SHOWN:] or lines[-1:] or ["it said nothing"]
    return "; ".join(shown)


def _memory(job: BuildJob) -> str:
    weights_path = Path(job.model_path + ".data")
    weights_bytes = weights_path.stat().st_size if weights_path.is_file() else 0
    total_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return (
        f"a build takes about 3 times the weights ({weights_bytes / 1e9:.1f} GB) and this machine has "
        f"{total_bytes / 1e9:.1f} GB in all; leave them in the bundle (--weights bundle) or build on a larger machine"
    )

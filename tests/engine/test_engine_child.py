"""What the death of a build's child process looks like to the caller: one line, and nothing left behind."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megalodon_deploy.bundle import Bundle
from megalodon_deploy.engine.child import check_installed, run_job
from megalodon_deploy.engine.job import BuildJob
from megalodon_deploy.engine.profile import optimization_profile
from megalodon_deploy.engine.targets import FLAVOURS
from megalodon_deploy.errors import EngineError, MissingDependencyError

HandMade = Callable[..., Bundle]


@pytest.fixture
def job(hand_made: HandMade, tmp_path: Path) -> BuildJob:
    bundle = hand_made("fp16")
    return BuildJob(
        flavour="tensorrt-rtx",
        model_path=str(bundle.model_path),
        engine_path=str(tmp_path / "model.engine"),
        engines_dir=str(bundle.path / "engines"),
        overwrite=False,
        precision="fp16",
        max_batch=1,
        capabilities=(80,),
        profile=optimization_profile(bundle.config, max_batch=1),
        plugin_library=None,
    )


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files of a build go."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def _deadly_library(folder: Path, statement: str) -> str:
    """A library that runs a C statement when TensorRT loads it as a plugin library."""
    source = folder / "deadly.c"
    source.write_text(
        "#include <signal.h>\n#include <stdio.h>\n#include <stdlib.h>\n#include <unistd.h>\n"
        f"__attribute__((constructor)) static void die(void) {{ {statement} }}\n"
    )
    library = folder / "libdeadly.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, source], check=True)
    return str(library)


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ('fputs("[E] disk on fire\\n", stderr); abort();', r"TensorRT crashed \(SIGABRT\): disk on fire$"),
        ('fputs("terminate called\\n", stderr); raise(SIGSEGV);', r"TensorRT crashed \(SIGSEGV\): terminate called$"),
        ("raise(SIGSEGV);", r"TensorRT crashed \(SIGSEGV\): it said nothing$"),
        ("raise(SIGKILL);", r"memory runs out.*GB in all"),
        ("raise(SIGTERM);", r"stopped by SIGTERM$"),
    ],
)
def test_death_becomes_one_line(job: BuildJob, tmp_path: Path, scratch: Path, statement: str, message: str) -> None:
    deadly = dataclasses.replace(job, plugin_library=_deadly_library(tmp_path, statement))
    with pytest.raises(EngineError, match=message) as caught:
        run_job(deadly)
    assert "\n" not in str(caught.value)
    assert job.model_path in str(caught.value)
    assert list(scratch.iterdir()) == []


def test_a_failure_that_is_ours_keeps_its_traceback(job: BuildJob, tmp_path: Path) -> None:
    broken = dataclasses.replace(job, plugin_library=_deadly_library(tmp_path, "exit(3);"))
    with pytest.raises(RuntimeError, match=r"Bug:.*status 3"):
        run_job(broken)


def test_noise_on_stdout_does_not_disturb(job: BuildJob, tmp_path: Path) -> None:
    noisy = _deadly_library(tmp_path, 'puts("{\\"result\\": {}}"); fflush(stdout); raise(SIGTERM);')
    with pytest.raises(EngineError, match="SIGTERM"):
        run_job(dataclasses.replace(job, plugin_library=noisy))


def test_full_disk(job: BuildJob) -> None:
    with pytest.raises(EngineError, match="No space left"):
        run_job(dataclasses.replace(job, engine_path="/dev/full"))


def test_a_model_that_is_none(job: BuildJob, tmp_path: Path) -> None:
    empty = tmp_path / "model.onnx"
    empty.write_bytes(b"")
    with pytest.raises(EngineError, match=r"tensorrt-rtx build of .*model\.onnx: .+"):
        run_job(dataclasses.replace(job, model_path=str(empty)))


def test_an_exception_of_the_caller_ends_the_child(job: BuildJob, scratch: Path) -> None:
    def interrupt(stage: str, fraction: float) -> None:
        raise KeyboardInterrupt

    before = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_job(job, interrupt)
    assert time.monotonic() - before < 60
    assert list(scratch.iterdir()) == []
    assert not Path(job.engine_path).exists()


def test_a_build_stops_when_nobody_reads_its_progress(job: BuildJob) -> None:
    child = subprocess.Popen(
        [sys.executable, "-m", "megalodon_deploy.engine.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=dict(os.environ, POLYGRAPHY_USE_TENSORRT_RTX="1"),
    )
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write(job.to_json().encode())
    child.stdin.close()
    assert b"progress" in child.stdout.readline()
    child.stdout.close()
    assert child.wait(timeout=60) != 0
    assert not Path(job.engine_path).exists()


def test_a_build_dies_with_its_caller(job: BuildJob, tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "from megalodon_deploy.engine.child import run_job\n"
        "from megalodon_deploy.engine.job import BuildJob\n"
        "run_job(BuildJob.from_json(sys.stdin.read()), lambda *_: print('building', flush=True))\n"
    )
    slow = dataclasses.replace(job, plugin_library=_deadly_library(tmp_path, "sleep(600);"))
    caller = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=dict(os.environ, TMPDIR=str(tmp_path)),
    )
    assert caller.stdin is not None
    assert caller.stdout is not None
    caller.stdin.write(slow.to_json().encode())
    caller.stdin.close()
    assert caller.stdout.readline() == b"building\n"
    child = int(Path(f"/proc/{caller.pid}/task/{caller.pid}/children").read_text())
    assert _is_running(child)
    caller.kill()
    caller.wait()
    deadline = time.monotonic() + 60
    while _is_running(child):
        assert time.monotonic() < deadline, "the build lives on"
        time.sleep(0.05)


def _is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for flavour, extra in (("tensorrt-rtx", r"\[build\]"), ("tensorrt", r"\[tensorrt\]")):
        absent = dataclasses.replace(FLAVOURS[flavour], module="no_such_tensorrt")
        monkeypatch.setitem(FLAVOURS, flavour, absent)
        with pytest.raises(MissingDependencyError, match=rf"{flavour} needs .*no_such_tensorrt.*{extra}"):
            check_installed(flavour)


@pytest.mark.skipif(os.path.exists("/proc/driver/nvidia/version"), reason="this machine has a GPU")
def test_full_tensorrt_needs_the_gpu(job: BuildJob) -> None:
    with pytest.raises(EngineError, match="there is none here"):
        run_job(dataclasses.replace(job, flavour="tensorrt", capabilities=()))

"""What a build is said to need, what a machine is said to have, and the refusal."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megalodon_deploy.bundle import WEIGHTS_FILE, Bundle
from megalodon_deploy.engine import build_engine, needs
from megalodon_deploy.engine.needs import BuildNeeds, available_memory, estimate_needs
from megalodon_deploy.errors import EngineError

MEMINFO = "MemTotal: 2000 kB\nMemFree: 10 kB\nMemAvailable: 1000 kB\nSwapFree: 24 kB\n"


@pytest.mark.parametrize(
    ("limit", "used", "expected"),
    [(None, 0, 1024 * 1024), ("max", 5, 1024 * 1024), ("600000", 100000, 500000), ("10", 20, 0)],
)
def test_memory_of_the_machine_and_of_its_container(
    tmp_path: Path, limit: str | None, used: int, expected: int
) -> None:
    (tmp_path / "meminfo").write_text(MEMINFO)
    if limit is not None:
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        (tmp_path / "memory.current").write_text(f"{used}\n")
    assert available_memory(tmp_path / "meminfo", tmp_path) == expected
    assert available_memory(tmp_path / "absent", tmp_path) is None


def test_needs_grow_with_the_weights(hand_made: Callable[..., Bundle]) -> None:
    bundle = hand_made("fp16")
    weights_bytes = bundle.manifest.files[WEIGHTS_FILE].size_bytes
    inside, outside, without = (
        estimate_needs(bundle, plugins=True),
        estimate_needs(bundle, plugins=True, weights="bundle"),
        estimate_needs(bundle, plugins=False),
    )
    assert inside.memory - outside.memory == 3 * weights_bytes
    assert inside.disk - outside.disk == weights_bytes
    assert without.memory > inside.memory
    several = estimate_needs(bundle, plugins=True, num_engines=4)
    assert (several.memory, several.disk) == (inside.memory, 4 * inside.disk)


def test_too_little_memory_is_refused_before_the_build(
    hand_made: Callable[..., Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = hand_made("fp16")
    monkeypatch.setattr(needs, "available_memory", lambda: 1 << 20)
    with pytest.raises(
        EngineError, match=r"takes about .* MiB of memory \(available: 1\.00 MiB\).*; leave .*--weights bundle"
    ):
        build_engine(bundle)
    assert not (bundle.path / "engines").exists()


def test_unknown_memory_is_not_refused(tmp_path: Path) -> None:
    BuildNeeds(memory=1 << 50, memory_available=None, disk=0, disk_free=1).check(tmp_path)


def test_command_states_needs_first(hand_made: Callable[..., Bundle]) -> None:
    bundle = hand_made("fp16")
    command = [sys.executable, "-m", "megalodon_deploy.cli", "build", str(bundle.path), "--sm", "90"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.splitlines()[0].startswith("the build takes about ")

"""The number of usable processors follows affinity and a container's quota."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megalodon_deploy.cpus import limit_spinning, usable_cpus


@pytest.fixture
def affinity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)


@pytest.mark.usefixtures("affinity")
@pytest.mark.parametrize(
    ("content", "expected"),
    [("max 100000", 8), ("200000 100000", 2), ("150000 100000", 2), ("1000 100000", 1), ("6400000 100000", 8), ("", 8)],
)
def test_the_quota_limits_the_affinity(tmp_path: Path, content: str, expected: int) -> None:
    quota = tmp_path / "cpu.max"
    quota.write_text(content + "\n")
    assert usable_cpus(quota) == expected


@pytest.mark.usefixtures("affinity")
def test_without_a_quota_file_affinity_decides(tmp_path: Path) -> None:
    assert usable_cpus(tmp_path / "missing") == 8


def test_this_machine_has_at_least_one() -> None:
    assert 1 <= usable_cpus() <= (os.cpu_count() or 1)


def test_the_users_choice_of_spinning_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    limit_spinning()
    assert os.environ["GOMP_SPINCOUNT"] == "7"
    monkeypatch.delenv("GOMP_SPINCOUNT")
    limit_spinning()
    assert 0 < int(os.environ["GOMP_SPINCOUNT"]) < 100_000

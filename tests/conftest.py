"""What every room's tests share: the golden cases."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from megalodon_deploy.cpus import limit_spinning, usable_cpus

limit_spinning()  # for tests beside other work, or beside each other
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # small models gain nothing from a second thread, processes do

_PROCESS_BYTES = 2 << 30  # what a process of the tests may need
_MOST_PROCESSES = 8  # every one imports PyTorch, and holds a context on a GPU

GOLDEN_DIR = Path(__file__).parent / "golden"
GOLDEN_NAMES = sorted(path.parent.name for path in GOLDEN_DIR.glob("*/expected.npz"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Processes for `pytest -n auto`: one for each processor that may be used, as far as memory goes."""
    memory_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(1, min(usable_cpus(), memory_bytes // _PROCESS_BYTES, _MOST_PROCESSES))


@dataclass(frozen=True)
class GoldenCase:
    """A checkpoint in the released layout and what an independent implementation computes for it."""

    path: Path
    expected: dict[str, np.ndarray]

    @property
    def gradients(self) -> dict[str, np.ndarray]:
        return {key.removeprefix("grad/"): value for key, value in self.expected.items() if key.startswith("grad/")}


@pytest.fixture(params=GOLDEN_NAMES)
def golden_case(request: pytest.FixtureRequest) -> GoldenCase:
    path = GOLDEN_DIR / request.param
    with np.load(path / "expected.npz") as arrays:
        return GoldenCase(path, dict(arrays))

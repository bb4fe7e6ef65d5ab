"""What every room's tests share: the golden cases."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from megalodon_deploy.cpus import limit_spinning

limit_spinning()  # for tests beside other work, or beside each other

GOLDEN_DIR = Path(__file__).parent / "golden"
GOLDEN_NAMES = sorted(path.parent.name for path in GOLDEN_DIR.glob("*/expected.npz"))


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

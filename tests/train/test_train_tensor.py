"""Tensor parallelism gives what one process gives: losses, gradients, states, checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

from train.parallel_helpers import launch


def test_tensor_parallel_gradients_are_those_of_one_process(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    done = launch(4, str(Path(__file__).with_name("tensor_parallel_check.py")), str(report))
    assert done.returncode == 0, done.stderr
    errors: dict[str, dict[str, float]] = json.loads(report.read_text())
    assert len(errors) == 14
    for case, found in errors.items():
        assert {"loss", "evaluation", "gradient", "state"} <= set(found)
        assert ("bytes" in found) != ("chunks" in case)
        for name, error in found.items():
            tolerance = 0 if name == "bytes" else 1e-12 if "float64" in case else 1e-5
            assert error <= tolerance, f"{case}, {name}: {error:.3g}"  # False for NaN

"""A few seconds of the load test: random arrivals, cancellations and kept streams on ONNX Runtime."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from runtime.small_models import SHORT_CHUNKS

from megalodon_deploy.bundle import Bundle

MakeBundle = Callable[..., Bundle]
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "soak.py"


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("soak", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["soak"] = module  # its dataclasses look there
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_answers_stay_right_and_nothing_is_lost(make_bundle: MakeBundle) -> None:
    soak_module, bundle = load_script(), make_bundle(SHORT_CHUNKS)
    sessions = [bundle.session(threads=1) for _ in range(2)]
    soak = soak_module.Soak(*sessions, streams=16, checked=0.5, seed=1)
    report = soak_module.run(soak, minutes=0.1, load=24)
    assert report["unfinished"] == 0
    assert report.get("failed", 0) == report.get("wrong", 0) == 0
    assert report["right"] > 10
    assert report["finished"] > 20
    assert report["grown_bytes"] < 32 << 20
    assert not soak.scheduler._slots.streams

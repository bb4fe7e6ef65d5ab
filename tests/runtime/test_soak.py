"""A few seconds of the load test: random arrivals, cancellations and kept streams on ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import soak
from runtime.small_models import SHORT_CHUNKS

from megalodon_deploy.bundle import Bundle

MakeBundle = Callable[..., Bundle]


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_answers_stay_right_and_nothing_is_lost(make_bundle: MakeBundle, tmp_path: Path) -> None:
    bundle = make_bundle(SHORT_CHUNKS)
    sessions = [bundle.session(threads=1) for _ in range(2)]
    load = soak.Soak(*sessions, streams=16, checked=0.5, seed=1, folder=tmp_path)
    report = soak.run(load, minutes=0.1, load=24)
    assert report["unfinished"] == 0
    assert report.get("failed", 0) == report.get("wrong", 0) == 0
    assert report["right"] > 10
    assert report["finished"] > 20
    assert report["resumed"] > 0
    assert report["grown_bytes"] < 32 << 20
    assert not load.scheduler._slots.streams

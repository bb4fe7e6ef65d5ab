"""Long streams: what is measured is right, promises are kept, and broken ones show."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
from verify.conftest import LONG_STREAM_TOKENS as TOKENS

from megalodon_deploy.bundle import Bundle
from megalodon_deploy.errors import UserError
from megalodon_deploy.verify import model_drift as model_drift_module
from megalodon_deploy.verify import parse_count, verify_bundle
from megalodon_deploy.verify.long_stream import LongStream
from megalodon_deploy.verify.operator_drift import CALL_TOKENS, ExactMoments, StepwiseMoments, norm_drift
from megalodon_deploy.verify.report import VerifyReport
from megalodon_deploy.verify.signals import GROUP_SIZE, SIGNALS, checkpoints, drifting_tokens, signal


def test_promises_are_kept_and_the_reason_shows(long_stream: LongStream) -> None:
    assert long_stream.passed, long_stream.checks
    by_name = {(curve.what, curve.state): curve for curve in long_stream.curves}
    for what in ("norm mean, drifting", "norm var, drifting"):
        pair, plain = (by_name[what, f"{state}, token by token"] for state in ("pair", "float32"))
        assert pair.worst < 1e-11
        assert plain.last > 1e4 * pair.last
    assert {position for curve in long_stream.curves for position in curve.positions if position > TOKENS} == set()
    assert all(curve.positions[-1] == TOKENS for curve in long_stream.curves)
    assert all(len(curve.positions) == len(curve.errors) for curve in long_stream.curves)
    assert all(math.isfinite(curve.worst) for curve in long_stream.curves)


def test_it_is_json_and_a_table(long_stream: LongStream) -> None:
    document = json.loads(json.dumps(long_stream.to_dict(), allow_nan=False))
    assert document["tokens"] == TOKENS
    assert document["passed"]
    assert {len(row) for row in long_stream.table_rows()} == {5}
    assert document["resident_bytes"][-1][0] == TOKENS


@pytest.mark.parametrize("value", [math.nan, 1.0])
def test_a_broken_promise_fails_the_report(report: VerifyReport, long_stream: LongStream, value: float) -> None:
    for curve in long_stream.curves:
        if curve.state in ("pair, in calls", "pair (ONNX Runtime)") or curve.what.startswith("moving"):
            errors = (value, *curve.errors[1:]) if len(curve.errors) > 1 else (value,)
            curves = [dataclasses.replace(curve, errors=errors) if it is curve else it for it in long_stream.curves]
            broken = dataclasses.replace(long_stream, curves=tuple(curves))
            counts = curve.state not in ("float16", "bfloat16")
            assert broken.passed != counts, curve
    grown = dataclasses.replace(long_stream, resident_bytes=((TOKENS // 2, 1 << 20), (TOKENS, 1 << 30)))
    assert [check.what for check in grown.checks if not check.passed] == ["memory grown, MiB"]
    assert report.passed
    failed = dataclasses.replace(report, long_stream=grown)
    assert not failed.passed
    assert "memory grown" in failed.verdict()
    assert any("memory grown, MiB: 1e+03, limit 64" in line for line in failed.notes())


def test_memory_that_the_system_does_not_tell_is_not_taken_for_flat(long_stream: LongStream) -> None:
    assert "memory grown, MiB" in {check.what for check in long_stream.checks}
    assert long_stream.not_run == ()
    unknown = dataclasses.replace(long_stream, resident_bytes=())
    assert "memory grown, MiB" not in {check.what for check in unknown.checks}
    assert [item.what for item in unknown.not_run] == ["memory over the long stream"]


def test_a_long_stream_is_a_part_of_the_report(bundle: Bundle, checkpoint: Path, text: Path) -> None:
    stages: list[tuple[str, float]] = []
    report = verify_bundle(
        bundle, ckpt=checkpoint, text=text, tokens=2000, progress=lambda *stage: stages.append(stage)
    )
    assert report.passed, report.verdict()
    assert report.long_stream is not None
    assert report.long_stream.tokens == 2000
    assert len([line for line in report.notes() if line.startswith("long stream: ")]) == 4
    assert [fraction for _, fraction in stages] == sorted(fraction for _, fraction in stages)
    assert "2,000 tokens, small model" in stages[-1][0]


def test_the_moments_are_those_of_all_tokens() -> None:
    total = 3 * CALL_TOKENS + 5
    x_TGs = signal(0, total, total, seed=3).reshape(total, len(SIGNALS), GROUP_SIZE).astype(np.float64)
    exact = ExactMoments()
    steps = StepwiseMoments(is_pair=True)
    for begin in (0, 7, 5000):
        part = x_TGs[begin : {0: 7, 7: 5000, 5000: total}[begin]]
        exact.add(part.mean(2), part.var(2))
        steps.add(begin, part.mean(2), part.var(2))
    for mean, var in (exact.moments(), steps.moments()):
        np.testing.assert_allclose(mean, x_TGs.mean((0, 2)), rtol=1e-12, atol=1e-12, equal_nan=False)
        np.testing.assert_allclose(var, x_TGs.var((0, 2)), rtol=1e-10, equal_nan=False)


def test_a_wrong_norm_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    from megalodon_deploy.verify import operator_drift

    right = operator_drift.timestep_norm
    monkeypatch.setattr(
        operator_drift, "timestep_norm", lambda x, past, position, *rest: right(x, past, position + 1, *rest)
    )
    curves = {curve.state: curve for curve in norm_drift(2 * CALL_TOKENS, lambda who, count: None)}
    assert curves["pair, in calls"].worst > 1e-6
    assert curves["pair, token by token"].worst < 1e-10


def test_a_session_that_forgets_shows(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    feed = model_drift_module._Streams.feed

    def forget(streams: model_drift_module._Streams, tokens_T: np.ndarray) -> None:
        if streams._stream.position == 512:
            saved = streams._stream.snapshot()
            tensors = {name: array * (0 if "cema" in name else 1) for name, array in saved.tensors.items()}
            session = streams._stream.batch.session
            streams._stream = session.stream(resume=dataclasses.replace(saved, tensors=tensors))
        feed(streams, tokens_T)

    monkeypatch.setattr(model_drift_module._Streams, "feed", forget)
    drift = model_drift_module.model_drift(bundle, 1024, lambda who, count: None)
    logits = {curve.state: curve for curve in drift.curves if "logits" in curve.what}
    assert logits["pair (ONNX Runtime)"].worst > 2e-5
    assert logits["float32 (PyTorch)"].worst < 2e-5


def test_a_nan_of_one_call_stays(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    right, calls = model_drift_module._relative, iter(range(100))
    monkeypatch.setattr(model_drift_module, "_relative", lambda *pair: math.nan if next(calls) == 2 else right(*pair))
    drift = model_drift_module.model_drift(bundle, 1024, lambda who, count: None)
    worst = {curve.state: curve.worst for curve in drift.curves if "logits" in curve.what}
    assert math.isnan(worst["pair (ONNX Runtime)"])
    assert worst["float32 (PyTorch)"] < 2e-5


def test_signals_are_the_same_wherever_a_call_begins_and_drift() -> None:
    total = 400_000
    means = [signal(at, 200, total, 0).reshape(200, len(SIGNALS), -1).mean((0, 2)) for at in range(0, total, 20_000)]
    steady, drifting, ramp, far = np.array(means).T
    assert np.abs(steady).max() < 0.2
    assert drifting.min() < 22
    assert drifting.max() > 38
    assert ramp[-1] > 90 > 10 > ramp[0]
    assert np.abs(far - 1000).max() < 0.2
    tokens = drifting_tokens(0, total, total, 256, 0)
    assert tokens.min() >= 0
    assert tokens.max() < 256
    assert np.array_equal(drifting_tokens(512, 100, total, 256, 0), drifting_tokens(512, 100, total, 256, 0))
    places = checkpoints(10**7, 4096)
    assert places == sorted(set(places))
    assert places[-1] == 10**7
    assert all(place % 4096 == 0 for place in places[:-1])


@pytest.mark.parametrize(("text", "count"), [("10M", 10**7), ("500k", 500_000), ("4_096", 4096), ("1,000", 1000)])
def test_counts_are_read(text: str, count: int) -> None:
    assert parse_count(text) == count


@pytest.mark.parametrize("text", ["", "0", "-5", "1.5M", "M", "ten"])
def test_what_is_no_count_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="positive number such as"):
        parse_count(text)

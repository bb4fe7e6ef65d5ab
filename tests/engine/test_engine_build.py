"""Real builds with TensorRT-RTX, on the hand-made graph."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megalodon_deploy.bundle import ENGINE_INFO_FILE, WEIGHTS_FILE, Bundle, Precision
from megalodon_deploy.engine import EngineInfo, build_engine, build_engines, check_engine, list_engines
from megalodon_deploy.engine.job import BuildJob
from megalodon_deploy.engine.library import LIBRARY_VARIABLE, abi_version, find_plugin_library
from megalodon_deploy.engine.profile import optimization_profile
from megalodon_deploy.errors import EngineError, MissingDependencyError
from megalodon_deploy.files import sha256_file

HandMade = Callable[..., Bundle]
Usage = namedtuple("Usage", "total used free")


def _files(bundle: Bundle) -> set[Path]:
    return {path.relative_to(bundle.path) for path in bundle.path.rglob("*")}


@pytest.fixture
def untouched(hand_made: HandMade) -> Iterator[Bundle]:
    """A bundle that a failing build must leave as it was."""
    bundle = hand_made("fp16")
    before = _files(bundle)
    yield bundle
    assert _files(bundle) == before


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_with_plugins(hand_made: HandMade, precision: Precision) -> None:
    bundle = hand_made(precision)
    stages: list[tuple[str, float]] = []
    info = build_engine(bundle, sm=(89, 80), progress=lambda stage, fraction: stages.append((stage, fraction)))
    assert info.id == f"tensorrt-rtx-{'.'.join(info.version.split('.')[:3])}-sm80+89-{precision}"
    assert info.plugins == ("ComplexEMA", "TimestepNorm", "TimestepNormComplexEMA")
    assert info.num_plugin_layers == 4
    assert info.norm_update == "float64"
    library = find_plugin_library()
    assert info.plugin_library is not None
    assert info.plugin_library.sha256 == sha256_file(library)
    assert info.plugin_library.abi_version == abi_version(library)
    engine = check_engine(bundle, info)
    assert b"ComplexEMA" in engine.read_bytes()
    assert list_engines(bundle) == [info]
    assert 0 < info.build_seconds < 600
    assert info.peak_memory_bytes > engine.stat().st_size
    fractions = [fraction for _, fraction in stages]
    assert len(fractions) > 5
    assert fractions == sorted(fractions)
    assert fractions[0] == 0.0
    assert fractions[-1] == 1.0


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_without_plugins(hand_made: HandMade, precision: Precision, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LIBRARY_VARIABLE, "/no/such/library")
    bundle = hand_made(precision)
    info = build_engine(bundle, sm=(86,), plugins=False)
    assert info.id.endswith(f"-sm86-{precision}-no-plugins")
    assert (info.plugins, info.num_plugin_layers, info.plugin_library) == ((), 0, None)
    assert info.norm_update == "float32"
    assert check_engine(bundle, info).stat().st_size == info.engine.size_bytes


def test_engines_stand_side_by_side_and_are_replaced_on_request(hand_made: HandMade) -> None:
    bundle = hand_made("fp16")
    first = build_engine(bundle, sm=(80,))
    batched = build_engine(bundle, sm=(80,), max_batch=3)
    assert batched.id == f"{first.id}-b3"
    assert batched.profile["tokens"].max == (3, bundle.config.chunk_size)
    assert list_engines(bundle) == [first, batched]
    with pytest.raises(EngineError, match=r"exists already; .*--overwrite"):
        build_engine(bundle, sm=(80,))
    marker = bundle.path / "engines" / first.id / ENGINE_INFO_FILE
    marker.unlink()
    again = build_engine(bundle, sm=(80,), overwrite=True)
    assert list_engines(bundle) == [again, batched]
    assert {path.name for path in (bundle.path / "engines").iterdir()} == {first.id, batched.id}


def test_an_engine_for_each_gpu_from_one_call(hand_made: HandMade) -> None:
    bundle = hand_made("fp16")
    stages: list[float] = []
    infos = build_engines(bundle, sm=(89, 80), progress=lambda stage, fraction: stages.append(fraction))
    assert [info.compute_capabilities for info in infos] == [(80,), (89,)]
    assert list_engines(bundle) == infos
    assert stages == sorted(stages)
    assert (stages[0], stages[-1]) == (0.0, 1.0)
    assert 0.5 in stages
    for info in infos:
        check_engine(bundle, info)
    (both,) = build_engines(bundle, sm=(89, 80), hardware_compatible=True)
    assert both.compute_capabilities == (80, 89)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sm": (80, 90)}, "sm 90: target tensorrt-rtx serves"),
        ({"sm": ()}, "no compute capability given"),
        ({"sm": (80, 86), "weights": "stripped"}, "'stripped' is none of"),
        ({"sm": (80,), "version_compatible": True}, "has no version-compatible engines"),
    ],
)
def test_mistakes_are_refused_before_the_first_build(untouched: Bundle, options: Any, message: str) -> None:
    with pytest.raises(EngineError, match=message):
        build_engines(untouched, **options)


def test_disk_for_all_engines_is_asked_for_first(untouched: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1 << 30, 1 << 30, 100 << 20))
    with pytest.raises(EngineError, match=r"128\.\d+ MiB of disk \(free: 100\.00 MiB\); make room"):
        build_engines(untouched, sm=(80, 86))


@pytest.mark.parametrize("plugins", [True, False])
def test_weights_stay_in_the_bundle(hand_made: HandMade, plugins: bool) -> None:
    bundle = hand_made("fp16")
    inside = build_engine(bundle, sm=(86,), plugins=plugins)
    outside = build_engine(bundle, sm=(86,), plugins=plugins, weights="bundle")
    assert outside.id == f"{inside.id}-bundle-weights"
    assert list_engines(bundle) == [inside, outside]
    assert set(outside.bundle_weights) >= {"embed", "output"}
    weights = (bundle.path / WEIGHTS_FILE).read_bytes()
    embed = outside.bundle_weights["embed"]
    content = weights[embed.offset : embed.offset + embed.size_bytes]
    assert len(content) == 2 * embed.shape[0] * embed.shape[1] > 500
    assert content in check_engine(bundle, inside).read_bytes()
    assert content not in check_engine(bundle, outside).read_bytes()


def test_streamed_weights(hand_made: HandMade) -> None:
    bundle = hand_made("fp16")
    info = build_engine(bundle, sm=(86,), weights="streamed")
    assert (info.id.endswith("-streamed"), info.weights, dict(info.bundle_weights)) == (True, "streamed", {})
    assert check_engine(bundle, info).read_bytes() != b""


FULL_TENSORRT = """
import json, sys
from megalodon_deploy.engine import worker
from megalodon_deploy.engine.job import BuildJob
worker._device_capability = lambda: 86
result = worker.build(BuildJob.from_json(sys.stdin.read()), lambda stage, fraction: None)
print(json.dumps([result.engine_id, result.capabilities]), file=sys.stderr)
"""


def test_full_tensorrt_keeps_its_timings(hand_made: HandMade, tmp_path: Path) -> None:
    """TensorRT-RTX under the other's name, which has the same interface; it times nothing, so the file stays small."""
    bundle = hand_made("fp16")
    (tmp_path / "tensorrt.py").write_text("from tensorrt_rtx import *\n__version__ = '10.99.1.2'\n")
    job = BuildJob(
        flavour="tensorrt",
        model_path=str(bundle.model_path),
        engine_path=str(tmp_path / "engine"),
        engines_dir=str(tmp_path),
        overwrite=False,
        precision="fp16",
        max_batch=1,
        capabilities=(),
        profile=optimization_profile(bundle.config, max_batch=1),
        plugin_library=None,
        weights="bundle",
        hardware_compatible=True,
    )
    paths = {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path]), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    command = [sys.executable, "-c", FULL_TENSORRT]
    environment = os.environ | paths | {"POLYGRAPHY_USE_TENSORRT_RTX": "0"}

    def build(job: BuildJob) -> list[str]:
        done = subprocess.run(
            command, input=job.to_json(), env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
        )
        return done.stdout.splitlines() + done.stderr.splitlines()

    assert build(job)[-1] == '["tensorrt-10.99.1-sm86-up-fp16-no-plugins-bundle-weights", [86]]'
    timings = tmp_path / "cache" / "megalodon-deploy" / "tensorrt-10.99.1.2-sm86.timings"
    first = timings.read_bytes()
    assert any("Loading" in line and str(timings) in line for line in build(job))
    assert timings.read_bytes() == first != b""
    assert any("lean" in line for line in build(replace(job, version_compatible=True)))


def test_an_operator_that_nobody_knows(hand_made: HandMade) -> None:
    bundle = hand_made("fp16", norm="Misspelt")
    before = _files(bundle)
    with pytest.raises(EngineError, match="Misspelt") as caught:
        build_engine(bundle, sm=(80,))
    assert "\n" not in str(caught.value)
    assert _files(bundle) == before


def test_weights_of_the_wrong_size_are_refused(hand_made: HandMade) -> None:
    bundle = hand_made("fp16")
    weights = bundle.path / "model.onnx.data"
    os.truncate(weights, weights.stat().st_size // 2)
    with pytest.raises(EngineError, match=r"model\.onnx"):
        build_engine(bundle, sm=(80,))
    assert not (bundle.path / "engines").exists()


def test_no_room(untouched: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1 << 30, 1 << 30, 1000))
    with pytest.raises(EngineError, match=r"of disk \(free: 1,000 B\); make room"):
        build_engine(untouched, sm=(80,))


def test_a_bundle_that_cannot_be_written(hand_made: HandMade) -> None:
    bundle = hand_made("fp16")
    (bundle.path / "engines").write_text("in the way")
    with pytest.raises(EngineError, match=r"engines: cannot write there"):
        build_engine(bundle, sm=(80,))


def test_a_missing_library_points_to_both_ways_out(untouched: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megalodon_deploy.engine.library.default_build_dir", lambda: Path("/nowhere"))
    monkeypatch.delenv(LIBRARY_VARIABLE, raising=False)
    with pytest.raises(MissingDependencyError, match=r"build-plugins.*--no-plugins"):
        build_engine(untouched, sm=(80,))


def test_a_foreign_library_is_refused(untouched: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    from numpy._core import _multiarray_umath

    monkeypatch.setenv(LIBRARY_VARIABLE, _multiarray_umath.__file__)
    with pytest.raises(EngineError, match="no libmegalodon"):
        build_engine(untouched, sm=(80,))


def test_the_caller_can_stop_a_build(untouched: Bundle) -> None:
    def stop(stage: str, fraction: float) -> None:
        if fraction > 0.2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_engine(untouched, sm=(80,), progress=stop)


def test_info_is_what_stands_in_the_file(hand_made: HandMade) -> None:
    bundle = hand_made("fp16")
    info = build_engine(bundle, plugins=False)
    path = bundle.path / "engines" / info.id / ENGINE_INFO_FILE
    assert EngineInfo.from_json(path.read_text(), path) == info

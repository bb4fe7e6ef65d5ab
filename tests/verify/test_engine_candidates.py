"""Engines as candidates: the real Polygraphy runs them, over a stand-in for TensorRT-RTX and the GPU."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polygraphy.backend.trt.runner
import pytest
import tensorrt_rtx
from polygraphy.comparator import Comparator
from polygraphy.datatype import DataType
from polygraphy.logger import G_LOGGER
from runtime.fake_gpu import FakeCudaExecutor, FakeGpu
from runtime.fake_tensorrt import FakeTensorRT, engine_info
from verify import fake_trt
from verify.conftest import Verify
from verify.fake_trt import Arrays

from megalodon_deploy import verify
from megalodon_deploy.bundle import ENGINE_FILE, ENGINE_INFO_FILE, ENGINES_DIR, Bundle, FileEntry
from megalodon_deploy.engine.weight_inputs import WeightPlace
from megalodon_deploy.errors import EngineError
from megalodon_deploy.export import export_checkpoint
from megalodon_deploy.export.precision import write_widened
from megalodon_deploy.runtime.session import Session, open_session
from megalodon_deploy.state import LOGITS, POSITION, TOKENS, state_specs
from megalodon_deploy.verify import candidates, engines, verification
from megalodon_deploy.verify.candidates import ACTIVATIONS
from megalodon_deploy.verify.onnx_values import _to_array, _to_value, open_exact

FLAVOUR, VERSION = "tensorrt-rtx", tensorrt_rtx.__version__


def add_engine(bundle: Bundle, name: str, **changes: Any) -> None:
    directory = bundle.path / ENGINES_DIR / name
    directory.mkdir(parents=True)
    (directory / ENGINE_FILE).write_bytes(b"no engine")
    given = {"version": VERSION, "max_batch": 3, "plugins": ()} | changes
    info = engine_info(bundle, name, engine=FileEntry.of(directory / ENGINE_FILE), **given)
    (directory / ENGINE_INFO_FILE).write_text(info.to_json())


def types(bundle: Bundle) -> tuple[dict[str, str], dict[str, str]]:
    """Of inputs and outputs, by name."""
    activation = ACTIVATIONS[bundle.manifest.precision]
    specs = [(spec, spec.numpy_dtype(activation).name) for spec in state_specs(bundle.config)]
    inputs = {TOKENS: "int64", POSITION: "int64"} | {spec.past: kind for spec, kind in specs}
    return inputs, {spec.present: kind for spec, kind in specs} | {LOGITS: "float32"}


def make_compute(bundle: Bundle, folder: Path) -> Callable[[Arrays], Arrays]:
    """The graph in ONNX Runtime, widened where that has no bf16."""
    is_bf16, (_, outputs) = bundle.manifest.precision == "bf16", types(bundle)
    session = open_exact(write_widened(bundle, folder) if is_bf16 else bundle.model_path)

    def compute(feeds: Arrays) -> Arrays:
        given = {
            name: array.astype(np.float32) if array.dtype == "bfloat16" else array for name, array in feeds.items()
        }
        values = session.run_with_ort_values(None, {name: _to_value(array) for name, array in given.items()})
        arrays = [_to_array(value) for value in values]
        names = [node.name for node in session.get_outputs()]
        return {name: array.astype(outputs[name]) for name, array in zip(names, arrays, strict=True)}

    return compute


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A GPU for stand-ins. Polygraphy's modules are bound to the other flavour before, as in a fresh process."""
    engines._use_flavour("tensorrt")
    monkeypatch.setattr(verification, "cpu_candidates", lambda bundle: ([], []))  # others are tested elsewhere
    monkeypatch.setattr(engines, "visible_gpus", lambda: "a GPU that is not there")
    monkeypatch.setattr(engines, "first_gpu_capability", lambda: 89)

    def open_here(bundle: Bundle, backend: str) -> Session:
        return Session(bundle, FakeCudaExecutor(bundle, 3)) if backend == FLAVOUR else open_session(bundle, backend)

    monkeypatch.setattr(candidates, "open_session", open_here)
    yield
    engines._use_flavour("tensorrt")


@pytest.mark.parametrize(
    "options",
    [{}, {"precision": "fp16", "kv_dtype": "fp8"}, {"precision": "bf16", "kv_dtype": "int8"}],
    ids=str,
)
@pytest.mark.usefixtures("gpu")
def test_a_right_engine_passes_and_a_wrong_one_is_named(
    checkpoint: Path, verify_copy: Verify, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, options: dict[str, Any]
) -> None:
    bundle = export_checkpoint(checkpoint, tmp_path / "bundle", **options)
    add_engine(bundle, "a", precision=bundle.manifest.precision)
    if bundle.manifest.precision == "bf16":  # the stand-in for a session runs the graph itself
        monkeypatch.setitem(sys.modules, "cuda.bindings", None)
        monkeypatch.delitem(sys.modules, "megalodon_deploy.runtime.cuda.driver", raising=False)
    right = make_compute(bundle, tmp_path / "widened")
    fake_trt.install(monkeypatch, *types(bundle), right)
    report = verify_copy(bundle, checkpoint)
    assert report.passed, report.verdict()
    compared = {finding.candidate for finding in report.findings}
    assert "engine a" in compared
    has_session = bundle.manifest.precision != "bf16"
    assert (f"{FLAVOUR} session" in compared) == has_session
    why = {item.what: item.why for item in report.not_run}.get(f"{FLAVOUR} session", "")
    assert ("needs cuda-bindings: pip install 'megalodon-deploy[cuda]'" in why) != has_session
    assert [agreement.candidate for agreement in report.text] == [f"{FLAVOUR} session"] * has_session

    def wrong(feeds: Arrays) -> Arrays:
        return right(feeds | {"past_cema.1": np.zeros_like(feeds["past_cema.1"])})

    fake_trt.install(monkeypatch, *types(bundle), wrong)
    (diagnosis,) = verify_copy(bundle, checkpoint).diagnoses
    assert (diagnosis.candidate, diagnosis.name) == ("engine a", "state not carried")
    assert diagnosis.first.tensor == "present_cema.1"


@pytest.mark.usefixtures("gpu")
def test_what_tensorrt_refuses_is_a_miss_in_its_words(
    bundle: Bundle, checkpoint: Path, verify_copy: Verify, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(feeds: Arrays) -> Arrays:
        raise RuntimeError("no kernel for this")

    fake_trt.install(monkeypatch, *types(bundle), fail)
    complaints = {}
    for name, content in (("call", b"no engine"), ("engine", b"of another release")):
        copy = Bundle(shutil.copytree(bundle.path, tmp_path / name), bundle.manifest)
        add_engine(copy, "a")
        path = copy.path / ENGINES_DIR / "a"
        (path / ENGINE_FILE).write_bytes(content)
        info = engine_info(
            bundle, "a", engine=FileEntry.of(path / ENGINE_FILE), version=VERSION, max_batch=3, plugins=()
        )
        (path / ENGINE_INFO_FILE).write_text(info.to_json())
        misses = verify_copy(copy, checkpoint).misses
        assert {(miss.candidate, miss.tensor) for miss in misses} == {("engine a", "all outputs")}
        complaints[name] = str(misses[0].problem)
    assert re.search(r"TensorRT refused the call: .*\(no kernel for this\)", complaints["call"])
    assert re.search(r"cannot load it: .*\(magic tag does not match\)", complaints["engine"])


@pytest.mark.usefixtures("gpu")
def test_engines_that_cannot_run_here_are_named_with_the_reason(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    copy = Bundle(shutil.copytree(bundle.path, tmp_path / "bundle"), bundle.manifest)
    fake_trt.install(monkeypatch, {}, {}, lambda feeds: {})
    add_engine(copy, "full", flavour="tensorrt")
    add_engine(copy, "old", version="1.0.0.1")
    add_engine(copy, "other", compute_capabilities=(120,))
    add_engine(copy, "outside", weights="bundle", bundle_weights={"w": WeightPlace(offset=0, size_bytes=4, shape=(1,))})
    found, not_run = engines.engine_candidates(copy)
    why = {item.what: item.why for item in not_run}
    assert "one process runs one flavour, here tensorrt-rtx" in why["engine full"]
    assert "needs tensorrt-rtx 1.0.0.1" in why["engine old"]
    assert "not for this GPU's compute capability 8.9, there are engines for 12.0" in why["engine other"]
    assert "the session runs it" in why["engine outside"]
    assert [candidate.name for candidate in found] == [f"{FLAVOUR} session"]
    monkeypatch.setattr(engines, "visible_gpus", lambda: None)
    found, not_run = engines.engine_candidates(copy)
    assert found == []
    assert {item.why for item in not_run} == {"no NVIDIA GPU is visible on this machine"}
    assert len(not_run) == 4


@pytest.mark.usefixtures("gpu")
def test_a_damaged_engine_is_never_loaded(
    bundle: Bundle, checkpoint: Path, verify_copy: Verify, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    copy = Bundle(shutil.copytree(bundle.path, tmp_path / "bundle"), bundle.manifest)
    fake = fake_trt.install(monkeypatch, *types(bundle), make_compute(bundle, tmp_path))
    monkeypatch.setattr(fake, "make_engine", lambda *_: pytest.fail("it was loaded"))
    add_engine(copy, "a", max_batch=1)
    (copy.path / ENGINES_DIR / "a" / ENGINE_FILE).write_bytes(b"changed..")
    report = verify_copy(copy, checkpoint)
    assert {(miss.candidate, miss.tensor) for miss in report.misses} == {("engine a", "all outputs")}
    assert "sha256" in report.misses[0].describe()
    too_large = {item.what for item in report.not_run}
    assert {"engine a, schedule batch", "engine a, schedule edges", f"{FLAVOUR} session, schedule saved"} <= too_large


@pytest.mark.usefixtures("gpu")
def test_a_users_own_comparison_has_engines_too(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    copy = Bundle(shutil.copytree(bundle.path, tmp_path / "bundle"), bundle.manifest)
    add_engine(copy, "a")
    fake_trt.install(monkeypatch, *types(bundle), make_compute(bundle, tmp_path))
    stretches = [verify.Stretch(11), *[verify.Stretch(1)] * 3]
    schedule = verify.walk("mine", "", bundle.config.chunk_size, (0,), stretches)
    runners = [verify.pytorch_runner(copy, schedule), verify.tensorrt_runner(copy, "a", schedule)]
    compare = verify.ContractCompare(bundle.config, schedule, {"engine a": verify.graph_contract(copy, "fp32")})
    with G_LOGGER.verbosity():
        results = Comparator.run(runners, list(verify.make_feeds(schedule, bundle.config.vocab_size, seed=0)))
        Comparator.compare_accuracy(results, compare_func=compare)
    assert compare.num_compared == 4
    assert [finding.describe() for finding in compare.findings if not finding] == []
    with verify.tensorrt_runner(copy, "a", schedule) as runner:
        first, last, *_ = (runner.infer(feed) for feed in verify.make_feeds(schedule, 256, seed=0))
    assert not np.array_equal(first[LOGITS], last[LOGITS]), "outputs lie in one buffer"
    with pytest.raises(EngineError, match="engine b cannot run here: the bundle has no such engine"):
        verify.tensorrt_runner(copy, "b", schedule)


@pytest.mark.usefixtures("gpu")
def test_polygraphy_takes_the_engines_flavour_whatever_was_imported_before() -> None:
    engines._use_flavour(FLAVOUR)
    assert DataType.from_dtype(tensorrt_rtx.bfloat16, "tensorrt") == DataType.BFLOAT16
    assert polygraphy.backend.trt.runner.trt.__version__ == VERSION


def unlike_real(stand_in: type, real: type) -> list[str]:
    """Methods that the real class lacks, or has with other parameters, as its documentation lists them."""
    unlike = []
    for name, method in vars(stand_in).items():
        if name.startswith("_") or not callable(method):
            continue
        overloads = re.findall(rf"^(?:\d+\. )?{name}\((.*)\) ->", getattr(real, name, method).__doc__ or "", re.M)
        known = [re.findall(r"(\w+): ", re.sub(r"\[[^\]]*\]|<[^>]*>", "", overload)) for overload in overloads]
        mine = list(method.__code__.co_varnames[: method.__code__.co_argcount])
        if not any(mine == parameters[: len(mine)] for parameters in known):
            unlike.append(f"{name}{mine}: {known}")
    return unlike


def test_stand_ins_have_the_real_ones_methods(bundle: Bundle) -> None:
    of_runtime = FakeTensorRT(FakeGpu(), bundle.model_path)
    runtime = of_runtime.Runtime(None)
    engine = runtime.deserialize_cuda_engine(b"")
    config = engine.create_runtime_config()
    config.set_execution_context_allocation_strategy("user managed")
    config.set_runtime_cache(config.create_runtime_cache())
    context = engine.create_execution_context(config)
    for stand_in, real in (
        (fake_trt.FakeRuntime, tensorrt_rtx.Runtime),
        (fake_trt.FakeEngine, tensorrt_rtx.ICudaEngine),
        (fake_trt.FakeContext, tensorrt_rtx.IExecutionContext),
        (type(runtime), tensorrt_rtx.Runtime),
        (type(engine), tensorrt_rtx.ICudaEngine),
        (type(context), tensorrt_rtx.IExecutionContext),
        (type(config), tensorrt_rtx.IRuntimeConfig),
        (type(config.runtime_cache), tensorrt_rtx.IRuntimeCache),
    ):
        assert unlike_real(stand_in, real) == [], stand_in

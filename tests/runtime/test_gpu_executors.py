"""Engines are chosen and checked before they are loaded; the calls into TensorRT, ONNX Runtime and CUDA are the right
ones, as far as that can be seen without a GPU."""

from __future__ import annotations

import gc
import inspect
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
from helpers import assert_close
from runtime.fake_gpu import FakeGpu, FakeKernels
from runtime.fake_tensorrt import VERSION, FakeTensorRT, engine_info
from runtime.small_models import SHORT_CHUNKS

from megalodon_deploy.bundle import (
    ENGINE_FILE,
    ENGINE_INFO_FILE,
    ENGINES_DIR,
    WEIGHTS_FILE,
    Bundle,
    FileEntry,
    open_bundle,
)
from megalodon_deploy.engine.graph import prepare_graph
from megalodon_deploy.engine.library import cache_dir
from megalodon_deploy.errors import EngineError, MissingDependencyError, UserError
from megalodon_deploy.runtime.executors import onnxruntime_cuda, tensorrt
from megalodon_deploy.runtime.executors.engine_choice import Place, choose_engine
from megalodon_deploy.runtime.executors.onnxruntime_cuda import OnnxRuntimeCudaExecutor
from megalodon_deploy.runtime.executors.tensorrt import TensorRTExecutor
from megalodon_deploy.runtime.session import Session

MakeBundle = Callable[..., Bundle]
HERE = Place("tensorrt-rtx", VERSION, 89)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"flavour": "tensorrt"}, "engines for tensorrt only"),
        ({"bundle_fingerprint": "0" * 64}, "another export"),
        ({"compute_capabilities": (80, 90)}, "compute capability 8.9"),
        ({"version": "1.6.0.9"}, "needs tensorrt-rtx 1.6.0.9, 1.7.1.116 is installed"),
        ({"profile": {}}, "shapes of another release"),
    ],
)
def test_an_engine_that_does_not_fit_is_named_with_what_to_do(
    make_bundle: MakeBundle, changes: dict[str, Any], message: str
) -> None:
    bundle = make_bundle(SHORT_CHUNKS)
    unfit = engine_info(bundle, "unfit", **changes)
    with pytest.raises(EngineError, match=message) as caught:
        choose_engine(bundle, [unfit], HERE)
    assert "megalodon-deploy build" in str(caught.value)
    assert "\n" not in str(caught.value)
    fit = engine_info(bundle, "fit")
    assert choose_engine(bundle, [unfit, fit, unfit], HERE) is fit


def test_the_best_engine_is_chosen(make_bundle: MakeBundle) -> None:
    bundle = make_bundle(SHORT_CHUNKS)
    with pytest.raises(EngineError, match="has no engine"):
        choose_engine(bundle, [], HERE)
    drifting = engine_info(bundle, "drifting", norm_update="float32", max_batch=64)
    small, large = engine_info(bundle, "small", max_batch=1), engine_info(bundle, "large", max_batch=8)
    assert choose_engine(bundle, [drifting, large, small], HERE) is large
    assert choose_engine(bundle, [drifting], HERE) is drifting
    outside = engine_info(bundle, "outside", max_batch=8, weights="bundle")
    for_one = engine_info(bundle, "for one", max_batch=8, compute_capabilities=(89,))
    assert choose_engine(bundle, [outside, large], HERE) is large
    assert choose_engine(bundle, [large, for_one, outside], HERE) is for_one
    by_plugin = engine_info(bundle, "plugin", max_batch=8, compute_capabilities=(89,), plugins=("ChunkAttention",))
    assert choose_engine(bundle, [large, by_plugin], HERE) is large
    for_plugin = Bundle(bundle.path, replace(bundle.manifest, attention="plugin"))
    of_it = [replace(info, bundle_fingerprint=for_plugin.manifest.fingerprint) for info in (large, by_plugin, for_one)]
    assert choose_engine(for_plugin, of_it, HERE).id == "plugin"


def test_of_several_gpus_engines_this_gpus_is_chosen(make_bundle: MakeBundle) -> None:
    bundle = make_bundle(SHORT_CHUNKS)
    each = [engine_info(bundle, f"for {sm}", compute_capabilities=(sm,)) for sm in (80, 86, 89, 120)]
    assert choose_engine(bundle, each, HERE).id == "for 89"
    with pytest.raises(EngineError, match=r"compute capability 8\.9, there are engines for 8\.0, 8\.6, 12\.0; build"):
        choose_engine(bundle, [info for info in each if info.id != "for 89"], HERE)


@pytest.mark.parametrize(
    ("version", "capability", "serves"),
    [
        ("10.13.3.9", 90, True),
        ("10.14.0.1", 120, True),
        ("10.13.2.9", 90, False),
        ("11.0.0", 90, False),
        ("10.13.3.9", 75, False),
    ],
)
def test_compatible_engines_serve_later_gpus_and_releases(
    make_bundle: MakeBundle, version: str, capability: int, serves: bool
) -> None:
    bundle = make_bundle(SHORT_CHUNKS)
    built = {"flavour": "tensorrt", "version": "10.13.3.9", "compute_capabilities": (80,)}
    info = engine_info(bundle, hardware_compatible=True, version_compatible=True, **built)
    place = Place("tensorrt", version, capability)
    if serves:
        assert choose_engine(bundle, [info], place) is info
    else:
        with pytest.raises(EngineError, match=r"needs tensorrt 10\.13\.3\.9|compute capability 7\.5"):
            choose_engine(bundle, [info], place)


@pytest.fixture
def with_engine(make_bundle: MakeBundle, tmp_path: Path) -> Bundle:
    """A copy of a bundle, with an engine file that nobody could load."""
    source = make_bundle(SHORT_CHUNKS)
    shutil.copytree(source.path, tmp_path / "bundle")
    bundle = open_bundle(tmp_path / "bundle")
    write_engine(bundle)
    return bundle


def write_engine(bundle: Bundle, **changes: Any) -> None:
    directory = bundle.path / ENGINES_DIR / "engine"
    directory.mkdir(parents=True, exist_ok=True)
    (directory / ENGINE_FILE).write_bytes(b"an engine")
    info = engine_info(bundle, engine=FileEntry.of(directory / ENGINE_FILE), **changes)
    (directory / ENGINE_INFO_FILE).write_text(info.to_json())


class Machine:
    """The stand-ins that a test runs on."""

    def __init__(self, bundle: Bundle, monkeypatch: pytest.MonkeyPatch, model_path: Path | None = None) -> None:
        self.bundle, self.gpu = bundle, FakeGpu()
        self.trt = FakeTensorRT(self.gpu, model_path or bundle.model_path)
        monkeypatch.setitem(sys.modules, "tensorrt_rtx", self.trt)
        monkeypatch.setenv("XDG_CACHE_HOME", str(bundle.path / "cache"))
        for module in (tensorrt, onnxruntime_cuda):
            monkeypatch.setattr(module, "find_plugin_library", lambda: Path("libmegalodon.so"))
            monkeypatch.setattr(module, "check_abi", lambda path: None)
            monkeypatch.setattr(module, "Kernels", lambda path: FakeKernels(self.gpu))

    def session(self) -> Session:
        return Session(self.bundle, TensorRTExecutor(self.bundle, "tensorrt-rtx", self.gpu))


@pytest.fixture
def machine(with_engine: Bundle, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(with_engine, monkeypatch)


def test_tensorrt_streams_what_the_cpu_streams(machine: Machine) -> None:
    tokens = np.random.default_rng(0).integers(0, 256, 60).tolist()
    on_gpu, on_cpu = machine.session().stream(), machine.bundle.session(threads=1).stream()
    assert_close(on_gpu.prefill(tokens[:30]), on_cpu.prefill(tokens[:30]), 1e-5)
    for token in tokens[30:]:
        assert_close(on_gpu.step(token), on_cpu.step(token), 1e-5)
    assert machine.trt.engine_bytes == b"an engine"
    assert machine.trt.loaded == ["libmegalodon.so"]
    assert machine.gpu.launches == 28
    with pytest.raises(UserError, match="--max-batch 5"):
        machine.session().batch(5)


def test_weights_come_from_the_bundles_file(with_engine: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph that a build gives to TensorRT, run by ONNX Runtime: every matrix is an input."""
    graph = prepare_graph(with_engine.model_path, (), SHORT_CHUNKS.chunk_size, weights_outside=True)
    rewritten = with_engine.path / "rewritten.onnx"
    rewritten.write_bytes(graph.model)
    write_engine(with_engine, weights="bundle", bundle_weights=graph.bundle_weights)
    machine = Machine(with_engine, monkeypatch, rewritten)
    tokens = np.random.default_rng(0).integers(0, 256, 40).tolist()
    on_gpu, on_cpu = machine.session().stream(), with_engine.session(threads=1).stream()
    assert_close(on_gpu.prefill(tokens[:30]), on_cpu.prefill(tokens[:30]), 1e-5)
    for token in tokens[30:]:
        assert_close(on_gpu.step(token), on_cpu.step(token), 1e-5)
    held = sum(place.size_bytes for place in graph.bundle_weights.values())
    assert held > 0.9 * (with_engine.path / WEIGHTS_FILE).stat().st_size - 4096 * len(graph.bundle_weights)
    name, place = next(iter(graph.bundle_weights.items()))
    for offset in (place.offset + (1 << 30), -place.size_bytes - 1):
        wrong = {**graph.bundle_weights, name: replace(place, offset=offset)}
        write_engine(with_engine, weights="bundle", bundle_weights=wrong)
        with pytest.raises(EngineError, match=rf"model\.onnx\.data ends before weight {name}; export the bundle again"):
            machine.session()
    wrong = {**graph.bundle_weights, name: replace(place, size_bytes=place.size_bytes - 1)}
    write_engine(with_engine, weights="bundle", bundle_weights=wrong)
    sizes = rf"{place.size_bytes} bytes in the engine, engine\.json says {place.size_bytes - 1}; build it again"
    with pytest.raises(EngineError, match=rf"weight {name} takes {sizes}"):
        machine.session()


def test_streamed_weights_get_what_room_there_is_before_the_first_context(machine: Machine) -> None:
    machine.session().stream().step(1)
    write_engine(machine.bundle, weights="streamed")
    machine.session().stream().step(1)
    assert machine.trt.budgets == [-1, 4242]


def test_only_an_engine_for_later_releases_may_bring_code_of_its_own(machine: Machine) -> None:
    machine.session()
    write_engine(machine.bundle, version_compatible=True)
    machine.session()
    assert [runtime.engine_host_code_allowed for runtime in machine.trt.runtimes] == [False, True]


def test_compiled_kernels_are_kept_for_the_next_session(machine: Machine, tmp_path: Path) -> None:
    session = machine.session()
    session.stream().step(1)
    assert machine.trt.runtime_caches == []
    del session
    gc.collect()
    (kept,) = cache_dir().iterdir()
    assert kept.read_bytes() == b"kernels"
    machine.session().stream().step(1)
    assert machine.trt.runtime_caches == [b"kernels"]


def test_plugins_are_registered_once_in_a_process(machine: Machine) -> None:
    machine.session()
    machine.trt.registry.all_creators.append(SimpleNamespace(name="ComplexEMA"))
    machine.session()
    assert len(machine.trt.loaded) == 1


@pytest.mark.parametrize(
    ("fails", "message"),
    [
        ("engine", "cannot load it (no driver)"),
        ("library", "cannot load the plugin library"),
        ("context", "cannot make an execution context"),
        ("shape", "cannot be [1, 1]"),
        ("call", "refused the call (a reason in two lines)"),
    ],
)
def test_what_tensorrt_refuses_becomes_one_line(machine: Machine, fails: str, message: str) -> None:
    machine.trt.fails.add(fails)
    with pytest.raises(EngineError) as caught:
        machine.session().stream().step(1)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_damaged_engine_is_never_loaded(machine: Machine) -> None:
    path = machine.bundle.path / ENGINES_DIR / "engine" / ENGINE_FILE
    path.write_bytes(b"AN ENGINE")
    with pytest.raises(EngineError, match="sha256"):
        machine.session()
    assert machine.trt.engine_bytes == b""


def test_an_engine_of_another_model_is_refused(machine: Machine) -> None:
    machine.trt.runtime_engine.session.get_inputs = list  # type: ignore[method-assign]
    trt = FakeTensorRT(machine.gpu, machine.bundle.model_path)
    trt.Runtime.deserialize_cuda_engine = lambda self, data: SimpleNamespace(  # type: ignore[attr-defined]
        num_io_tensors=1, get_tensor_name=lambda index: "tokens", device_memory_size_v2=1
    )
    sys.modules["tensorrt_rtx"] = trt
    with pytest.raises(EngineError, match="does not follow from the bundle's config"):
        machine.session()


def test_the_real_module_has_what_is_called() -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    assert trt.ExecutionContextAllocationStrategy.USER_MANAGED
    assert trt.TensorIOMode.INPUT
    assert trt.ILogger.Severity.INTERNAL_ERROR
    for kind, names in {
        trt.Runtime: ["deserialize_cuda_engine", "engine_host_code_allowed"],
        trt.IRuntimeCache: ["serialize", "deserialize"],
        trt.ICudaEngine: [
            "device_memory_size_v2",
            "create_execution_context",
            "create_runtime_config",
            "get_weight_streaming_automatic_budget",
            "weight_streaming_budget_v2",
            "get_tensor_name",
            "get_tensor_mode",
            "num_io_tensors",
        ],
        trt.IRuntimeConfig: [
            "set_execution_context_allocation_strategy",
            "create_runtime_cache",
            "set_runtime_cache",
            "dynamic_shapes_kernel_specialization_strategy",
        ],
        trt.DynamicShapesKernelSpecializationStrategy: ["EAGER", "LAZY"],
        trt.IExecutionContext: [
            "set_device_memory",
            "set_input_shape",
            "set_tensor_address",
            "execute_async_v3",
            "is_stream_capturable",
        ],
    }.items():
        assert not [name for name in names if not hasattr(kind, name)]
    errors = tensorrt.TensorRTErrors(trt)
    errors.logger.log(trt.ILogger.Severity.ERROR, "one\ntwo")
    errors.logger.log(trt.ILogger.Severity.WARNING, "three")
    assert errors.take() == "one two"


def test_every_call_into_cuda_exists_and_takes_these_arguments() -> None:
    """Without a driver each reports that; a wrong name or argument would raise something else."""
    driver = pytest.importorskip("megalodon_deploy.runtime.cuda.driver", reason="cuda-bindings is not installed")
    gpu = driver.CudaGpu.__new__(driver.CudaGpu)
    gpu.stream, gpu.name = 0, "none"
    if _has_driver():
        pytest.skip("a CUDA driver is here: the calls are tested on the GPU")
    with pytest.raises(EngineError, match="no NVIDIA GPU can be used here") as caught:
        driver.CudaGpu()
    assert "\n" not in str(caught.value)
    calls = 0
    for name, method in inspect.getmembers(driver.CudaGpu, inspect.isfunction):
        if name in ("__init__", "current", "end_capture"):
            continue
        arguments = [0] * (len(inspect.signature(method).parameters) - 1)
        with pytest.raises(EngineError, match="cudaErrorInsufficientDriver"):
            method(gpu, *arguments)
        calls += 1
    assert calls == 15
    assert gpu.end_capture() is None
    with pytest.raises(EngineError, match="cudaErrorInsufficientDriver"):
        driver.copy_to_host(0, 0, 4, 1)
    for name in ("cuCtxPushCurrent", "cuCtxPopCurrent", "cuCtxGetDevice", "cuDevicePrimaryCtxRetain", "cuDeviceGet"):
        assert hasattr(driver.cu, name)


def _has_driver() -> bool:
    from megalodon_deploy.doctor import visible_gpus

    return visible_gpus() is not None


def test_the_cuda_provider_is_missing_in_the_package_for_cpus(make_bundle: MakeBundle) -> None:
    if onnxruntime_cuda.PROVIDER in onnxruntime.get_available_providers():
        pytest.skip("the installed onnxruntime has the CUDA provider")
    with pytest.raises(MissingDependencyError, match=r"the one for CPUs.*\[gpu\]") as caught:
        make_bundle(SHORT_CHUNKS).session(device="cuda")
    assert "\n" not in str(caught.value)


def test_onnxruntime_on_cuda_streams_what_the_cpu_streams(
    make_bundle: MakeBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The executor's own way, but for the name of the provider and of the device."""
    bundle = make_bundle(SHORT_CHUNKS)
    machine = Machine(bundle, monkeypatch)
    machine.gpu.is_eager = True  # ONNX Runtime computes when it is called
    monkeypatch.setattr(onnxruntime_cuda, "PROVIDER", "CPUExecutionProvider")
    opened: list[Any] = []

    def load_session(bundle: Bundle, threads: int | None, providers: list[Any]) -> Any:
        opened.append(providers)
        return onnxruntime.InferenceSession(str(bundle.model_path), providers=["CPUExecutionProvider"])

    monkeypatch.setattr(onnxruntime_cuda, "load_session", load_session)
    monkeypatch.setattr(onnxruntime_cuda, "_DEVICE", "cpu")
    session = Session(bundle, OnnxRuntimeCudaExecutor(bundle, machine.gpu))
    options = {"device_id": "0", "user_compute_stream": "77", "use_tf32": "0"}
    assert opened == [[("CPUExecutionProvider", options)]]
    batch, on_cpu = session.batch(2), bundle.session(threads=1).stream()
    on_gpu, _ = batch.admit(), batch.admit()
    tokens = np.random.default_rng(0).integers(0, 256, 40).tolist()
    assert_close(on_gpu.prefill(tokens[:17]), on_cpu.prefill(tokens[:17]), 1e-5)
    for token in tokens[17:]:
        assert_close(on_gpu.step(token), on_cpu.step(token), 1e-5)
    assert machine.gpu.launches == 0


def test_onnxruntime_that_falls_back_to_the_cpu_is_an_error(
    make_bundle: MakeBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = make_bundle(SHORT_CHUNKS)
    machine = Machine(bundle, monkeypatch)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(
        onnxruntime_cuda, "load_session", lambda *arguments: SimpleNamespace(get_providers=lambda: ["CPU"])
    )
    with pytest.raises(EngineError, match="cannot start its CUDA provider"):
        OnnxRuntimeCudaExecutor(bundle, machine.gpu)

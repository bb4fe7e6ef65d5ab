"""Streams on a real GPU: TensorRT, ONNX Runtime's CUDA provider, PyCUDA, and the calls into CUDA themselves."""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import assert_close
from runtime.small_models import SHORT_CHUNKS, make_model

from megalodon_deploy.bundle import ENGINES_DIR, Bundle
from megalodon_deploy.doctor import visible_gpus
from megalodon_deploy.engine import build_engine
from megalodon_deploy.errors import UserError
from megalodon_deploy.export import export_checkpoint
from megalodon_deploy.model.checkpoint import save_checkpoint
from megalodon_deploy.runtime.cuda.arena import Arena
from megalodon_deploy.runtime.sampling import SamplingParams
from megalodon_deploy.runtime.session import Session

pytestmark = pytest.mark.gpu

TOLERANCE = 2e-4  # matrix products in another order, without TF32
SAMPLED = SamplingParams(seed=3, temperature=1.5, top_k=60, top_p=0.9, repetition_penalty=1.2)


@pytest.fixture(scope="module")
def gpu() -> Any:
    if visible_gpus() is None:
        pytest.skip("no NVIDIA GPU is visible to the CUDA driver")
    return pytest.importorskip("megalodon_deploy.runtime.cuda.driver", reason="no cuda-bindings").CudaGpu()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    directory = tmp_path_factory.mktemp("gpu")
    save_checkpoint(make_model(SHORT_CHUNKS), directory / "checkpoint")
    return export_checkpoint(directory / "checkpoint", directory / "bundle")


BACKENDS = [
    "onnxruntime",
    *(f"{target} {weights}" for target in ("tensorrt-rtx", "tensorrt") for weights in ("engine", "bundle", "streamed")),
]


@pytest.fixture(scope="module", params=BACKENDS)
def session(gpu: Any, bundle: Bundle, request: pytest.FixtureRequest) -> Session:
    """Of each backend that this machine has; why one is left out is printed."""
    backend, *weights = request.param.split()
    try:
        if weights:
            shutil.rmtree(bundle.path / ENGINES_DIR, ignore_errors=True)  # the session takes the only one
            sm = [gpu.capability] if backend == "tensorrt-rtx" else None
            build_engine(bundle, target=backend, sm=sm, max_batch=4, weights=weights[0])
        return bundle.session(backend, device="cuda")
    except UserError as error:
        pytest.skip(f"{backend}: {error}")


def some_tokens(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 256, length).tolist()


def test_copies_events_and_graphs(gpu: Any) -> None:
    with gpu.current():
        arena = Arena(gpu)
        device = arena.device({"a": 4096, "b": 4096})
        address, array = arena.pinned(4096)
        array[:] = np.arange(4096) % 251
        gpu.copy(device["a"], address, 4096)
        gpu.copy_rows(device["b"], 64, device["a"], 128, 32, 16)
        event = arena.event()
        gpu.wait(event)  # never recorded
        gpu.record(event)
        gpu.wait(event)
        found = np.empty(4096, np.uint8)
        gpu.copy(found.ctypes.data, device["b"], 4096)
        gpu.synchronize()
        expected = np.zeros((64, 64), np.uint8)
        expected[:16, :32] = (np.arange(4096) % 251).astype(np.uint8).reshape(32, 128)[:16, :32]
        np.testing.assert_array_equal(found, expected.ravel())
        gpu.begin_capture()
        gpu.copy(device["b"], device["a"], 4096)
        graph = gpu.end_capture()
        assert graph is not None
        gpu.clear(device["a"], 4096)
        gpu.launch(graph)
        gpu.copy(found.ctypes.data, device["b"], 4096)
        gpu.synchronize()
        assert not found.any()
        gpu.destroy_graph(graph)
    del arena


def test_steps_and_prompts_are_those_of_the_cpu(session: Session, bundle: Bundle) -> None:
    on_gpu, on_cpu = session.stream(), bundle.session(threads=1).stream()
    rng = np.random.default_rng(1)
    while on_cpu.position < 80:
        tokens = some_tokens(int(rng.integers(1, 12)) if rng.random() < 0.2 else 1, on_cpu.position)
        assert_close(on_gpu.prefill(tokens), on_cpu.prefill(tokens), TOLERANCE, f"at {on_cpu.position}")
    for name, array in on_cpu.snapshot().tensors.items():
        assert_close(on_gpu.snapshot().tensors[name], array, TOLERANCE, name)


def test_streams_of_a_batch_are_each_as_if_alone(session: Session, bundle: Bundle) -> None:
    batch, alone = session.batch(4), bundle.session(threads=1)
    twins = {batch.admit(): alone.stream() for _ in range(4)}
    rng = np.random.default_rng(2)
    for round_ in range(60):
        chosen = [stream for stream in twins if rng.random() < 0.7]
        longest = 9 if round_ % 10 == 0 else 2
        given = {stream: some_tokens(int(rng.integers(1, longest)), stream.position) for stream in chosen}
        for stream, logits_V in batch.feed(given).items():
            assert_close(logits_V, twins[stream].prefill(given[stream]), TOLERANCE)


@pytest.mark.parametrize("sampling", [None, SAMPLED])
def test_served_streams_give_the_text_of_the_cpu(
    session: Session, bundle: Bundle, sampling: SamplingParams | None
) -> None:
    alone = bundle.session(threads=1)
    with session.serve(max_streams=4, prefill_tokens=7) as scheduler:
        prompts = [some_tokens(3 + 5 * index, index) for index in range(9)]
        requests = [scheduler.submit(prompt, max_new_tokens=30, sampling=sampling) for prompt in prompts]
        found = [[item.token for item in request] for request in requests]
    for prompt, tokens in zip(prompts, found, strict=True):
        expected = alone.stream().generate(prompt, max_new_tokens=30, sampling=sampling)
        assert tokens == [item.token for item in expected]


def test_a_saved_stream_moves_between_gpu_and_cpu(session: Session, bundle: Bundle, tmp_path: Path) -> None:
    whole = [item.token for item in bundle.session(threads=1).stream().generate("def f(x):", max_new_tokens=40)]
    tokens: list[int] = []
    stream = session.stream()
    for count, target in ((7, bundle.session(threads=1)), (13, session), (20, session)):
        prompt = "def f(x):" if not tokens else ()
        tokens += [item.token for item in stream.generate(prompt, max_new_tokens=count)]
        stream.save(tmp_path / "stream")
        stream = target.stream(resume=tmp_path / "stream")
    assert tokens == whole


@pytest.fixture
def pycuda_context(gpu: Any) -> Iterator[Any]:
    driver = pytest.importorskip("pycuda.driver", reason="PyCUDA is not installed")
    driver.init()
    context = driver.Device(0).make_context()
    yield driver
    context.pop()
    context.detach()


def test_pycuda_contexts_streams_and_arrays_are_taken(pycuda_context: Any, session: Session, bundle: Bundle) -> None:
    """A session in PyCUDA's context and on its stream; a prompt in its array, logits read and changed by it."""
    from pycuda import gpuarray

    stream = pycuda_context.Stream()
    ours = bundle.session(session.backend, device=None if session.backend != "onnxruntime" else "cuda", stream=stream)
    on_gpu, on_cpu = ours.stream(), bundle.session(threads=1).stream()
    tokens = np.array(some_tokens(9), np.int32)
    expected = on_cpu.prefill(tokens.tolist())
    assert_close(on_gpu.prefill(gpuarray.to_gpu(tokens)), expected, TOLERANCE)
    logits = on_gpu.logits_on_gpu
    view = gpuarray.GPUArray(logits.shape, logits.dtype, gpudata=logits.address)
    stream.synchronize()
    assert_close(view.get(), expected, TOLERANCE)
    changed = view.get()
    changed[int(np.argmax(changed))] = -np.inf
    view.set(changed)
    assert next(on_gpu.generate(max_new_tokens=1)).token == int(np.argsort(expected)[-2])


def test_logits_come_as_a_cuda_array(session: Session) -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this PyTorch has no CUDA")
    stream = session.stream()
    expected = stream.prefill(some_tokens(5))
    found = torch.as_tensor(stream.logits_on_gpu, device="cuda")
    np.testing.assert_array_equal(found.cpu().numpy(), expected)
    prompt = torch.tensor(some_tokens(5), device="cuda")
    np.testing.assert_array_equal(session.stream().prefill(prompt), expected)


def test_a_context_of_the_application_stays_current(gpu: Any) -> None:
    cu = pytest.importorskip("cuda.bindings.driver", reason="no cuda-bindings")
    before = int(cu.cuCtxGetCurrent()[1])
    with gpu.current():
        assert int(cu.cuCtxGetCurrent()[1])
    assert int(cu.cuCtxGetCurrent()[1]) == before
    assert ctypes.sizeof(ctypes.c_void_p) == 8

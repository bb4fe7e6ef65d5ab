"""A GPU without a GPU: the same calls on host memory, executed late and checked.

Work is only noted down when it is enqueued and done when somebody waits for it, as late as a real GPU may do it: who
reads too early, or writes to page-locked memory that a copy has still to read, gets caught. Addresses are real ones,
so that kernels compiled for the CPU and ONNX Runtime work on them. Memory begins as NaN, with margins that nobody may
touch; an address that was freed, or lies outside, is refused.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from megalodon_deploy.bundle import Bundle
from megalodon_deploy.errors import EngineError
from megalodon_deploy.runtime.cuda.kernels import CHOICE_DTYPE, Append, ChoiceCall
from megalodon_deploy.runtime.cuda.layout import Tensor
from megalodon_deploy.runtime.cuda.memory import CudaMemory
from megalodon_deploy.runtime.executors.base import activation_dtype
from megalodon_deploy.runtime.executors.onnxruntime_cuda import OnnxRuntimeEngine
from megalodon_deploy.runtime.sampling import Choice, SamplingParams

MARGIN = 256
Work = Callable[[], None]


def host_bytes(address: int, size_bytes: int) -> np.ndarray:
    return np.ctypeslib.as_array((ctypes.c_uint8 * size_bytes).from_address(address))


class Block:
    def __init__(self, size_bytes: int) -> None:
        self.buffer = np.full(size_bytes + 3 * MARGIN, 0xFF, np.uint8)
        self.start = -(-(self.buffer.ctypes.data + MARGIN) // 256) * 256
        self.size_bytes = size_bytes

    def check_margins(self) -> None:
        before = self.start - self.buffer.ctypes.data
        assert (self.buffer[:before] == 0xFF).all(), "written before an allocation"
        assert (self.buffer[before + self.size_bytes :] == 0xFF).all(), "written behind an allocation"


class FakeGpu:
    index, name, capability, stream = 0, "stand-in", 89, 77

    def __init__(self) -> None:
        self.device: dict[int, Block] = {}
        self.pinned: dict[int, Block] = {}
        self.queue: list[Work] = []
        self.done = 0  # pieces of work ever done
        self.events: dict[int, int | None] = {}  # pieces of work before the last record
        self.capture: list[Work] | None = None
        self.is_capture_broken = False
        self.is_eager = False
        self.graphs: dict[int, list[Work]] = {}
        self.launches = 0
        self.synchronizations = 0
        self._depth = 0
        self._names = 1000

    @contextmanager
    def current(self) -> Iterator[None]:
        self._depth += 1
        yield
        self._depth -= 1

    def _check_call(self, *, while_capturing: bool = False) -> None:
        assert self._depth > 0, "a call without the GPU's context"
        assert while_capturing or self.capture is None, "a call that breaks a capture"

    def enqueue(self, work: Work) -> None:
        self._check_call(while_capturing=True)
        (self.queue if self.capture is None else self.capture).append(work)
        if self.is_eager:
            self._work(len(self.queue))

    def allocate(self, size_bytes: int) -> int:
        self._check_call()
        block = Block(size_bytes)
        self.device[block.start] = block
        self.clear(block.start, size_bytes)
        return block.start

    def allocate_pinned(self, size_bytes: int) -> int:
        self._check_call()
        block = Block(size_bytes)
        host_bytes(block.start, size_bytes)[:] = 0
        self.pinned[block.start] = block
        return block.start

    def free(self, address: int) -> None:
        self._check_call()
        assert not self.queue, "freed while work is enqueued"
        self.device.pop(address).check_margins()

    def free_pinned(self, address: int) -> None:
        self._check_call()
        assert not self.queue, "freed while work is enqueued"
        self.pinned.pop(address).check_margins()

    def check_device(self, address: int, size_bytes: int) -> None:
        assert any(
            block.start <= address and address + size_bytes <= block.start + block.size_bytes
            for block in self.device.values()
        ), f"{size_bytes} bytes at {address} are not allocated on the GPU"

    def is_device(self, address: int) -> bool:
        return any(block.start <= address < block.start + block.size_bytes for block in self.device.values())

    def copy(self, target: int, source: int, size_bytes: int) -> None:
        self.copy_rows(target, size_bytes, source, size_bytes, size_bytes, 1)

    def copy_rows(
        self, target: int, target_pitch: int, source: int, source_pitch: int, width_bytes: int, num_rows: int
    ) -> None:
        self._check_call(while_capturing=True)
        assert width_bytes <= min(target_pitch, source_pitch)
        is_from_host = not self.is_device(source)
        for row in range(num_rows):
            if not is_from_host:
                self.check_device(source + row * source_pitch, width_bytes)
            if self.is_device(target):
                self.check_device(target + row * target_pitch, width_bytes)
            else:
                assert not is_from_host, "neither end of a copy is on the GPU"

        def content() -> list[bytes]:
            return [host_bytes(source + row * source_pitch, width_bytes).tobytes() for row in range(num_rows)]

        promised = content() if is_from_host and self.capture is None else None

        def work() -> None:
            found = content()
            assert promised is None or found == promised, "host memory was changed before a copy had read it"
            for row, piece in enumerate(found):
                host_bytes(target + row * target_pitch, width_bytes)[:] = np.frombuffer(piece, np.uint8)

        self.enqueue(work)

    def clear(self, address: int, size_bytes: int) -> None:
        self.check_device(address, size_bytes)

        def work() -> None:
            host_bytes(address, size_bytes)[:] = 0

        self.enqueue(work)

    def synchronize(self) -> None:
        self._check_call()
        self.synchronizations += 1
        self._work(len(self.queue))

    def _work(self, count: int) -> None:
        ready, self.queue = self.queue[:count], self.queue[count:]
        for work in ready:
            work()
            self.done += 1

    def create_event(self) -> int:
        self._check_call()
        self._names += 1
        self.events[self._names] = None
        return self._names

    def destroy_event(self, event: int) -> None:
        del self.events[event]

    def record(self, event: int) -> None:
        self._check_call()
        assert event in self.events
        self.events[event] = self.done + len(self.queue)

    def wait(self, event: int) -> None:
        self._check_call()
        recorded = self.events[event]
        if recorded is not None:
            self._work(max(0, recorded - self.done))

    def begin_capture(self) -> None:
        self._check_call()
        self.capture = []

    def end_capture(self) -> int | None:
        assert self.capture is not None
        graph, self.capture = self.capture, None
        if self.is_capture_broken:
            return None
        self._names += 1
        self.graphs[self._names] = graph
        return self._names

    def launch(self, graph: int) -> None:
        self._check_call()
        self.launches += 1
        for work in self.graphs[graph]:
            self.enqueue(work)

    def destroy_graph(self, graph: int) -> None:
        del self.graphs[graph]

    def check_margins(self) -> None:
        for block in [*self.device.values(), *self.pinned.values()]:
            block.check_margins()


class FakeKernels:
    """mgd_append_rows and mgd_choose_tokens as their header describes them."""

    def __init__(self, gpu: FakeGpu) -> None:
        self.gpu = gpu

    def append_rows(
        self,
        appends: list[Append],
        *,
        batch: int,
        num_tokens: int,
        capacity: int,
        chunk_size: int,
        position: int,
        stream: int,
    ) -> None:
        assert stream == self.gpu.stream
        for append in appends:
            self.gpu.check_device(append.rows, batch * append.heads * num_tokens * append.row_bytes)
            self.gpu.check_device(append.memory, batch * append.heads * capacity * append.row_bytes)

        def work() -> None:
            position_B = host_bytes(position, 8 * batch).view(np.int64)
            for append in appends:
                shape = (batch, append.heads, -1, append.row_bytes)
                new = host_bytes(append.rows, batch * append.heads * num_tokens * append.row_bytes).reshape(shape)
                memory = host_bytes(append.memory, batch * append.heads * capacity * append.row_bytes).reshape(shape)
                for row in range(batch):
                    start = int(position_B[row] % chunk_size)
                    assert start + num_tokens <= chunk_size, "a call crosses a chunk edge"
                    memory[row, :, start : start + num_tokens] = new[row]

        self.gpu.enqueue(work)

    def choose_tokens_workspace_bytes(self, batch: int, vocab_size: int) -> int:
        return 8 * batch * vocab_size

    def choose_tokens(self, call: ChoiceCall, stream: int) -> None:
        assert stream == self.gpu.stream
        assert call.workspace_bytes == 8 * call.batch * call.vocab_size
        sizes = {
            call.logits: 4 * call.vocab_size,
            call.choices: CHOICE_DTYPE.itemsize,
            call.recent: 8 * call.max_recent,
            call.tokens: 8,
        }
        for address, row_bytes in (sizes | {call.workspace: 8 * call.vocab_size}).items():
            self.gpu.check_device(address, call.batch * row_bytes)

        def work() -> None:
            logits_BV, choices_B, recent_BR, tokens_B = (
                host_bytes(address, call.batch * row_bytes).view(kind).reshape(call.batch, -1)
                for (address, row_bytes), kind in zip(
                    sizes.items(), (np.float32, CHOICE_DTYPE, np.int64, np.int64), strict=True
                )
            )
            for row in range(call.batch):
                choice = choices_B[row, 0]
                if choice["is_wanted"]:
                    params = SamplingParams(
                        temperature=float(choice["temperature"]),
                        top_k=int(choice["top_k"]) or None,
                        top_p=float(choice["top_p"]),
                        min_p=float(choice["min_p"]),
                        repetition_penalty=float(choice["repetition_penalty"]),
                        repetition_window=call.max_recent,
                    )
                    seen = recent_BR[row, : choice["num_recent"]].tolist()
                    generator: Any = Drawn(float(choice["uniform"]))
                    token = Choice(params, seen, generator).of(logits_BV[row])
                    tokens_B[row] = -1 if token is None else token

        self.gpu.enqueue(work)


@dataclass
class Drawn:
    """A generator whose next number is known."""

    number: float

    def uniform(self) -> float:
        return self.number


class FakeEngine:
    """A graph in ONNX Runtime, run on the stand-in's memory, with TensorRT's conditions."""

    def __init__(self, gpu: FakeGpu, model_path: Path, max_slots: int = 8) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        self.session = onnxruntime.InferenceSession(str(model_path), options, providers=["CPUExecutionProvider"])
        self.runner = OnnxRuntimeEngine(onnxruntime, self.session, "cpu", 0)
        self.gpu, self.max_slots = gpu, max_slots
        self.contexts: list[FakeContext] = []
        self.refuses_capture = False

    def open_context(self, *, fixed_shapes: bool) -> FakeContext:
        self.gpu._check_call()
        self.contexts.append(FakeContext(self, fixed_shapes))
        return self.contexts[-1]


class FakeContext:
    is_capturable = True

    def __init__(self, engine: FakeEngine, fixed_shapes: bool) -> None:
        self.engine, self.gpu, self.fixed_shapes = engine, engine.gpu, fixed_shapes
        self.tensors: dict[str, Tensor] = {}
        self.has_run = False

    def bind(self, tensors: Mapping[str, Tensor]) -> None:
        names = {node.name for node in [*self.engine.session.get_inputs(), *self.engine.session.get_outputs()]}
        assert set(tensors) == names
        for name, tensor in tensors.items():
            assert tensor.address % 256 == 0, f"{name} is not aligned"
            self.gpu.check_device(tensor.address, tensor.size_bytes)
        assert not (self.fixed_shapes and self.tensors), "bound again"
        self.tensors, self.has_run = dict(tensors), False
        self.binding = self.engine.runner.binding(tensors)

    def enqueue(self) -> None:
        if self.gpu.capture is not None:
            assert self.has_run, "captured before the first run"
            if self.engine.refuses_capture:
                raise EngineError("not while a stream is captured")
        self.has_run = True
        tensors = self.tensors
        outputs = {node.name for node in self.engine.session.get_outputs()}
        spans = [(t.address, t.address + t.size_bytes, name in outputs) for name, t in tensors.items() if t.size_bytes]
        for start, end, is_output in spans:
            if is_output:
                overlapping = [1 for s, e, _ in spans if s < end and start < e]
                assert len(overlapping) == 1, "a tensor that is written is used twice in a call"

        binding = self.binding
        self.gpu.enqueue(lambda: self.engine.runner.run(binding))


class FakeCudaExecutor:
    """What TensorRT's executor is to a memory, with the stand-ins."""

    backend = "tensorrt-rtx"

    def __init__(self, bundle: Bundle, max_slots: int = 8) -> None:
        self.config = bundle.config
        self.activation = activation_dtype(bundle.manifest.precision)
        self.returns_all_logits = bundle.manifest.logits == "all"
        self.gpu = FakeGpu()
        self.engine = FakeEngine(self.gpu, bundle.model_path, max_slots)
        self.kernels = FakeKernels(self.gpu)

    def open_slots(self, num_slots: int) -> CudaMemory:
        return CudaMemory(self, num_slots)  # type: ignore[arg-type]

"""The state of several streams in the memory of a GPU.

A call is always one of all slots: addresses and shapes of a step never change, so that it can be a CUDA graph. Slots
that shall wait run along, and what the call made of them is taken back. Longer pieces of a single slot go through a
memory of one slot beside this one. All work of a session goes to one stream of the GPU, in order.
Letters as in `megalodon_deploy.state`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Protocol

import numpy as np

from megalodon_deploy.config import MegalodonConfig
from megalodon_deploy.errors import EngineError, UserError
from megalodon_deploy.runtime.cuda.arena import Arena
from megalodon_deploy.runtime.cuda.capture import StepGraphs
from megalodon_deploy.runtime.cuda.chooser import TokenChooser
from megalodon_deploy.runtime.cuda.engine import Context, Engine
from megalodon_deploy.runtime.cuda.gpu import Gpu
from megalodon_deploy.runtime.cuda.kernels import Append, Kernels
from megalodon_deploy.runtime.cuda.layout import INT64_BYTES, Layout, PairTensor, Tensor
from megalodon_deploy.runtime.cuda.staging import Block, StagingRing
from megalodon_deploy.runtime.device_array import DeviceArray
from megalodon_deploy.runtime.executors.base import SlotMemory
from megalodon_deploy.runtime.sampling import Choice
from megalodon_deploy.state import LOGITS

_PROMPT_BLOCKS = 2  # pieces of a prompt that may be on their way at once


class CudaExecutor(Protocol):
    """What a memory takes from the executor that opens it."""

    config: MegalodonConfig
    activation: np.dtype
    returns_all_logits: bool
    gpu: Gpu
    engine: Engine
    kernels: Kernels


class CudaMemory:
    prefers_whole_steps = True

    def __init__(self, executor: CudaExecutor, num_slots: int) -> None:
        if num_slots > executor.engine.max_slots:
            raise UserError(
                f"{num_slots} slots: this engine takes {executor.engine.max_slots} streams in a call; build one with "
                f"`megalodon-deploy build --max-batch {num_slots}`"
            )
        self.num_slots = num_slots
        self._executor = executor
        self._gpu = executor.gpu
        layout = Layout(executor.config, num_slots, executor.activation, returns_all_logits=executor.returns_all_logits)
        self._layout = layout
        with self._gpu.current():
            self._arena = Arena(self._gpu)
            self._rows = self._arena.device(layout.row_sizes())
            self._halves = [self._arena.device(layout.pair_sizes()) for _ in range(2)]
            self._scratch = self._arena.device(layout.scratch_sizes())
            self._steps = self._ring(2, num_tokens=1)
            self._chooser = TokenChooser(self._gpu, self._arena, executor.kernels, num_slots, layout.vocab_size)
            self._host_logits = self._arena.pinned(layout.logits.slot_bytes)
        self._past = 0  # which half holds the present state
        self._positions = np.zeros(num_slots, np.int64)
        self._graphs = StepGraphs()
        self._step_contexts: list[Context | None] = [None, None]

    def run(self, rows: slice, tokens_BT: np.ndarray, position_B: np.ndarray) -> None:
        with self._gpu.current():
            if rows == slice(0, self.num_slots) and tokens_BT.shape[1] <= self._layout.max_tokens:
                self._positions[:] = position_B
                self._call(tokens_BT)
            elif tokens_BT.shape[1] == 1:
                self._step_some(rows, tokens_BT, position_B)
            else:
                for row, slot in enumerate(range(self.num_slots)[rows]):
                    self._run_apart(slot, tokens_BT[row : row + 1], position_B[row : row + 1])

    def _call(self, tokens_BT: np.ndarray) -> None:
        if tokens_BT.shape[1] == 1:
            self._step(tokens_BT)
        else:
            self._piece(tokens_BT)
        self._past = 1 - self._past
        self._positions += tokens_BT.shape[1]

    def _step(self, tokens_BT: np.ndarray) -> None:
        half = self._past
        context, action = self._step_context(half), self._graphs.next_action(half)
        if action == "capture" and not context.is_capturable:
            self._graphs.captured(half, None)
            action = "run"
        with self._steps.block(half) as block:  # a graph reads the block that it was captured with
            self._fill(block, tokens_BT)
            if action == "capture":
                self._graphs.captured(half, self._capture(context, block))
                action = self._graphs.next_action(half)
            if action == "launch":
                self._gpu.launch(self._graphs.graph(half))
            else:
                self._enqueue(context, block, num_tokens=1)
                self._graphs.ran(half)

    def _piece(self, tokens_BT: np.ndarray) -> None:
        """Several tokens of the only slot."""
        num_tokens = tokens_BT.shape[1]
        self._prompt_context.bind(self._tensors(num_tokens))
        with self._pieces.block() as block:
            self._fill(block, tokens_BT)
            self._enqueue(self._prompt_context, block, num_tokens)
            if self._executor.returns_all_logits:
                last = self._scratch[LOGITS] + (num_tokens - 1) * self._layout.logits.slot_bytes
                self._gpu.copy(self._halves[1 - self._past][LOGITS], last, self._layout.logits.slot_bytes)

    def _fill(self, block: Block, tokens_BT: np.ndarray) -> None:
        offset, size_bytes = self._layout.tokens_offset, self._layout.control_bytes(tokens_BT.shape[1])
        block.array[: self.num_slots * INT64_BYTES].view(np.int64)[:] = self._positions
        block.array[offset:size_bytes].view(np.int64)[:] = tokens_BT.ravel()

    def _enqueue(self, context: Context, block: Block, num_tokens: int) -> None:
        control = self._layout.control(self._scratch)
        self._gpu.copy(control, block.address, self._layout.control_bytes(num_tokens))
        context.enqueue()
        self._executor.kernels.append_rows(
            self._appends,
            batch=self.num_slots,
            num_tokens=num_tokens,
            capacity=self._layout.chunk_size,
            chunk_size=self._layout.chunk_size,
            position=control,
            stream=self._gpu.stream,
        )

    def _capture(self, context: Context, block: Block) -> int | None:
        is_whole = False
        self._gpu.begin_capture()
        try:
            self._enqueue(context, block, num_tokens=1)
            is_whole = True
        except EngineError:  # without a graph the step runs plainly, which says what is wrong if it is wrong then too
            pass
        finally:  # whatever happened, the stream must not stay in capture
            graph = self._gpu.end_capture()
        if graph is not None and not is_whole:
            self._gpu.destroy_graph(graph)
            return None
        return None if graph is None else self._arena.keep_graph(graph)

    # Some of the slots.

    def _step_some(self, rows: slice, tokens_BT: np.ndarray, position_B: np.ndarray) -> None:
        """A step of all slots, of which those outside `rows` stay as they were.

        Their new key and value rows are written behind those that count, where nothing looks at them.
        """
        waiting = [slot for slot in range(self.num_slots) if not rows.start <= slot < rows.stop]
        kept = self._positions[waiting]
        tokens = np.zeros((self.num_slots, 1), np.int64)
        tokens[rows], self._positions[rows] = tokens_BT, position_B
        self._call(tokens)
        self._positions[waiting] = kept
        for tensor in self._layout.pair:
            for slot in waiting:
                self._gpu.copy(
                    self._pair_address(tensor, slot),
                    self._pair_address(tensor, slot, half=1 - self._past),
                    tensor.slot_bytes,
                )

    def _run_apart(self, slot: int, tokens_1T: np.ndarray, position_1: np.ndarray) -> None:
        position = int(position_1[0])
        if position:
            self._beside.copy(0, self, slot, position)
        self._beside.run(slice(0, 1), tokens_1T, position_1)
        self.copy(slot, self._beside, 0, position + tokens_1T.shape[1])
        self._beside.retire(0)  # the next piece may be another stream's

    @cached_property
    def _beside(self) -> CudaMemory:
        return CudaMemory(self._executor, 1)

    # Logits.

    def logits(self, slot: int) -> np.ndarray:
        address, array = self._host_logits
        with self._gpu.current():
            self._gpu.copy(address, self._pair_address(self._layout.logits, slot), self._layout.logits.slot_bytes)
            self._gpu.synchronize()
        return array.view(np.float32).copy()

    def logits_on_gpu(self, slot: int) -> DeviceArray:
        """The logits [V] float32 of a slot where they lie until the next call."""
        logits = self._layout.logits
        return DeviceArray(self._pair_address(logits, slot), logits.shape, logits.dtype, self._gpu.stream, self)

    def choose(self, choices: Mapping[int, Choice]) -> dict[int, int]:
        with self._gpu.current():
            return self._chooser.choose(self._halves[self._past][LOGITS], choices)

    # Whole streams.

    def read(self, slot: int, position: int) -> dict[str, np.ndarray]:
        tensors = self._host_tensors(position)
        with self._gpu.current():
            for address, host, pitch, host_pitch, width, count in self._pieces_of(slot, position, tensors):
                self._gpu.copy_rows(host, host_pitch, address, pitch, width, count)
            self._gpu.synchronize()
        return tensors

    def write(self, slot: int, position: int, tensors: Mapping[str, np.ndarray]) -> None:
        dense = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
        with self._gpu.current():
            for address, host, pitch, host_pitch, width, count in self._pieces_of(slot, position, dense):
                self._gpu.copy_rows(address, pitch, host, host_pitch, width, count)
            self._gpu.synchronize()  # until then the arrays have to stay
        self._positions[slot] = position

    def copy(self, slot: int, source: SlotMemory, source_slot: int, position: int) -> None:
        assert isinstance(source, CudaMemory), "Bug: streams move between memories of one executor"
        with self._gpu.current():
            num_rows = position % self._layout.chunk_size
            for row in self._layout.rows if num_rows else ():
                name, pitch = row.spec.past, row.head_bytes
                target = self._rows[name] + slot * row.slot_bytes
                origin = source._rows[name] + source_slot * row.slot_bytes
                self._gpu.copy_rows(target, pitch, origin, pitch, num_rows * row.row_bytes, row.heads)
            for pair in self._layout.pair:
                target, origin = self._pair_address(pair, slot), source._pair_address(pair, source_slot)
                self._gpu.copy(target, origin, pair.slot_bytes)
        self._positions[slot] = position

    def retire(self, slot: int) -> None:
        # What is not finite anywhere reaches the final norm in the same call, and its statistics keep it for ever.
        with self._gpu.current():
            final = self._layout.recurrent[-1]
            statistics = np.empty(final.shape, final.dtype)
            self._gpu.copy(statistics.ctypes.data, self._pair_address(final, slot), final.slot_bytes)
            self._gpu.synchronize()
            if not np.isfinite(statistics).all():
                self._clear(slot)
        self._positions[slot] = 0

    def _clear(self, slot: int) -> None:
        for row in self._layout.rows:
            self._gpu.clear(self._rows[row.spec.past] + slot * row.slot_bytes, row.slot_bytes)
        for pair in self._layout.pair:
            for half in range(2):
                self._gpu.clear(self._pair_address(pair, slot, half=half), pair.slot_bytes)

    # Addresses.

    def _pair_address(self, tensor: PairTensor, slot: int, *, half: int | None = None) -> int:
        return self._halves[self._past if half is None else half][tensor.name] + slot * tensor.slot_bytes

    def _host_tensors(self, position: int) -> dict[str, np.ndarray]:
        """Empty arrays for one stream's state."""
        num_rows = position % self._layout.chunk_size
        tensors = {}
        for row in self._layout.rows:
            _, heads, _, *width = row.spec.past_shape
            tensors[row.spec.past] = np.empty((1, int(heads), num_rows, *map(int, width)), row.dtype)
        for pair in self._layout.recurrent:
            tensors[pair.name] = np.empty((1, *pair.shape), pair.dtype)
        return tensors

    def _pieces_of(
        self, slot: int, position: int, tensors: Mapping[str, np.ndarray]
    ) -> Iterator[tuple[int, int, int, int, int, int]]:
        """Device and host address, pitch of both, bytes of a piece, number of pieces: for each of a slot's tensors."""
        num_rows = position % self._layout.chunk_size
        for row in self._layout.rows if num_rows else ():
            width = num_rows * row.row_bytes
            address = self._rows[row.spec.past] + slot * row.slot_bytes
            yield address, tensors[row.spec.past].ctypes.data, row.head_bytes, width, width, row.heads
        for pair in self._layout.recurrent:
            size = pair.slot_bytes
            yield self._pair_address(pair, slot), tensors[pair.name].ctypes.data, size, size, size, 1

    # What is made once.

    def _ring(self, num_blocks: int, num_tokens: int) -> StagingRing:
        size_bytes = self._layout.control_bytes(num_tokens)
        return StagingRing(self._gpu, self._arena, num_blocks=num_blocks, size_bytes=size_bytes)

    @cached_property
    def _pieces(self) -> StagingRing:
        return self._ring(_PROMPT_BLOCKS, self._layout.max_tokens)

    @cached_property
    def _prompt_context(self) -> Context:
        return self._executor.engine.open_context(fixed_shapes=False)

    def _step_context(self, half: int) -> Context:
        context = self._step_contexts[half]
        if context is None:
            context = self._step_contexts[half] = self._executor.engine.open_context(fixed_shapes=True)
            context.bind(self._tensors(num_tokens=1))
        return context

    def _tensors(self, num_tokens: int) -> dict[str, Tensor]:
        past, present = self._halves[self._past], self._halves[1 - self._past]
        return self._layout.tensors(num_tokens, self._rows, past, present, self._scratch)

    @cached_property
    def _appends(self) -> Sequence[Append]:
        return [
            Append(self._scratch[row.spec.present], self._rows[row.spec.past], row.heads, row.row_bytes)
            for row in self._layout.rows
        ]

"""ONNX Runtime on the CPU.

Every buffer that a decode step reads or writes is bound once and written in place from then on. Present CEMA and norm
tensors are bound to the other half of a pair, and the next step has them as its past. New key/value rows are copied
into the memory of the open chunk; the memory itself is never copied for a token, and bound again only when its
capacity changes. Letters as in `megalodon_deploy.state`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megalodon_deploy.bundle import MODEL_FILE
from megalodon_deploy.engine.library import KERNELS_VARIABLE, OPERATORS_FILE, find_onnxruntime_operators
from megalodon_deploy.errors import BundleError, EngineError, MissingDependencyError
from megalodon_deploy.files import atomic_directory
from megalodon_deploy.runtime.executors.base import HostLogits
from megalodon_deploy.runtime.executors.host_memory import KeyValueMemory
from megalodon_deploy.runtime.executors.huge_pages import huge_pages
from megalodon_deploy.runtime.executors.packed_cache import changing_entries, make_room, use_entry, write_record
from megalodon_deploy.runtime.executors.packed_weights import check_sizes, packed_folder, packing_entries
from megalodon_deploy.state import LOGITS, POSITION, TOKENS, StateSpec, concrete_shape, state_specs

if TYPE_CHECKING:
    from megalodon_deploy.bundle import Bundle, Manifest

_ACTIVATIONS: dict[str, np.dtype] = {"fp32": np.dtype(np.float32), "fp16": np.dtype(np.float16)}
# How ONNX Runtime multiplies with quantised matrices: the accuracy level of its operator MatMulNBits.
MATMUL_ACCURACY = "session.qdq_matmulnbits_accuracy_level"
INT8_PRODUCTS, FLOAT_PRODUCTS = "4", "1"  # activations rounded to int8 by blocks, which is what makes it fast; float32
_QUIET = 3  # log errors only
_ONNX_FLOAT8E4M3FN = 17  # in ONNX's TensorProto.DataType; the runtime does not import onnx

Arrays = dict[str, np.ndarray]


def missing_on_cpu(manifest: Manifest) -> str | None:
    """What a bundle needs that ONNX Runtime lacks on a CPU; None when it can run it."""
    if manifest.precision not in _ACTIVATIONS:
        return f"{manifest.precision} matrix product"
    return "fp4 type" if "nvfp4" in manifest.weight_kinds else None


def has_int8_products(manifest: Manifest) -> bool:
    """Whether the CPU multiplies int8 activations with some matrices: those that ONNX Runtime fuses to MatMulNBits."""
    return bool(manifest.weight_kinds & {"int8", "int4"})


class OnnxRuntimeExecutor:
    """Raises `MissingDependencyError` without onnxruntime, `EngineError` for a precision that the CPU lacks and
    `BundleError` for a graph that ONNX Runtime refuses or whose inputs are not the bundle's."""

    backend = "onnxruntime"

    def __init__(
        self,
        bundle: Bundle,
        *,
        threads: int | None = None,
        native: bool | None = None,
        share_weights: bool = False,
    ) -> None:
        precision = bundle.manifest.precision
        if missing := missing_on_cpu(bundle.manifest):
            raise EngineError(
                f"{bundle.path}: ONNX Runtime has no {missing} on a CPU; "
                "use the backend torch or a TensorRT engine, or export with other types"
            )
        self.config = bundle.config
        self.activation = _ACTIVATIONS[precision]
        self.returns_all_logits = bundle.manifest.logits == "all"
        self.operators = _operators(bundle, native)
        self._threads = threads
        if share_weights:
            self.session = self._open_packed(bundle)
        else:
            with huge_pages():
                self.session = self._open(bundle, bundle.cpu_model_path)
        names = {spec.past for spec in state_specs(self.config)} | {TOKENS, POSITION}
        if unlike := sorted(names ^ {node.name for node in self.session.get_inputs()}):
            raise BundleError(f"{bundle.model_path}: input {unlike[0]} does not follow from its config; export again")

    def open_slots(self, num_slots: int) -> OnnxRuntimeMemory:
        return OnnxRuntimeMemory(self, num_slots)

    def _open(self, bundle: Bundle, model: Path, *, pack_into: Path | None = None) -> Any:
        return load_session(
            bundle, self._threads, ["CPUExecutionProvider"], self.operators, model=model, pack_into=pack_into
        )

    def _open_packed(self, bundle: Bundle) -> Any:
        """A session whose weights are mapped as they are multiplied, from a file that is written when there is none."""
        folder = packed_folder(bundle, import_onnxruntime().__version__, self.operators)
        entry = use_entry(folder, verify_hashes=bundle.is_verified)
        if entry is None:
            check_sizes(bundle)
            with changing_entries():
                entry = use_entry(folder, verify_hashes=bundle.is_verified)  # another process may have written it now
                if entry is None:
                    make_room(bundle)
                    self._pack(bundle, folder)
                    entry = use_entry(folder, verify_hashes=False)
        self._entry = entry  # kept open: so nobody removes it
        return self._open(bundle, folder / MODEL_FILE)

    def _pack(self, bundle: Bundle, folder: Path) -> None:
        with atomic_directory(folder, overwrite=True) as directory:
            own = self._first_logits(self._open(bundle, bundle.model_path, pack_into=directory))
            mapped = self._first_logits(self._open(bundle, directory / MODEL_FILE))
            if not np.array_equal(own, mapped):
                raise EngineError(
                    f"{bundle.path}: ONNX Runtime {import_onnxruntime().__version__} computes something else from "
                    "packed weights; leave out share_weights"
                )
            write_record(directory, bundle)

    def _first_logits(self, session: Any) -> np.ndarray:
        """Of some tokens, which go through the kernels for one token and through those for several, [2, V]."""
        self.session = session
        memory = self.open_slots(1)
        found = []
        for start, count in ((0, 1), (1, min(7, self.config.chunk_size - 1))):
            tokens = (start + np.arange(count))[None] % self.config.vocab_size
            memory.run(slice(0, 1), tokens, np.array([start]))
            found.append(memory.logits(0))
        return np.stack(found)


@dataclass(frozen=True)
class _Call:
    """One bound call: fill `tokens` and `position`, run, read `logits` and `new_rows`."""

    binding: Any
    tokens: np.ndarray  # [b, T]
    position: np.ndarray  # [b]
    logits: np.ndarray  # [b, K, V]
    new_rows: Arrays  # [b, H, T, w] or [b, H, T] by output name


class OnnxRuntimeMemory(HostLogits):
    """State of several streams in main memory."""

    def __init__(self, executor: OnnxRuntimeExecutor, num_slots: int) -> None:
        super().__init__(num_slots, executor.config.vocab_size)
        self._executor = executor
        config = executor.config
        self._rows = KeyValueMemory(config, num_slots, executor.activation)
        self._row_specs = [spec for spec in state_specs(config) if spec.is_rows]
        self._recurrent_specs = [spec for spec in state_specs(config) if not spec.is_rows]
        self._past, self._present = (self._recurrent_buffers(), self._recurrent_buffers())
        self._steps: dict[tuple[int, int, int], _Call] = {}  # calls of one token, by rows and place of the past
        self._bound_capacity = self._rows.capacity

    def run(self, rows: slice, tokens_BT: np.ndarray, position_B: np.ndarray) -> None:
        call = self._step_call(rows) if tokens_BT.shape[1] == 1 else self._bind(rows, tokens_BT.shape[1])
        call.tokens[...] = tokens_BT
        call.position[...] = position_B
        self._executor.session.run_with_iobinding(call.binding)
        self._rows.append(rows, position_B, call.new_rows)
        if rows == slice(0, self.num_slots):
            self._past, self._present = self._present, self._past
        else:
            for name, past in self._past.items():
                past[rows] = self._present[name][rows]
        if self._executor.returns_all_logits:
            self.last_logits[rows] = call.logits[:, -1]

    def read(self, slot: int, position: int) -> Arrays:
        rows = self._rows.read(slot, position % self._executor.config.chunk_size)
        return rows | {name: past[slot : slot + 1].copy() for name, past in self._past.items()}

    def write(self, slot: int, position: int, tensors: Mapping[str, np.ndarray]) -> None:
        self._rows.write(slot, position % self._executor.config.chunk_size, tensors)
        for name, past in self._past.items():
            past[slot] = tensors[name][0]

    def retire(self, slot: int) -> None:
        # A value row that is not finite makes its own token's output so, and the final norm carries that on for ever:
        # the small tensors tell of the large ones.
        is_broken = not all(np.isfinite(past[slot]).all() for past in self._past.values())
        if is_broken:
            for buffers in (self._past, self._present):
                for buffer in buffers.values():
                    buffer[slot] = 0
        self._rows.retire(slot, clear=is_broken)

    def _recurrent_buffers(self) -> Arrays:
        return {
            spec.past: np.zeros(concrete_shape(spec.past_shape, batch=self.num_slots), np.float32)
            for spec in self._recurrent_specs
        }

    def _step_call(self, rows: slice) -> _Call:
        """The bound call of one token: found, or made when rows, capacity or the pair's order are new."""
        if self._bound_capacity != self._rows.capacity:
            self._steps.clear()
            self._bound_capacity = self._rows.capacity
        key = (rows.start, rows.stop, id(self._past))
        if key not in self._steps:
            self._steps[key] = self._bind(rows, 1)
        return self._steps[key]

    def _bind(self, rows: slice, num_tokens: int) -> _Call:
        """Bind the memory of a range of rows, and fresh buffers for everything else."""
        batch = rows.stop - rows.start
        call = _Call(
            binding=self._executor.session.io_binding(),
            tokens=np.zeros((batch, num_tokens), np.int64),
            position=np.zeros(batch, np.int64),
            logits=self._logits_output(rows, num_tokens),
            new_rows={spec.present: self._new_rows(spec, batch, num_tokens) for spec in self._row_specs},
        )
        inputs = {TOKENS: call.tokens, POSITION: call.position}
        inputs |= {name: array[rows] for name, array in (self._rows.views | self._past).items()}
        outputs = {LOGITS: call.logits} | call.new_rows
        outputs |= {spec.present: self._present[spec.past][rows] for spec in self._recurrent_specs}
        for name, array in inputs.items():
            call.binding.bind_input(name, "cpu", 0, _element_type(array), array.shape, array.ctypes.data)
        for name, array in outputs.items():
            call.binding.bind_output(name, "cpu", 0, _element_type(array), array.shape, array.ctypes.data)
        return call

    def _logits_output(self, rows: slice, num_tokens: int) -> np.ndarray:
        """Where a call writes its logits [b, K, V]: their place of rest, when it returns no others."""
        if not self._executor.returns_all_logits:
            return self.last_logits[rows][:, None]
        return np.empty((rows.stop - rows.start, num_tokens, self._executor.config.vocab_size), np.float32)

    def _new_rows(self, spec: StateSpec, batch: int, num_tokens: int) -> np.ndarray:
        shape = concrete_shape(spec.present_shape, batch=batch, tokens=num_tokens)
        return np.empty(shape, spec.numpy_dtype(self._executor.activation))


def _element_type(array: np.ndarray) -> Any:
    """What a binding calls the type: NumPy's class, or ONNX's number of a type that NumPy lacks."""
    return _ONNX_FLOAT8E4M3FN if array.dtype.name == "float8_e4m3fn" else array.dtype.type


def _operators(bundle: Bundle, native: bool | None) -> Path | None:
    """The library of compiled operators, None for the function bodies."""
    is_float32 = bundle.manifest.precision == "fp32"
    if native and not is_float32:
        precision = bundle.manifest.precision
        raise EngineError(f"{bundle.path}: the compiled operators are float32, the bundle is {precision}; native=False")
    if native is False or not is_float32 or (native is None and os.environ.get(KERNELS_VARIABLE) == "reference"):
        return None
    library = find_onnxruntime_operators()
    if native and library is None:
        raise MissingDependencyError(
            f"{OPERATORS_FILE} is missing; build it: python -m megalodon_deploy.engine.toolchain build-cpu"
        )
    return library


def import_onnxruntime() -> Any:
    """The module. Raises `MissingDependencyError` naming the extras."""
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingDependencyError(
            "ONNX Runtime is not installed: pip install 'megalodon-deploy[cpu]', or [gpu] where CUDA is"
        ) from error
    return onnxruntime


def load_session(
    bundle: Bundle,
    threads: int | None,
    providers: Sequence[str | tuple[str, Mapping[str, str]]],
    operators: Path | None = None,
    *,
    model: Path | None = None,
    pack_into: Path | None = None,
) -> Any:
    """A bundle's graph, on the first provider that takes each node, with a library of compiled operators or without.

    `model` is another file of the same graph; `pack_into` a folder to write one to, with packed weights beside it.

    Raises `BundleError` when the graph is refused, `EngineError` when the library is.
    """
    onnxruntime = import_onnxruntime()
    path = model or bundle.model_path
    options = _session_options(onnxruntime, threads, operators)
    if pack_into is not None:
        options.optimized_model_filepath = str(pack_into / MODEL_FILE)
        for name, value in packing_entries().items():
            options.add_session_config_entry(name, value)
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=list(providers))
    except Exception as error:  # its error classes share no other base
        text = " ".join(str(error).split())
        cure = "export it again" if path.parent == bundle.path else "remove it"
        if pack_into is not None:  # as where the disk fills up
            cure = "leave out share_weights"
        raise BundleError(f"{path}: ONNX Runtime cannot load it ({text}); {cure}") from error


def _session_options(onnxruntime: Any, threads: int | None, operators: Path | None) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _QUIET
    options.intra_op_num_threads = threads or 0
    options.add_session_config_entry(MATMUL_ACCURACY, INT8_PRODUCTS)
    if operators is not None:
        try:
            options.register_custom_ops_library(str(operators))
        except Exception as error:  # its error classes share no other base
            text = " ".join(str(error).split())
            raise EngineError(f"{operators}: ONNX Runtime cannot load it ({text}); build it again") from error
    return options

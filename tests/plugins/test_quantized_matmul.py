"""The compiled product with codes inside the installed ONNX Runtime, against float64."""

from __future__ import annotations

import ctypes
import gc
import mmap
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from helpers import assert_close
from onnx import TensorProto, helper, numpy_helper

from megalodon_deploy.engine.toolchain import build_onnxruntime_operators
from megalodon_deploy.export.operators.quantized_matmul import quantized_matmul_function

Array = np.ndarray
SPAN = 32  # elements of x that share a scale
EXCEEDS = 1e-6  # of the sum of magnitudes: float32 scales and sums of spans
# K, N: one element; below, at and above a quad of rows, a span, a vector of columns and a tile; work for two threads.
SIZES = [(1, 2), (3, 2), (32, 14), (37, 130), (64, 64), (128, 66), (132, 16), (256, 254), (260, 322), (1024, 640)]
BLOCKS = [0, 32, 64, 128, 256]  # 0: whole columns
SHAPES = [(1, 1), (1, 3), (2, 4), (5, 9)]  # of rows of x


def _flags() -> set[str]:
    path = Path("/proc/cpuinfo")
    return set(path.read_text(encoding="utf-8").split()) if path.is_file() else set()


def random_matrix(kind: str, k: int, n: int, block: int, seed: int = 0) -> tuple[Array, Array]:
    """Codes [K, N] of the whole range and scales [K / block, N] or [N]."""
    rng = np.random.default_rng(seed)
    low, dtype = (-8, ml_dtypes.int4) if kind == "int4" else (-128, np.int8)
    codes = rng.integers(low, -low, (k, n)).astype(dtype)
    scales = rng.uniform(0.5, 2, (-(k // -block), n) if block else n).astype(np.float32)
    return codes, scales


def decoded(codes: Array, scales: Array, block: int) -> Array:
    """W [K, N] float64."""
    full = np.repeat(scales, block, axis=0) if block else scales
    return codes.astype(np.float64) * full


def rounded(x: Array) -> Array:
    """What becomes of x [..., K]: a scale for each span, float64."""
    out = np.empty(x.shape)
    for start in range(0, x.shape[-1], SPAN):
        part = x[..., start : start + SPAN]
        most = np.abs(part).max(-1, keepdims=True)
        codes = np.rint(part * (np.float32(127) / most))
        out[..., start : start + SPAN] = codes * (most / np.float32(127)).astype(np.float64)
    return out


def make_model(codes: Array, scales: Array, block: int, *, constant: bool = True) -> onnx.ModelProto:
    tensors = [numpy_helper.from_array(codes, "codes"), numpy_helper.from_array(scales, "scales")]
    node = helper.make_node(
        "QuantizedMatMul", ["x", "codes", "scales"], ["y"], domain="megalodon", axis=0 if block else 1, block_size=block
    )
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", "T", codes.shape[0]])]
    if not constant:
        inputs += [helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in tensors]
        tensors = []
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["B", "T", codes.shape[1]])]
    return helper.make_model(
        helper.make_graph([node], "one", inputs, outputs, tensors),
        functions=[ir.to_proto(quantized_matmul_function())],
        opset_imports=[helper.make_opsetid("", 24), helper.make_opsetid("megalodon", 1)],
        ir_version=11,
    )


@pytest.fixture(scope="module")
def built() -> Path:
    return build_onnxruntime_operators()


@pytest.fixture(scope="module")
def library(built: Path) -> Path:
    """Skips where the operator is left to its body."""
    if platform.machine() != "x86_64" or "avx512_vnni" not in _flags():
        pytest.skip("the processor has no AVX-512 VNNI")
    if b"clang version" in built.read_bytes():
        pytest.skip("compiled by clang, and not by GCC")
    return built


def load(
    model: onnx.ModelProto,
    library: Path | None,
    threads: int = 0,
    *,
    given: Mapping[str, onnxruntime.OrtValue] | None = None,
    executed: Path | None = None,
) -> onnxruntime.InferenceSession:
    """A session; `given`: initializers in memory of the caller's; `executed`: where the optimised graph is written."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    if executed:
        options.optimized_model_filepath = str(executed)
    for name, value in (given or {}).items():
        options.add_initializer(name, value)
    if library is not None:
        options.register_custom_ops_library(str(library))
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("kind", ["int4", "int8"])
@pytest.mark.parametrize(("k", "n"), SIZES)
def test_products_are_those_of_float64(library: Path, kind: str, k: int, n: int) -> None:
    rng = np.random.default_rng(k + n)
    for block in (size for size in BLOCKS if not size or k % size == 0):
        codes, scales = random_matrix(kind, k, n, block)
        session = load(make_model(codes, scales, block), library)
        for shape in SHAPES:
            x = rng.standard_normal((*shape, k)).astype(np.float32)
            (y,) = session.run(None, {"x": x})
            exact, weight = rounded(x), decoded(codes, scales, block)
            error = np.abs(y - exact @ weight) / (np.abs(exact) @ np.abs(weight) + 1e-30)
            assert error.max() <= EXCEEDS, (block, shape)


@pytest.mark.parametrize("kind", ["int4", "int8"])
def test_a_row_is_the_same_beside_others_and_on_any_number_of_threads(library: Path, kind: str) -> None:
    codes, scales = random_matrix(kind, 256, 700, 64)
    one, several = (load(make_model(codes, scales, 64), library, threads) for threads in (1, 3))
    x = np.random.default_rng(1).standard_normal((1, 37, 256)).astype(np.float32)
    (together,) = one.run(None, {"x": x})
    assert np.isfinite(together).all()
    np.testing.assert_array_equal(several.run(None, {"x": x})[0], together)
    for token in (0, 3, 4, 36):
        np.testing.assert_array_equal(one.run(None, {"x": x[:, token : token + 1]})[0], together[:, token : token + 1])


@pytest.mark.parametrize("kind", ["int4", "int8"])
def test_what_is_not_finite_stays_so_in_its_own_row(library: Path, kind: str) -> None:
    codes, scales = random_matrix(kind, 260, 66, 0)
    session = load(make_model(codes, scales, 0), library)
    x = np.random.default_rng(2).standard_normal((1, 7, 260)).astype(np.float32)
    (whole,) = session.run(None, {"x": x})
    x[0, 1, 259], x[0, 2, 0], x[0, 4, 130], x[0, 6, 33] = np.nan, np.inf, -np.inf, np.nan
    (y,) = session.run(None, {"x": x})
    assert not np.isfinite(y[0, [1, 2, 4, 6]]).any()
    np.testing.assert_array_equal(y[0, [0, 3, 5]], whole[0, [0, 3, 5]])


def test_zeros_and_extreme_magnitudes(library: Path) -> None:
    codes, scales = random_matrix("int4", 128, 64, 32)
    session = load(make_model(codes, scales, 32), library)
    x = np.zeros((1, 5, 128), np.float32)
    x[0, 1], x[0, 2], x[0, 3, ::32], x[0, 4] = 1e-44, 1e34, -1e-20, 1e-37
    (y,) = session.run(None, {"x": x})
    weight = decoded(codes, scales, 32)
    assert not y[0, [0, 1, 4]].any()  # nothing, and less than a float32 can divide by
    for row in (2, 3):
        assert_close(
            y[0, row].astype(np.float64) / np.abs(x[0, row]).max(), x[0, row] / np.abs(x[0, row]).max() @ weight, 1e-4
        )


def test_an_empty_call_gives_nothing(library: Path) -> None:
    codes, scales = random_matrix("int8", 8, 6, 0)
    session = load(make_model(codes, scales, 0), library)
    assert session.run(None, {"x": np.empty((2, 0, 8), np.float32)})[0].shape == (2, 0, 6)


@pytest.mark.parametrize(
    ("k", "n", "block", "constant", "message"),
    [
        (96, 4, 48, True, "blocks of a multiple of 32"),
        (48, 4, 32, True, "blocks of a multiple of 32"),
        (8, 3, 0, True, "an even number of columns"),
        (8, 4, 0, False, "codes and scales that are initializers"),
    ],
)
def test_what_it_cannot_do_is_said_when_it_loads(
    library: Path, k: int, n: int, block: int, constant: bool, message: str
) -> None:
    codes, scales = random_matrix("int4", k, n, block)
    with pytest.raises(Exception, match=message):
        load(make_model(codes, scales, block, constant=constant), library)


def test_a_row_of_another_length_is_refused(library: Path) -> None:
    model = make_model(*random_matrix("int8", 8, 6, 0), 0)
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "K"
    with pytest.raises(Exception, match=r"expected x \[..., K\]"):
        load(model, library).run(None, {"x": np.ones((1, 1, 4), np.float32)})


@pytest.mark.parametrize("kind", ["int4", "int8"])
def test_the_body_is_the_same_product(kind: str) -> None:
    codes, scales = random_matrix(kind, 64, 48, 32)
    x = np.random.default_rng(3).standard_normal((2, 3, 64)).astype(np.float32)
    model = make_model(codes, scales, 32)
    onnx.checker.check_model(model, full_check=True)
    (y,) = load(model, None).run(None, {"x": x})
    assert_close(y, x.astype(np.float64) @ decoded(codes, scales, 32), 2e-2)  # x may be rounded, or not


@pytest.mark.parametrize("kind", ["int4", "int8"])
@pytest.mark.parametrize("block", [0, 32])
def test_what_is_executed(library: Path, tmp_path: Path, kind: str, block: int) -> None:
    """The node where the library has it; where not, what ONNX Runtime makes of its body."""
    model = make_model(*random_matrix(kind, 64, 48, block), block)
    for operators, expected in ((library, "QuantizedMatMul"), (None, "MatMulNBits")):
        load(model, operators, executed=tmp_path / "executed.onnx")
        assert [node.op_type for node in onnx.load(tmp_path / "executed.onnx").graph.node] == [expected]


def test_two_threads_may_call_one_session(library: Path) -> None:
    session = load(make_model(*random_matrix("int4", 256, 700, 64), 64), library, threads=2)
    calls = [np.random.default_rng(seed).standard_normal((1, 9, 256)).astype(np.float32) for seed in range(2)]
    alone = [session.run(None, {"x": x})[0] for x in calls]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(lambda i: session.run(None, {"x": calls[i % 2]})[0], range(40)))
    for i, y in enumerate(together):
        np.testing.assert_array_equal(y, alone[i % 2])


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * mmap.PAGESIZE


def test_sessions_give_their_memory_back(library: Path) -> None:
    model = make_model(*random_matrix("int8", 4096, 2048, 0), 0)
    x = np.ones((1, 1, 4096), np.float32)
    resident = []
    for _ in range(16):
        load(model, library, threads=1).run(None, {"x": x})
        gc.collect()  # a session in Python is part of a cycle
        resident.append(resident_bytes())
    assert resident[-1] - resident[3] < 50e6, "the packed codes of 12 sessions are 100 MB"


def before_a_wall(array: Array) -> Array:
    """A copy that ends where the process may no longer read: one byte more ends it."""
    size = -(-array.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    pages = mmap.mmap(-1, size + mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(pages))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address + size), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    copy = np.frombuffer(pages, array.dtype, array.size, size - array.nbytes).reshape(array.shape)
    copy[...] = array
    return copy


@pytest.mark.parametrize(("k", "n", "block"), [(37, 66, 0), (32, 40, 32)])
def test_nothing_is_read_beyond_the_end(library: Path, k: int, n: int, block: int) -> None:
    """Of int8: ONNX Runtime takes no int4 from memory of NumPy's."""
    codes, scales = random_matrix("int8", k, n, block)
    model = make_model(codes, scales, block)
    arrays = {"codes": codes, "scales": scales}
    given = {name: onnxruntime.OrtValue.ortvalue_from_numpy(before_a_wall(array)) for name, array in arrays.items()}
    x = before_a_wall(np.random.default_rng(4).standard_normal((1, 5, k)).astype(np.float32))
    (y,) = load(model, library, given=given).run(None, {"x": x})
    np.testing.assert_array_equal(y, load(model, library).run(None, {"x": x})[0])


EMULATOR = "qemu-x86_64-static"
CALL = """
import sys
import numpy as np
import onnxruntime
library, model, x, y = sys.argv[1:]
options = onnxruntime.SessionOptions()
options.register_custom_ops_library(library)
np.save(y, onnxruntime.InferenceSession(model, options).run(None, {"x": np.load(x)})[0])
"""


def test_a_processor_without_the_instructions_takes_the_body(built: Path, tmp_path: Path) -> None:
    """A process on an emulated Haswell, where an instruction of AVX-512 ends it."""
    if platform.machine() != "x86_64" or shutil.which(EMULATOR) is None:
        pytest.skip("no emulator of an x86-64 processor: apt-get install qemu-user-static")
    codes, scales = random_matrix("int4", 64, 48, 32)
    onnx.save(make_model(codes, scales, 32), tmp_path / "model.onnx")
    x = np.random.default_rng(5).standard_normal((1, 3, 64)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    files = [built, tmp_path / "model.onnx", tmp_path / "x.npy", tmp_path / "y.npy"]
    command = [EMULATOR, "-cpu", "Haswell", sys.executable, "-c", CALL, *files]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert_close(np.load(tmp_path / "y.npy"), x.astype(np.float64) @ decoded(codes, scales, 32), 2e-2)

"""The kernel benchmark but for the device: its plan, its calls (on the emulated kernels), its tables and files."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import gpu_timing
import kernels
import pytest
import torch
from gpu_timing import Ceilings, copies_for_cold_caches, median_and_p95
from helpers import small_config
from kernel_calls import Library, make_tensors, reference, timed_reference, worst_error
from kernel_cases import KERNELS, Case, Kernel, Phase, make_case, plan
from kernel_report import Result, plan_table, result_table, write_json

SMALL = small_config(chunk_size=40, z_dim=32, value_dim=64, model_dim=24)
PHASES = [(kernel, phase) for kernel in KERNELS for phase in kernel.phases]


def small_case(kernel: Kernel, phase: Phase, dtype: str = "float32", memory_dtype: str = "activation") -> Case:
    return make_case(kernel, phase, "small", SMALL, batch=2, dtype=dtype, memory_dtype=memory_dtype)


def kernel_named(name: str) -> Kernel:
    return next(kernel for kernel in KERNELS if kernel.name == name)


@pytest.fixture(scope="module")
def library(emulated_path: Path) -> Library:
    return Library(emulated_path)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("kernel", "phase"), PHASES, ids=lambda value: getattr(value, "name", value))
def test_the_kernel_computes_its_reference(library: Library, kernel: Kernel, phase: Phase, dtype: str) -> None:
    """Every tensor and size reaches the argument that it is for; a wrong output would be noticed."""
    for memory_dtype in kernel.memory_types if phase == "decode" else ("activation",):
        case = small_case(kernel, phase, dtype, memory_dtype)
        tensors = make_tensors(library, case, "cpu")
        expected = reference(case, tensors, precise=True)
        assert worst_error(case, tensors, expected) == math.inf  # nothing is written yet
        library.bind(case, tensors)()
        assert worst_error(case, tensors, expected) <= 1
        name, values = next((name, values) for name, values in expected.items() if values.numel())
        disturbed = expected | {name: values + 0.1 * values.nan_to_num(0).abs().max()}
        assert worst_error(case, tensors, disturbed) > 1
        timed_reference(case, compiled=False)(tensors)


def test_a_refused_call_says_why(library: Library) -> None:
    case = small_case(kernel_named("complex_ema"), "decode")
    tensors = make_tensors(library, case, "cpu")
    del tensors["omega"]
    with pytest.raises(RuntimeError, match=r"complex_ema decode small .*invalid argument"):
        library.bind(case, tensors)()


def test_the_plan_has_every_kernel_at_every_model() -> None:
    cases = list(plan())
    assert len({case.name for case in cases}) == len(cases)
    assert {(case.kernel.name, case.phase) for case in cases} == {(kernel.name, phase) for kernel, phase in PHASES}
    for case in cases:
        assert case.sizes["T"] == (1 if case.phase == "decode" else case.sizes["C"])
        assert case.position % case.sizes["C"] + case.sizes["T"] <= case.sizes["C"]
    assert next(iter(plan(only="append_rows decode paper-7B bfloat16 B8"))).sizes["B"] == 8


def test_bytes_and_operations_are_those_of_a_calculation_by_hand() -> None:
    def case_of(name: str, phase: str) -> Case:
        return next(case for case in plan(models=["paper-7B"]) if case.kernel.name == name and case.phase == phase)

    D, T, N, G = 4096, 4096, 16, 64
    ema = case_of("complex_ema", "prefill")
    assert ema.traffic_bytes == 2 * (T * D * 2) + 2 * (D * N * 8) + 8 + D * N * (4 + 8 + 8) + D * 4
    assert ema.flops == 12 * T * D * N
    assert case_of("timestep_norm", "prefill").traffic_bytes == 2 * (T * D * 2) + 2 * (G * 16) + 8 + 2 * D * 4
    decode = case_of("chunk_attention", "decode")
    assert decode.traffic_bytes == (4095 + 1) * 4 * (256 + 2048) * 2 + 4 * (256 + 2048) * 2 + 8
    assert decode.flops == 2 * 4 * 4096 * (256 + 2048)
    assert case_of("chunk_attention", "prefill").flops == 2 * 4 * (4096 * 4097 // 2) * (256 + 2048)
    assert case_of("append_rows", "decode").traffic_bytes == 2 * 4 * (256 + 2048) * 2 + 8


def test_quantised_memory_is_smaller_and_has_scales() -> None:
    attention = kernel_named("chunk_attention")
    plain, quantised = (small_case(attention, "decode", "bfloat16", memory) for memory in ("activation", "int8"))
    rows = 2 * SMALL.num_heads * plain.sizes["S"]
    width = SMALL.key_head_dim + SMALL.value_head_dim
    assert plain.traffic_bytes - quantised.traffic_bytes == rows * (2 - 1) * width - rows * 2 * 4
    assert not any(tensor.quantised_only for tensor in plain.inputs)


def test_a_floor_is_what_limits_most() -> None:
    ceilings = Ceilings(1e9, 1e10, {"bfloat16": 1e12})
    assert ceilings.floor(1_000_000, 1_000, "float32", "bfloat16") == (1e-3, "memory")
    assert ceilings.floor(1, 10**10, "float32", "bfloat16") == (1.0, "float32")
    assert ceilings.floor(1, 10**12, "matrix", "bfloat16") == (1.0, "matrix")


def test_copies_do_not_fit_the_cache() -> None:
    assert copies_for_cold_caches(1 << 30, 50 << 20) == 2
    assert copies_for_cold_caches(1 << 20, 50 << 20) == 100
    assert copies_for_cold_caches(0, 50 << 20) == 512


def test_median_and_p95() -> None:
    median, p95 = median_and_p95([float(value) for value in range(101)][::-1])
    assert (median, p95) == (50, 95)


RESULT = Result(
    case="complex_ema decode",
    sizes={"B": 1},
    traffic_bytes=2_000_000,
    flops=4_000_000,
    worst_error=0.5,
    median_us=2.0,
    p95_us=3.0,
    floor_us=1.0,
    bound="memory",
    eager_us=50.0,
)


def test_the_table_shows_rates_and_what_is_wrong() -> None:
    wrong = Result(case="broken", sizes={}, traffic_bytes=1, flops=0, worst_error=math.nan)
    _, first, second = result_table([RESULT, wrong]).splitlines()
    assert first.split() == [
        *("complex_ema", "decode", "2", "3", "1000", "2", "50%", "memory", "50", "-", "0.50"),
    ]
    assert second.split()[-2:] == ["nan", "WRONG"]
    assert not wrong.is_right
    cases = list(plan(models=["mega200M"], only="timestep_norm"))
    assert len(plan_table(cases).splitlines()) == 1 + len(cases)


def test_the_file_has_all_that_was_measured(tmp_path: Path) -> None:
    path = tmp_path / "new" / "result.json"
    wrong = dataclasses.replace(RESULT, worst_error=math.inf, median_us=None)
    write_json(path, {"device": "none"}, [RESULT, wrong])
    read = json.loads(path.read_text())
    assert read["device"] == "none"
    first, second = read["results"]
    assert (first["share"], first["gigabytes_per_second"], first["teraflops"]) == (0.5, 1000.0, 2.0)
    assert (second["is_right"], second["worst_error"], second["share"]) == (False, None, None)


def test_what_was_measured_before_an_error_is_kept(
    emulated_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Device:
        def __init__(self, *arguments: object, repeats: int, beside: list[str]) -> None:
            assert (repeats, beside) == (7, ["eager"])
            self.results = [RESULT]

        def run(self, case: Case) -> Result:
            return self.results.pop()

    monkeypatch.setattr(kernels, "Benchmark", Device)
    monkeypatch.setattr(gpu_timing, "describe_device", lambda: {"device": "none", "cache_bytes": 1})
    monkeypatch.setattr(gpu_timing, "measure_ceilings", lambda *_: Ceilings(1.0, 1.0, {}))
    path = tmp_path / "result.json"
    options = kernels.parse(["--repeats", "7", "--beside", "eager", "--output", str(path)])
    with pytest.raises(IndexError):
        kernels.run_all(list(plan())[:2], emulated_path, options)
    read = json.loads(path.read_text())
    assert (read["device"], len(read["results"])) == ("none", 1)


def run_script(*arguments: str) -> subprocess.CompletedProcess[str]:
    script = Path(__file__).parents[2] / "benchmarks" / "kernels.py"
    return subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, check=False)


def test_the_plan_is_printed_anywhere() -> None:
    done = run_script("--list", "--only", "chunk_attention decode paper-7B")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1 + 3 * 2


def test_without_a_gpu_one_line_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    done = run_script()
    assert done.returncode == 2
    assert done.stderr.startswith("error: no NVIDIA GPU")

"""How fast the kernels are on this GPU, beside PyTorch and beside what the device can do at best.

    python benchmarks/kernels.py [--list] [--only TEXT] [--models ...] [--dtypes ...] [--batches ...] [--beside ...]

Each case is compared with float64 first; a wrong one is not timed, and the exit code is 1. Then a CUDA graph makes
calls on sets of tensors in turn, so many that none is in the cache when it is read again. Beside it: PyTorch's own
operations, eager and compiled, on the same tensors. Ceilings are a large copy and large matrix products of the same
run. The file is written anew after every case: what was measured before an error or a time limit is kept. Needs a
GPU, but for `--list`.
"""

from __future__ import annotations

import argparse
import datetime
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kernel_cases import MODELS, Case, plan
from kernel_report import Result, plan_table, result_table, write_json

from megalodon_deploy.config import PRESETS
from megalodon_deploy.engine.library import ABI_VERSION, check_abi, find_plugin_library
from megalodon_deploy.errors import UserError

if TYPE_CHECKING:
    from gpu_timing import Ceilings
    from kernel_calls import Library, Tensors

RESULTS = Path(__file__).parent / "results"
BESIDE = ("eager", "compiled")


class Benchmark:
    """On the current CUDA device."""

    def __init__(
        self, library: Library, ceilings: Ceilings, cache_bytes: int, *, repeats: int, beside: Sequence[str]
    ) -> None:
        import torch

        self.library, self.ceilings, self.cache_bytes = library, ceilings, cache_bytes
        self.repeats, self.beside = repeats, beside
        self.stream = torch.cuda.Stream()

    def run(self, case: Case) -> Result:
        """Check, then time."""
        import torch
        from gpu_timing import copies_for_cold_caches, median_and_p95, time_graph
        from kernel_calls import make_tensors, reference, worst_error

        with torch.cuda.stream(self.stream):
            tensors = make_tensors(self.library, case, "cuda")
            self.library.bind(case, tensors, self.stream.cuda_stream)()
            self.stream.synchronize()
            error = worst_error(case, tensors, reference(case, tensors, precise=True))
            torch.cuda.empty_cache()
            result = {"case": case.name, "sizes": case.sizes, "traffic_bytes": case.traffic_bytes, "flops": case.flops}
            if not error <= 1:
                return Result(**result, worst_error=error)
            count = copies_for_cold_caches(case.footprint_bytes, self.cache_bytes)
            sets = [tensors, *(make_tensors(self.library, case, "cuda", seed) for seed in range(1, count))]
            calls = [self.library.bind(case, one, self.stream.cuda_stream) for one in sets]
            median, p95 = median_and_p95(time_graph(calls, self.stream, self.repeats))
        floor, bound = self.ceilings.floor(case.traffic_bytes, case.flops, case.kernel.unit, case.dtype)
        return Result(
            **result,
            worst_error=error,
            median_us=median * 1e6,
            p95_us=p95 * 1e6,
            floor_us=floor * 1e6,
            bound=bound,
            cold=count * case.footprint_bytes >= 2 * self.cache_bytes,
            **self._beside(case, sets),
        )

    def _beside(self, case: Case, sets: list[Tensors]) -> dict[str, float | None]:
        """PyTorch on the same tensors: what a model without our kernels would launch."""
        from gpu_timing import median_and_p95, time_launches
        from kernel_calls import timed_reference

        times: dict[str, float | None] = {}
        for kind in self.beside:
            name, function = f"{kind}_us", timed_reference(case, compiled=kind == "compiled")
            calls = [_call_of(function, one) for one in sets[:4]]
            try:
                times[name] = median_and_p95(time_launches(calls, self.stream, max(3, self.repeats // 4)))[0] * 1e6
            except RuntimeError as error:  # of the compiler, or of memory: the column stays empty
                print(f"{case.name}: {name}: {str(error).splitlines()[0]}", file=sys.stderr)
                times[name] = None
        return times


def _call_of(function: Callable[[Tensors], Any], tensors: Tensors) -> Callable[[], Any]:
    return lambda: function(tensors)


def run_all(cases: list[Case], library_path: Path, options: argparse.Namespace) -> tuple[Path, list[Result]]:
    """The file that was written, and what is in it."""
    from gpu_timing import describe_device, measure_ceilings
    from kernel_calls import TORCH_TYPES, Library

    check_abi(library_path)
    device = describe_device()
    ceilings = measure_ceilings(options.dtypes, TORCH_TYPES)
    description = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.argv]),
        **device,
        "library_abi": ABI_VERSION,
        "ceilings": vars(ceilings),
        "repeats": options.repeats,
    }
    name = "-".join([description["date"][:10], device["device"].replace(" ", "-"), "kernels.json"])
    path = options.output or RESULTS / name
    library = Library(library_path)
    benchmark = Benchmark(library, ceilings, device["cache_bytes"], repeats=options.repeats, beside=options.beside)
    results: list[Result] = []
    for case in cases:
        results.append(benchmark.run(case))
        print(result_table(results[-1:]).splitlines()[-1], flush=True)
        write_json(path, description, results)
    return path, results


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="print the cases, their bytes and operations, and stop")
    parser.add_argument("--only", default="", help="only cases whose name contains this text")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(PRESETS), metavar="PRESET")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"], choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8], help="rows; decode takes all, else the first")
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--beside", nargs="*", default=list(BESIDE), choices=BESIDE, help="PyTorch's own; default both")
    parser.add_argument("--library", type=Path, help="default: the built libmegalodon.so")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/DATE-DEVICE-kernels.json")
    return parser.parse_args(arguments)


def main() -> int:
    options = parse()
    cases = list(plan(models=options.models, dtypes=options.dtypes, batches=options.batches, only=options.only))
    if options.list:
        print(plan_table(cases))
        return 0
    import torch

    if not torch.cuda.is_available():
        print("error: no NVIDIA GPU: torch.cuda.is_available() is False; --list prints the plan", file=sys.stderr)
        return 2
    try:
        library = options.library or find_plugin_library()
        path, results = run_all(cases, library, options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"\n{result_table(results)}\n\n{path}")
    return 0 if all(result.is_right for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())

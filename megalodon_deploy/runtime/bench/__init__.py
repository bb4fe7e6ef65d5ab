"""How fast a bundle streams here, against the speed at which this machine reads memory.

A token of one stream reads every weight and its state once and computes little with them, so memory bandwidth is the
limit of decode. The limit and all backends are measured in one run, in turns, so that a machine that slows down slows
down for all.
"""

from megalodon_deploy.runtime.bench.reads import state_bytes_per_token, weight_bytes_per_token
from megalodon_deploy.runtime.bench.report import BackendTimes, BatchTimes, BenchReport, PositionTimes
from megalodon_deploy.runtime.bench.run import bench_bundle

__all__ = [
    "BackendTimes",
    "BatchTimes",
    "BenchReport",
    "PositionTimes",
    "bench_bundle",
    "state_bytes_per_token",
    "weight_bytes_per_token",
]

"""Does a stream cost the same after 100,000 tokens? Time per token and resident memory, late against early.

A stream is fed token by token up to `--tokens`. Then a second one is brought to the same place in its chunk near token
1,000, and both take turns of a few steps, so that a machine that changes its speed does so for both.

    python benchmarks/long_stream.py BUNDLE [--tokens 100000] [--backend onnxruntime]
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np

from megalodon_deploy import open_bundle
from megalodon_deploy.runtime.stream import Stream

EARLY = 1000
TURNS, STEPS = 20, 10


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def timed_steps(stream: Stream, count: int) -> list[float]:
    seconds = []
    for _ in range(count):
        start = time.perf_counter()
        stream.step(stream.position % 256)
        seconds.append(time.perf_counter() - start)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--backend", default="onnxruntime")
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    session = open_bundle(arguments.bundle).session(arguments.backend, threads=arguments.threads)
    chunk_size = session.config.chunk_size
    late_target = EARLY + (arguments.tokens - EARLY) // chunk_size * chunk_size

    late, memory = session.stream(), {}
    while late.position < late_target:
        timed_steps(late, 1)
        if late.position in (EARLY, late_target) or late.position % 10_000 == 0:
            memory[late.position] = resident_bytes()
    early = session.stream()
    early.prefill([token % 256 for token in range(EARLY)])
    timed_steps(early, 1)
    timed_steps(late, 1)
    times: dict[str, list[float]] = {"early": [], "late": []}
    for _ in range(TURNS):
        times["early"] += timed_steps(early, STEPS)
        times["late"] += timed_steps(late, STEPS)
    medians = {name: float(np.median(seconds)) * 1e6 for name, seconds in times.items()}
    report = {
        "chunk_size": chunk_size,
        "resident_bytes_at": memory,
        "grown_bytes": memory[late_target] - memory[EARLY],
        "positions": {"early": EARLY + 1, "late": late_target + 1},
        "median_microseconds": medians,
        "late_over_early": medians["late"] / medians["early"],
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()

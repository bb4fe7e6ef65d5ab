"""Serve random requests for a long time: do answers stay right, and does memory stay flat?

Clients arrive at random, with prompts and settings of their own; some cancel, some come back to a stream that they
saved to a file. Answers are compared with the same requests served alone. Memory is resident memory of the process
after a warm-up.

    python benchmarks/soak.py BUNDLE [--minutes 60] [--streams 64] [--backend onnxruntime] [--busy 0.3]

Exits with 1 when an answer differs, a request is lost, or memory has grown by more than --max-growth-mib.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megalodon_deploy import open_bundle
from megalodon_deploy.runtime.request import Request
from megalodon_deploy.runtime.sampling import SamplingParams
from megalodon_deploy.runtime.session import Session

WARM_UP = 0.25  # share of the time after which memory should not grow
MAX_KEPT = 16  # saved streams that wait for their client to come back


@dataclass
class Client:
    """A request, and the tokens that the stream had seen before it."""

    request: Request
    options: dict[str, Any]
    before: Path | None  # the file that its stream was resumed from


class Soak:
    def __init__(self, session: Session, alone: Session, streams: int, checked: float, seed: int, folder: Path) -> None:
        self.scheduler = session.serve(max_streams=streams, prefill_tokens=64)
        self.alone, self.checked = alone, checked
        self.rng = np.random.default_rng(seed)
        self.vocab_size = session.config.vocab_size
        self.clients: list[Client] = []
        self.folder = folder  # of saved streams
        self.kept: list[Path] = []
        self.num_saved = 0
        self.counts: Counter[str] = Counter()

    def arrive(self) -> None:
        """A client with a prompt, sometimes on a stream that was kept."""
        sampling = None
        if self.rng.random() < 0.7:
            sampling = SamplingParams(seed=int(self.rng.integers(1 << 30)), temperature=1.2, top_p=0.95)
        options = {
            "prompt": self.rng.integers(0, self.vocab_size, self.rng.geometric(1 / 40)).tolist(),
            "max_new_tokens": int(self.rng.geometric(1 / 30)),
            "sampling": sampling,
            "stop_tokens": [],
        }
        before = self.kept.pop() if self.kept and self.rng.random() < 0.3 else None
        keep = self.rng.random() < 0.2
        request = self.scheduler.submit(**options, resume=before, keep=keep)
        self.clients.append(Client(request, options, before))

    def step(self, load: int) -> None:
        while len(self.clients) < load and self.rng.random() < 0.5:
            self.arrive()
        if self.clients and self.rng.random() < 0.002:
            self.clients[self.rng.integers(len(self.clients))].request.cancel()
        self.scheduler.step()
        for client in [client for client in self.clients if client.request.is_done]:
            self.clients.remove(client)
            self.leave(client)

    def leave(self, client: Client) -> None:
        found = [item.token for item in client.request]
        self.counts[client.request.state] += 1
        self.counts["tokens"] += len(found)
        if client.request.saved is not None and len(self.kept) < MAX_KEPT:
            self.num_saved += 1
            client.request.save(path := self.folder / f"{self.num_saved}.safetensors")
            self.kept.append(path)
        if client.request.state == "finished" and self.rng.random() < self.checked:
            expected = [item.token for item in self.alone.stream(resume=client.before).generate(**client.options)]
            self.counts["right" if found == expected else "wrong"] += 1
        if client.before is not None:
            client.before.unlink()
            self.counts["resumed"] += 1


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def run(soak: Soak, minutes: float, load: int, busy: float = 1.0) -> dict[str, Any]:
    start, steps = time.monotonic(), 0
    resident: list[tuple[float, int]] = []
    while (elapsed := time.monotonic() - start) < 60 * minutes:
        soak.step(load)
        steps += 1
        time.sleep((time.monotonic() - start - elapsed) * (1 / busy - 1))
        if not resident or elapsed - resident[-1][0] > 0.6 * minutes:  # a hundred samples
            resident.append((elapsed, resident_bytes()))
    soak.scheduler.run()
    for client in soak.clients:
        soak.leave(client)
    warm = [size for seconds, size in resident if seconds >= 60 * minutes * WARM_UP]
    return {
        "minutes": minutes,
        "steps": steps,
        **soak.counts,
        "unfinished": soak.scheduler.num_streams + soak.scheduler.num_waiting,
        "resident_bytes_after_warm_up": warm[0],
        "resident_bytes_at_end": resident_bytes(),
        "grown_bytes": max(warm) - warm[0],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--load", type=int, default=96, help="clients that wait for an answer at once, at most")
    parser.add_argument("--checked", type=float, default=0.2, help="share of answers that are computed again alone")
    parser.add_argument("--busy", type=float, default=1.0, help="share of the time to work in; it sleeps the rest")
    parser.add_argument("--backend", default="onnxruntime")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-growth-mib", type=float, default=32.0)
    arguments = parser.parse_args()
    bundle = open_bundle(arguments.bundle)
    sessions = [bundle.session(arguments.backend, threads=arguments.threads) for _ in range(2)]
    with tempfile.TemporaryDirectory() as folder:
        soak = Soak(*sessions, arguments.streams, arguments.checked, arguments.seed, Path(folder))
        report = run(soak, arguments.minutes, arguments.load, arguments.busy)
    print(json.dumps(report, indent=2))
    is_right = not report.get("wrong") and not report.get("failed") and not report["unfinished"]
    return 0 if is_right and report["grown_bytes"] <= arguments.max_growth_mib * 2**20 else 1


if __name__ == "__main__":
    sys.exit(main())

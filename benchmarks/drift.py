"""How far state drifts over a long stream: `verify --tokens` on a model with random weights, as a record and a figure.

    python benchmarks/drift.py --tokens 10M --figure docs/images/drift.svg > benchmarks/results/DATE-cpu-drift.json

The figure shows the mean of a drifting signal in both ways that a norm's statistics may be kept, token by token.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import torch

from megalodon_deploy import Megalodon, save_checkpoint, verify
from megalodon_deploy.export import export_checkpoint
from megalodon_deploy.train import byte_model
from megalodon_deploy.verify.long_stream import LongStream, run_long_stream
from megalodon_deploy.verify.machine import describe_machine, describe_versions
from megalodon_deploy.verify.report_plots import drift_figure

CSS = Path(verify.__file__).with_name("report.css")


def stream(tokens: int) -> LongStream:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, target = Path(folder) / "checkpoint", Path(folder) / "bundle"
        save_checkpoint(Megalodon(byte_model(num_layers=4, model_dim=128, chunk_size=256)), checkpoint)
        bundle = export_checkpoint(checkpoint, target)
        return run_long_stream(bundle, tokens, lambda stage, done: print(f"{done:7.2%} {stage}", file=sys.stderr))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=verify.parse_count, default=10**7)
    parser.add_argument("--figure", type=Path)
    arguments = parser.parse_args()
    begin = time.perf_counter()
    found = stream(arguments.tokens)
    if arguments.figure is not None:
        arguments.figure.write_text(drift_figure(found, CSS.read_text(encoding="utf-8")), encoding="utf-8")
    record = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": describe_machine(),
        "versions": describe_versions(),
        "command": f"python benchmarks/drift.py --tokens {arguments.tokens}",
        "seconds": round(time.perf_counter() - begin),
        "result": found.to_dict(),
    }
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()

"""What is each part of Megalodon worth? A grid of small models, one change each, trained on the same text.

    python benchmarks/ablations.py --out benchmarks/results/ablations

writes ablations.json, ablations.md and ablations.svg. The text is the standard library's source; every model sees the
same rows in the same order for each seed. At this size differences of the last digit are noise: the spread over seeds
is in the table.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

from megalodon_deploy.cpus import limit_spinning, usable_cpus
from megalodon_deploy.files import atomic_file
from megalodon_deploy.train import TrainConfig, TrainResult, train
from megalodon_deploy.train.log import pyplot_figure

CHANGES: dict[str, dict[str, Any]] = {
    "released": {},
    "real moving average": {"ema": "real"},
    "no moving average": {"ema": "none"},
    "layer norm": {"stream_norm": "layer"},
    "attention not normalised": {"attention_norm": False},
    "one-hop residual": {"two_hop": False},
    "chunks of 32": {"chunk_size": 32},
    "chunks of 512": {"chunk_size": 512},
}


def run(change: dict[str, Any], seed: int, arguments: argparse.Namespace, folder: Path) -> TrainResult:
    tables = {
        "model": {"model_dim": arguments.dim, "num_layers": arguments.layers} | change,
        "data": {
            "paths": [sysconfig.get_path("stdlib")],
            "glob": "**/*.py",
            "exclude": ["*-packages", "*test*", "encodings", "pydoc_data"],
            "rows": "windows",
            "cache": str(folder / "tokens"),
        },
        "run": {
            "out": str(folder / "run"),
            "steps": arguments.steps,
            "batch_size": arguments.batch_size,
            "seq_len": 512,
            "seed": seed,
            "threads": arguments.threads,
        },
        "evaluation": {"times": 4, "rows": 24},
    }
    return train(TrainConfig.from_tables(tables), overwrite=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=usable_cpus())
    parser.add_argument("--out", type=Path, required=True, help="names of the results, without an ending")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name, change in CHANGES.items():
            results = [run(change, seed, arguments, Path(folder)) for seed in range(arguments.seeds)]
            rows.append(summary(name, results))
            print(table(rows[-1:]), file=sys.stderr, flush=True)
    document = {
        "command": " ".join(["python", "benchmarks/ablations.py", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {arguments.threads} threads",
        "settings": {name: value for name, value in vars(arguments).items() if name != "out"},
        "results": rows,
    }
    write(arguments.out, document)
    print(table(rows))


def summary(name: str, results: list[TrainResult]) -> dict[str, Any]:
    losses = [result.held_out_loss for result in results if result.held_out_loss is not None]
    points = zip(*(result.curve for result in results), strict=True)
    return {
        "change": name,
        "num_parameters": results[0].num_parameters,
        "held_out_loss": statistics.mean(losses),
        "spread": max(losses) - min(losses),
        "curve": [[same[0].step, statistics.mean(point.held_out_loss for point in same)] for same in points],
    }


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| change | parameters | held-out loss, nats/byte | spread over seeds |", "| --- | --- | --- | --- |"]
    for row in rows:
        numbers = f"{row['num_parameters']:,} | {row['held_out_loss']:.3f} | {row['spread']:.3f}"
        lines.append(f"| {row['change']} | {numbers} |")
    return "\n".join(lines) + "\n"


def write(out: Path, document: dict[str, Any]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    for suffix, text in ((".json", json.dumps(document, indent=1) + "\n"), (".md", table(document["results"]))):
        with atomic_file(out.with_suffix(suffix)) as path:
            path.write_text(text)
    with pyplot_figure(out.with_suffix(".svg")) as axes:
        for row in document["results"]:
            axes.plot(*zip(*row["curve"], strict=True), label=row["change"])
        axes.set(xlabel="step", ylabel="held-out loss, nats per byte")


if __name__ == "__main__":
    limit_spinning()
    main()

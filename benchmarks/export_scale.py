"""Export a model of a published size with random, distinct bf16 weights: seconds, bytes a second, peak memory.

    python benchmarks/export_scale.py --preset mega7.3B --folder /big/disk

needs twice the weights in disk space. Each line of the result is one export in a process of its own; the time ends when
its files are on the disk. Peak memory is the process's largest resident set, mapped pages of files included.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from megalodon_deploy.config import MegalodonConfig
from megalodon_deploy.model.checkpoint.native import WEIGHTS_FILE, write_config
from megalodon_deploy.parameters import num_parameters, parameter_specs

EXPORTS = {
    "bf16": ["--precision", "bf16"],
    "bf16, int4 weights": ["--precision", "bf16", "--quantize", "int4"],
}
MEASURE = "import resource; from megalodon_deploy.cli import main; import sys, atexit; \
atexit.register(lambda: print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)); main()"


def write_checkpoint(folder: Path, config: MegalodonConfig) -> int:
    """A native checkpoint, a tensor at a time; returns its bytes."""
    folder.mkdir(parents=True)
    write_config(folder, config, None)
    header: dict[str, Any] = {}
    offset = 0
    for spec in parameter_specs(config):
        end = offset + 2 * math.prod(spec.shape)
        header[spec.name] = {"dtype": "BF16", "shape": list(spec.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    torch.manual_seed(0)
    with open(folder / WEIGHTS_FILE, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for spec in parameter_specs(config):
            values = torch.randn(spec.shape, dtype=torch.bfloat16) * spec.shape[-1] ** -0.5
            file.write(values.view(torch.int16).numpy().tobytes())
    return offset


def measure(checkpoint: Path, out: Path, options: list[str]) -> dict[str, float]:
    command = [sys.executable, "-c", MEASURE, "export", "--ckpt", checkpoint, "--out", out, *options]
    start = time.perf_counter()
    done = subprocess.run(command, check=True, stderr=subprocess.PIPE, text=True)
    seconds = time.perf_counter() - start
    read, written = checkpoint.joinpath(WEIGHTS_FILE).stat().st_size, out.joinpath("model.onnx.data").stat().st_size
    return {
        "seconds": round(seconds, 1),
        "read_bytes": read,
        "written_bytes": written,
        "megabytes_per_second": round((read + written) / seconds / 1e6),
        "peak_memory_bytes": int(done.stderr.split()[-1]) * 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="mega7.3B")
    parser.add_argument("--folder", type=Path, required=True, help="work folder; emptied afterwards")
    arguments = parser.parse_args()
    config = MegalodonConfig.preset(arguments.preset)
    folder = arguments.folder / f"export-scale-{os.getpid()}"
    try:
        write_checkpoint(folder / "checkpoint", config)
        results = {}
        for name, options in EXPORTS.items():
            results[name] = measure(folder / "checkpoint", folder / "bundle", options)
            shutil.rmtree(folder / "bundle")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    machine = {"cpus": os.cpu_count(), "platform": platform.platform(), "torch": torch.__version__}
    report = {"preset": arguments.preset, "num_parameters": num_parameters(config), "machine": machine}
    print(json.dumps(report | {"date": time.strftime("%Y-%m-%d"), "exports": results}, indent=2))


if __name__ == "__main__":
    main()

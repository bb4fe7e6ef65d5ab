"""What each precision costs on held-out text: bits per byte, KL divergence from float32, size. Prints JSON.

python benchmarks/precision_table.py --ckpt my-checkpoint --gate held-out.txt --calibrate other.txt
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from megalodon_deploy.bundle import WEIGHTS_FILE
from megalodon_deploy.export import export_checkpoint
from megalodon_deploy.inspection import inspect_bundle

CALIBRATED = "gptq"
ROWS: dict[str, dict[str, Any]] = {
    "fp16": {"precision": "fp16"},
    "bf16": {"precision": "bf16"},
    "fp32, keys and values fp8": {"kv_dtype": "fp8"},
    "fp32, keys and values int8": {"kv_dtype": "int8"},
    "int8 by columns": {"quantize": "int8"},
    "int8 by 32": {"quantize": "int8", "block_size": 32},
    "fp8 by columns": {"quantize": "fp8"},
    "int4 by 32, output int8": {"quantize": "int4", "block_size": 32},
    "int4 by 64, output int8": {"quantize": "int4", "block_size": 64},
    "int4 by 128, output int8": {"quantize": "int4", "block_size": 128},
    "int4 by 32, output int4": {"quantize": "int4", "block_size": 32, "quantize_output": "int4"},
    "NVFP4, output int8": {"quantize": "nvfp4"},
    "int4 by 32, output int8, calibrated": {"quantize": "int4", "block_size": 32, CALIBRATED: True},
    "int4 by 128, output int8, calibrated": {"quantize": "int4", "block_size": 128, CALIBRATED: True},
    "NVFP4, output int8, calibrated": {"quantize": "nvfp4", CALIBRATED: True},
    "int4 by 32 calibrated, keys and values fp8, fp16": {
        "quantize": "int4",
        "block_size": 32,
        "precision": "fp16",
        "kv_dtype": "fp8",
        CALIBRATED: True,
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("ckpt", "gate", "calibrate"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, options in ROWS.items():
            chosen = {key: value for key, value in options.items() if key != CALIBRATED}
            calibrate = arguments.calibrate if CALIBRATED in options else None
            out = Path(folder) / "bundle"
            bundle = export_checkpoint(
                arguments.ckpt, out, gate=arguments.gate, calibrate=calibrate, overwrite=True, **chosen
            )
            quality = bundle.manifest.quality
            assert quality is not None, "Bug: a gate was given"
            rows.append(
                {
                    "precision": name,
                    "weights_bytes": bundle.manifest.files[WEIGHTS_FILE].size_bytes,
                    "state_bytes": inspect_bundle(bundle)["state_bytes_per_stream"]["full_chunk"],
                    **quality.to_dict(),
                }
            )
    report = {"date": time.strftime("%Y-%m-%d"), "versions": {name: version(name) for name in ("torch", "onnx")}}
    print(json.dumps(report | {"rows": rows}, indent=2))


if __name__ == "__main__":
    main()

"""The law that lets a model of any size through a small machine: peak memory follows the largest matrix."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from export_helpers import write_seeded
from helpers import small_config

from megalodon_deploy.parameters import num_parameters

# The peak of a process never falls, so a small model goes first: it brings all libraries into memory.
SCRIPT = """
import sys
from megalodon_deploy.export import export_checkpoint
def peak():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM:"))
options = {"quantize": sys.argv[2]} if sys.argv[2] else {"precision": "bf16"}
for name in ("small", "large"):
    before = peak()
    export_checkpoint(f"{sys.argv[1]}/{name}", f"{sys.argv[1]}/{name}-{sys.argv[2]}", **options)
print(peak() - before)
"""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """Folder of a small and a large checkpoint, and the large one's float32 bytes."""
    root = tmp_path_factory.mktemp("memory")
    dims = {"model_dim": 384, "value_dim": 768, "ffn_hidden_dim": 768, "z_dim": 96, "norm_num_groups": 4}
    for name, layers in (("small", 1), ("large", 16)):
        config = small_config(**dims, num_layers=layers)
        write_seeded(root / name, config)
    return root, 4 * num_parameters(config)


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc for memory")
@pytest.mark.parametrize("quantize", ["", "int4", "nvfp4"])
def test_peak_memory_does_not_follow_the_model(checkpoints: tuple[Path, int], quantize: str) -> None:
    root, weights_bytes = checkpoints
    assert weights_bytes > 90e6
    command = [sys.executable, "-c", SCRIPT, str(root), quantize]
    added = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert added < 0.4 * weights_bytes  # what holds a whole model takes 0.5 in bf16 and 1 in float32

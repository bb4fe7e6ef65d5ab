"""Weights in the mapped file: the memory that a process adds, the results, and what cannot be had."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from export_helpers import export_seeded
from helpers import assert_close, small_config

from megalodon_deploy.bundle import WEIGHTS_FILE
from megalodon_deploy.errors import EngineError, UserError

SCRIPT = """
import sys
from megalodon_deploy import open_bundle
def dirty():
    lines = open("/proc/self/smaps_rollup").read().splitlines()
    return int(next(line for line in lines if line.startswith("Private_Dirty")).split()[1]) * 1024
import onnxruntime
bundle, before = open_bundle(sys.argv[1]), dirty()
session = bundle.session(threads=1, share_weights=sys.argv[2] == "True")
session.stream().prefill([1])
print(dirty() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc for memory")
def test_a_process_adds_little_to_the_mapped_file(tmp_path: Path) -> None:
    config = small_config(model_dim=768, value_dim=1536, ffn_hidden_dim=1536, norm_num_groups=3, num_layers=2)
    bundle = export_seeded(tmp_path, config)
    weights_bytes = (bundle.path / WEIGHTS_FILE).stat().st_size
    assert weights_bytes > 40e6
    added = {}
    for share in (True, False):
        command = [sys.executable, "-c", SCRIPT, str(bundle.path), str(share)]
        added[share] = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert added[False] > 0.8 * weights_bytes
    assert added[True] < 0.4 * weights_bytes


def test_logits_are_the_same(tmp_path: Path) -> None:
    bundle = export_seeded(tmp_path, small_config())
    tokens = np.random.default_rng(0).integers(0, 50, 30).tolist()
    streams = [bundle.session(threads=1, share_weights=share).stream() for share in (True, False)]
    mapped, packed = ([stream.prefill(tokens), stream.step(7)] for stream in streams)
    assert_close(np.stack(mapped), np.stack(packed), 2e-6)


def test_what_cannot_be_shared(tmp_path: Path) -> None:
    bundle = export_seeded(tmp_path, small_config(), precision="fp16")
    with pytest.raises(EngineError, match="share_weights is for bundles in fp32"):
        bundle.session(share_weights=True)
    with pytest.raises(UserError, match="only onnxruntime on the CPU computes from the mapped file"):
        bundle.session("torch", share_weights=True)

"""Verification of engines on a real GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
from runtime.small_models import SHORT_CHUNKS, make_model

from megalodon_deploy.doctor import visible_gpus
from megalodon_deploy.engine import build_engine, list_engines
from megalodon_deploy.errors import UserError
from megalodon_deploy.export import export_checkpoint
from megalodon_deploy.model.checkpoint import save_checkpoint
from megalodon_deploy.verify import verify_bundle

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("target", ["tensorrt-rtx", "tensorrt"])
def test_an_engine_passes_on_this_gpu(tmp_path: Path, target: str) -> None:
    if visible_gpus() is None:
        pytest.skip("no NVIDIA GPU is visible to the CUDA driver")
    save_checkpoint(make_model(SHORT_CHUNKS), tmp_path / "checkpoint")
    bundle = export_checkpoint(tmp_path / "checkpoint", tmp_path / "bundle")
    try:
        build_engine(bundle, target=target, max_batch=4)
    except UserError as error:
        pytest.skip(f"{target}: {error}")
    report = verify_bundle(bundle, ckpt=tmp_path / "checkpoint")
    assert f"engine {list_engines(bundle)[0].id}" in {finding.candidate for finding in report.findings}
    assert report.passed, report.verdict()

"""A model whose activations leave the range of fp16: naive fp16 gives infinities, the fp16 bundle the right logits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_cases import write_case
from export_helpers import seeded_state
from helpers import assert_close, small_config
from torch import Tensor, nn

from megalodon_deploy.config import MegalodonConfig
from megalodon_deploy.export import export_checkpoint
from megalodon_deploy.model.checkpoint import load_checkpoint
from megalodon_deploy.model.megalodon import Megalodon
from megalodon_deploy.verify import verify_bundle

FP16_MAX = 65504
TOKENS = torch.randint(0, 50, (2, 30), generator=torch.Generator().manual_seed(0))


def large_state(config: MegalodonConfig) -> dict[str, Tensor]:
    """A residual stream of about 10^5 from the first block on, and products of activations of 10^5 in the second."""
    state = seeded_state(config)
    state["layers.0.nffn.fc2.weight"] *= 60000
    for name in ("mega.wv", "mega.wr"):
        state[f"layers.1.{name}.weight"] *= 400
    state["layers.1.mega.wh2.weight"] *= 0.02
    for name in ("fc1", "fc3"):
        if f"layers.1.nffn.{name}.weight" in state:
            state[f"layers.1.nffn.{name}.weight"] *= 400
    return state


def largest_values(model: Megalodon) -> dict[str, float]:
    """Magnitudes in float32 of what a naive fp16 model would hold in fp16."""
    largest: dict[str, float] = {}

    def watch(name: str) -> None:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor | tuple[Tensor, ...]) -> None:
            result = output if isinstance(output, Tensor) else output[0]
            for what, tensor in (("in", inputs[0]), ("out", result)):
                key = f"{name} {what}"
                largest[key] = max(largest.get(key, 0.0), float(tensor.abs().max()))

        model.get_submodule(name).register_forward_hook(hook)

    for name in ("layers.1", "layers.1.mega.wh2", "layers.1.nffn.fc2"):
        watch(name)
    with torch.inference_mode():
        model(TOKENS)
    return largest


@pytest.mark.parametrize("swiglu", [True, False])
def test_fp16_bundle_of_a_model_with_large_activations(tmp_path: Path, swiglu: bool) -> None:
    config = small_config(swiglu=swiglu)
    ckpt = write_case(tmp_path / "ckpt", "native", config, large_state(config))
    largest = largest_values(load_checkpoint(ckpt))
    assert largest["layers.1 in"] > FP16_MAX  # the residual stream
    assert largest["layers.1.mega.wh2 in"] > FP16_MAX  # attention times gate
    assert not swiglu or largest["layers.1.nffn.fc2 in"] > FP16_MAX  # fc1 times fc3
    assert largest["layers.1.nffn.fc2 out"] > FP16_MAX or not swiglu
    bundle = export_checkpoint(ckpt, tmp_path / "bundle", precision="fp16")
    report = verify_bundle(bundle, ckpt=ckpt)
    assert report.passed, report.verdict


def test_fp16_in_pytorch(tmp_path: Path) -> None:
    config = small_config(swiglu=True)
    ckpt = write_case(tmp_path / "ckpt", "native", config, large_state(config))
    with torch.inference_mode():
        exact = load_checkpoint(ckpt).double()(TOKENS)[0].numpy()
        half = load_checkpoint(ckpt).half()(TOKENS)[0].numpy()
    assert np.isfinite(half).all()
    assert_close(half, exact, 3e-2)

"""GPTQ and the quality gate: arithmetic against float64, the whole export, mistakes in the text."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_cases import write_case
from export_helpers import seeded_state
from helpers import small_config

from megalodon_deploy.bundle import MANIFEST_FILE, Manifest, open_bundle
from megalodon_deploy.cli import main
from megalodon_deploy.config import MegalodonConfig
from megalodon_deploy.errors import UserError
from megalodon_deploy.export import export_checkpoint, load_bundle_model
from megalodon_deploy.export.codes import quantize_nearest
from megalodon_deploy.export.gptq import quantize_gptq
from megalodon_deploy.model.checkpoint import TokenizerSource, load_checkpoint
from megalodon_deploy.model.checkpoint.native import write_native
from megalodon_deploy.quality import Quality
from megalodon_deploy.quantization import WeightKind, make_format
from megalodon_deploy.verify import verify_bundle

BYTES_CONFIG = small_config(
    vocab_size=256, model_dim=64, value_dim=128, ffn_hidden_dim=96, z_dim=32, norm_num_groups=4, swiglu=True
)


def write_checkpoint(path: Path, config: MegalodonConfig = BYTES_CONFIG) -> Path:
    """Byte-level, with an output matrix that makes some bytes far likelier than others."""
    state = seeded_state(config)
    if "output.output.weight" in state:
        state["output.output.weight"] *= 3
    path.mkdir()
    write_native(path, config, state, TokenizerSource("bytes"))
    return path


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_bytes(np.random.default_rng(0).choice(np.frombuffer(b"etaoin shrdlu\n", np.uint8), 3000).tobytes())
    return path


@pytest.mark.parametrize(("kind", "block_size"), [("int4", 32), ("int4", 128), ("int8", 0), ("fp8", 0), ("nvfp4", 16)])
def test_gptq_keeps_outputs_better_than_rounding(kind: WeightKind, block_size: int) -> None:
    """Inputs that go together, as activations do; errors in float64."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(40, 256, generator=generator)
    inputs = torch.randn(2000, 40, generator=generator) @ basis + 0.1 * torch.randn(2000, 256, generator=generator)
    matrix = torch.randn(256, 48, generator=generator) * 0.05
    form = make_format(kind, block_size)

    def error(decoded: torch.Tensor) -> float:
        difference = inputs.double() @ (decoded.double() - matrix.double())
        return float(difference.square().mean())

    moments = inputs.t() @ inputs
    calibrated = quantize_gptq(matrix, moments, form, torch.float32)
    nearest = quantize_nearest(matrix.clone(), form, torch.float32)
    assert calibrated.codes.shape == nearest.codes.shape
    assert calibrated.codes.dtype == nearest.codes.dtype
    assert calibrated.scales.shape == nearest.scales.shape
    assert error(calibrated.dequantized()) < 0.5 * error(nearest.dequantized())


def test_gptq_with_independent_inputs_is_rounding() -> None:
    """Nothing can make good for a rounding then."""
    matrix = torch.randn(64, 16, generator=torch.Generator().manual_seed(1))
    form = make_format("int8", 0)
    calibrated = quantize_gptq(matrix, torch.eye(64), form, torch.float32)
    assert torch.equal(calibrated.codes, quantize_nearest(matrix, form, torch.float32).codes)


def test_gptq_with_an_input_that_is_always_zero() -> None:
    matrix = torch.randn(32, 8, generator=torch.Generator().manual_seed(1))
    inputs = torch.randn(100, 32, generator=torch.Generator().manual_seed(2))
    inputs[:, 5] = 0
    codes = quantize_gptq(matrix, inputs.t() @ inputs, make_format("int4", 32), torch.float32)
    assert np.isfinite(codes.dequantized().numpy()).all()


@pytest.mark.parametrize("share_emb", [False, True])
def test_calibrated_bundle(tmp_path: Path, text: Path, share_emb: bool) -> None:
    """Its logits on the text are nearer to float32's than after rounding, and it passes verification."""
    config = replace(BYTES_CONFIG, share_emb=share_emb, scale_emb=share_emb, rescale_nffn=share_emb)
    ckpt = write_checkpoint(tmp_path / "ckpt", config)
    tokens = torch.tensor([list(text.read_bytes()[:1024])])
    errors = {}
    with torch.inference_mode():
        exact = load_checkpoint(ckpt)(tokens)[0]
        for name, calibrate in (("nearest", None), ("gptq", text)):
            bundle = export_checkpoint(ckpt, tmp_path / name, quantize="int4", calibrate=calibrate)
            assert bundle.manifest.quantization is not None
            assert bundle.manifest.quantization.method == name
            errors[name] = float((load_bundle_model(bundle)(tokens)[0] - exact).square().mean())
    assert errors["gptq"] < 0.8 * errors["nearest"]
    report = verify_bundle(bundle, ckpt=ckpt)
    assert report.passed, report.verdict()
    assert "calibrated" in report.reference["note"]


def naive_quality(exact_logits: np.ndarray, logits: np.ndarray, tokens: np.ndarray) -> tuple[float, float, float]:
    """bits per byte of both, and KL in bits, in float64, token by token."""
    bits = exact_bits = divergence = 0.0
    for exact_V, found_V, token in zip(exact_logits[:-1], logits[:-1], tokens[1:], strict=True):
        p, q = (np.exp(row - row.max()) / np.exp(row - row.max()).sum() for row in (exact_V, found_V))
        exact_bits -= math.log2(p[token])
        bits -= math.log2(q[token])
        divergence += float((p * np.log2(p / q)).sum())
    count = len(tokens) - 1
    return bits / count, exact_bits / count, divergence / count


def test_gate_measures_what_float64_says(tmp_path: Path, text: Path) -> None:
    ckpt = write_checkpoint(tmp_path / "ckpt")
    bundle = export_checkpoint(ckpt, tmp_path / "bundle", quantize="int4", gate=text, precision="fp32")
    quality = open_bundle(bundle.path).manifest.quality
    assert quality is not None
    windows = torch.tensor(list(text.read_bytes()[: 5 * 512])).view(5, 512)
    with torch.inference_mode():
        exact = load_checkpoint(ckpt).double()(windows)[0].numpy()
        found = load_bundle_model(bundle).double()(windows)[0].numpy()
    parts = [naive_quality(*values, row) for *values, row in zip(exact, found, windows.numpy(), strict=True)]
    bits, exact_bits, divergence = np.mean(parts, axis=0)
    assert quality.num_tokens == 5 * 511
    assert quality.bits_per_byte == pytest.approx(bits, rel=1e-4)
    assert quality.float32_bits_per_byte == pytest.approx(exact_bits, rel=1e-4)
    assert quality.kl_bits == pytest.approx(divergence, rel=1e-2)
    assert quality.kl_bits > 1e-4


def test_a_bundle_that_fails_its_gate_is_not_verified(tmp_path: Path, text: Path) -> None:
    ckpt = write_checkpoint(tmp_path / "ckpt")
    bundle = export_checkpoint(ckpt, tmp_path / "bundle", quantize="int4", gate=text)
    assert bundle.manifest.quality is not None
    assert verify_bundle(bundle).passed == bundle.manifest.quality.passed
    failing = replace(bundle.manifest, quality=replace(bundle.manifest.quality, kl_bits=1.0))
    (bundle.path / MANIFEST_FILE).write_text(failing.to_json())
    report = verify_bundle(open_bundle(bundle.path))
    assert not report.misses
    assert not report.passed
    assert "quality gate failed" in report.verdict()


def test_command_line_exits_with_1(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ckpt = write_checkpoint(tmp_path / "ckpt")
    arguments = ["export", "--ckpt", str(ckpt), "--quantize", "int4", "--gate", str(text), "--json"]
    bundle = str(tmp_path / "bundle")
    monkeypatch.setattr(Quality, "passed", property(lambda quality: quality.kl_bits <= 1e-9))
    monkeypatch.setattr(sys, "argv", ["megalodon-deploy", *arguments, "--out", bundle])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 1
    assert "quality gate failed" in capsys.readouterr().err
    document = json.loads((tmp_path / "bundle" / MANIFEST_FILE).read_text())
    assert document["quality"]["passed"] is False
    assert Manifest.from_json(json.dumps(document), tmp_path).quality is not None


def test_nan_does_not_pass() -> None:
    numbers: dict[str, Any] = {"text_sha256": "", "num_tokens": 1, "same_first_choice": 1.0}
    good = Quality(**numbers, bits_per_byte=1.0, float32_bits_per_byte=1.0, kl_bits=0.0)
    assert good.passed
    assert not replace(good, kl_bits=math.nan).passed
    assert not replace(good, bits_per_byte=math.nan).passed
    assert not replace(good, bits_per_byte=1.03).passed


@pytest.mark.parametrize("option", ["calibrate", "gate"])
@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "is empty; expected a text of at least 2,048 tokens"), (b"x" * 700, "has 700 tokens, expected at least")],
)
def test_text_too_short(tmp_path: Path, option: str, content: bytes, message: str) -> None:
    ckpt = write_checkpoint(tmp_path / "ckpt")
    (tmp_path / "short.txt").write_bytes(content)
    with pytest.raises(UserError, match=message):
        export_checkpoint(ckpt, tmp_path / "bundle", quantize="int8", **{option: tmp_path / "short.txt"})
    assert not (tmp_path / "bundle").exists()


def test_text_without_a_tokenizer_or_quantisation(tmp_path: Path, text: Path) -> None:
    ckpt = write_case(tmp_path / "ckpt", "native", small_config(), seeded_state(small_config()))
    with pytest.raises(UserError, match=r"the checkpoint has no tokenizer; name one \(--tokenizer\)"):
        export_checkpoint(ckpt, tmp_path / "bundle", gate=text)
    with pytest.raises(UserError, match="calibration go with a kind of quantisation"):
        export_checkpoint(ckpt, tmp_path / "bundle", calibrate=text)

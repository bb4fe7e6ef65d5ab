"""The runtime's own arithmetic against NumPy and Python, through cpp/tests/parity_tool."""

from __future__ import annotations

import codecs
import subprocess
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from megalodon_deploy.runtime.sampling import Generator, SamplingParams, choose_token


def run_tool(build_dir: Path, *arguments: str | Path) -> list[str]:
    command = [build_dir / "parity_tool", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_bytes_become_characters_as_in_python(build_dir: Path, tmp_path: Path) -> None:
    """Random bytes that are mostly the first bytes of characters and what may follow them."""
    random = np.random.default_rng(3)
    likely = list(bytes.fromhex("417f808f909fa0bfc1c2dfe0e1edeff0f4f5"))
    data = bytes(random.choice(likely, 20_000).tolist() + random.integers(0, 256, 5_000).tolist()) + b"\xf0\x9f"
    (tmp_path / "data").write_bytes(data)
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    expected = [decoder.decode(bytes([byte])) for byte in data] + [decoder.decode(b"", True)]
    found = [bytes.fromhex(line).decode() for line in run_tool(build_dir, "utf8", tmp_path / "data")]
    assert found == expected


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16], ids=["float16", "bfloat16"])
def test_floats_are_rounded_as_in_numpy(build_dir: Path, tmp_path: Path, dtype: type) -> None:
    """Random bits of all magnitudes, and the neighbourhood of every value of the narrow type."""
    random = np.random.default_rng(5)
    largest = float(ml_dtypes.finfo(dtype).max)
    edges = np.arange(1 << 16, dtype=np.uint16).view(dtype).astype(np.float32)
    edges = edges[np.isfinite(edges)]
    middle = edges + np.spacing(edges) * random.integers(-2, 3, len(edges)).astype(np.float32)
    halves = edges[:-1] / 2 + edges[1:] / 2  # ties
    values = np.concatenate([random.integers(0, 1 << 32, 200_000, np.uint32).view(np.float32), edges, middle, halves])
    with np.errstate(invalid="ignore"):
        values = values[np.abs(values) <= largest].astype(np.float32)
    save_file({"x": values}, tmp_path / "x")
    run_tool(build_dir, "cast", tmp_path / "x", np.dtype(dtype).name)
    bits = np.frombuffer((tmp_path / "x").read_bytes()[-2 * len(values) :], np.uint16)
    np.testing.assert_array_equal(bits, values.astype(dtype).view(np.uint16))
    run_tool(build_dir, "cast", tmp_path / "x", "float32")
    np.testing.assert_array_equal(load_file(tmp_path / "x")["x"], values.astype(dtype).astype(np.float32))


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(seed=1),
        SamplingParams(seed=2, temperature=0.4, top_k=50),
        SamplingParams(seed=3, temperature=1.7, top_p=0.8),
        SamplingParams(seed=2**63 + 5, temperature=0.9, top_k=300, top_p=0.95, min_p=0.002, repetition_penalty=1.2),
    ],
    ids=["plain", "top_k", "top_p", "all"],
)
@pytest.mark.parametrize("vocab_size", [5, 128, 1003])
def test_the_same_seed_gives_the_same_tokens(
    build_dir: Path, tmp_path: Path, params: SamplingParams, vocab_size: int
) -> None:
    """Quarters, so that many logits are equal. exp of the two may differ in its last bit: a draw that falls between
    them would differ, about once in 10^14."""
    random = np.random.default_rng(vocab_size)
    logits = (np.round(random.normal(0, 3, (1500, vocab_size)) * 4) / 4).astype(np.float32)
    save_file({"logits": logits}, tmp_path / "logits")
    assert params.seed is not None
    generator, recent = Generator(params.seed), list[int]()
    for row in logits:
        recent.append(choose_token(row, params, recent, generator))
    values = (params.temperature, params.top_k or 0, params.top_p, params.min_p, params.repetition_penalty)
    words = [repr(value) for value in (params.seed, *values, params.repetition_window)]
    assert list(map(int, run_tool(build_dir, "sample", tmp_path / "logits", *words))) == recent

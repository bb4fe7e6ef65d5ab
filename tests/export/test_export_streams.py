"""Whole sequences through exported graphs, cut into calls in any way: the golden cases, and a model that drifts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import GoldenCase
from export_helpers import Arrays, open_onnx, run_session, write_seeded
from helpers import assert_close, small_config

from megalodon_deploy.config import MegalodonConfig
from megalodon_deploy.export import export_checkpoint
from megalodon_deploy.state import LOGITS, POSITION, TOKENS, call_lengths, state_specs, zero_state


class Stream:
    """Rows at one position each, with key/value memory of a whole chunk; feeds a session call by call."""

    def __init__(self, path: Path, config: MegalodonConfig, batch: int) -> None:
        self.session, self.config = open_onnx(path), config
        self.past = zero_state(config, batch=batch, capacity=config.chunk_size, activation=np.dtype(np.float32))
        self.position = np.zeros(batch, np.int64)

    def feed(self, tokens_BT: np.ndarray) -> np.ndarray:
        """The logits of all tokens, which must stay inside a chunk."""
        outputs: Arrays = run_session(self.session, {TOKENS: tokens_BT, POSITION: self.position, **self.past})
        for spec in state_specs(self.config):
            if spec.is_activation:
                for row, position in enumerate(self.position % self.config.chunk_size):
                    self.past[spec.past][row, :, position : position + tokens_BT.shape[1]] = outputs[spec.present][row]
            else:
                self.past[spec.past] = outputs[spec.present]
        self.position += tokens_BT.shape[1]
        return outputs[LOGITS]

    def feed_all(self, tokens_BT: np.ndarray, longest: list[int]) -> np.ndarray:
        """Calls of at most `longest` tokens, its numbers taken in turn, and never across a chunk edge."""
        logits, start, turn = [], 0, 0
        while start < tokens_BT.shape[1]:
            wanted = min(longest[turn % len(longest)], tokens_BT.shape[1] - start)
            for length in call_lengths(int(self.position[0]), wanted, self.config.chunk_size):
                logits.append(self.feed(tokens_BT[:, start : start + length]))
                start += length
            turn += 1
        return np.concatenate(logits, axis=1)


@pytest.mark.parametrize("longest", [[10**6], [1], [3, 1, 17, 2]], ids=["chunks", "tokens", "odd"])
def test_golden(golden_case: GoldenCase, tmp_path: Path, longest: list[int]) -> None:
    bundle = export_checkpoint(golden_case.path, tmp_path / "bundle", logits="all")
    tokens_BT = golden_case.expected["tokens"]
    stream = Stream(bundle.model_path, bundle.config, tokens_BT.shape[0])
    assert_close(stream.feed_all(tokens_BT, longest), golden_case.expected["logits"], 2e-5)


def test_any_split_gives_the_same_state(tmp_path: Path) -> None:
    config = small_config(chunk_size=21)
    bundle = export_checkpoint(write_seeded(tmp_path / "ckpt", config), tmp_path / "bundle", logits="all")
    tokens_BT = np.random.default_rng(0).integers(0, config.vocab_size, (2, 100))
    streams = [Stream(bundle.model_path, config, 2) for _ in range(2)]
    first, second = (
        stream.feed_all(tokens_BT, longest) for stream, longest in zip(streams, ([21], [1, 5, 20]), strict=True)
    )
    assert_close(first, second, 2e-5)
    for spec in state_specs(config):
        if spec.kind == "norm":
            continue  # hi and lo may round differently; the sums are compared below
        assert_close(streams[0].past[spec.past], streams[1].past[spec.past], 2e-5, spec.past)
    final = [stream.past["past_norm.final"].astype(np.float64) for stream in streams]
    assert_close(final[0][..., ::2] + final[0][..., 1::2], final[1][..., ::2] + final[1][..., 1::2], 1e-7)

"""Measure a bundle against its checkpoint on held-out text, in PyTorch.

The checkpoint computes in float32. The bundle's model has the bundle's weights, dequantised, and its types of
activations, keys and values; that an executor computes the same is what `verify` checks.
Letters: B windows, T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from megalodon_deploy.bundle import Bundle, Precision
from megalodon_deploy.export.reader import read_model
from megalodon_deploy.export.text import TextWindows, read_windows
from megalodon_deploy.model.checkpoint import Checkpoint, TokenizerSource, build_model
from megalodon_deploy.model.megalodon import Megalodon
from megalodon_deploy.quality import Quality

_MOST_WINDOWS = 32
TORCH_TYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def read_gate_text(path: Path, tokenizer: TokenizerSource | None, vocab_size: int) -> TextWindows:
    """The gate's windows; raises as `read_windows`."""
    return read_windows(path, tokenizer, vocab_size, most=_MOST_WINDOWS)


def measure_quality(bundle: Bundle, checkpoint: Checkpoint, text: TextWindows) -> Quality:
    """One model after the other, so that only one is in memory; the first one's predictions wait as float32."""
    expected = list(_log_probabilities(build_model(checkpoint), text.tokens))
    model = read_model(bundle).to(TORCH_TYPES[bundle.manifest.precision])
    loss = expected_loss = divergence = same = 0.0
    for tokens_T, exact_TV, found_TV in zip(text.tokens, expected, _log_probabilities(model, text.tokens), strict=True):
        next_T = tokens_T[1:, None]
        loss -= float(found_TV.gather(1, next_T).sum())
        expected_loss -= float(exact_TV.gather(1, next_T).sum())
        divergence += float(functional.kl_div(found_TV, exact_TV, reduction="sum", log_target=True))
        same += float((found_TV.argmax(1) == exact_TV.argmax(1)).sum())
    num_tokens = text.tokens.shape[0] * (text.tokens.shape[1] - 1)
    bit = math.log(2)
    return Quality(
        text_sha256=text.sha256,
        num_tokens=num_tokens,
        bits_per_byte=loss / bit / text.num_bytes,
        float32_bits_per_byte=expected_loss / bit / text.num_bytes,
        kl_bits=divergence / bit / num_tokens,
        same_first_choice=same / num_tokens,
    )


def _log_probabilities(model: Megalodon, tokens_BT: Tensor) -> Iterator[Tensor]:
    """Of the next token after each but the last: [T - 1, V] for each window, each a stream of its own."""
    with torch.inference_mode():
        for tokens_T in tokens_BT:
            logits_TV = model(tokens_T[None])[0][0, :-1]
            yield logits_TV.float().log_softmax(-1)

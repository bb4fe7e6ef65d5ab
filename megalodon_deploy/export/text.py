"""Windows of tokens from a user's text file, for calibration and for the quality gate."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megalodon_deploy.errors import UserError
from megalodon_deploy.files import sha256_file
from megalodon_deploy.model.checkpoint import TokenizerSource
from megalodon_deploy.tokenizers import BytesTokenizer, Tokenizer, decode, read_tokenizer

WINDOW_TOKENS = 512
_MIN_WINDOWS = 4


@dataclass(frozen=True)
class TextWindows:
    """Pieces of a text, spread evenly over it."""

    tokens: Tensor  # [B, T] int64
    num_bytes: int  # of the text of all tokens but the first of each window
    sha256: str


def read_windows(path: Path, tokenizer: TokenizerSource | None, vocab_size: int, *, most: int) -> TextWindows:
    """At most `most` windows. Raises `UserError` for a text that is missing, empty, too short or not the model's."""
    if not path.is_file():
        raise UserError(f"{path} is not a file; expected a text in the language of the model")
    text = path.read_bytes().decode("utf-8", errors="surrogateescape")
    if not text:
        raise UserError(f"{path} is empty; expected a text of at least {_MIN_WINDOWS * WINDOW_TOKENS:,} tokens")
    reader = _open(tokenizer, path, vocab_size)
    tokens = reader.encode(text)
    num_windows = len(tokens) // WINDOW_TOKENS
    if num_windows < _MIN_WINDOWS:
        raise UserError(
            f"{path} has {len(tokens):,} tokens, expected at least {_MIN_WINDOWS * WINDOW_TOKENS:,}; give a longer text"
        )
    if max(tokens) >= vocab_size:
        raise UserError(f"{path}: token {max(tokens)} is outside the model's vocabulary of {vocab_size}")
    chosen = range(num_windows) if num_windows <= most else [index * num_windows // most for index in range(most)]
    windows = [tokens[index * WINDOW_TOKENS : (index + 1) * WINDOW_TOKENS] for index in chosen]
    num_bytes = sum(len(decode(reader, window[1:]).encode("utf-8", errors="replace")) for window in windows)
    return TextWindows(torch.tensor(windows), num_bytes, sha256_file(path))


def _open(source: TokenizerSource | None, path: Path, vocab_size: int) -> Tokenizer:
    if vocab_size == BytesTokenizer.num_tokens and (source is None or source.file is None):
        return BytesTokenizer()
    if source is None or source.kind == "none":
        raise UserError(f"{path} cannot be read: the checkpoint has no tokenizer; name one (--tokenizer)")
    if source.file is None:
        return BytesTokenizer()
    return read_tokenizer(source.file, sentencepiece=source.kind == "sentencepiece")

"""One view of checkpoints and bundles: tokens of a stream in, logits after each of them out.

T tokens of a call, V vocabulary. A checkpoint runs in PyTorch, many tokens at a time; a bundle runs in its session
token by token, which is how it will be used.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from megalodon_deploy.bundle import MANIFEST_FILE, open_bundle
from megalodon_deploy.errors import MissingDependencyError, UserError
from megalodon_deploy.tokenizers import BytesTokenizer, Tokenizer, read_tokenizer

_TOKENS_AT_ONCE = 512  # logits of so many positions are held


class Reader(Protocol):
    """One stream that is being read."""

    def read(self, tokens: Sequence[int]) -> np.ndarray:
        """Logits [T, V] float32 that follow each of `tokens`, of any number."""
        ...


class LanguageModel(Protocol):
    """A model with its tokenizer."""

    name: str
    vocab_size: int
    tokenizer: Tokenizer
    stop_tokens: tuple[int, ...]

    def open(self) -> Reader:
        """A fresh stream."""
        ...


def open_language_model(
    path: str | Path, *, backend: str = "onnxruntime", device: str = "cpu", threads: int | None = None
) -> LanguageModel:
    """A bundle with `backend`, or a checkpoint of any layout in PyTorch on `device`.

    Raises `UserError` when a checkpoint does not say its tokenizer, and what opening them raises.
    """
    root = Path(path)
    if (root / MANIFEST_FILE).is_file():
        return BundleModel(root, backend, threads)
    try:
        import torch
    except ImportError as error:
        raise MissingDependencyError(
            f"{root} is a checkpoint, which needs PyTorch: pip install 'megalodon-deploy[train]'; bundles do not"
        ) from error
    if threads is not None:
        torch.set_num_threads(threads)
    return CheckpointModel(root, device)


class BundleModel:
    """See `LanguageModel`."""

    def __init__(self, path: Path, backend: str, threads: int | None) -> None:
        bundle = open_bundle(path)
        self.name = bundle.manifest.name
        self.vocab_size = bundle.config.vocab_size
        self.stop_tokens = tuple(bundle.manifest.tokenizer.stop_tokens)
        self._session = bundle.session(backend, threads=threads)
        self.tokenizer = self._session.tokenizer

    def open(self) -> Reader:
        return _BundleReader(self._session.stream())


class _BundleReader:
    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def read(self, tokens: Sequence[int]) -> np.ndarray:
        return np.stack([self._stream.step(int(token)) for token in tokens])


class CheckpointModel:
    """See `LanguageModel`."""

    def __init__(self, path: Path, device: str) -> None:
        from megalodon_deploy.model.checkpoint import build_model, read_checkpoint

        checkpoint = read_checkpoint(path)
        source = checkpoint.tokenizer
        if source is None or source.kind == "none":
            raise UserError(f"{path}: the checkpoint does not say its tokenizer; put its file beside the weights")
        self.name = path.name
        self.vocab_size = checkpoint.config.vocab_size
        self.stop_tokens = source.stop_tokens
        self.tokenizer: Tokenizer = (
            BytesTokenizer()
            if source.file is None
            else read_tokenizer(source.file, sentencepiece=source.kind == "sentencepiece")
        )
        try:
            self._model = build_model(checkpoint).to(device)
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"device {device!r}: PyTorch cannot use it ({str(error).splitlines()[0]})") from error

    def open(self) -> Reader:
        return _CheckpointReader(self._model)


class _CheckpointReader:
    def __init__(self, model: Any) -> None:
        self._model = model
        self._state: Any = None

    def read(self, tokens: Sequence[int]) -> np.ndarray:
        import torch

        parts = []
        with torch.inference_mode():
            for begin in range(0, len(tokens), _TOKENS_AT_ONCE):
                part = torch.tensor([list(tokens[begin : begin + _TOKENS_AT_ONCE])])
                logits_BTV, self._state = self._model(part.to(self._model.embed.weight.device), self._state)
                parts.append(logits_BTV[0].float().cpu().numpy())
        return np.concatenate(parts)

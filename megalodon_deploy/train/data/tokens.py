"""Text tokenised once, into memory-mapped shards beside a table of documents.

A data set on disk is a folder named by what it was made of: every source's content, the tokenizer and the settings
that shape documents. It is there whole or not at all, so an interrupted or simultaneous run does no harm.

    shard-00000.bin ...   tokens, one document after the other; uint8, uint16 or uint32
    documents.npy         [documents, 3] int64: tokens, bytes of UTF-8, first 63 bits of the text's sha256
    tokens.json           type, tokens of each shard
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megalodon_deploy.errors import TrainError
from megalodon_deploy.files import atomic_directory, sha256_file
from megalodon_deploy.tokenizers import BytesTokenizer, Tokenizer, read_tokenizer
from megalodon_deploy.train.config import BYTES, DataConfig
from megalodon_deploy.train.data.sources import Source, find_sources, read_documents

_VERSION = 1
_SHARD_TOKENS = 1 << 28
_DTYPES = (np.uint8, np.uint16, np.uint32)
_IN_FLIGHT = 64  # documents that wait for a tokenising thread
TOKENS, BYTES_OF_TEXT, DIGEST = range(3)  # columns of the table of documents

Tokenised = tuple[np.ndarray, int, int]  # tokens, bytes, digest


@dataclass(frozen=True)
class TokenStore:
    """Tokens of all documents, memory-mapped; documents are numbered as they were read."""

    name: str  # says what it was made of: equal names, equal tokens
    shards: tuple[np.ndarray, ...]
    shard_start: np.ndarray  # [shards + 1] int64
    documents: np.ndarray  # [documents, 3] int64
    start: np.ndarray  # [documents + 1] int64, first token of each document

    def read(self, begin: int, length: int) -> np.ndarray:
        """`length` tokens from `begin` on; a document lies in one shard."""
        shard = int(np.searchsorted(self.shard_start, begin, side="right")) - 1
        offset = begin - int(self.shard_start[shard])
        return self.shards[shard][offset : offset + length]


def open_training_tokenizer(name: str) -> Tokenizer:
    """`bytes`, or the file of a tokenizer; raises `TrainError` when there is none, `BundleError` when it is damaged."""
    if name == BYTES:
        return BytesTokenizer()
    path = Path(name)
    if not path.is_file():
        raise TrainError(f"data.tokenizer = {name!r}: no such file; expected a tokenizer.json, a .model, or bytes")
    return read_tokenizer(path, sentencepiece=path.suffix != ".json")


def open_tokens(data: DataConfig, progress: Callable[[str, float], None]) -> TokenStore:
    """The data set of `data`, tokenised now unless it was before. Raises `TrainError` as its parts do."""
    sources = find_sources(data)
    progress(f"reading {len(sources)} files", 0.0)
    folder = (data.cache or default_cache()) / f"tokens-{_key(sources, data)[:32]}"
    if not (folder / "tokens.json").is_file():
        try:
            _write(folder, sources, data, progress)
        except OSError:
            if not (folder / "tokens.json").is_file():  # no other run has made it meanwhile
                raise
    return _open(folder)


def default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megalodon-deploy"


def _key(sources: Sequence[Source], data: DataConfig) -> str:
    tokenizer = BYTES if data.tokenizer == BYTES else sha256_file(Path(data.tokenizer))
    shape = [_VERSION, tokenizer, data.end_token, data.invalid_utf8, data.text_field]
    digest = hashlib.sha256(json.dumps(shape).encode())
    for source in sources:
        try:
            content = sha256_file(source.path)
        except OSError as error:
            raise TrainError(f"{source.path}: cannot be read ({error.strerror}); leave it out: data.exclude") from error
        digest.update(f"{source.path.suffix}\0{content}\n".encode())
    return digest.hexdigest()


def _write(folder: Path, sources: Sequence[Source], data: DataConfig, progress: Callable[[str, float], None]) -> None:
    tokenizer = open_training_tokenizer(data.tokenizer)
    ending = [] if data.end_token is None else [data.end_token]
    highest = max(tokenizer.num_tokens - 1, *ending, 0)
    dtype = next(dtype for dtype in _DTYPES if highest <= np.iinfo(dtype).max)

    def tokenise(text: str) -> Tokenised:
        content = text.encode()
        digest = int.from_bytes(hashlib.sha256(content).digest()[:8], "big") >> 1
        plain = data.tokenizer == BYTES and not ending
        tokens = np.frombuffer(content, np.uint8) if plain else np.asarray(tokenizer.encode(text) + ending, dtype)
        return tokens, len(content), digest

    with atomic_directory(folder, overwrite=True) as directory:
        table: list[tuple[int, int, int]] = []
        shard_tokens: list[int] = []
        for tokens, num_bytes, digest in _in_order(tokenise, _all_documents(sources, data, progress), data.workers):
            if not shard_tokens or shard_tokens[-1] >= _SHARD_TOKENS:
                shard_tokens.append(0)
            with open(directory / _shard_name(len(shard_tokens) - 1), "ab") as file:
                file.write(tokens.astype(dtype, copy=False).tobytes())
            shard_tokens[-1] += len(tokens)
            table.append((len(tokens), num_bytes, digest))
        np.save(directory / "documents.npy", np.array(table, np.int64).reshape(-1, 3))
        document = {"dtype": np.dtype(dtype).name, "shard_tokens": shard_tokens}
        (directory / "tokens.json").write_text(json.dumps(document) + "\n")


def _all_documents(
    sources: Sequence[Source], data: DataConfig, progress: Callable[[str, float], None]
) -> Iterator[str]:
    for done, source in enumerate(sources):
        yield from read_documents(source, data)
        progress(f"tokenising file {done + 1} of {len(sources)}", 0.0)


def _in_order(function: Callable[[str], Tokenised], texts: Iterator[str], workers: int) -> Iterator[Tokenised]:
    """Results in the order of the texts, whatever the number of workers; few texts are held at a time."""
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[Future[Tokenised]] = deque()
        for text in texts:
            waiting.append(pool.submit(function, text))
            if len(waiting) >= _IN_FLIGHT:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _shard_name(number: int) -> str:
    return f"shard-{number:05d}.bin"


def _open(folder: Path) -> TokenStore:
    try:
        description = json.loads((folder / "tokens.json").read_text())
        documents = np.load(folder / "documents.npy", allow_pickle=False)
        dtype, counts = np.dtype(description["dtype"]), description["shard_tokens"]
        shards = [
            np.memmap(folder / _shard_name(number), dtype, "r", shape=(count,)) if count else np.empty(0, dtype)
            for number, count in enumerate(counts)
        ]
        if sum(counts) != documents[:, TOKENS].sum():
            raise ValueError("its parts do not fit together")
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise TrainError(f"{folder}: damaged ({error}); remove it, it is made again") from error
    return TokenStore(folder.name, tuple(shards), _starts(counts), documents, _starts(documents[:, TOKENS]))


def _starts(lengths: Sequence[int] | np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)

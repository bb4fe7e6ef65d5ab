"""Which tokenizer a checkpoint directory holds."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from megalodon_deploy.model.checkpoint.types import TokenizerSource

BYTE_VOCAB_SIZE = 256
TOKENIZER_JSON = "tokenizer.json"
SENTENCEPIECE_MODEL = "tokenizer.model"


def find_tokenizer(
    directory: Path, *, vocab_size: int, named: str | None = None, stop_tokens: tuple[int, ...] = ()
) -> TokenizerSource | None:
    """The tokenizer file in `directory`: the one that the configuration names, else the usual names.

    A vocabulary of 256 without a file is bytes, none of which stops a stream; otherwise None. A named path is looked
    up by its last part only: a checkpoint never reaches outside its directory.
    """
    names = [PurePosixPath(named).name] if named else []
    for name in [*names, TOKENIZER_JSON, SENTENCEPIECE_MODEL]:
        file = directory / name
        if file.is_file():
            return TokenizerSource("tokenizer.json" if file.suffix == ".json" else "sentencepiece", file, stop_tokens)
    return TokenizerSource("bytes") if vocab_size == BYTE_VOCAB_SIZE else None

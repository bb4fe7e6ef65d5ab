"""Text to tokens, and tokens to text as they arrive.

A stream of tokens is a stream of bytes: byte-level BPE and SentencePiece models both say which bytes a token stands
for, so text is decoded by one incremental UTF-8 decoder that never gives out part of a character. Only tokenizers
without such a table (word pieces, for example) are decoded by comparing texts.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from megalodon_deploy.errors import BundleError, MissingDependencyError, UserError

if TYPE_CHECKING:
    from megalodon_deploy.bundle import Bundle

_SPACE_PIECE = "\u2581"  # what SentencePiece writes for a space
_REPLACEMENT = "\ufffd"  # what decoders write for bytes that are not UTF-8
_MAX_CHARACTER_BYTES = 4


class Detokenizer(Protocol):
    """Turns tokens into text one by one."""

    def push(self, token: int) -> str:
        """The text that `token` completes: "" while a character is unfinished; U+FFFD for bytes that are not UTF-8."""
        ...

    def flush(self) -> str:
        """What is left at the end: U+FFFD for an unfinished character, or ""."""
        ...


class Tokenizer(Protocol):
    """What a session or a training run needs of a tokenizer."""

    @property
    def num_tokens(self) -> int:
        """Tokens are below this number: what a model's vocabulary must hold."""
        ...

    def encode(self, text: str, *, start: bool = True) -> list[int]:
        """Tokens of `text`; `start`: the text begins a stream, so special tokens that open a text are added."""
        ...

    def detokenizer(self, context: Sequence[int] = ()) -> Detokenizer:
        """A detokenizer for what follows the tokens `context`: it completes a character that they leave open, and
        keeps the space before the first word unless the context is empty."""
        ...


def decode(tokenizer: Tokenizer, tokens: Sequence[int]) -> str:
    """Text of a whole sequence."""
    detokenizer = tokenizer.detokenizer()
    return "".join([*map(detokenizer.push, tokens), detokenizer.flush()])


def open_tokenizer(bundle: Bundle) -> Tokenizer:
    """The tokenizer of a bundle. Raises `BundleError` when its file is damaged, `MissingDependencyError` when the
    package that reads it is not installed."""
    info = bundle.manifest.tokenizer
    if info.file is None:
        return BytesTokenizer()
    path = bundle.path / info.file
    if not path.is_file():
        raise BundleError(f"{path} is missing; export or copy the bundle again")
    return read_tokenizer(path, sentencepiece=info.kind == "sentencepiece")


def read_tokenizer(path: Path, *, sentencepiece: bool) -> Tokenizer:
    """A tokenizer from its file; raises as `open_tokenizer`."""
    return SentencePieceTokenizer(path) if sentencepiece else JsonTokenizer(path)


class BytesTokenizer:
    """A token is a byte of UTF-8 text; higher tokens, if the model has any, stand for no text."""

    num_tokens = 256

    def encode(self, text: str, *, start: bool = True) -> list[int]:
        return list(_utf8(text, "surrogateescape"))  # a command line hands invalid bytes on as lone surrogates

    def detokenizer(self, context: Sequence[int] = ()) -> Detokenizer:
        return _ByteDetokenizer(_byte_of, context)


class JsonTokenizer:
    """A Hugging Face `tokenizer.json`."""

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer as HuggingFaceTokenizer

        try:
            self._tokenizer = HuggingFaceTokenizer.from_file(str(path))
        except Exception as error:  # the package raises nothing more precise
            raise BundleError(f"{path}: not a readable tokenizer.json ({_one_line(error)})") from error
        description = json.loads(self._tokenizer.to_str())
        self._special = {token["id"] for token in description["added_tokens"] if token["special"]}
        self._piece_bytes = _byte_rule(description["decoder"])
        self._strips_space = self._piece_bytes is _sentencepiece_bytes and self._decodes_without_leading_space()
        self._bytes_of: dict[int, bytes] = {}

    @property
    def num_tokens(self) -> int:
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def encode(self, text: str, *, start: bool = True) -> list[int]:
        _utf8(text)
        return list(self._tokenizer.encode(text, add_special_tokens=start).ids)

    def detokenizer(self, context: Sequence[int] = ()) -> Detokenizer:
        if self._piece_bytes is None:
            return _TextDetokenizer(self._tokenizer.decode, self._special, context)
        return _ByteDetokenizer(self._token_bytes, context, strips_space=self._strips_space)

    def _token_bytes(self, token: int) -> bytes:
        if token not in self._bytes_of:
            assert self._piece_bytes is not None, "Bug: no table of bytes"
            piece = None if token in self._special else self._tokenizer.id_to_token(token)
            self._bytes_of[token] = b"" if piece is None else self._piece_bytes(piece)
        return self._bytes_of[token]

    def _decodes_without_leading_space(self) -> bool:
        """Whether this tokenizer's own decoder drops the space that the first word begins with."""
        words = (token for piece, token in self._tokenizer.get_vocab().items() if piece.rfind(_SPACE_PIECE) == 0)
        text = next((text for word in words if (text := self._tokenizer.decode([word])).strip()), " ")
        return not text.startswith(" ")


class SentencePieceTokenizer:
    """A SentencePiece model; its begin-of-text token, if it has one, opens a stream."""

    def __init__(self, path: Path) -> None:
        try:
            from sentencepiece import SentencePieceProcessor
        except ImportError as error:
            raise MissingDependencyError(
                f"{path.name} needs the package sentencepiece: pip install 'megalodon-deploy[sentencepiece]'"
            ) from error
        try:
            self._model: Any = SentencePieceProcessor(model_proto=path.read_bytes())
        except (RuntimeError, OSError) as error:
            raise BundleError(f"{path}: not a readable SentencePiece model ({_one_line(error)})") from error
        self._strips_space = self._model.decode([_SPACE_PIECE + "a"]) == "a"

    @property
    def num_tokens(self) -> int:
        return int(self._model.get_piece_size())

    def encode(self, text: str, *, start: bool = True) -> list[int]:
        _utf8(text)
        opening = [self._model.bos_id()] if start and self._model.bos_id() >= 0 else []
        return opening + list(self._model.encode(text))

    def detokenizer(self, context: Sequence[int] = ()) -> Detokenizer:
        return _ByteDetokenizer(self._token_bytes, context, strips_space=self._strips_space)

    def _token_bytes(self, token: int) -> bytes:
        model = self._model
        if token >= model.get_piece_size() or model.is_control(token) or model.is_unused(token):
            return b""
        if model.is_unknown(token):
            return bytes(model.decode([token]).encode())
        return _sentencepiece_bytes(model.id_to_piece(token))


class _ByteDetokenizer:
    """For tokenizers that know the bytes of every token."""

    def __init__(
        self, token_bytes: Callable[[int], bytes], context: Sequence[int], *, strips_space: bool = False
    ) -> None:
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._strips_space = strips_space  # until the first visible byte
        for token in context:
            self.push(token)

    def push(self, token: int) -> str:
        data = self._token_bytes(token)
        if data and self._strips_space:
            self._strips_space = False
            data = data.removeprefix(b" ")
        return self._decoder.decode(data)

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class _TextDetokenizer:
    """For other tokenizers: text is what decoding one more token adds to the decoded window.

    The window starts at tokens that are already out, because decoders join words by looking at their neighbours.
    """

    def __init__(self, decode_text: Callable[[list[int]], str], special: set[int], context: Sequence[int]) -> None:
        self._decode_text = decode_text
        self._special = special
        self._window = [token for token in context[-_MAX_CHARACTER_BYTES:] if token not in special]
        self._num_out = len(self._window)  # tokens of the window whose text is out

    def push(self, token: int) -> str:
        if token in self._special:
            return ""
        self._window.append(token)
        text = self._new_text()
        # A token has one byte at least, so an unfinished character is settled by its fourth token.
        if text.endswith(_REPLACEMENT) and len(self._window) - self._num_out < _MAX_CHARACTER_BYTES:
            return ""
        self._window = self._window[-_MAX_CHARACTER_BYTES:]
        self._num_out = len(self._window)
        return text

    def flush(self) -> str:
        text = self._new_text()
        self._num_out = len(self._window)
        return text

    def _new_text(self) -> str:
        return self._decode_text(self._window)[len(self._decode_text(self._window[: self._num_out])) :]


def _byte_rule(decoder: dict[str, Any] | None) -> Callable[[str], bytes] | None:
    """How a piece of a `tokenizer.json` spells bytes, by its decoder; None: only the decoder itself knows."""
    steps = [] if decoder is None else decoder.get("decoders", [decoder])
    kinds = {step["type"] for step in steps}
    if "ByteLevel" in kinds:
        return _byte_level_bytes
    if kinds & {"ByteFallback", "Metaspace"} and kinds <= {"ByteFallback", "Metaspace", "Replace", "Fuse", "Strip"}:
        return _sentencepiece_bytes
    return None


def _byte_level_alphabet() -> dict[str, int]:
    """The characters by which byte-level BPE (GPT-2) spells the 256 bytes: printable Latin-1 ones spell themselves,
    the others take the code points from 256 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}


_BYTE_LEVEL = _byte_level_alphabet()


def _byte_level_bytes(piece: str) -> bytes:
    if all(character in _BYTE_LEVEL for character in piece):
        return bytes(_BYTE_LEVEL[character] for character in piece)
    return piece.encode()  # a token added by hand


def _sentencepiece_bytes(piece: str) -> bytes:
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return bytes([int(piece[3:5], 16)])
    return piece.replace(_SPACE_PIECE, " ").encode()


def _byte_of(token: int) -> bytes:
    return bytes([token]) if token < 256 else b""


def _utf8(text: str, errors: str = "strict") -> bytes:
    try:
        return text.encode("utf-8", errors)
    except UnicodeEncodeError as error:
        raise UserError(f"text holds {error.object[error.start]!r} at {error.start}, which is no character") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())

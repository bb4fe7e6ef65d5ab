"""Tokenizers trained here on real text: a stream of tokens decodes to the text that the tokenizer's own decoder gives,
in pieces that never cut a character."""

from __future__ import annotations

import inspect
import io
import json
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers as hf
from hypothesis import given, settings
from hypothesis import strategies as st

from megalodon_deploy.errors import BundleError, UserError
from megalodon_deploy.tokenizers import (
    BytesTokenizer,
    JsonTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    decode,
)

CORPUS = "\n".join(inspect.getsource(module) for module in (io, json, textwrap)).splitlines()
TEXTS = [
    "def f(x):\n    return x + 1  # add",
    " leading and  double  spaces ",
    "emoji \U0001f389\U0001f469\u200d\U0001f4bb, CJK \u4f60\u597d\u4e16\u754c",
    "accents \u00e9\u00e8 \u0301, right to left \u05e9\u05dc\u05d5\u05dd",
    "\u4f60",
    "tab\there\r\nand \ufffd itself",
]


def byte_level(path: Path) -> Tokenizer:
    tokenizer = hf.Tokenizer(hf.models.BPE())
    tokenizer.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = hf.decoders.ByteLevel()
    trainer = hf.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens(["<mark up>"])
    tokenizer.post_processor = hf.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.save(str(path))
    return JsonTokenizer(path)


def byte_fallback(path: Path) -> Tokenizer:
    """As converted SentencePiece models are: spaces as U+2581, a leading one added, unknown characters as bytes."""
    tokenizer = hf.Tokenizer(hf.models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = hf.normalizers.Sequence(
        [hf.normalizers.Prepend("\u2581"), hf.normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.decoder = hf.decoders.Sequence(
        [
            hf.decoders.Replace("\u2581", " "),
            hf.decoders.ByteFallback(),
            hf.decoders.Fuse(),
            hf.decoders.Strip(" ", 1, 0),
        ]
    )
    byte_pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = hf.trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<unk>", "<s>", *byte_pieces], show_progress=False, max_token_length=8
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    description = json.loads(tokenizer.to_str())
    for token in description["added_tokens"]:
        token["special"] = not token["content"].startswith("<0x")
    path.write_text(json.dumps(description), encoding="utf-8")
    return JsonTokenizer(path)


def sentencepiece(path: Path) -> Tokenizer:
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        vocab_size=420,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())
    return SentencePieceTokenizer(path)


def word_level(path: Path) -> Tokenizer:
    """Word pieces: only the decoder knows where spaces go."""
    tokenizer = hf.Tokenizer(hf.models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = hf.pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = hf.decoders.WordPiece(cleanup=False)
    trainer = hf.trainers.WordPieceTrainer(vocab_size=500, special_tokens=["[UNK]", "[SEP]"], show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.save(str(path))
    return JsonTokenizer(path)


MAKERS: dict[str, Callable[[Path], Tokenizer]] = {
    "bytes": lambda path: BytesTokenizer(),
    "byte_level": byte_level,
    "byte_fallback": byte_fallback,
    "sentencepiece": sentencepiece,
}


@pytest.fixture(scope="module", params=list(MAKERS))
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return MAKERS[request.param](tmp_path_factory.mktemp("tokenizer") / "tokenizer.file")


def test_the_number_of_tokens_covers_every_token(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("x" * 5 + "\u00e9\U0001f600")
    assert max(tokens) < tokenizer.num_tokens <= 2000


@pytest.mark.parametrize("text", TEXTS)
def test_text_survives_and_no_character_is_cut(tokenizer: Tokenizer, text: str) -> None:
    tokens = tokenizer.encode(text, start=True)
    detokenizer = tokenizer.detokenizer()
    out = ""
    for token in tokens:
        out += detokenizer.push(token)
        assert text.startswith(out)
    assert out == text
    assert detokenizer.flush() == ""
    assert decode(tokenizer, tokens) == text


@pytest.mark.parametrize("text", TEXTS)
def test_any_context_continues_as_the_whole_text(tokenizer: Tokenizer, text: str) -> None:
    """Also when the context ends inside a character."""
    tokens = tokenizer.encode(text, start=False)
    whole = tokenizer.detokenizer()
    pieces = [whole.push(token) for token in tokens]
    for cut in range(1, len(tokens)):
        continued = tokenizer.detokenizer(tokens[:cut])
        assert [continued.push(token) for token in tokens[cut:]] == pieces[cut:]


@settings(max_examples=200)
@given(data=st.binary(max_size=24))
def test_any_bytes_decode_as_python_decodes_them(data: bytes) -> None:
    detokenizer = BytesTokenizer().detokenizer()
    pieces = [detokenizer.push(byte) for byte in data]
    assert "".join(pieces) + detokenizer.flush() == data.decode("utf-8", errors="replace")


def test_invalid_bytes_of_a_bpe_model_come_out_at_once(tmp_path: Path) -> None:
    tokenizer = byte_level(tmp_path / "tokenizer.json")
    vocabulary = hf.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    spelled = hf.pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str("\u20ac")[0][0]
    first, second, third = (vocabulary.token_to_id(character) for character in spelled)
    letter = vocabulary.token_to_id("a")
    detokenizer = tokenizer.detokenizer()
    pieces = [detokenizer.push(token) for token in (first, second, letter, third, first, second, third)]
    assert pieces == ["", "", "\ufffda", "\ufffd", "", "", "\u20ac"]


def test_first_word_keeps_its_space_only_after_a_context(tmp_path: Path) -> None:
    for make in (sentencepiece, byte_fallback):
        tokenizer = make(tmp_path / make.__name__)
        word = tokenizer.encode("return", start=False)
        assert decode(tokenizer, word) == "return"
        continued = tokenizer.detokenizer(tokenizer.encode("x", start=False))
        assert "".join(map(continued.push, word)) == " return"


def test_special_tokens_open_a_stream_and_show_no_text(tmp_path: Path) -> None:
    for make, opening in ((byte_level, 0), (sentencepiece, 1)):
        tokenizer = make(tmp_path / make.__name__)
        tokens = tokenizer.encode("x y", start=True)
        assert tokens == [opening, *tokenizer.encode("x y", start=False)]
        assert decode(tokenizer, tokens) == "x y"
    tokenizer = byte_level(tmp_path / "added")
    tokens = tokenizer.encode("a<mark up>b", start=False)
    assert decode(tokenizer, tokens) == "a<mark up>b"
    assert len(tokens) == 3


def test_word_pieces_are_joined_by_their_own_decoder(tmp_path: Path) -> None:
    tokenizer = word_level(tmp_path / "tokenizer.json")
    own = hf.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tokens = tokenizer.encode("return the default encoding of this stream", start=False)
    tokens.insert(3, own.token_to_id("[SEP]"))
    assert len(tokens) > 8
    assert decode(tokenizer, tokens) == own.decode(tokens)
    context = tokenizer.detokenizer(tokens[:5])
    assert own.decode(tokens[:5]) + "".join(map(context.push, tokens[5:])) == own.decode(tokens)


def test_tokens_beyond_the_vocabulary_show_no_text(tokenizer: Tokenizer) -> None:
    assert decode(tokenizer, [100_000]) == ""


def test_lone_surrogates_are_bytes_or_one_line(tokenizer: Tokenizer) -> None:
    text = b"ok \xff".decode("utf-8", "surrogateescape")
    if isinstance(tokenizer, BytesTokenizer):
        assert bytes(tokenizer.encode(text, start=True)) == b"ok \xff"
        text = "\ud800"
    with pytest.raises(UserError, match="no character"):
        tokenizer.encode(text, start=True)


@pytest.mark.parametrize("kind", [JsonTokenizer, SentencePieceTokenizer])
def test_a_damaged_file_gets_one_line(kind: Callable[[Path], Tokenizer], tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.file"
    path.write_bytes(b'{"model": 3}')
    with pytest.raises(BundleError, match="not a readable") as caught:
        kind(path)
    assert "\n" not in str(caught.value)

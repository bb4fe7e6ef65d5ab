"""The file of a saved stream: what it holds, that it is whole or not there, and that a wrong one is refused."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from helpers import small_config
from runtime.fake_executor import fake_session
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from megalodon_deploy.errors import StateError
from megalodon_deploy.runtime.sampling import HISTORY_TOKENS, SamplingParams
from megalodon_deploy.runtime.saved_stream import SavedStream
from megalodon_deploy.runtime.session import Session
from megalodon_deploy.state import concrete_shape, state_specs

CONFIG = small_config(vocab_size=256, num_layers=1, chunk_size=8)
PROMPT = list(range(40, 51))


@pytest.fixture
def session() -> Session:
    return fake_session(CONFIG)


@pytest.fixture
def saved_path(session: Session, tmp_path: Path) -> Path:
    """A stream of 11 prompt tokens and 3 generated ones, of which the last is pending."""
    stream = session.stream()
    list(stream.generate(PROMPT, max_new_tokens=3, sampling=SamplingParams(seed=9)))
    stream.save(tmp_path / "saved" / "stream.safetensors")
    return tmp_path / "saved" / "stream.safetensors"


def read_metadata(path: Path) -> dict[str, str]:
    with safe_open(path, framework="np") as file:
        return dict(file.metadata())


def test_the_file_holds_one_row_and_only_the_open_rows(session: Session, saved_path: Path) -> None:
    tensors = load_file(saved_path)
    for spec in state_specs(CONFIG):
        tensor = tensors.pop(spec.past)
        assert tensor.shape == concrete_shape(spec.past_shape, batch=1, capacity=13 % 8)
        assert tensor.dtype == np.float32
    assert tensors.pop("position").tolist() == [13]
    recent = tensors.pop("recent_tokens").tolist()
    assert recent[:11] == PROMPT
    assert tensors.pop("pending_tokens").tolist() == recent[13:]
    assert tensors.pop("generator").tolist() == [9, 3]
    assert tensors.pop("logits").shape == (0,)
    assert not tensors
    manifest = session.bundle.manifest
    expected = {
        "format": "megalodon-stream",
        "format_version": "1",
        "bundle_fingerprint": manifest.fingerprint,
        "model_fingerprint": manifest.model_fingerprint,
    }
    assert read_metadata(saved_path) == expected


def test_only_the_last_tokens_are_kept(session: Session, tmp_path: Path) -> None:
    tokens = [token % 256 for token in range(HISTORY_TOKENS + 100)]
    stream = session.stream()
    stream.prefill(tokens)
    stream.save(tmp_path / "stream")
    assert load_file(tmp_path / "stream")["recent_tokens"].tolist() == tokens[-HISTORY_TOKENS:]


def test_saving_replaces_the_old_file_or_leaves_it(
    session: Session, saved_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = saved_path.read_bytes()

    def fails(*args: Any, **kwargs: Any) -> None:
        raise OSError("no space left")

    stream = session.stream()
    stream.prefill([1])
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", fails)
        with pytest.raises(OSError, match="no space"):
            stream.save(saved_path)
    assert saved_path.read_bytes() == before
    stream.save(saved_path)
    assert load_file(saved_path)["position"].tolist() == [1]
    assert [path.name for path in saved_path.parent.iterdir()] == [saved_path.name]


def test_the_file_has_ordinary_permissions(session: Session, tmp_path: Path) -> None:
    (tmp_path / "ordinary").touch()
    stream = session.stream()
    stream.prefill([1])
    stream.save(tmp_path / "saved")
    assert (tmp_path / "saved").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


@pytest.mark.parametrize("activation", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_rows_are_cast_to_the_target_and_the_rest_stays_float32(session: Session, activation: type) -> None:
    stream = session.stream()
    stream.prefill(PROMPT)
    snapshot = stream.snapshot()
    tensors = snapshot.tensors_as(np.dtype(activation), CONFIG)
    for spec in state_specs(CONFIG):
        dtype = np.dtype(activation if spec.is_activation else np.float32)
        assert tensors[spec.past].dtype == dtype
        np.testing.assert_array_equal(tensors[spec.past], snapshot.tensors[spec.past].astype(dtype))


@pytest.mark.parametrize("activation", [np.float16, ml_dtypes.bfloat16])
def test_a_stream_of_any_activation_resumes_with_any_other(activation: type, tmp_path: Path) -> None:
    """The toy's key rows are multiples of 1/8 below 16, which every type holds exactly."""
    narrow, wide = fake_session(CONFIG, activation), fake_session(CONFIG)
    tokens = [1, 2, 3, 4, 127]
    expected = wide.stream()
    expected.prefill(tokens)
    for source, target in ((narrow, wide), (wide, narrow)):
        stream = source.stream()
        stream.prefill(tokens)
        stream.save(tmp_path / "stream")
        resumed = target.stream(resume=tmp_path / "stream")
        np.testing.assert_array_equal(resumed.step(5), expected.fork().step(5))


def test_overflow_in_the_target_type_is_refused(session: Session) -> None:
    stream = session.stream()
    stream.prefill([1])
    snapshot = stream.snapshot()
    snapshot.tensors["past_value.0"][...] = 1e5
    with pytest.raises(StateError, match=r"past_value\.0 in float16"):
        snapshot.tensors_as(np.dtype(np.float16), CONFIG)


def test_a_broken_stream_is_not_saved(session: Session, tmp_path: Path) -> None:
    stream = session.stream()
    stream.prefill([1, 2])
    session.executor.memories[0]._state["past_norm.final"][...] = np.inf  # type: ignore[attr-defined]
    with pytest.raises(StateError, match=r"past_norm\.final holds NaN or infinity"):
        stream.save(tmp_path / "stream")
    assert not list(tmp_path.iterdir())


def test_another_bundle_is_refused(session: Session, saved_path: Path) -> None:
    other = fake_session(small_config(vocab_size=256, num_layers=1, chunk_size=8, norm_eps=1e-6))
    with pytest.raises(StateError, match="comes from bundle") as caught:
        other.stream(resume=saved_path)
    assert session.bundle.manifest.fingerprint[:12] in str(caught.value)
    with pytest.raises(StateError, match="comes from bundle"):
        other.stream(resume=session.stream().snapshot())


Tensors = dict[str, np.ndarray]


def changed(name: str, change: Callable[[np.ndarray], Any]) -> Callable[[Tensors], None]:
    def edit(tensors: Tensors) -> None:
        tensors[name] = np.asarray(change(tensors[name]))

    return edit


def with_value(value: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(array: np.ndarray) -> np.ndarray:
        array.flat[array.size // 2] = value
        return array

    return change


DAMAGE: dict[str, tuple[Callable[[Tensors], Any], str]] = {
    "a state tensor is missing": (lambda t: t.pop("past_cema.0"), "past_cema.0 is missing"),
    "position is missing": (lambda t: t.pop("position"), "position is missing"),
    "logits are missing": (lambda t: t.pop("logits"), "logits is missing"),
    "a tensor too many": (lambda t: t.update(past_cema_1=np.zeros(1, np.float32)), "unknown tensor past_cema_1"),
    "rows too many": (changed("past_key.0", lambda a: np.zeros((1, 2, 6, 8), np.float32)), "expected [1, 2, 5, 8]"),
    "position of other rows": (changed("position", lambda a: a + 1), "expected [1, 2, 6, 8]"),
    "negative position": (changed("position", lambda a: -a), "position is -13"),
    "position as int32": (changed("position", lambda a: a.astype(np.int32)), "position is int32 [1]"),
    "two positions": (changed("position", lambda a: np.repeat(a, 2)), "position is int64 [2]"),
    "float64 keys": (changed("past_key.0", lambda a: a.astype(np.float64)), "past_key.0 is float64"),
    "float16 memory": (changed("past_cema.0", lambda a: a.astype(np.float16)), "past_cema.0 is float16"),
    "NaN in a key": (changed("past_key.0", with_value(np.nan)), "past_key.0 holds NaN"),
    "infinity in a norm": (changed("past_norm.final", with_value(-np.inf)), "past_norm.final holds NaN or infinity"),
    "a recent token too high": (changed("recent_tokens", with_value(256)), "token 256"),
    "a negative pending token": (changed("pending_tokens", lambda a: a * 0 - 1), "token -1"),
    "a pending token that is not recent": (changed("pending_tokens", lambda a: (a + 1) % 256), "not the last"),
    "no pending token and no logits": (changed("pending_tokens", lambda a: a[:0]), "logits is missing"),
    "logits and a pending token": (changed("logits", lambda a: np.zeros(256, np.float32)), "logits is not expected"),
    "a long history": (changed("recent_tokens", lambda a: np.zeros(1025, np.int64)), "length 0 to 1024"),
    "half a generator": (changed("generator", lambda a: a[:1]), "generator is uint64 [1]"),
}


@pytest.mark.parametrize("damage", list(DAMAGE))
def test_a_damaged_file_is_refused_in_one_line(session: Session, saved_path: Path, damage: str) -> None:
    edit, message = DAMAGE[damage]
    tensors, metadata = load_file(saved_path), read_metadata(saved_path)
    edit(tensors)
    save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, saved_path, metadata)
    refused(session, saved_path, message)


@pytest.mark.parametrize(
    ("key", "value"), [("format", "other"), ("format_version", "2"), ("bundle_fingerprint", "0" * 64), (None, None)]
)
def test_wrong_metadata_are_refused(session: Session, saved_path: Path, key: str | None, value: str | None) -> None:
    metadata = read_metadata(saved_path) | {key: value, "model_fingerprint": ""} if key else None
    save_file(load_file(saved_path), saved_path, metadata)
    refused(session, saved_path, value[:12] if value and key != "format_version" else "format")


@pytest.mark.parametrize("size", [0, 4, 100, -1])
def test_a_truncated_file_is_refused(session: Session, saved_path: Path, size: int) -> None:
    saved_path.write_bytes(saved_path.read_bytes()[:size])
    refused(session, saved_path, "not a whole safetensors file")


def test_other_files_are_refused(session: Session, tmp_path: Path) -> None:
    refused(session, tmp_path / "nothing", "no such file")
    header = json.dumps({"position": {"dtype": "I64", "shape": [9], "data_offsets": [0, 8]}}).encode()
    (tmp_path / "lies").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    refused(session, tmp_path / "lies", "not a whole safetensors file")


def refused(session: Session, path: Path, message: str) -> None:
    batch = session.batch(1)
    with pytest.raises(StateError) as caught:
        batch.admit(resume=path)
    text = str(caught.value)
    assert message in text
    assert str(path) in text
    assert "\n" not in text
    assert batch.admit().position == 0, "the slot is still free"


def test_a_snapshot_is_a_copy(session: Session) -> None:
    stream = session.stream()
    stream.prefill(PROMPT)
    snapshot: SavedStream = stream.snapshot()
    before = {name: array.copy() for name, array in snapshot.tensors.items()}
    stream.prefill(PROMPT)
    assert snapshot.position == 11
    for name, array in before.items():
        np.testing.assert_array_equal(snapshot.tensors[name], array)

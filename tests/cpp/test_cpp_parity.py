"""C++ and Python over the same bundle: the same tokens, texts, states and files, whichever of them goes on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cpp.c_library import CError, CLibrary, CSession, CStream
from runtime.small_models import LONG_CHUNKS, SHORT_CHUNKS, make_model
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from megalodon_deploy.bundle import Bundle
from megalodon_deploy.engine.toolchain import build_onnxruntime_operators
from megalodon_deploy.errors import StateError
from megalodon_deploy.export import export_checkpoint
from megalodon_deploy.model.checkpoint import save_checkpoint
from megalodon_deploy.runtime.sampling import SamplingParams
from megalodon_deploy.runtime.session import Session
from megalodon_deploy.runtime.stream import Stream

PROMPT = [(7 * index) % 256 for index in range(41)]  # past three chunk edges

SAMPLINGS = {
    "greedy": SamplingParams.greedy(),
    "seeded": SamplingParams(seed=11),
    "filtered": SamplingParams(seed=2**64 - 1, temperature=1.4, top_k=30, top_p=0.9, min_p=0.01),
    "penalised": SamplingParams(seed=0, temperature=0.7, repetition_penalty=1.3, repetition_window=20),
}


def header_and_data(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


@pytest.mark.parametrize("name", SAMPLINGS)
def test_same_tokens_texts_and_files(session: CSession, python_session: Session, name: str, tmp_path: Path) -> None:
    sampling = SAMPLINGS[name]
    cpp, python = session.stream(), python_session.stream()
    np.testing.assert_array_equal(cpp.prefill(PROMPT), python.prefill(PROMPT))
    options: dict[str, Any] = {"max_new_tokens": 300, "sampling": sampling}
    assert cpp.generate([1, 2], **options) == list(python.generate([1, 2], **options))
    assert cpp.position == python.position == 342, "the last token is not consumed yet"
    cpp.save(tmp_path / "cpp")
    python.save(tmp_path / "python")
    header, data = header_and_data(tmp_path / "cpp")
    expected_header, expected_data = header_and_data(tmp_path / "python")
    assert header == expected_header
    assert data == expected_data


@pytest.mark.parametrize("name", SAMPLINGS)
def test_each_goes_on_where_the_other_stopped(
    session: CSession, python_session: Session, name: str, tmp_path: Path
) -> None:
    """A stream that changes hands at every turn, against one that stays in Python."""
    sampling = SAMPLINGS[name]
    alone = python_session.stream()
    expected = [item.token for item in alone.generate(PROMPT, max_new_tokens=60, sampling=sampling)]
    stream: CStream | Stream = python_session.stream()
    tokens = [item.token for item in stream.generate(PROMPT, max_new_tokens=10, sampling=sampling)]
    for turn in range(5):
        path = tmp_path / str(turn)
        stream.save(path)
        stream = session.stream(path) if turn % 2 == 0 else python_session.stream(resume=path)
        tokens += [item.token for item in stream.generate(max_new_tokens=10, sampling=sampling)]
    assert tokens == expected


def test_stop_strings_stop_tokens_and_text_prompts(session: CSession, python_session: Session) -> None:
    text = "".join(item.text for item in python_session.stream().generate("héllo", max_new_tokens=100))
    stop = next(text[index : index + 2] for index in range(30, 90) if text[index : index + 2].isprintable())
    for options in (
        {"stop_strings": [stop, "never"]},
        {"stop_tokens": [PROMPT[3], 162, 140]},
        {"max_new_tokens": None, "stop_strings": [stop]},
    ):
        options = {"max_new_tokens": 100} | options
        found = session.stream().generate("héllo", **options)  # type: ignore[arg-type]
        assert found == list(python_session.stream().generate("héllo", **options))  # type: ignore[arg-type]
        assert found[-1].finish in ("stop_string", "stop_token")


def test_positions_beyond_32_bits_are_no_edge(session: CSession, python_session: Session, tmp_path: Path) -> None:
    stream, chunk_size = python_session.stream(), python_session.config.chunk_size
    stream.prefill(PROMPT[:20])
    for first in (1 << 31, 1 << 32):
        saved = replace(stream.snapshot(), position=20 + (first - 26) // chunk_size * chunk_size)
        saved.write(tmp_path / "stream", python_session.config)
        cpp, python = session.stream(tmp_path / "stream"), python_session.stream(resume=saved)
        for token in range(2 * chunk_size):
            np.testing.assert_array_equal(cpp.prefill([token]), python.step(token))
        assert cpp.position == python.position > first
        cpp.save(tmp_path / "cpp")
        python.save(tmp_path / "python")
        assert header_and_data(tmp_path / "cpp") == header_and_data(tmp_path / "python")
    tensors = load_file(tmp_path / "stream")
    tensors["position"] = np.array([(1 << 63) - 4])
    with safe_open(tmp_path / "stream", "np") as file:
        save_file(tensors, tmp_path / "beyond", file.metadata())
    with pytest.raises(CError, match="position is 9223372036854775804, expected 0 to"):
        session.stream(tmp_path / "beyond")
    with pytest.raises(StateError, match="position is 9223372036854775804, expected 0 to"):
        python_session.stream(resume=tmp_path / "beyond")


def test_forks_go_on_alike(session: CSession) -> None:
    stream = session.stream()
    stream.generate(PROMPT, max_new_tokens=5, sampling=SAMPLINGS["seeded"])
    fork = stream.fork()
    assert fork.generate(max_new_tokens=50, sampling=SamplingParams()) == stream.generate(
        max_new_tokens=50, sampling=SamplingParams()
    )


def test_a_batch_through_the_c_interface_gives_what_each_stream_gives_alone(
    session: CSession, python_session: Session, tmp_path: Path
) -> None:
    """Streams that come with prompts of their own, decode together, wait, leave and are resumed in a slot."""
    batch, alone = session.batch(3), {name: python_session.stream() for name in SAMPLINGS}
    streams = {name: batch.admit() for name in list(SAMPLINGS)[:3]}
    batch.feed({stream: PROMPT[: 5 + index] for index, stream in enumerate(streams.values())})
    for index, name in enumerate(streams):
        alone[name].prefill(PROMPT[: 5 + index])
        np.testing.assert_allclose(streams[name].logits, alone[name].last_logits, rtol=0, atol=1e-5, equal_nan=False)
    assert batch.num_free == 0
    for turn in range(30):
        chosen = [name for index, name in enumerate(streams) if (turn + index) % 4]
        found = batch.sample({streams[name]: SAMPLINGS[name] for name in chosen})
        for name, token in zip(chosen, found, strict=True):
            assert token == next(iter(alone[name].generate(max_new_tokens=1, sampling=SAMPLINGS[name]))).token
        if turn == 15:
            name = chosen[0]
            streams[name].save(tmp_path / "stream")
            streams[name].close()
            assert batch.num_free == 1
            streams[name] = batch.admit(tmp_path / "stream")
    first = next(iter(streams))
    assert (
        streams[first].sample(SAMPLINGS[first])
        == next(iter(alone[first].generate(max_new_tokens=1, sampling=SAMPLINGS[first]))).token
    )
    with pytest.raises(CError, match="all 3 slots"):
        batch.admit()
    with pytest.raises(CError, match="stream is NULL"):
        streams[first].close()
        batch.feed({streams[first]: [1]})


def test_a_callback_ends_it_between_tokens(session: CSession, python_session: Session) -> None:
    expected = list(python_session.stream().generate(PROMPT, max_new_tokens=20))
    stream = session.stream()
    first = stream.generate(PROMPT, max_new_tokens=20, goes_on=lambda token: token != expected[4].token)
    assert first == expected[: len(first)]
    assert [item.token for item in first + stream.generate(max_new_tokens=20 - len(first))] == [
        item.token for item in expected
    ]


@pytest.mark.parametrize(
    "options", [{"precision": "fp16"}, {"logits": "all"}, {"kv_dtype": "int8"}, {"kv_dtype": "fp8"}], ids=str
)
def test_other_bundles(library: CLibrary, onnxruntime_library: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    """Long chunks, so that the memory of rows grows and shrinks; half precision; quantised rows with scales."""
    save_checkpoint(make_model(LONG_CHUNKS), tmp_path / "checkpoint")
    bundle: Bundle = export_checkpoint(tmp_path / "checkpoint", tmp_path / "bundle", **options)
    python_session = bundle.session("onnxruntime", threads=1, native=False)
    session = library.session(bundle.path, onnxruntime_library, threads=1)
    cpp, python = session.stream(), python_session.stream()
    long_prompt = PROMPT * 7
    np.testing.assert_array_equal(cpp.prefill(long_prompt), python.prefill(long_prompt))
    assert cpp.generate(max_new_tokens=100) == list(python.generate(max_new_tokens=100))
    cpp.save(tmp_path / "cpp")
    python.save(tmp_path / "python")
    assert header_and_data(tmp_path / "cpp") == header_and_data(tmp_path / "python")
    resumed = session.stream(tmp_path / "python")
    continued = python_session.stream(resume=tmp_path / "cpp")
    assert resumed.generate(max_new_tokens=80) == list(continued.generate(max_new_tokens=80))


def test_streams_move_between_exports(
    library: CLibrary, bundle: Bundle, onnxruntime_library: Path, tmp_path: Path
) -> None:
    """Keys and values are cast or quantised on the way; both languages make the same rows of them."""
    checkpoint = bundle.path.parent / "checkpoint"
    bundles = {"fp32": bundle, "fp16": export_checkpoint(checkpoint, tmp_path / "fp16", precision="fp16")}
    for kind in ("int8", "fp8"):
        bundles[kind] = export_checkpoint(checkpoint, tmp_path / kind, kv_dtype=kind)  # type: ignore[arg-type]
    python = {name: made.session("onnxruntime", threads=1, native=False) for name, made in bundles.items()}
    cpp = {name: library.session(made.path, onnxruntime_library, threads=1) for name, made in bundles.items()}
    for source in bundles:
        stream = python[source].stream()
        stream.prefill(PROMPT)
        stream.save(tmp_path / "stream")
        for target in bundles:
            cpp[target].stream(tmp_path / "stream").save(tmp_path / "cpp")
            python[target].stream(resume=tmp_path / "stream").save(tmp_path / "python")
            assert header_and_data(tmp_path / "cpp") == header_and_data(tmp_path / "python"), (source, target)


def test_compiled_operators(
    library: CLibrary,
    bundle: Bundle,
    python_session: Session,
    onnxruntime_library: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The operators of libmegalodon_onnxruntime, where they are built."""
    from megalodon_deploy.engine.library import find_onnxruntime_operators

    operators = find_onnxruntime_operators()
    if operators is None:
        pytest.skip("libmegalodon_onnxruntime.so is not built: make plugins")
    messages: list[tuple[int, str]] = []
    logger = library.log_to(messages)
    session = library.session(bundle.path, onnxruntime_library, operators_library=str(operators).encode())
    library.get("mgr_set_logger", None, None)
    assert any(str(operators) in text for _, text in messages), logger
    reference = bundle.session("onnxruntime", native=True).stream()
    np.testing.assert_array_equal(session.stream().prefill(PROMPT), reference.prefill(PROMPT))


def test_products_with_codes(library: CLibrary, onnxruntime_library: Path, tmp_path: Path) -> None:
    """In the graph for the CPU, which is the one that is opened: with the compiled operators and without."""
    config = replace(SHORT_CHUNKS, model_dim=64, value_dim=128, ffn_hidden_dim=96, z_dim=32, norm_num_groups=4)
    save_checkpoint(make_model(config), tmp_path / "checkpoint")
    bundle = export_checkpoint(tmp_path / "checkpoint", tmp_path / "bundle", quantize="int4")
    bundle.model_path.write_bytes(bytes(bundle.model_path.stat().st_size))
    operators = str(build_onnxruntime_operators()).encode()
    for native in (False, True):
        python = bundle.session("onnxruntime", threads=1, native=native).stream()
        options = {"operators_library": operators} if native else {}
        cpp = library.session(bundle.path, onnxruntime_library, threads=1, **options).stream()
        np.testing.assert_array_equal(cpp.prefill(PROMPT), python.prefill(PROMPT))
        assert cpp.generate(max_new_tokens=20) == list(python.generate(max_new_tokens=20))


def test_wrong_values_are_refused_and_the_stream_goes_on(session: CSession) -> None:
    stream = session.stream()
    for tokens, expected in (([], "fed no tokens"), ([256], "token 256 is outside"), ([-1], "token -1")):
        with pytest.raises(CError, match=expected) as caught:
            stream.prefill(tokens)
        assert caught.value.status == 1
    assert stream.position == 0
    assert np.isfinite(stream.prefill([1])).all()

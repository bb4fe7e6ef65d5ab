"""The compiled tests under every sanitizer, the examples, the installed package."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from cpp.conftest import BuildRuntime
from runtime.small_models import LONG_CHUNKS, SHORT_CHUNKS, make_model
from safetensors.numpy import save_file

from megalodon_deploy.bundle import Bundle
from megalodon_deploy.engine.toolchain import find_program
from megalodon_deploy.export import export_checkpoint
from megalodon_deploy.model.checkpoint import save_checkpoint
from megalodon_deploy.runtime.session import Session
from megalodon_deploy.state import LOGITS, POSITION, TOKENS, call_lengths, state_specs, zero_state


def run(command: list[str | Path], **environment: str) -> str:
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
    return done.stdout


@pytest.fixture(scope="session")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every input and output of ONNX Runtime while this loop, and not our runtime, drives a bundle greedily."""
    folder = tmp_path_factory.mktemp("recording")
    save_checkpoint(make_model(LONG_CHUNKS), folder / "checkpoint")
    bundle = export_checkpoint(folder / "checkpoint", folder / "bundle")
    config = bundle.config
    model = onnxruntime.InferenceSession(str(bundle.model_path), providers=["CPUExecutionProvider"])
    names = [output.name for output in model.get_outputs()]
    state = zero_state(config, batch=1, capacity=0, activation=np.dtype(np.float32))
    prompt, generated, position, num_calls = list(range(7, 7 + 170)), list[int](), 0, 0
    logits = np.empty(0)
    for given in [prompt, *[None] * 19]:
        tokens = given if given is not None else [generated[-1]]
        for length in call_lengths(position, len(tokens), config.chunk_size):
            now, tokens = tokens[:length], tokens[length:]
            inputs = state | {TOKENS: np.array([now]), POSITION: np.array([position])}
            outputs = dict(zip(names, model.run(names, inputs), strict=True))
            arrays = {name: np.ascontiguousarray(array) for name, array in (inputs | outputs).items()}
            save_file(arrays, folder / f"call-{num_calls}.safetensors")
            position, num_calls, logits = position + length, num_calls + 1, outputs[LOGITS]
            for spec in state_specs(config):
                present = outputs[spec.present]
                if spec.is_rows:
                    present = np.concatenate([state[spec.past], present], 2)
                    present = present if position % config.chunk_size else present[:, :, :0]
                state[spec.past] = present
        generated.append(int(logits[0, -1].argmax()))
    script = {"prompt": np.array(prompt), "generated": np.array(generated)}
    save_file(script, folder / "script.safetensors")
    return folder


@pytest.mark.parametrize("sanitizer", ["", "address", "thread"], ids=["plain", "address", "thread"])
def test_compiled_tests(build_runtime: BuildRuntime, recording: Path, sanitizer: str) -> None:
    options = {
        "ASAN_OPTIONS": "detect_leaks=1",
        "TSAN_OPTIONS": "halt_on_error=1",
        "MEGALODON_RECORDING": str(recording),
    }
    output = run([build_runtime(sanitizer) / "runtime_tests"], **options)
    assert "[  PASSED  ]" in output
    assert "SKIPPED" not in output


@pytest.fixture
def environment(onnxruntime_library: Path) -> dict[str, str]:
    return {"ONNXRUNTIME_LIBRARY": str(onnxruntime_library)}


def test_hello_stream(
    build_dir: Path, bundle: Bundle, python_session: Session, environment: dict[str, str], tmp_path: Path
) -> None:
    command = [build_dir / "hello_stream", bundle.path, "def main("]
    done = subprocess.run(command, env=os.environ | environment, cwd=tmp_path, capture_output=True, check=True)
    expected = "".join(item.text for item in python_session.stream().generate("def main(", max_new_tokens=200))
    assert done.stdout.decode() == expected + "\n"
    assert python_session.stream(resume=tmp_path / "conversation.safetensors").position == len("def main(") + 199


def test_onnxruntime_reports_to_nobody(
    build_dir: Path, bundle: Bundle, environment: dict[str, str], tmp_path: Path
) -> None:
    """Where it does, it keeps what it has to tell in the home directory."""
    home = {
        name: value for name, value in os.environ.items() if name not in ("XDG_CACHE_HOME", "ORT_DISABLE_TELEMETRY")
    }
    home |= environment | {"HOME": str(tmp_path / "home")}
    (tmp_path / "home").mkdir()
    subprocess.run([build_dir / "hello_stream", bundle.path], env=home, cwd=tmp_path, capture_output=True, check=True)
    assert list((tmp_path / "home").rglob("*")) == []


def test_robot_loop_keeps_its_rate(build_dir: Path, bundle: Bundle, environment: dict[str, str]) -> None:
    output = run([build_dir / "robot_loop", bundle.path, "10", "30"], **environment)
    assert re.match(r"30 ticks, \d+ missed deadlines", output), output


def test_stream_server_answers_every_request(build_dir: Path, bundle: Bundle, environment: dict[str, str]) -> None:
    output = run([build_dir / "stream_server", bundle.path, "5", "3", "20"], **environment)
    assert output.startswith("15 requests, 300 tokens"), output


@pytest.mark.parametrize("program", ["hello_stream", "robot_loop", "stream_server"])
def test_programs_end_with_one_line(build_dir: Path, program: str, tmp_path: Path) -> None:
    done = subprocess.run([build_dir / program, tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_sentencepiece_stream_writes_the_text_of_python(
    build_dir: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    """A model with byte fallback, a prompt that needs it, and random weights that generate every kind of piece."""
    program = build_dir / "sentencepiece_stream"
    if not program.exists():
        pytest.skip("libsentencepiece-dev is not installed")
    trainer = pytest.importorskip("sentencepiece", reason="sentencepiece is not installed").SentencePieceTrainer
    words = [f"def name_{index}(self, value): return value + {index}" for index in range(200)]
    options = {"vocab_size": 400, "model_type": "bpe", "byte_fallback": True, "minloglevel": 2}
    trainer.train(
        sentence_iterator=iter(words), model_prefix=str(tmp_path / "model"), hard_vocab_limit=False, **options
    )
    config = replace(SHORT_CHUNKS, vocab_size=400)
    save_checkpoint(make_model(config), tmp_path / "checkpoint")
    bundle = export_checkpoint(tmp_path / "checkpoint", tmp_path / "bundle", tokenizer=tmp_path / "model.model")
    prompt = "def name(self): héllo 日本"
    done = subprocess.run([program, bundle.path, prompt], env=os.environ | environment, capture_output=True, check=True)
    items = list(bundle.session("onnxruntime", threads=1, native=False).stream().generate(prompt, max_new_tokens=256))
    assert done.stdout.decode() == "".join(item.text for item in items) + "\n"
    assert len({item.token for item in items}) > 20


CONSUMER = """
cmake_minimum_required(VERSION 3.22)
project(consumer LANGUAGES C CXX)
find_package(megalodon REQUIRED)
add_executable(cpp_program main.cpp)
add_executable(c_program main.c)
target_link_libraries(cpp_program PRIVATE megalodon::runtime)
target_link_libraries(c_program PRIVATE megalodon::runtime)
set_target_properties(c_program PROPERTIES C_STANDARD 99 C_EXTENSIONS OFF)
set_target_properties(cpp_program c_program PROPERTIES NO_SYSTEM_FROM_IMPORTED ON)  # warnings of our headers too
target_compile_options(cpp_program PRIVATE -Wall -Wextra -Wpedantic -Werror)
target_compile_options(c_program PRIVATE -Wall -Wextra -pedantic -Werror)
"""
C_PROGRAM = """
#include <megalodon_runtime.h>
#include <stdio.h>
int main(int argc, char** argv) {
    mgr_session* session;
    int status = mgr_session_open(argv[argc - 1], NULL, &session);
    if (status != MGR_OK) return fprintf(stderr, "%s\\n", mgr_last_error());
    printf("%d\\n", (int)mgr_session_vocab_size(session));
    mgr_session_close(session);
    return 0;
}
"""


def readme_program() -> str:
    """The example of cpp/README.md as a whole program."""
    readme = (Path(__file__).parents[2] / "cpp" / "README.md").read_text()
    block = re.search(r"^```cpp\n(#include .*?\n)(.*?)^```", readme, re.MULTILINE | re.DOTALL)
    assert block is not None
    return f"#include <iostream>\n{block[1]}int main() {{\n{block[2]}}}\n"


def test_an_installed_package_is_found_and_the_readme_runs(
    build_dir: Path, bundle: Bundle, python_session: Session, environment: dict[str, str], tmp_path: Path
) -> None:
    cmake, prefix, source = find_program("cmake"), tmp_path / "prefix", tmp_path / "consumer"
    run([cmake, "--install", build_dir, "--prefix", prefix])
    source.mkdir()
    for name, text in (("CMakeLists.txt", CONSUMER), ("main.cpp", readme_program()), ("main.c", C_PROGRAM)):
        (source / name).write_text(text)
    generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={find_program('ninja')}"]
    run([cmake, *generator, "-S", source, "-B", source / "build", f"-DCMAKE_PREFIX_PATH={prefix}"])
    run([cmake, "--build", source / "build"])
    assert run([source / "build" / "c_program", bundle.path], **environment) == "256\n"
    (tmp_path / "my-bundle").symlink_to(bundle.path)
    command = [source / "build" / "cpp_program"]
    done = subprocess.run(command, env=os.environ | environment, cwd=tmp_path, capture_output=True, check=True)
    expected = "".join(item.text for item in python_session.stream().generate("def main("))
    assert done.stdout.decode() == expected


def test_the_library_needs_no_runtime_at_link_time(build_dir: Path) -> None:
    output = run(["readelf", "-d", build_dir / "libmegalodon_runtime.so"])
    needed = re.findall(r"NEEDED.*\[(.+)\]", output)
    assert needed, output
    assert not [name for name in needed if re.search("onnx|nvinfer|tensorrt|cuda|torch|python", name)]


def test_the_build_script_prints_the_library(build_dir: Path) -> None:
    script = Path(__file__).parents[2] / "cpp" / "build.py"
    assert Path(run([sys.executable, script]).strip()) == build_dir / "libmegalodon_runtime.so"

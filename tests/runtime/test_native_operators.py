"""Sessions of ONNX Runtime with and without the compiled operators."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from helpers import assert_close
from runtime.conftest import MakeBundle

from megalodon_deploy.bundle import Bundle
from megalodon_deploy.engine import library
from megalodon_deploy.engine.library import KERNELS_VARIABLE, OPERATORS_VARIABLE
from megalodon_deploy.engine.toolchain import build_onnxruntime_operators
from megalodon_deploy.errors import EngineError, MissingDependencyError
from megalodon_deploy.runtime.session import Session

ERRORS_ONLY = 3  # of ONNX Runtime's severities
TOKENS = [int(token) for token in np.random.default_rng(3).integers(0, 256, 41)]  # three chunk edges and more


@pytest.fixture(autouse=True, scope="module")
def built() -> Path:
    return build_onnxruntime_operators()


def all_logits(session: Session) -> np.ndarray:
    stream = session.stream()
    outputs = [stream.prefill(TOKENS[:17])]
    outputs += [stream.step(token) for token in TOKENS[17:]]
    return np.stack(outputs)


def test_they_give_the_same_logits(make_bundle: MakeBundle) -> None:
    bundle = make_bundle()
    native, portable = (bundle.session(native=choice) for choice in (True, False))
    assert_close(all_logits(native), all_logits(portable), 2e-6, "logits")


def test_an_fp16_graph_keeps_its_function_bodies(make_bundle: MakeBundle) -> None:
    bundle = make_bundle(precision="fp16")
    assert bundle.session().executor.operators is None
    with pytest.raises(EngineError, match="the compiled operators are float32, the bundle is fp16"):
        bundle.session(native=True)


def optimised_operators(bundle: Bundle, built: Path | None, directory: Path) -> set[str]:
    """Types of the nodes that ONNX Runtime executes."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(directory / "optimised.onnx")
    options.log_severity_level = ERRORS_ONLY
    if built:
        options.register_custom_ops_library(str(built))
    onnxruntime.InferenceSession(str(bundle.model_path), options, providers=["CPUExecutionProvider"])
    return {node.op_type for node in onnx.load(directory / "optimised.onnx", load_external_data=False).graph.node}


def test_compiled_operators_take_the_place_of_function_bodies(
    make_bundle: MakeBundle, built: Path, tmp_path: Path
) -> None:
    ours = {"ChunkAttention", "ComplexEMA", "TimestepNorm"}
    assert ours <= optimised_operators(make_bundle(), built, tmp_path)
    assert not ours & optimised_operators(make_bundle(), None, tmp_path)


def test_they_are_taken_where_they_are_and_left_out_on_request(
    make_bundle: MakeBundle, built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = make_bundle()
    assert bundle.session().executor.operators == built
    assert bundle.session(native=False).executor.operators is None
    monkeypatch.setenv(KERNELS_VARIABLE, "reference")
    assert bundle.session().executor.operators is None


def test_without_the_library_only_a_demand_fails(
    make_bundle: MakeBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "default_operators_dir", lambda: tmp_path)
    assert make_bundle().session().executor.operators is None
    with pytest.raises(MissingDependencyError, match=r"libmegalodon_onnxruntime.so is missing; build it: .*build-cpu"):
        make_bundle().session(native=True)


def test_a_file_that_is_no_library_is_named(
    make_bundle: MakeBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setenv(OPERATORS_VARIABLE, str(broken))
    with pytest.raises(EngineError, match=r"broken\.so: ONNX Runtime cannot load it .*build it again"):
        make_bundle().session()

"""The C++ runtime, compiled once for the session, and bundles for it."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from cpp.c_library import CLibrary, CSession
from runtime.small_models import SHORT_CHUNKS, make_model

from megalodon_deploy.bundle import Bundle
from megalodon_deploy.engine.library import repository_root
from megalodon_deploy.errors import MissingDependencyError
from megalodon_deploy.export import export_checkpoint
from megalodon_deploy.model.checkpoint import save_checkpoint
from megalodon_deploy.runtime.session import Session

BuildRuntime = Callable[[str], Path]


def load_script(name: str) -> ModuleType:
    """A script of the cpp directory, as a module."""
    root = repository_root()
    assert root is not None, "the tests run from a checkout"
    spec = importlib.util.spec_from_file_location(name, root / "cpp" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def build_runtime() -> BuildRuntime:
    """`build_runtime(sanitizer or "")`: the directory of a build; skipped where its libraries are not installed."""
    script = load_script("build")

    def build(sanitize: str = "") -> Path:
        try:
            folder: Path = script.build(sanitize)
        except MissingDependencyError as error:
            if os.environ.get("CI"):
                raise
            pytest.skip(str(error))
        return folder

    return build


@pytest.fixture(scope="session")
def build_dir(build_runtime: BuildRuntime) -> Path:
    return build_runtime("")


@pytest.fixture(scope="session")
def library(build_dir: Path) -> CLibrary:
    return CLibrary(build_dir / "libmegalodon_runtime.so")


@pytest.fixture(scope="session")
def onnxruntime_library() -> Path:
    """The directory of libonnxruntime.so that the Python package brings."""
    import onnxruntime

    return Path(onnxruntime.__file__).parent / "capi"


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    directory = tmp_path_factory.mktemp("cpp")
    save_checkpoint(make_model(SHORT_CHUNKS), directory / "checkpoint")
    return export_checkpoint(directory / "checkpoint", directory / "bundle")


@pytest.fixture(scope="session")
def python_session(bundle: Bundle) -> Session:
    return bundle.session("onnxruntime", threads=1, native=False)


@pytest.fixture(scope="session")
def session(library: CLibrary, bundle: Bundle, onnxruntime_library: Path) -> CSession:
    return library.session(bundle.path, onnxruntime_library, threads=1)

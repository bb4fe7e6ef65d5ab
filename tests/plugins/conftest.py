"""Libraries under test, compiled once for the session; nothing is done when they are up to date."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from kernel_helpers import ASCENDING, HostMemory, KernelLibrary

from megalodon_deploy.engine.library import repository_root
from megalodon_deploy.engine.toolchain import build_emulated, build_plugins
from megalodon_deploy.errors import MissingDependencyError

EMULATED_VARIABLE = "MEGALODON_EMULATED_LIBRARY"  # a sanitized or a mutated library


@pytest.fixture(scope="session")
def repository() -> Path:
    root = repository_root()
    assert root is not None, "the tests run from a checkout"
    return root


@pytest.fixture(scope="session")
def emulated_path(repository: Path) -> Path:
    """libmegalodon_emulated.so: the kernels compiled for the CPU, or the copy that the environment names."""
    if chosen := os.environ.get(EMULATED_VARIABLE):
        return Path(chosen)
    return build_emulated(repository / "build" / "emulated")


@pytest.fixture(scope="session")
def plugin_path() -> Path:
    """The real libmegalodon.so; skipped where nothing can compile it."""
    try:
        return build_plugins()
    except MissingDependencyError as error:
        pytest.skip(f"libmegalodon.so cannot be built here: {error}")


@pytest.fixture(scope="session")
def kernels(emulated_path: Path) -> KernelLibrary:
    """The emulated kernels, driven from host memory."""
    return KernelLibrary(emulated_path, HostMemory())


@pytest.fixture
def set_order(kernels: KernelLibrary) -> Iterator[Callable[[int], None]]:
    """Chooses the order in which the threads of a block run, until the test ends."""

    def choose(order: int) -> None:
        kernels.library.mgd_emulate_order(ctypes.c_int64(order))

    yield choose
    choose(ASCENDING)

"""Compile the emulated library once, and again in part for each changed header."""

from __future__ import annotations

import os
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from mutants import Mutant

PLUGINS = Path(__file__).resolve().parents[1]
COMPILE = ["c++", "-std=c++17", "-O1", "-fPIC", "-w", "-DMEGALODON_EMULATE"]


def sources_of_kernels() -> list[Path]:
    """The headers that hold device code, without CUDA's side of the emulation."""
    paths = [*PLUGINS.glob("operators/*/*.cuh"), *PLUGINS.glob("common/*.cuh")]
    return sorted(path for path in paths if path.name != "platform.cuh")


class Builder:
    """Objects live in `folder`; `flags` are for the compiler and the linker."""

    def __init__(self, folder: Path, flags: Sequence[str]) -> None:
        self.folder, self.flags = folder, list(flags)
        folder.mkdir(parents=True, exist_ok=True)
        kernels = [*PLUGINS.glob("operators/*/*.cu"), *PLUGINS.glob("common/*.cu")]
        hosts = ("operators/*/c_api.cpp", "c_api/*.cpp", "emulation/*.cpp")
        self.sources = sorted([*kernels, *(path for pattern in hosts for path in PLUGINS.glob(pattern))])
        self.includes: dict[Path, set[str]] = {}
        self.lock = threading.Lock()

    def original(self) -> Path:
        """The library as it is, compiled on the first call. Raises RuntimeError when it does not compile."""
        with self.lock:
            return self.folder / "original.so" if self.includes else self._build_original()

    def _build_original(self) -> Path:
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            compiled = list(pool.map(lambda source: self._compile(source, self._object(source)), self.sources))
        if not all(compiled):
            raise RuntimeError("the kernels do not compile as they are")
        for source in self.sources:
            command = [*self._command(source), "-MM"]
            output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            self.includes[source] = set(output.replace("\\\n", " ").split())
        return self._link({source: self._object(source) for source in self.sources}, self.folder / "original.so")

    @contextmanager
    def mutant(self, mutant: Mutant) -> Iterator[Path | None]:
        """The library of one mutant, None when it does not compile."""
        self.original()
        with tempfile.TemporaryDirectory(dir=self.folder) as name:
            folder = Path(name)
            changed = folder / mutant.path
            changed.parent.mkdir(parents=True)
            changed.write_text(mutant.apply((PLUGINS / mutant.path).read_text()))
            objects = {source: self._object(source) for source in self.sources}
            compiled = True
            for number, source in enumerate(self.sources):
                if str(PLUGINS / mutant.path) in self.includes[source]:
                    objects[source] = folder / f"{number}.o"
                    compiled = compiled and self._compile(source, objects[source], folder)
            yield self._link(objects, folder / "mutant.so") if compiled else None

    def _object(self, source: Path) -> Path:
        return self.folder / (str(source.relative_to(PLUGINS)).replace("/", "-") + ".o")

    def _command(self, source: Path, *before: Path) -> list[str]:
        """A changed header in a folder of `before` hides the plugins' own."""
        folders = [*before, PLUGINS, PLUGINS / "include"]
        return [*COMPILE, *self.flags, *(f"-I{folder}" for folder in folders), "-x", "c++", str(source)]

    def _compile(self, source: Path, target: Path, *before: Path) -> bool:
        command = [*self._command(source, *before), "-c", "-o", str(target)]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    def _link(self, objects: dict[Path, Path], target: Path) -> Path:
        subprocess.run(["c++", *self.flags, "-shared", "-o", target, *objects.values()], check=True)
        return target

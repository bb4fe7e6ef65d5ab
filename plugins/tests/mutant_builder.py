"""Compile the emulated library with every mutant in it; $MEGALODON_MUTANT chooses one when the library is loaded."""

from __future__ import annotations

import os
import re
import subprocess
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mutants import Mutant, instrument

PLUGINS = Path(__file__).resolve().parents[1]
VARIABLE = "MEGALODON_MUTANT"
COMPILE = ["c++", "-std=c++17", "-O1", "-fPIC", "-w", "-fmax-errors=50", "-DMEGALODON_EMULATE"]
MOST_TRIES = 10

CHOICE_HEADER = "extern int mgd_mutant;\n#define MGD_MUTANT(number) (mgd_mutant == (number))\n"
CHOICE_SOURCE = f"""\
#include <cstdlib>
static int chosen() {{
    const char* text = std::getenv("{VARIABLE}");
    return text == nullptr ? 0 : std::atoi(text);
}}
int mgd_mutant = chosen();
"""


def sources_of_kernels() -> list[Path]:
    """The headers that hold device code, without CUDA's side of the emulation."""
    paths = [*PLUGINS.glob("operators/*/*.cuh"), *PLUGINS.glob("common/*.cuh")]
    return sorted(path for path in paths if path.name != "platform.cuh")


class Builder:
    """Everything is below `folder`; `flags` are for the compiler and the linker."""

    def __init__(self, folder: Path, flags: Sequence[str], mutants: Sequence[Mutant]) -> None:
        self.folder, self.flags, self.mutants = folder, list(flags), list(mutants)
        self.numbers = {mutant.key: number for number, mutant in enumerate(mutants, 1)}
        self.broken: set[str] = set()  # keys of mutants that do not compile
        self.done = False
        self.lock = threading.Lock()

    @property
    def library(self) -> Path:
        """Compiled on the first use. Raises RuntimeError when the sources do not compile as they are."""
        with self.lock:
            if not self.done:
                self._build()
                self.done = True
        return self.folder / "mutants.so"

    def environment(self, mutant: Mutant | None) -> dict[str, str]:
        """Variables of a process that tries one mutant, or none."""
        return {VARIABLE: str(self.numbers[mutant.key] if mutant else 0)}

    def _build(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "mutant.h").write_text(CHOICE_HEADER)
        (self.folder / "mutant.cpp").write_text(CHOICE_SOURCE)
        kernels = [path for pattern in ("operators/*/*.cu", "common/*.cu") for path in PLUGINS.glob(pattern)]
        hosts = ("operators/*/c_api.cpp", "common/cuda_error.cpp", "c_api/*.cpp", "emulation/*.cpp")
        sources = [*kernels, *(path for pattern in hosts for path in PLUGINS.glob(pattern)), self.folder / "mutant.cpp"]
        waiting = sources
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            for _ in range(MOST_TRIES):
                self._write_sources()
                errors = list(pool.map(self._compile, waiting))
                waiting = [source for source, error in zip(waiting, errors, strict=True) if error]
                if not waiting:
                    break
                if not self._leave_out(errors):
                    raise RuntimeError(f"the kernels do not compile: {next(filter(None, errors))[:2000]}")
        command = ["c++", *self.flags, "-shared", "-o", self.folder / "mutants.so", *map(self._object, sources)]
        subprocess.run(command, check=True)

    def _write_sources(self) -> None:
        for path in sources_of_kernels():
            name = str(path.relative_to(PLUGINS))
            chosen = [mutant for mutant in self.mutants if mutant.path == name and mutant.key not in self.broken]
            target = self.folder / "sources" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(instrument(path.read_text(), chosen, self.numbers))

    def _leave_out(self, errors: Iterable[str]) -> bool:
        """Forget the mutants of the lines that the compiler complains of; whether there were any."""
        lines = {
            (match.group(1), int(match.group(2)))
            for error in errors
            for match in re.finditer(r"/sources/(\S+?\.cuh):(\d+)", error)
        }
        found = {mutant.key for mutant in self.mutants if (mutant.path, mutant.line) in lines} - self.broken
        self.broken |= found
        return bool(found)

    def _object(self, source: Path) -> Path:
        return self.folder / (str(source.relative_to(source.parents[2])).replace("/", "-") + ".o")

    def _compile(self, source: Path) -> str:
        """The compiler's complaints, empty when there are none. Changed headers come before the plugins' own."""
        folders = [self.folder / "sources", PLUGINS, PLUGINS / "include"]
        command = [*COMPILE, *self.flags, *(f"-I{folder}" for folder in folders)]
        command += ["-include", str(self.folder / "mutant.h"), "-x", "c++", "-c", str(source)]
        done = subprocess.run([*command, "-o", self._object(source)], capture_output=True, text=True, check=False)
        return done.stderr if done.returncode else ""

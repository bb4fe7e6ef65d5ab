"""Compile the emulated library with every mutant in it; `mgd_choose_mutant(number)` chooses one, 0 none."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mutants import Mutant, instrument

PLUGINS = Path(__file__).resolve().parents[1]
COMPILE = ["c++", "-std=c++17", "-O1", "-fPIC", "-w", "-fmax-errors=50", "-DMEGALODON_EMULATE"]
MOST_TRIES = 10
MOST_OF_A_SOURCE = 1000  # mutants: each source has numbers of its own, so that an edit leaves those of others

# What stands in the place of the removed text. A removal that would have changed something is noted in `mgd_touched`.
CHOICE_HEADER = """\
#pragma once
extern int mgd_mutant;
extern "C" unsigned char mgd_touched[];
inline bool mgd_tried(int number) {
    mgd_touched[number] = 1;
    return mgd_mutant == number;
}
inline bool mgd_or(int number, bool value) {
    return value || mgd_tried(number);
}
inline bool mgd_and_not(int number, bool value) {
    return value && !mgd_tried(number);
}
"""
CHOICE_SOURCE = """\
int mgd_mutant = 0;
extern "C" unsigned char mgd_touched[NUM_MUTANTS + 1] = {};
extern "C" void mgd_choose_mutant(int number) { mgd_mutant = number; }
"""


def sources_of_kernels() -> list[Path]:
    """Kernels and their launchers, without CUDA's side of the emulation."""
    paths = [*PLUGINS.glob("operators/*/*.cu*"), *PLUGINS.glob("common/*.cuh")]
    return sorted(path for path in paths if path.name != "platform.cuh")


def numbers_of(mutants: Sequence[Mutant]) -> dict[str, int]:
    """By key, from 1 on."""
    paths = sorted({mutant.path for mutant in mutants})
    numbers = {}
    for index, path in enumerate(paths):
        keys = [mutant.key for mutant in mutants if mutant.path == path]
        assert len(keys) < MOST_OF_A_SOURCE, f"Bug: too many mutants of {path}"
        numbers |= {key: index * MOST_OF_A_SOURCE + place for place, key in enumerate(keys, 1)}
    return numbers


class Builder:
    """Everything is below `folder`; `flags` are for the compiler and the linker."""

    def __init__(self, folder: Path, flags: Sequence[str], mutants: Sequence[Mutant]) -> None:
        self.folder, self.flags, self.mutants = folder, list(flags), list(mutants)
        self.numbers = numbers_of(mutants)
        self.broken: set[str] = set()  # keys of mutants that do not compile

    @property
    def library(self) -> Path:
        return self.folder / "mutants.so"

    def build(self) -> None:
        """Raises RuntimeError when the sources do not compile as they are."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "mutant.h").write_text(CHOICE_HEADER)
        count = str(max(self.numbers.values(), default=0))
        (self.folder / "mutant.cpp").write_text(CHOICE_SOURCE.replace("NUM_MUTANTS", count))
        kernels = [self._changed(path) for path in sources_of_kernels() if path.suffix == ".cu"]
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
        command = ["c++", *self.flags, "-shared", "-o", self.library, *map(self._object, sources)]
        subprocess.run(command, check=True)

    def _write_sources(self) -> None:
        for path in sources_of_kernels():
            name = str(path.relative_to(PLUGINS))
            chosen = [mutant for mutant in self.mutants if mutant.path == name and mutant.key not in self.broken]
            target = self._changed(path)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(instrument(path.read_text(), chosen, self.numbers))

    def _changed(self, source: Path) -> Path:
        return self.folder / "sources" / source.relative_to(PLUGINS)

    def _leave_out(self, errors: Iterable[str]) -> bool:
        """Forget the mutants of the lines that the compiler complains of; whether there were any."""
        lines = {
            (match.group(1), int(match.group(2)))
            for error in errors
            for match in re.finditer(r"/sources/(\S+?\.cuh?):(\d+)", error)
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
        command += ["-include", str(self.folder / "mutant.h"), "-x", "c++", str(source)]
        expanded = subprocess.run([*command, "-E"], capture_output=True, check=False).stdout
        digest = hashlib.sha256(" ".join(command).encode() + expanded).hexdigest()
        target = self._object(source)
        stamp = target.with_suffix(".sha256")
        if target.is_file() and stamp.is_file() and stamp.read_text() == digest:
            return ""
        stamp.unlink(missing_ok=True)
        done = subprocess.run([*command, "-c", "-o", target], capture_output=True, text=True, check=False)
        if done.returncode:
            return done.stderr
        stamp.write_text(digest)
        return ""

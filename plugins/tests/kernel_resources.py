"""What each kernel takes of each GPU: registers, stack, shared memory, read from the built library with cuobjdump.

    python plugins/tests/kernel_resources.py [LIBRARY] [--markdown]

Registers that a compiler spills lie on the stack, so a kernel without a stack has no spills.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megalodon_deploy.engine.library import find_plugin_library
from megalodon_deploy.errors import MissingDependencyError, UserError

ARCHITECTURE = re.compile(r"^arch = sm_(\w+)$")
FUNCTION = re.compile(r"^ Function (\S+):$")
USE = re.compile(r"\b(REG|STACK|SHARED|LOCAL):(\d+)")


@dataclass(frozen=True)
class KernelUse:
    """One kernel on one architecture. Stack and local memory are a thread's, shared memory is a block's."""

    kernel: str  # with its template arguments
    architecture: int  # 75, 80 ...
    registers: int
    stack_bytes: int
    local_bytes: int
    shared_bytes: int

    @property
    def leaves_registers(self) -> bool:
        return self.stack_bytes > 0 or self.local_bytes > 0


def find_cuobjdump() -> Path:
    """From $CUDA_HOME, PATH, /usr/local/cuda or the PyPI wheel. Raises `MissingDependencyError`."""
    folders = [Path(os.environ["CUDA_HOME"]) / "bin"] if os.environ.get("CUDA_HOME") else []
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        folders += sorted(Path(folder).glob("cu*/bin"), reverse=True)
    for folder in [*folders, None, Path("/usr/local/cuda/bin")]:
        if found := shutil.which("cuobjdump", path=folder):
            return Path(found)
    raise MissingDependencyError("cuobjdump was not found; pip install 'megalodon-deploy[dev]', or set CUDA_HOME")


def read_resources(library: Path) -> list[KernelUse]:
    """Every kernel of every architecture, sorted by name."""
    command = [find_cuobjdump(), "--dump-resource-usage", library]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    uses = list(parse_resources(done.stdout))
    names = _demangled([use[0] for use in uses])
    found = {
        KernelUse(names[name], architecture, *numbers) for name, architecture, numbers in uses
    }  # some stand in two files
    return sorted(found, key=lambda use: (use.kernel, use.architecture))


def parse_resources(text: str) -> Iterator[tuple[str, int, tuple[int, int, int, int]]]:
    """(mangled name, architecture, (registers, stack, local, shared)) of each function in cuobjdump's output."""
    architecture, name = 0, ""
    for line in text.splitlines():
        if found := ARCHITECTURE.match(line):
            architecture = int(found.group(1).rstrip("af"))
        elif found := FUNCTION.match(line):
            name = found.group(1)
        elif name and (numbers := dict(USE.findall(line))):
            values = tuple(int(numbers[key]) for key in ("REG", "STACK", "LOCAL", "SHARED"))
            assert len(values) == 4, "Bug: four were asked for"
            yield name, architecture, values
            name = ""


def _demangled(names: Sequence[str]) -> dict[str, str]:
    """Readable names without namespaces, arguments and the types' own namespaces."""
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    return dict(zip(names, map(_short, done.stdout.splitlines()), strict=True))


def _short(name: str) -> str:
    """`void megalodon::norm::kernel<__half, 4>(megalodon::Call)` -> `norm::kernel<half, 4>`."""
    name = re.sub(r"\((?:[^()]|\([^()]*\))*\)$", "", name).removeprefix("void ")
    name = re.sub(r"\bmegalodon::|\(anonymous namespace\)::", "", name)
    kernel, bracket, arguments = name.partition("<")
    arguments = re.sub(r"\w+::|\((?:int|bool|unsigned int)\)", "", arguments)
    return kernel + bracket + arguments.replace("__nv_bfloat16", "bfloat16").replace("__half", "half")


def table(uses: Sequence[KernelUse], *, markdown: bool = False) -> str:
    """A row for each kernel: registers on each architecture; the most stack, local and shared bytes of any."""
    architectures = sorted({use.architecture for use in uses})
    rows = [["kernel", *(f"sm_{number}" for number in architectures), "stack", "local", "shared"]]
    for kernel in sorted({use.kernel for use in uses}):
        own = {use.architecture: use for use in uses if use.kernel == kernel}
        registers = [str(own[number].registers) if number in own else "-" for number in architectures]
        most = [max(getattr(use, f"{kind}_bytes") for use in own.values()) for kind in ("stack", "local", "shared")]
        rows.append([kernel, *registers, *map(str, most)])
    if markdown:
        rows.insert(1, ["---"] * len(rows[0]))
        return "\n".join("| " + " | ".join(row) + " |" for row in rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if index == 0 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", nargs="?", type=Path, help="default: the built libmegalodon.so")
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    try:
        print(table(read_resources(options.library or find_plugin_library()), markdown=options.markdown))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

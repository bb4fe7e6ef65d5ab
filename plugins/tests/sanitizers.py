"""How a Python process loads a library that was compiled with AddressSanitizer and UndefinedBehaviorSanitizer."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from megalodon_deploy.errors import MissingDependencyError

FLAGS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g1"]
RUNTIMES = ("libasan.so", "libubsan.so")


def sanitizer_environment(library: Path) -> dict[str, str]:
    """Variables of a process whose emulated library is `library`. The sanitizers come before everything else.

    Tensors get no margins: the first byte outside one is then an error of the sanitizer's. Leaks are not looked for,
    since Python has its own. Raises `MissingDependencyError` when the compiler has no sanitizers.
    """
    paths = [_path_of(name) for name in RUNTIMES]
    if paths == list(RUNTIMES):  # what the compiler answers for a file that it does not have
        raise MissingDependencyError("the C++ compiler has no sanitizer libraries; apt-get install g++")
    return os.environ | {
        "LD_PRELOAD": " ".join(paths),
        "ASAN_OPTIONS": "detect_leaks=0",
        "PYTHONMALLOC": "malloc",
        "MEGALODON_TEST_MARGIN": "0",
        "MEGALODON_EMULATED_LIBRARY": str(library),
    }


def _path_of(name: str) -> str:
    command = ["c++", f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

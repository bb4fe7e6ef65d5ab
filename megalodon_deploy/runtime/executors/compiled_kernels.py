"""What TensorRT-RTX compiled for this GPU, kept in the user's cache: the next process need not compile it again."""

from __future__ import annotations

import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any

from megalodon_deploy.engine.library import cache_dir
from megalodon_deploy.files import atomic_file


class CompiledKernels:
    """Of one engine on one kind of GPU. TensorRT-RTX refuses by itself what another driver or release compiled.

    The file is written when the last holder is gone, or at the end of the program.
    """

    def __init__(self, engine_sha256: str, capability: int) -> None:
        self._path = cache_dir() / f"{engine_sha256[:32]}-sm{capability}.kernels"
        self._cache: Any = None

    def use_in(self, config: Any) -> None:
        """Let contexts of this runtime configuration take kernels from the cache, and add theirs."""
        if self._cache is None:
            self._cache = config.create_runtime_cache()
            with suppress(OSError):  # there is none yet
                self._cache.deserialize(self._path.read_bytes())
            weakref.finalize(self, _save, self._cache, self._path)
        config.set_runtime_cache(self._cache)


def _save(cache: Any, path: Path) -> None:
    content = bytes(cache.serialize())
    with suppress(OSError), atomic_file(path) as file:  # a cache that cannot be written costs time, nothing else
        file.write_bytes(content)

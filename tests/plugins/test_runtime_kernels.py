"""Whole streams over the kernels that the runtime calls itself, compiled for the CPU, and the stand-in for a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from choice_helpers import CHOICE_SETTINGS
from runtime.fake_gpu import FakeCudaExecutor, FakeGpu
from runtime.small_models import SHORT_CHUNKS, make_model

from megalodon_deploy.errors import EngineError
from megalodon_deploy.export import export_checkpoint
from megalodon_deploy.model.checkpoint import save_checkpoint
from megalodon_deploy.runtime.cuda.kernels import ChoiceCall, Kernels
from megalodon_deploy.runtime.sampling import SamplingParams
from megalodon_deploy.runtime.session import Session


class QueuedKernels:
    """The compiled kernels, in the stand-in's queue."""

    def __init__(self, gpu: FakeGpu, path: Path) -> None:
        self._gpu, self._kernels = gpu, Kernels(path)

    def choose_tokens_workspace_bytes(self, batch: int, vocab_size: int) -> int:
        return self._kernels.choose_tokens_workspace_bytes(batch, vocab_size)

    def append_rows(self, *arguments: Any, **options: Any) -> None:
        self._gpu.enqueue(lambda: self._kernels.append_rows(*arguments, **options))

    def choose_tokens(self, call: ChoiceCall, stream: int) -> None:
        self._gpu.enqueue(lambda: self._kernels.choose_tokens(call, stream))


@pytest.mark.parametrize("kv_dtype", ["activation", "int8"])
def test_streams_over_compiled_kernels_are_those_of_the_cpu(emulated_path: Path, tmp_path: Path, kv_dtype: Any) -> None:
    save_checkpoint(make_model(SHORT_CHUNKS), tmp_path / "checkpoint")
    bundle = export_checkpoint(tmp_path / "checkpoint", tmp_path / "bundle", kv_dtype=kv_dtype)
    executor = FakeCudaExecutor(bundle)
    executor.kernels = QueuedKernels(executor.gpu, emulated_path)  # type: ignore[assignment]
    scheduler = Session(bundle, executor).serve(max_streams=2, prefill_tokens=10)
    alone = bundle.session(threads=1)
    requests = []
    for index, params in enumerate([None, CHOICE_SETTINGS[6], CHOICE_SETTINGS[-1]]):
        seeded = params and SamplingParams(**{**vars(params), "seed": index})
        options: dict[str, Any] = {"prompt": [index, 7, 9] * 4, "max_new_tokens": 5, "sampling": seeded}
        requests.append((scheduler.submit(**options), options))
    scheduler.run()
    for request, options in requests:
        assert list(request) == list(alone.stream().generate(**options))
    executor.gpu.check_margins()


def test_a_library_of_another_kind_is_refused() -> None:
    with pytest.raises(EngineError, match="no libmegalodon of this release"):
        Kernels(Path("libc.so.6"))
    with pytest.raises(EngineError, match="no libmegalodon of this release"):
        Kernels(Path("nothing.so"))

"""Calls of mgd_choose_tokens beside what `sampling.py` chooses."""

from __future__ import annotations

import ctypes

import numpy as np
from kernel_helpers import KernelLibrary, Tensor

from megalodon_deploy.runtime.cuda.kernels import CHOICE_DTYPE
from megalodon_deploy.runtime.sampling import Generator, SamplingParams, choose_token, penalised_tokens

MAX_RECENT = 40
CHOICE_SETTINGS = [
    SamplingParams.greedy(),
    SamplingParams(),
    SamplingParams(temperature=0.3),
    SamplingParams(temperature=5.0),
    SamplingParams(top_k=1),
    SamplingParams(top_k=7, temperature=3.0),
    SamplingParams(top_p=0.2, temperature=4.0),
    SamplingParams(top_p=0.95),
    SamplingParams(min_p=0.3, temperature=2.0),
    SamplingParams(min_p=1.0),
    SamplingParams(top_k=50, top_p=0.7, min_p=0.05, temperature=3.0),
    SamplingParams(temperature=0.0, repetition_penalty=3.0, repetition_window=40),
    SamplingParams(repetition_penalty=0.4, repetition_window=10, top_p=0.8),
]


class ChoiceRow:
    """What one row of a call is asked, and what `sampling.py` answers."""

    def __init__(self, logits_V: np.ndarray, params: SamplingParams, recent: list[int], seed: int) -> None:
        self.logits_V, self.params, self.recent = logits_V, params, recent
        self.uniform = Generator(seed).uniform()
        self.expected = choose_token(logits_V, params, recent, Generator(seed))

    def setting(self) -> tuple[float | int, ...]:
        params, seen = self.params, penalised_tokens(self.recent, self.params)
        filters = (params.temperature, params.top_p, params.min_p, params.repetition_penalty)
        return (*filters, self.uniform, params.top_k or 0, len(seen), 1)


def run_choices(library: KernelLibrary, rows: list[ChoiceRow | None]) -> np.ndarray:
    """Tokens [B]; None is a row that is left out."""
    vocab_size = next(row.logits_V.size for row in rows if row)
    logits = np.full((len(rows), vocab_size), np.nan, np.float32)
    settings = np.zeros(len(rows), CHOICE_DTYPE)
    recent = np.full((len(rows), MAX_RECENT), 1 << 40, np.int64)
    for index, row in enumerate(rows):
        if row:
            logits[index], settings[index] = row.logits_V, row.setting()
            seen = penalised_tokens(row.recent, row.params)
            recent[index, : len(seen)] = seen
    function = library.library.mgd_choose_tokens_workspace_bytes
    function.restype = ctypes.c_size_t
    sizes = [ctypes.c_int64(len(rows)), ctypes.c_int64(vocab_size)]
    workspace_bytes = function(*sizes)
    assert workspace_bytes == 8 * logits.size
    given = [Tensor(library.memory, array) for array in (logits, settings.view(np.int64), recent)]
    tokens = Tensor(library.memory, np.full(len(rows), -7, np.int64))
    workspace = Tensor(library.memory, np.full(logits.size, np.nan))
    pointers = [tensor.pointer for tensor in given]
    status = library.library.mgd_choose_tokens(
        *sizes,
        *pointers,
        ctypes.c_int64(MAX_RECENT),
        tokens.pointer,
        workspace.pointer,
        ctypes.c_size_t(workspace_bytes),
        ctypes.c_void_p(library.memory.stream()),
    )
    assert status == 0, library.status_string(status)
    workspace.read()
    assert all(tensor.is_unchanged() for tensor in given), "an input was written"
    return tokens.read()

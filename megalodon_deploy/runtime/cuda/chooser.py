"""Choosing tokens on the GPU: settings go there, one number for each stream comes back."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from megalodon_deploy.runtime.cuda.arena import Arena, aligned
from megalodon_deploy.runtime.cuda.gpu import Gpu
from megalodon_deploy.runtime.cuda.kernels import CHOICE_DTYPE, ChoiceCall, Kernels
from megalodon_deploy.runtime.cuda.staging import StagingRing
from megalodon_deploy.runtime.sampling import HISTORY_TOKENS, Choice, penalised_tokens

_INT64_BYTES = 8


class TokenChooser:
    """For logits [num_slots, V] float32 on the GPU. Used while the GPU's context is current."""

    def __init__(self, gpu: Gpu, arena: Arena, kernels: Kernels, num_slots: int, vocab_size: int) -> None:
        self._gpu, self._kernels = gpu, kernels
        self._num_slots, self._vocab_size = num_slots, vocab_size
        self._recent_offset = aligned(num_slots * CHOICE_DTYPE.itemsize)
        block_bytes = self._recent_offset + num_slots * HISTORY_TOKENS * _INT64_BYTES
        self._workspace_bytes = kernels.choose_tokens_workspace_bytes(num_slots, vocab_size)
        self._device = arena.device(
            {"block": block_bytes, "workspace": self._workspace_bytes, "tokens": num_slots * _INT64_BYTES}
        )
        self._ring = StagingRing(gpu, arena, num_blocks=1, size_bytes=block_bytes)
        self._tokens_address, self._tokens = arena.pinned(num_slots * _INT64_BYTES)

    def choose(self, logits: int, choices: Mapping[int, Choice]) -> dict[int, int]:
        """The next token of each of these slots, but of those whose logits are not finite. `logits`: their address."""
        with self._ring.block() as block:
            has_recent = self._fill(block.array, choices)
            used_bytes = block.array.size if has_recent else self._recent_offset
            self._gpu.copy(self._device["block"], block.address, used_bytes)
            call = ChoiceCall(
                logits=logits,
                choices=self._device["block"],
                recent=self._device["block"] + self._recent_offset,
                tokens=self._device["tokens"],
                workspace=self._device["workspace"],
                workspace_bytes=self._workspace_bytes,
                batch=self._num_slots,
                vocab_size=self._vocab_size,
                max_recent=HISTORY_TOKENS,
            )
            self._kernels.choose_tokens(call, self._gpu.stream)
            self._gpu.copy(self._tokens_address, self._device["tokens"], self._tokens.size)
        self._gpu.synchronize()
        tokens = self._tokens.view(np.int64)
        return {slot: int(tokens[slot]) for slot in choices if tokens[slot] >= 0}

    def _fill(self, block: np.ndarray, choices: Mapping[int, Choice]) -> bool:
        """Write the settings; whether any of them needs the recent tokens."""
        settings = block[: self._num_slots * CHOICE_DTYPE.itemsize].view(CHOICE_DTYPE)
        recent = block[self._recent_offset :].view(np.int64).reshape(self._num_slots, HISTORY_TOKENS)
        settings["is_wanted"] = 0
        has_recent = False
        for slot, choice in choices.items():
            params = choice.params
            seen = penalised_tokens(choice.recent, params)
            recent[slot, : len(seen)] = seen
            has_recent = has_recent or len(seen) > 0
            settings[slot] = (
                params.temperature,
                params.top_p,
                params.min_p,
                params.repetition_penalty,
                choice.generator.uniform() if params.temperature > 0.0 else 0.0,
                min(params.top_k or 0, self._vocab_size),
                len(seen),
                1,
            )
        return has_recent

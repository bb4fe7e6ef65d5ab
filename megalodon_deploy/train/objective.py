"""What is differentiated: tokens and targets in, summed loss out, through one forward pass of one module.

One module, because wrappers of distributed training act on its forward. Shapes: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from megalodon_deploy.model.megalodon import Megalodon, ModelState
from megalodon_deploy.model.packing import run_documents
from megalodon_deploy.train.loss import chunked_cross_entropy


class MicroBatch(NamedTuple):
    """Rows that are computed at once: what `Objective.forward` takes."""

    tokens: Tensor  # [B, T] int64
    targets: Tensor  # [B, T] int64
    documents: np.ndarray | None = None
    state: ModelState | None = None


class Objective(nn.Module):
    """The model with its loss; `logits_at_once` positions have logits at a time. `autocasts`: in bfloat16."""

    def __init__(self, model: Megalodon, logits_at_once: int, *, autocasts: bool = False) -> None:
        super().__init__()
        self.model = model
        self.logits_at_once = logits_at_once
        self.autocasts = autocasts
        self.num_runs: Callable[[int], int] = lambda own: own  # of packed documents: see `run_documents`

    def forward(
        self,
        tokens_BT: Tensor,
        targets_BT: Tensor,
        documents: np.ndarray | None = None,
        state: ModelState | None = None,
    ) -> tuple[Tensor, ModelState | None]:
        """(sum of cross-entropy over targets, state after the call).

        With `documents` (see `model.packing`) every document runs alone and there is no state; else rows go on from
        `state`, or start afresh. A stage of a pipeline takes the stream [B, T, D] of the one before it in the place of
        tokens, and gives its own in the place of the loss unless it is the last.
        """
        with torch.autocast(tokens_BT.device.type, torch.bfloat16, enabled=self.autocasts):
            after: ModelState | None = None
            if documents is None:
                x_BTD, after = self.model.hidden(tokens_BT, state)
            else:
                x_BTD = run_documents(lambda tokens: self.model.hidden(tokens)[0], tokens_BT, documents, self.num_runs)
            if self.model.output is None:
                return x_BTD, after
            matrix, targets_M = self.model.output_matrix, targets_BT.flatten()
            return chunked_cross_entropy(x_BTD.flatten(0, 1), matrix, targets_M, self.logits_at_once), after

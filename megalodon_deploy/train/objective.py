"""What is differentiated: tokens and targets in, summed loss out, through one forward pass of one module.

One module, because wrappers of distributed training act on its forward. Shapes: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from torch import Tensor, nn

from megalodon_deploy.model.megalodon import Megalodon, ModelState
from megalodon_deploy.model.packing import run_documents
from megalodon_deploy.train.loss import chunked_cross_entropy


class Objective(nn.Module):
    """The model with its loss; `logits_at_once` positions have logits at a time."""

    def __init__(self, model: Megalodon, logits_at_once: int) -> None:
        super().__init__()
        self.model = model
        self.logits_at_once = logits_at_once
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
        `state`, or start afresh.
        """
        after: ModelState | None = None
        if documents is None:
            x_BTD, after = self.model.hidden(tokens_BT, state)
        else:
            x_BTD = run_documents(lambda tokens: self.model.hidden(tokens)[0], tokens_BT, documents, self.num_runs)
        loss = chunked_cross_entropy(
            x_BTD.flatten(0, 1), self.model.output_matrix, targets_BT.flatten(), self.logits_at_once
        )
        return loss, after

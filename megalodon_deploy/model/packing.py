"""Rows packed with several documents, computed as if each document were alone.

Documents become rows of their own: gathered, grouped by length, padded at the end, and scattered back. Everything in
the model is causal, so padding behind a document changes neither its values nor its gradients; norm statistics,
moving averages, attention and rotary positions all begin at its first token because its row begins there. No operator
knows of documents.

Shapes: B packed rows of T tokens, S documents, D channels. `documents` [S, 3] int64 holds (row, first token, length).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

_MAX_PADDING = 0.125  # of a group's tokens: more groups than that takes cost more than they save


def group_by_length(lengths: Sequence[int] | np.ndarray, max_padding: float = _MAX_PADDING) -> list[np.ndarray]:
    """Indices of documents that run together, longest group first; padding is at most that part of each group."""
    order = np.argsort(-np.asarray(lengths), kind="stable")
    groups: list[np.ndarray] = []
    begin = padding = 0
    for i, document in enumerate(order):
        longest = lengths[order[begin]]
        padding += longest - lengths[document]
        if padding > max_padding * longest * (i - begin + 1):
            groups.append(order[begin:i])
            begin, padding = i, 0
    return [*groups, order[begin:]] if len(order) else []


def run_documents(
    run: Callable[[Tensor], Tensor],
    tokens_BT: Tensor,
    documents: np.ndarray,
    num_runs: Callable[[int], int] = lambda own: own,
) -> Tensor:
    """`run`'s outputs [B, T, D] with every document computed alone, zeros where no document is.

    Args:
        run: tokens [b, t] of fresh streams to [b, t, D]; called once per group of documents of similar lengths.
        tokens_BT: packed tokens, or [B, T, D] with D channels of each, as `run` then takes them.
        documents: as above; they do not overlap.
        num_runs: from the number of groups to how often `run` is called, at least as often: processes that share the
            work of a call must make equally many. What it gives beyond the groups counts nothing.
    """
    batch, num_tokens = tokens_BT.shape[:2]
    flat_tokens, begin = tokens_BT.flatten(0, 1), documents[:, 0] * num_tokens + documents[:, 1]
    groups = group_by_length(documents[:, 2])
    num_idle = num_runs(len(groups)) - len(groups)
    if len(documents) == batch and (documents[:, 2] == num_tokens).all() and num_idle == 0:
        return run(tokens_BT)
    outputs = [run(flat_tokens[None, :2]).flatten(0, 1) for _ in range(num_idle)]
    sources = [np.full(len(output), len(flat_tokens)) for output in outputs]  # behind the last token
    for group in groups:
        lengths = documents[group, 2]
        step = np.arange(lengths.max())
        inside = step < lengths[:, None]
        index = np.where(inside, begin[group, None] + step, begin[group, None])  # padding repeats the first token
        out = run(flat_tokens[torch.from_numpy(index).to(flat_tokens.device)])
        outputs.append(out.flatten(0, 1)[torch.from_numpy(inside.ravel()).to(out.device)])
        sources.append(index[inside])
    joined, source = torch.cat(outputs), torch.from_numpy(np.concatenate(sources)).to(tokens_BT.device)
    scattered = joined.new_zeros(batch * num_tokens + 1, joined.shape[-1]).index_copy(0, source, joined)
    return scattered[:-1].view(batch, num_tokens, -1)

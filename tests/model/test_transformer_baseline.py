"""The transformer of the comparisons is a right one: token by token it computes what it computes at once."""

from __future__ import annotations

import pytest
import torch
from transformer_baseline import Memory, Transformer


@torch.no_grad()
def test_tokens_one_by_one_give_what_all_give_at_once() -> None:
    torch.manual_seed(0)
    transformer = Transformer(dim=128, layers=2, vocab_size=50).double()
    tokens = torch.randint(50, (2, 24))
    expected = transformer.hidden(tokens)
    memory = Memory(transformer, batch=2, capacity=24)
    parts = [transformer.hidden(tokens[:, :9], memory)]
    parts += [transformer.hidden(tokens[:, i : i + 1], memory) for i in range(9, 24)]
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="one at a time"):
        transformer.hidden(tokens, memory)

"""Packed documents: each as if it were alone, in logits and in gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import small_config
from hypothesis import given
from hypothesis import strategies as st

from megalodon_deploy.model.megalodon import Megalodon
from megalodon_deploy.model.packing import group_by_length, run_documents

NUM_TOKENS = 40  # chunks of 12: three edges
DOCUMENTS = np.array([(0, 0, 17), (0, 17, 1), (0, 18, 22), (1, 0, 40), (2, 0, 12), (2, 12, 13), (2, 25, 9)])
"""Row 2 ends with 6 tokens of no document."""


@pytest.fixture
def model() -> Megalodon:
    torch.manual_seed(0)
    model = Megalodon(small_config(swiglu=True, rescale_nffn=True)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def gradients(model: Megalodon, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def test_documents_are_computed_alone(model: Megalodon) -> None:
    tokens = torch.randint(50, (3, NUM_TOKENS))
    mix = torch.randn(3, NUM_TOKENS, model.config.model_dim, dtype=torch.float64)
    packed = run_documents(lambda part: model.hidden(part)[0], tokens, DOCUMENTS)
    found = gradients(model, (packed * mix).sum())

    loss = torch.zeros((), dtype=torch.float64)
    covered = torch.zeros(3, NUM_TOKENS, dtype=torch.bool)
    for row, begin, length in DOCUMENTS.tolist():
        part = slice(begin, begin + length)
        alone = model.hidden(tokens[row : row + 1, part])[0][0]
        assert torch.allclose(packed[row, part], alone, rtol=1e-10, atol=1e-10)
        loss = loss + (alone * mix[row, part]).sum()
        covered[row, part] = True
    assert (packed[~covered] == 0).all()
    expected = gradients(model, loss)
    assert found.keys() == expected.keys()
    assert len(found) == len(list(model.parameters())) - 1  # all but the output matrix, which is not used here
    for name, gradient in expected.items():
        scale = gradient.abs().max().clamp(min=1e-3)
        assert torch.allclose(found[name] / scale, gradient / scale, rtol=0, atol=1e-10), name


def test_what_lies_beside_a_document_does_not_matter(model: Megalodon) -> None:
    tokens = torch.randint(50, (3, NUM_TOKENS))
    changed = tokens.clone()
    changed[0, :18] = torch.randint(50, (18,))
    changed[2, 34:] = 7
    first, second = (run_documents(lambda part: model.hidden(part)[0], t, DOCUMENTS) for t in (tokens, changed))
    assert torch.equal(first[0, 18:], second[0, 18:])
    assert torch.equal(first[2], second[2])
    assert (first[0, :18] - second[0, :18]).abs().max() > 1e-3


def test_whole_rows_are_one_call(model: Megalodon) -> None:
    calls = []

    def run(tokens: torch.Tensor) -> torch.Tensor:
        calls.append(tokens.shape)
        return model.hidden(tokens)[0]

    tokens = torch.randint(50, (2, 8))
    assert torch.equal(run_documents(run, tokens, np.array([(0, 0, 8), (1, 0, 8)])), model.hidden(tokens)[0])
    assert calls == [(2, 8)]


@given(st.lists(st.integers(1, 500), min_size=1, max_size=80))
def test_padding_is_bounded(lengths: list[int]) -> None:
    groups = group_by_length(lengths)
    assert sorted(int(i) for group in groups for i in group) == list(range(len(lengths)))
    for group in groups:
        sizes = [lengths[i] for i in group]
        assert len(sizes) * max(sizes) - sum(sizes) <= 0.125 * len(sizes) * max(sizes)

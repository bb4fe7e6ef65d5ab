"""The chunk_attention op and the ways in which calls lie on the chunk grid, against loops in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from attention_helpers import attention_inputs, attention_reference
from helpers import assert_close
from torch import Tensor

from megalodon_deploy.model.attention import OnTheGrid, plan_attention
from megalodon_deploy.model.operators import chunk_attention
from megalodon_deploy.model.operators.chunk_attention import chunk_attention_backward

Case = tuple[list[Tensor], Tensor, int]  # (q, k, v, past_key, past_value), position, chunk size

FILLED = {"one row": [9], "same": [4, 4], "different": [0, 9, 4]}


def case(filled: list[int], num_tokens: int, dtype: torch.dtype = torch.float64) -> Case:
    call = attention_inputs(T=num_tokens, S=11, dz=6, dv=10, filled=filled)
    tensors = [torch.from_numpy(getattr(call, name)) for name in ("q", "k", "v", "past_key", "past_value")]
    return [tensor.to(dtype) for tensor in tensors], torch.from_numpy(call.position), call.chunk_size


def by_hand(tensors: list[Tensor], position: Tensor, chunk_size: int) -> Tensor:
    """Every query on its own, on differentiable slices."""
    q, k, v, past_key, past_value = tensors
    out = []
    for b, offset in enumerate((position % chunk_size).tolist()):
        rows = []
        for t in range(q.shape[2]):
            keys = torch.cat([past_key[b, :, :offset], k[b, :, : t + 1]], 1)
            values = torch.cat([past_value[b, :, :offset], v[b, :, : t + 1]], 1)
            scores = torch.einsum("hd,hjd->hj", q[b, :, t], keys)
            rows.append(torch.einsum("hj,hje->he", scores.softmax(-1), values))
        out.append(torch.stack(rows, 1))
    return torch.stack(out)


@pytest.mark.parametrize("filled", FILLED.values(), ids=FILLED)
@pytest.mark.parametrize("num_tokens", [1, 7])
def test_matches_float64_whatever_masked_rows_hold(filled: list[int], num_tokens: int) -> None:
    call = attention_inputs(T=num_tokens, S=11, dz=6, dv=10, filled=filled)  # NaN where nobody looks
    for dtype, tolerance in ((torch.float64, 1e-7), (torch.float32, 2e-6), (torch.bfloat16, 2e-2)):
        tensors, position, chunk_size = case(filled, num_tokens, dtype)
        found = chunk_attention(*tensors, position, chunk_size)
        assert found.dtype == dtype
        assert_close(found.double().numpy(), attention_reference(call), tolerance, str(dtype))


@pytest.mark.parametrize("filled", FILLED.values(), ids=FILLED)
@pytest.mark.parametrize("num_tokens", [1, 7])
def test_gradients_are_those_of_every_query_on_its_own(filled: list[int], num_tokens: int) -> None:
    tensors, position, chunk_size = case(filled, num_tokens)
    torch.manual_seed(0)
    grad = torch.randn(*tensors[0].shape[:3], tensors[2].shape[3], dtype=torch.float64)
    grads = []
    for function in (chunk_attention, lambda *inputs: by_hand(list(inputs[:5]), *inputs[5:])):
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        function(*leaves, position, chunk_size).backward(grad)
        grads.append([leaf.grad for leaf in leaves])
    for found, expected in zip(*grads, strict=True):
        assert found is not None
        assert expected is not None
        assert_close(found.numpy(), expected.numpy(), 1e-12)


@pytest.mark.parametrize("filled", FILLED.values(), ids=FILLED)
@pytest.mark.parametrize("num_tokens", [1, 7])
def test_opcheck(filled: list[int], num_tokens: int) -> None:
    tensors, position, chunk_size = case(filled, num_tokens, torch.float32)
    tensors = [tensor.nan_to_num(1.0).requires_grad_() for tensor in tensors]
    torch.library.opcheck(chunk_attention, (*tensors, position, chunk_size))
    inputs = [tensor.detach() for tensor in tensors]
    torch.library.opcheck(chunk_attention_backward, (torch.randn_like(inputs[2]), *inputs, position, chunk_size))


@pytest.mark.parametrize("num_tokens", [9, 20, 45])
def test_rows_cross_chunk_edges_at_different_tokens(num_tokens: int) -> None:
    """Outputs and gradients of a batch are those of each row alone, which takes another way."""
    chunk_size, offsets = 12, [0, 11, 5]
    assert isinstance(plan_attention(offsets, num_tokens, chunk_size, torch.device("cpu")), OnTheGrid)
    random = np.random.default_rng(0)
    shapes = [(3, 2, length, width) for length, width in ((num_tokens, 6),) * 2 + ((num_tokens, 10), (11, 6), (11, 10))]
    tensors = [torch.from_numpy(random.standard_normal(shape)) for shape in shapes]
    for row, offset in enumerate(offsets):
        for past in tensors[3:]:
            past[row, :, offset:] = torch.nan
    grad = torch.from_numpy(random.standard_normal(shapes[2]))

    def run(rows: slice) -> list[Tensor]:
        leaves = [tensor[rows].clone().requires_grad_() for tensor in tensors]
        out = plan_attention(offsets[rows], num_tokens, chunk_size, torch.device("cpu"))(*leaves)
        out.backward(grad[rows])
        return [out.detach(), *(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves)]

    together = run(slice(None))
    for row in range(3):
        for found, expected in zip(together, run(slice(row, row + 1)), strict=True):
            assert_close(found[row : row + 1].numpy(), expected.numpy(), 1e-12, f"row {row}")

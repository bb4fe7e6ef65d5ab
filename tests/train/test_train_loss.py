"""The loss in blocks of positions: PyTorch's own loss and gradients, whatever the block."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional

from megalodon_deploy.train.data import rows
from megalodon_deploy.train.loss import NO_TARGET, chunked_cross_entropy


def operands(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(37, 8, generator=generator, dtype=dtype, requires_grad=True)
    matrix = torch.randn(23, 8, generator=generator, dtype=dtype, requires_grad=True)
    targets = torch.randint(23, (37,), generator=generator)
    targets[::5] = NO_TARGET
    return x, matrix, targets


@pytest.mark.parametrize("at_once", [1, 10, 37, 1000])
def test_loss_and_gradients_are_those_of_pytorch(at_once: int) -> None:
    x, matrix, targets = operands(torch.float64)
    expected = functional.cross_entropy(x @ matrix.t(), targets, reduction="sum", ignore_index=NO_TARGET)
    wanted = torch.autograd.grad(3 * expected, (x, matrix))
    loss = chunked_cross_entropy(x, matrix, targets, at_once)
    assert torch.allclose(loss, expected, rtol=1e-12)
    for found, gradient in zip(torch.autograd.grad(3 * loss, (x, matrix)), wanted, strict=True):
        assert torch.allclose(found, gradient, rtol=1e-10, atol=1e-12)


def test_large_logits_do_not_overflow() -> None:
    x, matrix, targets = operands(torch.float32)
    loss = chunked_cross_entropy(x * 1e4, matrix, targets, 10)
    expected = functional.cross_entropy(
        (x * 1e4).double() @ matrix.double().t(), targets, reduction="sum", ignore_index=NO_TARGET
    )
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_no_target_anywhere_is_no_loss() -> None:
    x, matrix, targets = operands(torch.float32)
    loss = chunked_cross_entropy(x, matrix, torch.full_like(targets, NO_TARGET), 10)
    assert loss.item() == 0
    assert all((gradient == 0).all() for gradient in torch.autograd.grad(loss, (x, matrix)))


def test_autocast_multiplies_in_bfloat16_and_sums_in_float32() -> None:
    x, matrix, targets = operands(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = chunked_cross_entropy(x, matrix, targets, 10)
    assert loss.dtype == torch.float32
    rounded = (x.bfloat16() @ matrix.bfloat16().t()).float()
    expected = functional.cross_entropy(rounded, targets, reduction="sum", ignore_index=NO_TARGET)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-3)
    exact = chunked_cross_entropy(x, matrix, targets, 10)
    grads, wanted = (torch.autograd.grad(value, (x, matrix)) for value in (loss, exact))
    for found, gradient in zip(grads, wanted, strict=True):
        assert found.dtype == torch.float32
        assert (found - gradient).norm() <= 0.03 * gradient.norm()


def test_the_logits_of_few_positions_exist_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    x, matrix, targets = operands(torch.float32)
    sizes: list[int] = []
    linear = functional.linear

    def watched(*arguments: Any) -> torch.Tensor:
        out = linear(*arguments)
        sizes.append(out.shape[0])
        return out

    monkeypatch.setattr(functional, "linear", watched)
    chunked_cross_entropy(x, matrix, targets, 10).backward()
    assert sizes == [10, 10, 10, 7]


def test_both_sides_agree_on_the_mark_of_no_target() -> None:
    assert rows.NO_TARGET == NO_TARGET

"""The two operators against float64 loops: forward, gradients, any split, any position."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from helpers import assert_close
from model.reference import complex_ema_reference, timestep_norm_reference
from torch import Tensor

from megalodon_deploy.model.operators import complex_ema, timestep_norm
from megalodon_deploy.model.operators.complex_ema import MAX_BLOCK, Blocks, power_table

POSITIONS = torch.tensor([0, 3, 1_000_000])
LENGTHS = [1, 2, 17, MAX_BLOCK, MAX_BLOCK + 1, 2 * MAX_BLOCK + 37]
EPS = 1e-5


def cema_inputs(num_tokens: int, *, dtype: torch.dtype, dim: int = 6, modes: int = 3) -> list[Tensor]:
    """(x, past, position, p, q, gamma, omega); memories of one token to hundreds."""
    torch.manual_seed(num_tokens)
    batch = len(POSITIONS)
    modulus = 1 - torch.logspace(-3, 0, dim * modes, dtype=torch.float64).view(dim, modes)
    q = torch.view_as_real(torch.polar(modulus, 6.28 * torch.rand(dim, modes, dtype=torch.float64)))
    tensors = [torch.randn(batch, num_tokens, dim), torch.randn(batch, dim, modes, 2), POSITIONS]
    tensors += [torch.rand(dim, modes), q, torch.randn(dim, modes, 2), torch.randn(dim)]
    return [tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in tensors]


def norm_inputs(num_tokens: int, *, dtype: torch.dtype, groups: int = 2, size: int = 3) -> list[Tensor]:
    """(x, past, position, weight, bias); activations far from zero."""
    torch.manual_seed(num_tokens)
    dim = groups * size
    x = 30 + torch.randn(len(POSITIONS), num_tokens, dim)
    past = torch.stack([30 + torch.rand(len(POSITIONS), groups), 1 + torch.rand(len(POSITIONS), groups)], -1)
    past = torch.stack([past, 1e-7 * torch.rand_like(past)], -1).flatten(-2)
    tensors = [x, past, POSITIONS, torch.randn(dim), torch.randn(dim)]
    return [tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in tensors]


def numpy(tensors: list[Tensor]) -> list[np.ndarray]:
    return [tensor.detach().to(torch.float64 if tensor.is_floating_point() else None).numpy() for tensor in tensors]


def with_nan_where_fresh(past: Tensor) -> Tensor:
    return torch.where((POSITIONS == 0).view(-1, *(1,) * (past.ndim - 1)), torch.nan, past)


@pytest.mark.parametrize("num_tokens", LENGTHS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-13)])
def test_complex_ema_is_the_recurrence(num_tokens: int, dtype: torch.dtype, tolerance: float) -> None:
    x, past, *rest = cema_inputs(num_tokens, dtype=dtype)
    y, present = complex_ema(x, with_nan_where_fresh(past), *rest)
    expected_y, expected_present = complex_ema_reference(*numpy([x, past, *rest]))
    assert (y.dtype, present.dtype) == (dtype, dtype)
    assert_close(y.numpy(), expected_y, tolerance, "y")
    assert_close(present.numpy(), expected_present, tolerance, "present")


@pytest.mark.parametrize("num_tokens", LENGTHS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 4e-6), (torch.float64, 1e-12)])
def test_timestep_norm_is_the_recurrence(num_tokens: int, dtype: torch.dtype, tolerance: float) -> None:
    x, past, position, weight, bias = norm_inputs(num_tokens, dtype=dtype)
    y, present = timestep_norm(x, with_nan_where_fresh(past), position, weight, bias, EPS)
    expected_y, expected_present = timestep_norm_reference(*numpy([x, past, position, weight, bias]), EPS)
    assert (y.dtype, present.dtype) == (dtype, dtype)
    assert_close(y.numpy(), expected_y, tolerance, "y")
    for part in (0, 2):
        number = present[..., part].double() + present[..., part + 1].double()
        assert_close(number.numpy(), expected_present[..., part], 1e-12, "present")
        rounded = torch.from_numpy(expected_present[..., part]).to(dtype).double()
        assert_close(present[..., part].double().numpy(), rounded.numpy(), 1e-7, "hi")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_activations_keep_a_float32_state(dtype: torch.dtype) -> None:
    x, *rest = cema_inputs(20, dtype=torch.float32)
    y, present = complex_ema(x.to(dtype), *rest)
    expected_y, expected_present = complex_ema_reference(*numpy([x.to(dtype), *rest]))
    assert (y.dtype, present.dtype) == (dtype, torch.float32)
    assert_close(y.double().numpy(), expected_y, torch.finfo(dtype).eps, "y")
    assert_close(present.numpy(), expected_present, 2e-6, "state")
    x, *rest = norm_inputs(20, dtype=torch.float32)
    y, present = timestep_norm(x.to(dtype), *rest, EPS)
    expected_y, expected_present = timestep_norm_reference(*numpy([x.to(dtype), *rest]), EPS)
    assert (y.dtype, present.dtype) == (dtype, torch.float32)
    assert_close(y.double().numpy(), expected_y, torch.finfo(dtype).eps, "y")
    assert_close(present[..., 0].numpy(), expected_present[..., 0], 1e-6, "state")


def test_a_drifting_signal_fed_one_token_at_a_time_is_not_lost() -> None:
    """With statistics in plain float32 this signal is off by 1e-3 after these few tokens already."""
    num_tokens, start = 2000, 5_000_000
    torch.manual_seed(0)
    x = 30 + 10 * torch.sin(torch.arange(num_tokens) / 300).view(1, -1, 1) + torch.randn(1, num_tokens, 4)
    past, position = torch.tensor([[[29.0, 0.0, 50.0, 0.0]]]), torch.tensor([start])
    weight, bias = torch.ones(4), torch.zeros(4)
    outputs, state = [], past
    for t in range(num_tokens):
        y, state = timestep_norm(x[:, t : t + 1], state, position + t, weight, bias, EPS)
        outputs.append(y)
    expected_y, expected_present = timestep_norm_reference(*numpy([x, past, position, weight, bias]), EPS)
    assert_close(torch.cat(outputs, 1).numpy(), expected_y, 2e-6, "y")
    whole = timestep_norm(x, past, position, weight, bias, EPS)[1]
    for present in (state, whole):
        assert_close((present[..., 0].double() + present[..., 1]).numpy(), expected_present[..., 0], 1e-11, "mean")
        assert_close((present[..., 2].double() + present[..., 3]).numpy(), expected_present[..., 2], 1e-11, "var")


def test_blocks_cover_every_token_once() -> None:
    for num_tokens in range(1, 50 * MAX_BLOCK):
        blocks = Blocks.of(num_tokens)
        assert (blocks.num - 1) * blocks.length + blocks.last == num_tokens
        assert 1 <= blocks.last <= blocks.length <= MAX_BLOCK


def test_powers_come_from_double_precision() -> None:
    q = torch.tensor([[[0.6, 0.799]]])
    exact = complex(*q[0, 0].double().tolist()) ** np.arange(MAX_BLOCK + 1)
    assert_close(torch.view_as_real(power_table(q, MAX_BLOCK)[0, :, 0]).numpy()[:, 0], exact.real, 1e-13)
    assert_close(torch.view_as_real(power_table(q, MAX_BLOCK)[0, :, 0]).numpy()[:, 1], exact.imag, 1e-13)


def operator_cases(
    num_tokens: int,
) -> list[tuple[Callable[..., tuple[Tensor, Tensor]], list[Tensor], tuple[float, ...]]]:
    cema, norm = cema_inputs(num_tokens, dtype=torch.float64), norm_inputs(num_tokens, dtype=torch.float64)
    return [(complex_ema, cema, ()), (timestep_norm, norm, (EPS,))]


@pytest.mark.parametrize("num_tokens", [1, 5, MAX_BLOCK + 3])
def test_gradients_are_those_of_the_recurrence(num_tokens: int) -> None:
    """By finite differences, through outputs and present state, to inputs, past state and parameters."""
    for operator, inputs, rest in operator_cases(num_tokens):
        for tensor in inputs:
            tensor.requires_grad_(tensor.is_floating_point())
        every_element = num_tokens < MAX_BLOCK  # else along random directions
        assert torch.autograd.gradcheck(operator, (*inputs, *rest), fast_mode=not every_element)


def test_gradients_hold_in_float32_over_many_blocks() -> None:
    """Against the float64 operator, which finite differences have checked."""
    for operator, inputs, rest in operator_cases(5 * MAX_BLOCK - 7):
        grads = []
        for dtype in (torch.float64, torch.float32):
            leaves = [t.float().to(dtype).clone().requires_grad_() if t.is_floating_point() else t for t in inputs]
            y, present = operator(*leaves, *rest)
            torch.manual_seed(1)
            loss = (y * torch.randn_like(y.double())).sum() + (present * torch.randn_like(present.double())).sum()
            loss.backward()
            grads.append([leaf.grad for leaf in leaves if leaf.is_floating_point()])
        for exact, rounded in zip(*grads, strict=True):
            assert (rounded.double() - exact).norm() <= 2e-6 * exact.norm()


def test_a_fresh_row_takes_no_gradient_and_no_nan_from_its_past() -> None:
    for operator, (x, past, *tensors), rest in operator_cases(9):
        past = with_nan_where_fresh(past).requires_grad_()
        x.requires_grad_()
        y, present = operator(x, past, *tensors, *rest)
        (y.sum() + present.square().sum()).backward()
        assert past.grad is not None
        assert x.grad is not None
        assert past.grad[POSITIONS == 0].abs().max() == 0
        assert past.grad[POSITIONS == 3].abs().max() > 0
        assert x.grad.isfinite().all()


@pytest.mark.parametrize("num_tokens", [1, 70])
def test_opcheck(num_tokens: int) -> None:
    for operator, inputs, rest in operator_cases(num_tokens):
        for tensor in inputs:
            tensor.requires_grad_(tensor.is_floating_point())
        torch.library.opcheck(operator, (*inputs, *rest))


@pytest.mark.parametrize("num_tokens", [1, 70])
def test_opcheck_of_backward(num_tokens: int) -> None:
    from megalodon_deploy.model.operators.complex_ema import complex_ema_backward
    from megalodon_deploy.model.operators.timestep_norm import timestep_norm_backward

    x, past, *tensors = cema_inputs(num_tokens, dtype=torch.float32)
    torch.library.opcheck(complex_ema_backward, (torch.randn_like(x), torch.randn_like(past), x, past, *tensors))
    x, past, position, weight, _ = norm_inputs(num_tokens, dtype=torch.float32)
    inputs = (torch.randn_like(x), torch.randn_like(past), x, past, position, weight, EPS)
    torch.library.opcheck(timestep_norm_backward, inputs)


def test_what_is_kept_for_backward_does_not_grow_with_modes() -> None:
    """O(T) memory: nothing of B x T x D x N."""
    kept: list[int] = []
    x, *rest = cema_inputs(500, dtype=torch.float32, dim=8, modes=16)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.numel()), t)[1], lambda t: t):
        complex_ema(x.requires_grad_(), *rest)
    assert max(kept) == x.numel()
    assert sum(kept) < 2 * x.numel()


def test_results_share_no_memory_with_the_past() -> None:
    for num_tokens in (1, 3):
        for operator, (x, past, *tensors), rest in operator_cases(num_tokens):
            before = past.clone()
            _, present = operator(x, past, *tensors, *rest)
            present.fill_(torch.nan)
            assert torch.equal(past, before)

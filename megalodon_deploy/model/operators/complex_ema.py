r"""CEMA, the complex exponential moving average, parallel over time in O(T) memory.

Shapes: B rows, T tokens, D channels, N complex modes, L tokens of a block, K blocks of a row, R = B K. Complex numbers
are pairs (re, im) on the last axis wherever a tensor enters or leaves; p, q, gamma are the coefficients of the
architecture page with 1/sqrt(N) folded into gamma.

    h_t = q h_{t-1} + p u_t                       h complex [B, D, N], p real
    y_t = Re(sum_n gamma_n h_tn) + omega u_t

**In blocks.** Let s be the state that enters a block and j = 0..L-1 the token in it. Unrolling the recurrence:

    y_j = sum_{i<=j} k_{j-i} u_i + Re(sum_n gamma q^(j+1) s),   k_j = Re(sum_n gamma p q^j) + [j = 0] omega
    s'  = q^L s + sum_i p q^(L-1-i) u_i

so a block is three real matrix products per channel, with matrices that are the same for all blocks:

    Y = U `toeplitz` + S `readout`^T,    A = U `intake`,    S_{b+1} = q^L S_b + A_b

`toeplitz` [L, L] holds k, `readout` and `intake` [L, 2N] are real views of conj(gamma q^(j+1)) and p q^(L-1-i). Only
the last line is sequential: one fused multiply-add of [B, D, N] per block.

**Backward.** Gradients of complex numbers are written G = dLoss/dRe + i dLoss/dIm, so a product w = a b of complex
numbers gives G_a = conj(b) G_w. The three matrix products are real and linear; the state obeys, from right to left,

    GS_b = GY_b `readout` + conj(q^L) GS_{b+1},    GU = GY `toeplitz`^T + GA `intake`^T,    GA_b = GS_{b+1}

with the gradient of the present state entering at the end, and GS_0 the gradient of the past. The parameters are
reached through the matrices: G`toeplitz` = U^T GY summed along its diagonals is the gradient of k, G`readout` =
GY^T S, G`intake` = U^T GA, and G(q^L) = sum conj(S_b) GS_{b+1}; then through the powers, with d(q^j)/dq = j q^(j-1).
Nothing of size B x T x D x N is ever formed: block states are recomputed, [R, D, N].

Conjugates are physical throughout: PyTorch's lazy ones are ignored where a tracer runs an operator with the
conjugate dispatch key switched off.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from megalodon_deploy.model.operators import kernels

MAX_BLOCK = 32  # tokens of a block; measured: 16 and 64 take up to twice as long at D = 160 and D = 1024
_NEGLIGIBLE = 1e-30  # powers below are 0: as denormal numbers they would make the products twice as slow


class Blocks(NamedTuple):
    """How T tokens fall into blocks: `length` tokens each but `last` in the last one, which is padded with zeros."""

    num: int
    length: int
    last: int

    @classmethod
    def of(cls, num_tokens: int) -> Blocks:
        num = math.ceil(num_tokens / MAX_BLOCK)
        length = math.ceil(num_tokens / num)
        return cls(num, length, num_tokens - (num - 1) * length)


class _Tables(NamedTuple):
    """The matrices of one block; complex dtype follows the coefficients."""

    powers: Tensor  # complex [D, L + 1, N], q^0 .. q^L
    intake: Tensor  # complex [D, L, N], p q^(L-1-i)
    readout: Tensor  # complex [D, L, N], conj(gamma q^(j+1))
    toeplitz: Tensor  # real [D, L, L], row i and column j: k_{j-i}, zero below the diagonal


def power_table(q_DN2: Tensor, highest: int) -> Tensor:
    """q^0 .. q^highest, complex128 [D, highest + 1, N].

    By doubling in double precision: squaring in float32 costs 1e-3 after 2,048 tokens.
    """
    q_DN = torch.view_as_complex(q_DN2.double().contiguous())
    table = torch.empty(q_DN.shape[0], highest + 1, q_DN.shape[1], dtype=q_DN.dtype, device=q_DN.device)
    table[:, 0] = 1
    done = 1
    while done <= highest:
        take = min(done, highest + 1 - done)
        factor = table[:, done - 1 : done] * q_DN[:, None]
        torch.mul(table[:, :take], factor, out=table[:, done : done + take])
        done += take
    return table


def _as_complex(pairs: Tensor) -> Tensor:
    return torch.view_as_complex(pairs.contiguous())


def _as_rows(values: Tensor) -> Tensor:
    """Complex [..., N] -> real [..., 2N], re and im interleaved."""
    return torch.view_as_real(values).flatten(-2)


def _upper_toeplitz(kernel_DL: Tensor) -> Tensor:
    """[D, L, L] with k_{j-i} at row i, column j: every row is the one above, shifted right by one.

    The rows of length 2L - 1 cut out of a repeated [k, 0] of length 2L shift by themselves.
    """
    dim, length = kernel_DL.shape
    padded = functional.pad(kernel_DL, (0, length))
    flat = padded[:, None].expand(dim, length, 2 * length).reshape(dim, -1)
    return flat[:, : length * (2 * length - 1)].view(dim, length, 2 * length - 1)[:, :, :length]


def _diagonal_sums(matrix_DLL: Tensor) -> Tensor:
    """Adjoint of `_upper_toeplitz`: [D, L] sums over row i, column i + j."""
    dim, length, _ = matrix_DLL.shape
    flat = matrix_DLL.new_zeros(dim, 2 * length * length)
    flat[:, : length * (2 * length - 1)].view(dim, length, 2 * length - 1)[:, :, :length] = matrix_DLL
    return flat.view(dim, length, 2 * length).sum(1)[:, :length]


def _tables(p_DN: Tensor, q_DN2: Tensor, gamma_DN2: Tensor, omega_D: Tensor, length: int) -> _Tables:
    gamma_DN = _as_complex(gamma_DN2)
    powers = torch.view_as_real(power_table(q_DN2, length).to(gamma_DN.dtype))
    powers = torch.view_as_complex(functional.hardshrink(powers, _NEGLIGIBLE))
    readout = (gamma_DN[:, None] * powers[:, 1:]).conj_physical()
    mix = _as_rows((gamma_DN * p_DN).conj_physical())
    kernel = (_as_rows(powers[:, :length]) @ mix.unsqueeze(-1)).squeeze(-1)
    kernel[:, 0] += omega_D
    return _Tables(powers, powers[:, :length].flip(1) * p_DN[:, None], readout, _upper_toeplitz(kernel))


def _channels_first(x_BTD: Tensor, blocks: Blocks, dtype: torch.dtype) -> Tensor:
    """[B, T, D] -> [D, R, L] in `dtype`, zeros after the last token. One two-dimensional transposition."""
    batch, num_tokens, dim = x_BTD.shape
    padded = functional.pad(x_BTD.to(dtype), (0, 0, 0, blocks.num * blocks.length - num_tokens))
    return padded.reshape(-1, dim).t().contiguous().view(dim, batch * blocks.num, blocks.length)


def _tokens_first(y_DRL: Tensor, batch: int, num_tokens: int, dtype: torch.dtype) -> Tensor:
    """[D, R, L] -> [B, T, D] contiguous in `dtype`."""
    dim = y_DRL.shape[0]
    return y_DRL.reshape(dim, -1).t().to(dtype).reshape(batch, -1, dim)[:, :num_tokens].contiguous()


def _block_states(intake_DRN: Tensor, start_BDN: Tensor, power_DN: Tensor, count: int) -> Tensor:
    """The state that enters each block, complex [D, B, K, N]."""
    batch, dim, modes = start_BDN.shape
    intake = intake_DRN.view(dim, batch, count, modes)
    states = torch.empty_like(intake)
    states[:, :, 0] = start_BDN.transpose(0, 1)
    factor = power_DN[:, None]
    for block in range(count - 1):
        torch.addcmul(intake[:, :, block], factor, states[:, :, block], out=states[:, :, block + 1])
    return states


def _fresh_rows_zeroed(values: Tensor, position_B: Tensor) -> Tensor:
    """Rows at position 0 are selected away, not multiplied: NaN times 0 is NaN."""
    return values.masked_fill((position_B == 0).view(-1, *(1,) * (values.ndim - 1)), 0)


def _intake_by_block(u_DRL: Tensor, tables: _Tables) -> Tensor:
    """What each block adds to the state, complex [D, R, N]."""
    rows = u_DRL @ _as_rows(tables.intake)
    return torch.view_as_complex(rows.view(*rows.shape[:-1], -1, 2))


def _step(
    x_B1D: Tensor, past_BDN: Tensor, p_DN: Tensor, q_DN: Tensor, gamma_DN: Tensor, omega_D: Tensor
) -> tuple[Tensor, Tensor]:
    u_BD = x_B1D[:, 0].to(p_DN.dtype)
    present = torch.addcmul(u_BD.unsqueeze(-1) * p_DN, q_DN, past_BDN)
    y_BD = torch.addcmul((present * gamma_DN).sum(-1).real, u_BD, omega_D)
    return y_BD.to(x_B1D.dtype).unsqueeze(1), torch.view_as_real(present)


def _parallel(
    x_BTD: Tensor, past_BDN: Tensor, p_DN: Tensor, q_DN2: Tensor, gamma_DN2: Tensor, omega_D: Tensor
) -> tuple[Tensor, Tensor]:
    batch, num_tokens, dim = x_BTD.shape
    blocks = Blocks.of(num_tokens)
    tables = _tables(p_DN, q_DN2, gamma_DN2, omega_D, blocks.length)
    u_DRL = _channels_first(x_BTD, blocks, p_DN.dtype)
    states = _block_states(_intake_by_block(u_DRL, tables), past_BDN, tables.powers[:, -1], blocks.num)
    y_DRL = u_DRL @ tables.toeplitz
    y_DRL.baddbmm_(_as_rows(states).flatten(1, 2), _as_rows(tables.readout).transpose(1, 2))
    last_DBL = u_DRL.view(dim, batch, blocks.num, -1)[:, :, -1, : blocks.last]
    tail = last_DBL @ _as_rows(tables.intake[:, -blocks.last :])
    tail_DBN = torch.view_as_complex(tail.view(dim, batch, -1, 2))
    present = torch.addcmul(tail_DBN, tables.powers[:, None, blocks.last], states[:, :, -1])
    return _tokens_first(y_DRL, batch, num_tokens, x_BTD.dtype), torch.view_as_real(
        present.transpose(0, 1).contiguous()
    )


@torch.library.custom_op("megalodon::complex_ema", mutates_args=())
def complex_ema(
    x: Tensor, past: Tensor, position: Tensor, p: Tensor, q: Tensor, gamma: Tensor, omega: Tensor
) -> tuple[Tensor, Tensor]:
    """CEMA of T more tokens.

    Args:
        x: [B, T, D], any floating dtype; T >= 1.
        past: [B, D, N, 2] state (re, im) before the call, float32 (float64 in a float64 model).
        position: [B] int64, tokens consumed before the call. At 0 the row's past has no effect, NaN included.
        p, q, gamma, omega: [D, N], [D, N, 2], [D, N, 2], [D], of the dtype of `past`; see `cema_coefficients`.

    Returns:
        y [B, T, D] in the dtype of x, and the state after the call, [B, D, N, 2].
    """
    if found := kernels.kernels_for(x, past):
        return found.complex_ema(x, past, position, p, q, gamma, omega)
    past_BDN = _as_complex(_fresh_rows_zeroed(past, position))
    if x.shape[1] == 1:
        return _step(x, past_BDN, p, _as_complex(q), _as_complex(gamma), omega)
    return _parallel(x, past_BDN, p, q, gamma, omega)


@complex_ema.register_fake
def _complex_ema_fake(
    x: Tensor, past: Tensor, position: Tensor, p: Tensor, q: Tensor, gamma: Tensor, omega: Tensor
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, memory_format=torch.contiguous_format), past.new_empty(past.shape)


class _MatrixGradients(NamedTuple):
    """Gradients of the tables, from which those of the coefficients follow."""

    powers: Tensor  # complex [D, L + 1, N]; from the state recurrence: filled in at q^L and q^last only
    intake: Tensor  # complex [D, L, N]
    readout: Tensor  # complex [D, L, N]
    kernel: Tensor  # real [D, L]


def _state_gradients(grad_states: Tensor, grad_present_BDN: Tensor, tables: _Tables, blocks: Blocks) -> None:
    """Turn the gradients that block states [D, B, K, N] get from outputs into their whole gradients, in place."""
    grad_last = grad_present_BDN.transpose(0, 1)
    grad_states[:, :, -1].addcmul_(tables.powers[:, None, blocks.last].conj_physical(), grad_last)
    factor = tables.powers[:, None, -1].conj_physical()
    for block in range(blocks.num - 1, 0, -1):
        grad_states[:, :, block - 1].addcmul_(factor, grad_states[:, :, block])


def _coefficient_gradients(
    grads: _MatrixGradients, tables: _Tables, p_DN: Tensor, gamma_DN2: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Chain from the tables to (p, q, gamma, omega); see the module's docstring."""
    gamma_DN, length = _as_complex(gamma_DN2), tables.intake.shape[1]
    powers, conj_powers = tables.powers, tables.powers.conj_physical()
    grad_intake, grad_readout = grads.intake.flip(1), grads.readout.conj_physical()
    grad_mix = (conj_powers[:, :length] * grads.kernel.unsqueeze(-1)).sum(1)  # of gamma p, in k_j = Re(gamma p q^j)
    grad_p = (conj_powers[:, :length] * grad_intake).real.sum(1) + (gamma_DN.conj_physical() * grad_mix).real
    grad_gamma = (conj_powers[:, 1:] * grad_readout).sum(1) + p_DN * grad_mix
    grad_powers = grads.powers
    grad_powers[:, :length] += p_DN[:, None] * grad_intake
    grad_powers[:, :length] += (gamma_DN.conj_physical() * p_DN)[:, None] * grads.kernel.unsqueeze(-1)
    grad_powers[:, 1:] += gamma_DN.conj_physical()[:, None] * grad_readout
    exponents = torch.arange(1, length + 1, device=p_DN.device, dtype=p_DN.dtype).view(-1, 1)
    grad_q = ((powers[:, :length] * exponents).conj_physical() * grad_powers[:, 1:]).sum(1)
    return grad_p, torch.view_as_real(grad_q), torch.view_as_real(grad_gamma), grads.kernel[:, 0].contiguous()


@torch.library.custom_op("megalodon::complex_ema_backward", mutates_args=())
def complex_ema_backward(
    grad_y: Tensor,
    grad_present: Tensor,
    x: Tensor,
    past: Tensor,
    position: Tensor,
    p: Tensor,
    q: Tensor,
    gamma: Tensor,
    omega: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, past, p, q, gamma, omega, each of its tensor's shape and dtype; block states are recomputed."""
    if found := kernels.kernels_for(x, past):
        grads = found.complex_ema_backward(grad_y, grad_present, x, past, position, p, q, gamma, omega)
        return grads[0], grads[1], grads[2], grads[3], grads[4], grads[5]
    return _parallel_backward(grad_y, grad_present, x, past, position, p, q, gamma, omega)


def _parallel_backward(
    grad_y: Tensor,
    grad_present: Tensor,
    x: Tensor,
    past: Tensor,
    position: Tensor,
    p: Tensor,
    q: Tensor,
    gamma: Tensor,
    omega: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, num_tokens, dim = x.shape
    blocks, modes = Blocks.of(num_tokens), p.shape[1]
    tables = _tables(p, q, gamma, omega, blocks.length)
    intake_rows = _as_rows(tables.intake)
    u_DRL = _channels_first(x, blocks, p.dtype)
    grad_DRL = _channels_first(grad_y, blocks, p.dtype)
    past_BDN = _as_complex(_fresh_rows_zeroed(past, position))
    states = _block_states(_intake_by_block(u_DRL, tables), past_BDN, tables.powers[:, -1], blocks.num)
    grad_present_BDN = _as_complex(grad_present)
    grad_states = (grad_DRL @ _as_rows(tables.readout)).view(dim, batch, blocks.num, modes, 2)
    grad_states = torch.view_as_complex(grad_states)
    _state_gradients(grad_states, grad_present_BDN, tables, blocks)

    # Each block's intake reaches the state that enters the next one; the last block's, cut to its tokens, the present.
    grad_intake_states = torch.zeros_like(grad_states)
    grad_intake_states[:, :, :-1] = grad_states[:, :, 1:]
    grad_intake_rows = _as_rows(grad_intake_states).flatten(1, 2)
    grad_u = grad_DRL @ tables.toeplitz.transpose(1, 2)
    grad_u.baddbmm_(grad_intake_rows, intake_rows.transpose(1, 2))
    grad_present_rows = _as_rows(grad_present_BDN.transpose(0, 1).contiguous())
    last_DBL = u_DRL.view(dim, batch, blocks.num, -1)[:, :, -1, : blocks.last]
    grad_u_last = grad_u.view(dim, batch, blocks.num, -1)[:, :, -1, : blocks.last]
    grad_u_last += grad_present_rows @ intake_rows[:, -blocks.last :].transpose(1, 2)

    grad_intake = u_DRL.transpose(1, 2) @ grad_intake_rows
    grad_intake[:, -blocks.last :] += last_DBL.transpose(1, 2) @ grad_present_rows
    grad_readout = grad_DRL.transpose(1, 2) @ _as_rows(states).flatten(1, 2)
    grad_powers = torch.zeros_like(tables.powers)
    grad_powers[:, -1] = (states[:, :, :-1].conj_physical() * grad_states[:, :, 1:]).sum((1, 2))
    grad_powers[:, blocks.last] += (states[:, :, -1].conj_physical() * grad_present_BDN.transpose(0, 1)).sum(1)
    grads = _MatrixGradients(
        grad_powers,
        torch.view_as_complex(grad_intake.view(dim, blocks.length, modes, 2)),
        torch.view_as_complex(grad_readout.view(dim, blocks.length, modes, 2)),
        _diagonal_sums(u_DRL.transpose(1, 2) @ grad_DRL),
    )
    grad_past = torch.view_as_real(grad_states[:, :, 0].transpose(0, 1).contiguous())
    return (
        _tokens_first(grad_u, batch, num_tokens, x.dtype),
        _fresh_rows_zeroed(grad_past, position),
        *_coefficient_gradients(grads, tables, p, gamma),
    )


@complex_ema_backward.register_fake
def _complex_ema_backward_fake(
    grad_y: Tensor,
    grad_present: Tensor,
    x: Tensor,
    past: Tensor,
    position: Tensor,
    p: Tensor,
    q: Tensor,
    gamma: Tensor,
    omega: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    like = (x, past, p, q, gamma, omega)
    empty = [tensor.new_empty(tensor.shape) for tensor in like]
    return empty[0], empty[1], empty[2], empty[3], empty[4], empty[5]


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad_y, grad_present):  # type: ignore[no-untyped-def]
    grads = complex_ema_backward(grad_y, grad_present, *ctx.saved_tensors)
    grad_x, grad_past, *grad_coefficients = grads
    return grad_x, grad_past, None, *grad_coefficients


complex_ema.register_autograd(_backward, setup_context=_setup_context)

for _device in ("cpu", "cuda"):  # under autocast the operator still computes in the dtype of its state
    complex_ema.register_autocast(_device, torch.float32)
    complex_ema_backward.register_autocast(_device, torch.float32)

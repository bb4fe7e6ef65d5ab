"""ComplexEMA's function for TensorRT without plugins: standard operators, no branch, no loop.

The exported function chooses between one step and blocks with an If, and goes from block to block with a Scan. ONNX
Runtime is fast at that; TensorRT-RTX 1.7 cannot compile a Scan over a computed number of blocks ("producer is not
shape_call"), nor padding to whole blocks inside an If. Here all calls take blocks, and doubling the Scan's place:

    inside a block       y = Toeplitz(k) u,  k_j = Re sum_n gamma p q^j
    a block's sum        S = sum_j p q^(L-1-j) u_j
    from block to block  z = (past, S_0, S_1, ...);  z_i += q^(L s) z_(i-s)  for s = 1, 2, 4, ...
    into block i         y_t += Re sum_n gamma q^(t+1) z_i

The last block may be partial: its r tokens are moved to the block's end, where zeros before them add nothing, and the
state after it is q^r z_i + S. Tables depend on weights alone: TensorRT folds them.

Letters as in `MegalodonConfig`, and: L tokens of a block, M = B times the number of blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from megalodon_deploy.engine.emitter import Complex, Emitter

if TYPE_CHECKING:
    import onnx

_MAX_BLOCK = 16
_INPUTS = ("x", "past_cema", "position", "p", "q_powers", "gamma", "omega")
_OUTPUTS = ("y", "present_cema")


def loopless_complex_ema(exported: onnx.FunctionProto, chunk_size: int) -> onnx.FunctionProto:
    """A function of the same name, inputs and outputs as `exported`, for calls of 1..`chunk_size` tokens."""
    from onnx import TensorProto, helper

    assert (len(exported.input), len(exported.output)) == (len(_INPUTS), len(_OUTPUTS)), "Bug: other operands"
    emit = Emitter()
    u_BTD = emit.op("Cast", "x", to=TensorProto.FLOAT)
    direct_BTD = emit.op("Mul", u_BTD, "omega")
    past_BDN = emit.split(_past_or_zero(emit))
    average_BTD, present = _blocks(emit, u_BTD, past_BDN, chunk_size)
    y_BTD = emit.op("CastLike", emit.op("Add", direct_BTD, average_BTD), "x")
    for output, value in zip(_OUTPUTS, (y_BTD, present), strict=True):
        emit.nodes.append(helper.make_node("Identity", [value], [output], name=output))
    return helper.make_function(
        exported.domain, exported.name, _INPUTS, _OUTPUTS, emit.nodes, opset_imports=list(exported.opset_import)
    )


def _past_or_zero(emit: Emitter) -> str:
    """The past state, with zeros selected (not multiplied: it may hold NaN) in rows at position 0."""
    fresh = emit.reshape(emit.op("Equal", "position", emit.constant(0)), -1, 1, 1, 1)
    return emit.op("Where", fresh, emit.constant(0.0, np.float32), "past_cema")


def _power(emit: Emitter, level: int, num_powers: int) -> Complex:
    """q^(2^level), parts [D, N]; beyond the last of `num_powers` entries by squaring it."""
    entry = emit.constant(min(level, num_powers - 1))
    power = emit.split(emit.op("Gather", "q_powers", entry, axis=0))
    for _ in range(level - num_powers + 1):
        power = emit.multiply(power, power)
    return power


@dataclass(frozen=True)
class _Tables:
    """Each channel's matrices, and powers of q."""

    toeplitz: str  # [D, L, L]: element (j, t) is k_(t-j), 0 where t < j
    sums: Complex  # [D, L, N]: p q^(L-1-j)
    readout: Complex  # [D, N, L]: gamma q^(t+1)
    powers: Complex  # [D, N, L]: q^j, j = 0..L: L + 1 of them


def _tables(emit: Emitter, levels: int) -> _Tables:
    """For L = 2^levels."""
    length = 1 << levels
    zeros_DN1 = emit.unsqueeze(emit.op("Sub", "p", "p"), -1)
    powers: Complex = (emit.op("Add", zeros_DN1, emit.constant(1.0, np.float32)), zeros_DN1)
    for level in range(levels):
        factor_DN1 = emit.each("Unsqueeze", _power(emit, level, levels + 1), emit.constant([-1]))
        powers = emit.concat(powers, emit.multiply(powers, factor_DN1), -1)
    top_DN1 = emit.each("Unsqueeze", _power(emit, levels, levels + 1), emit.constant([-1]))
    all_powers = emit.concat(powers, top_DN1, -1)
    p_DN1 = emit.unsqueeze("p", -1)
    gamma_DN1 = emit.each("Unsqueeze", emit.split("gamma"), emit.constant([-1]))
    products_DNL = emit.op("Mul", emit.real_product(powers, gamma_DN1), p_DN1)
    kernel_DL = emit.op("ReduceSum", products_DNL, emit.constant([1]), keepdims=0)
    distance = np.arange(length)[None, :] - np.arange(length)[:, None]
    repeated_DLL = emit.op("Gather", kernel_DL, emit.constant(np.maximum(distance, 0)), axis=1)
    backwards = emit.each("Gather", powers, emit.constant(np.arange(length)[::-1]), axis=2)
    return _Tables(
        toeplitz=emit.op("Mul", repeated_DLL, emit.constant(distance >= 0, np.float32)),
        sums=emit.each("Transpose", emit.each("Mul", backwards, p_DN1), perm=[0, 2, 1]),
        readout=emit.multiply(
            emit.each("Gather", all_powers, emit.constant(np.arange(1, length + 1)), axis=2), gamma_DN1
        ),
        powers=all_powers,
    )


def _blocks(emit: Emitter, u_BTD: str, past_BDN: Complex, chunk_size: int) -> tuple[str, str]:
    """Average [B, T, D] without the omega term, and the new state [B, D, N, 2]."""
    num_powers = chunk_size.bit_length()
    levels = min(_MAX_BLOCK.bit_length(), num_powers) - 1
    length, one = emit.constant([1 << levels]), emit.constant([1])
    batch, dim, num_tokens = emit.length(u_BTD, 0), emit.length("p", 0), emit.length(u_BTD, 1)
    whole = emit.op("Div", emit.op("Sub", num_tokens, one), length)
    last_start = emit.op("Mul", whole, length)
    last_tokens = emit.op("Sub", num_tokens, last_start)
    missing = emit.op("Sub", length, last_tokens)
    tables = _tables(emit, levels)

    padded = emit.reshape(emit.pad(u_BTD, 3, 1, after=missing), 0, -1, length, dim)
    blocks_DML = emit.reshape(emit.op("Transpose", padded, perm=[3, 0, 1, 2]), 0, -1, length)
    inner_DML = emit.op("MatMul", blocks_DML, tables.toeplitz)
    sums_DMN = [emit.op("MatMul", blocks_DML, part) for part in tables.sums]
    sums_re, sums_im = (emit.reshape(part, 0, batch, -1, emit.length("p", 1)) for part in sums_DMN)
    past_DB1N = emit.each("Unsqueeze", emit.each("Transpose", past_BDN, perm=[1, 0, 2]), emit.constant([2]))
    states = _accumulate(emit, emit.concat(past_DB1N, (sums_re, sums_im), 2), levels, chunk_size)

    num_blocks = emit.op("Add", whole, one)
    entering = [emit.slice(part, emit.constant([0]), num_blocks, 2) for part in states]
    rows_DMN = [emit.reshape(part, 0, -1, emit.length("p", 1)) for part in entering]
    into_re, into_im = (emit.op("MatMul", *pair) for pair in zip(rows_DMN, tables.readout, strict=True))
    y_DML = emit.op("Add", inner_DML, emit.op("Sub", into_re, into_im))
    y_BMLD = emit.op("Transpose", emit.reshape(y_DML, 0, batch, -1, length), perm=[1, 2, 3, 0])
    average_BTD = emit.slice(emit.reshape(y_BMLD, 0, -1, dim), emit.constant([0]), num_tokens, 1)

    last_re, last_im = (emit.slice(part, whole, num_blocks, 2) for part in states)
    last_DBN = emit.each("Squeeze", (last_re, last_im), emit.constant([2]))
    decay_DN1 = emit.each("Gather", tables.powers, last_tokens, axis=2)
    moved_DBN = emit.multiply(last_DBN, emit.each("Transpose", decay_DN1, perm=[0, 2, 1]))
    tail_BLD = emit.pad(emit.slice(u_BTD, last_start, num_tokens, 1), 3, 1, before=missing)
    tail_DBL = emit.op("Transpose", tail_BLD, perm=[2, 0, 1])
    tail_re, tail_im = (emit.op("MatMul", tail_DBL, part) for part in tables.sums)
    state_BDN = emit.each("Transpose", emit.add(moved_DBN, (tail_re, tail_im)), perm=[1, 0, 2])
    return average_BTD, emit.join(state_BDN)


def _accumulate(emit: Emitter, z: Complex, levels: int, chunk_size: int) -> Complex:
    """z_i = sum over j <= i of q^(L (i-j)) z_j along axis 2 of [D, B, blocks + 1, N]; entry i enters block i."""
    num_entries = -(-chunk_size // (1 << levels)) + 1
    end = emit.length(z[0], 2)
    for doubling in range((num_entries - 1).bit_length()):
        factor_DN = _power(emit, levels + doubling, chunk_size.bit_length())
        factor = emit.each("Unsqueeze", factor_DN, emit.constant([1, 2]))
        shift, zero = emit.constant([1 << doubling]), emit.constant([0])
        real, imaginary = (emit.slice(emit.pad(part, 4, 2, before=shift), zero, end, 2) for part in z)
        z = emit.add(z, emit.multiply((real, imaginary), factor))
    return z

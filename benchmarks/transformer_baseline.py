"""The transformer that Megalodon is compared with: what the field trains and serves.

RMSNorm, rotary positions, PyTorch's fused causal attention, SwiGLU, as in Llama. A stream keeps the keys and values of
all its tokens.

Shapes: B rows, T tokens of a call, S tokens before it, D channels, H heads, V vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from megalodon_deploy.model.attention import Rotation

HEAD_DIM = 64


class Memory:
    """Rotated keys and values of all blocks, [layers, 2, B, H, capacity, 64], of which `used` rows are filled."""

    def __init__(self, transformer: Transformer, batch: int, capacity: int) -> None:
        weight = transformer.embed.weight
        shape = (len(transformer.layers), 2, batch, weight.shape[1] // HEAD_DIM, capacity, HEAD_DIM)
        # Written, not only reserved: pages that were never written to are read from one page of zeros.
        self.rows = torch.full(shape, 0.01, dtype=weight.dtype, device=weight.device)
        self.used = 0

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values of a block, [B, H, S + T, 64] each, with those of the call behind the others."""
        end = self.used + k.shape[2]
        self.rows[layer, 0, :, :, self.used : end] = k
        self.rows[layer, 1, :, :, self.used : end] = v
        keys, values = self.rows[layer, :, :, :, :end].unbind(0)
        return keys, values


class TransformerBlock(nn.Module):
    """Pre-norm attention and SwiGLU."""

    def __init__(self, dim: int, hidden: int, index: int) -> None:
        super().__init__()
        self.index = index
        self.attention_norm, self.ffn_norm = nn.RMSNorm(dim), nn.RMSNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.gate_up, self.down = nn.Linear(dim, 2 * hidden, bias=False), nn.Linear(hidden, dim, bias=False)

    def forward(self, x_BTD: Tensor, rotation: Rotation, memory: Memory | None) -> Tensor:
        batch, num_tokens, _ = x_BTD.shape
        qkv = self.qkv(self.attention_norm(x_BTD)).view(batch, num_tokens, 3, -1, HEAD_DIM)
        q, k = (x.transpose(1, 2) for x in rotation(qkv[:, :, :2]).unbind(2))
        v = qkv[:, :, 2].transpose(1, 2)
        if memory is not None:
            k, v = memory.append(self.index, k, v)
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=num_tokens > 1)
        x_BTD = x_BTD + self.out(attended.transpose(1, 2).flatten(2))
        gate, up = self.gate_up(self.ffn_norm(x_BTD)).chunk(2, -1)
        return x_BTD + self.down(functional.silu(gate) * up)


class Transformer(nn.Module):
    """A Llama-like language model of `dim` channels, a multiple of 64."""

    def __init__(self, dim: int, layers: int, vocab_size: int) -> None:
        super().__init__()
        hidden = 8 * dim // 3 // 32 * 32
        self.embed = nn.Embedding(vocab_size, dim)
        self.layers = nn.ModuleList(TransformerBlock(dim, hidden, index) for index in range(layers))
        self.norm = nn.RMSNorm(dim)
        self.output = nn.Linear(dim, vocab_size, bias=False)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)
        for block in self.layers:  # residual branches start small, as in GPT-2 and its heirs
            for linear in (block.out, block.down):
                nn.init.normal_(linear.weight, std=0.02 / math.sqrt(2 * layers))

    def hidden(self, tokens_BT: Tensor, memory: Memory | None = None) -> Tensor:
        """[B, T, D], what the output matrix is applied to. With a memory in use T is 1: the mask is that of its end."""
        begin = 0 if memory is None else memory.used
        if begin and tokens_BT.shape[1] > 1:
            raise ValueError("a transformer that has consumed tokens takes one at a time")
        x_BTD = self.embed(tokens_BT)
        positions = torch.arange(begin, begin + tokens_BT.shape[1], device=tokens_BT.device).unsqueeze(0)
        rotation = Rotation.at(positions, HEAD_DIM, 10000.0, x_BTD.dtype)
        for layer in self.layers:
            x_BTD = layer(x_BTD, rotation, memory)
        if memory is not None:
            memory.used += tokens_BT.shape[1]
        return self.norm(x_BTD)

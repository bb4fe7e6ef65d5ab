"""One block: gated attention over a moving average, then a feed-forward layer with a two-hop residual.

Shapes: B rows, T tokens, D channels, H heads, Z and E all heads' key and value width, F feed-forward width.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from megalodon_deploy.config import MegalodonConfig
from megalodon_deploy.model.attention import Attend, Rotation
from megalodon_deploy.model.half_precision import to_residual, with_headroom
from megalodon_deploy.model.layers import ComplexEMA, LayerNorm, RMSNorm, rms_norm, stream_norm
from megalodon_deploy.model.quantized_rows import QuantizedRows, dequantize_rows, quantize_rows


class LayerState(NamedTuple):
    """One layer's recurrent tensors, past or present. A present holds the call's own key/value rows only."""

    key: Tensor  # [B, H, S or T, dz]
    value: Tensor  # [B, H, S or T, dv]
    cema: Tensor  # [B, D, N, 2]
    norm: Tensor  # [B, G, 4]
    key_scale: Tensor | None = None  # [B, H, S or T]; of keys and values in 8 bits, which have their codes' type
    value_scale: Tensor | None = None


class Call(NamedTuple):
    """What all layers of one call share."""

    position: Tensor  # [B]
    rotation: Rotation
    attend: Attend


def _linear(in_dim: int, out_dim: int, *, bias: bool) -> nn.Linear:
    """The released "he" initialisation: std 1/sqrt(3 fan_in), biases 0."""
    linear = nn.Linear(in_dim, out_dim, bias=bias)
    nn.init.kaiming_normal_(linear.weight, a=math.sqrt(5))
    if bias:
        nn.init.zeros_(linear.bias)
    return linear


class QueriesAndKeys(nn.Module):
    """From z to rotated queries and keys of all heads. It has no parameters: a module, so that hooks can act on it."""

    def __init__(self, config: MegalodonConfig) -> None:
        super().__init__()
        self.heads = (config.num_heads, config.key_head_dim)
        self.eps = config.norm_eps
        self.normalizes = config.attention_norm

    def forward(self, z_BTZ: Tensor, gamma_2Z: Tensor, beta_2Z: Tensor, rotation: Rotation) -> Tensor:
        """[B, T, 2, H, dz]: queries, then keys."""
        z_BTHd = z_BTZ.view(*z_BTZ.shape[:2], *self.heads)
        if self.normalizes:
            z_BTHd = rms_norm(z_BTHd, None, self.eps)
        scale_2Hd = ((gamma_2Z + 1) / math.sqrt(self.heads[1])).view(2, *self.heads)
        return rotation(torch.addcmul(beta_2Z.view(2, *self.heads), z_BTHd.unsqueeze(2), scale_2Hd))


class GatedAttention(nn.Module):
    """The released `mega` part of a layer: x + attention."""

    def __init__(self, config: MegalodonConfig) -> None:
        super().__init__()
        self.kv_dtype = config.kv_dtype
        dim = config.model_dim
        self.queries_and_keys = QueriesAndKeys(config)
        self.timenorm = stream_norm(config)
        self.cema = None if config.ema == "none" else ComplexEMA(config)
        self.rmsnorm = RMSNorm(config)
        self.wz = _linear(dim, config.z_dim, bias=True)
        self.wv = _linear(dim, config.value_dim, bias=True)
        self.wr = _linear(dim, config.value_dim, bias=True)
        self.wh1 = _linear(dim, dim, bias=True)
        self.wh2 = _linear(config.value_dim, dim, bias=False)
        self.gamma = nn.Parameter(torch.zeros(2, config.z_dim))
        self.beta = nn.Parameter(torch.zeros(2, config.z_dim))

    def forward(self, x_BTD: Tensor, past: LayerState, call: Call) -> tuple[Tensor, LayerState]:
        u_BTD, norm = self.timenorm(x_BTD, past.norm, call.position)
        averaged, cema = (u_BTD, past.cema) if self.cema is None else self.cema(u_BTD, past.cema, call.position)
        dtype = self.wv.weight.dtype
        u_BTD, m_BTD = u_BTD.to(dtype), self.rmsnorm(averaged).to(dtype)
        both_BT2Hd = self.queries_and_keys(self.wz(m_BTD), self.gamma, self.beta, call.rotation)
        q_BHTd, k_BHTd = (x_BTHd.transpose(1, 2) for x_BTHd in both_BT2Hd.unbind(2))
        v_BTE = functional.silu(self.wv(u_BTD))
        v_BHTe = v_BTE.view(*v_BTE.shape[:2], both_BT2Hd.shape[3], -1).transpose(1, 2)
        (k_BHTd, past_key), keys = self._kept(k_BHTd, past.key, past.key_scale)
        (v_BHTe, past_value), values = self._kept(v_BHTe, past.value, past.value_scale)
        attended = call.attend(q_BHTd, k_BHTd, v_BHTe, past_key, past_value).transpose(1, 2).flatten(2)
        gated_BTE = attended * with_headroom(functional.silu(self.wr(m_BTD)))
        y_BTD = x_BTD + self.wh1(m_BTD) + to_residual(self.wh2(gated_BTE))
        return y_BTD, LayerState(keys[0], values[0], cema, norm, keys[1], values[1])

    def _kept(
        self, new: Tensor, past: Tensor, past_scale: Tensor | None
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor | None]]:
        """New and past rows as attention sees them; the new ones as they are kept, with their scales."""
        if self.kv_dtype == "activation" or past_scale is None:
            return (new, past), (new, None)
        kept = quantize_rows(new, self.kv_dtype)
        past_rows = QuantizedRows(past, past_scale)
        return (dequantize_rows(kept, new.dtype), dequantize_rows(past_rows, new.dtype)), kept


class FeedForward(nn.Module):
    """The released `nffn` part of a layer, without its residual."""

    def __init__(self, config: MegalodonConfig, layer: int) -> None:
        super().__init__()
        self.norm = LayerNorm(config)
        self.fc1 = _linear(config.model_dim, config.ffn_hidden_dim, bias=False)
        self.fc2 = _linear(config.ffn_hidden_dim, config.model_dim, bias=False)
        self.fc3 = _linear(config.model_dim, config.ffn_hidden_dim, bias=False) if config.swiglu else None
        self.alpha = nn.Parameter(torch.full((config.model_dim,), 0.1 * 0.5**layer)) if config.rescale_nffn else None

    def forward(self, y_BTD: Tensor) -> Tensor:
        n_BTD = self.norm(y_BTD).to(self.fc1.weight.dtype)
        hidden_BTF = with_headroom(functional.silu(self.fc1(n_BTD)))
        if self.fc3 is not None:
            hidden_BTF = hidden_BTF * self.fc3(n_BTD)
        out_BTD = to_residual(self.fc2(hidden_BTF))
        return out_BTD if self.alpha is None else out_BTD * self.alpha


class Block(nn.Module):
    """Both parts. The second hop adds the feed-forward output to the block's input, not to the attention's output."""

    def __init__(self, config: MegalodonConfig, layer: int) -> None:
        super().__init__()
        self.mega = GatedAttention(config)
        self.nffn = FeedForward(config, layer)
        self.two_hop = config.two_hop

    def forward(self, x_BTD: Tensor, past: LayerState, call: Call) -> tuple[Tensor, LayerState]:
        y_BTD, present = self.mega(x_BTD, past, call)
        return (x_BTD if self.two_hop else y_BTD) + self.nffn(y_BTD), present

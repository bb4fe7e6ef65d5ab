"""The model: tokens and state in, logits and state out.

Shapes: B rows, T tokens, V vocabulary, D channels. Names of state tensors are those of `megalodon_deploy.state`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from megalodon_deploy.config import MegalodonConfig
from megalodon_deploy.model.attention import Attend, OneChunk, Rotation, plan_attention
from megalodon_deploy.model.block import Block, Call, LayerState
from megalodon_deploy.model.layers import stream_norm
from megalodon_deploy.model.model_state import ModelState

__all__ = ["Megalodon", "ModelState"]

_FINAL_NORM = "norm.final"


def _scaled_normal(weight: Tensor) -> None:
    """Truncated normal of std 1/sqrt(D), three deviations wide."""
    std = 1 / math.sqrt(weight.shape[-1])
    nn.init.trunc_normal_(weight, std=std, a=-3 * std, b=3 * std)


class Output(nn.Module):
    """Final norm and, unless the embedding serves, the output matrix."""

    def __init__(self, config: MegalodonConfig) -> None:
        super().__init__()
        self.final_norm = stream_norm(config)
        self.output: nn.Linear | None = None
        if not config.share_emb:
            self.output = nn.Linear(config.model_dim, config.vocab_size, bias=False)
            _scaled_normal(self.output.weight)


class Megalodon(nn.Module):
    """A Megalodon language model, initialised as released.

    `state_dict()` has the names of `parameters.parameter_specs(config)`. `model.to(torch.bfloat16)` and the like
    convert the activations and the matrices; norms, CEMA coefficients and recurrent state stay float32. A float64
    model computes everything, state included, in float64.

    `embed`, `output` and some of `layers` may be set to None: what is left is a stage of a pipeline, see `hidden`.
    """

    embed: nn.Embedding | None
    output: Output | None

    def __init__(self, config: MegalodonConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.model_dim)
        _scaled_normal(self.embed.weight)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.output = Output(config)

    @property
    def dtype(self) -> torch.dtype:
        """Of activations, and of key/value memory."""
        return self._matrix.dtype

    @property
    def device(self) -> torch.device:
        """Where tokens are taken."""
        return self._matrix.device

    @property
    def _matrix(self) -> Tensor:
        """One that every stage has."""
        block = next(self.layers.children())
        assert isinstance(block, Block), "Bug: a stage without layers"
        return block.mega.wz.weight

    def initial_state(self, batch: int) -> ModelState:
        """The state of `batch` streams that have consumed nothing, of the layers that are here."""
        state = ModelState.zeros(self.config, batch, dtype=self.dtype, device=self.device)
        here = {name for name, _ in self.layers.named_children()} | ({"final"} if self.output else set())
        tensors = {name: tensor for name, tensor in state.tensors.items() if name.rpartition(".")[2] in here}
        return ModelState(state.position, tensors)

    def forward(self, tokens_BT: Tensor, state: ModelState | None = None) -> tuple[Tensor, ModelState]:
        """Logits [B, T, V] (float32; float64 in a float64 model) of T >= 1 tokens, and the state after them.

        Rows may be at different positions and T may cross any number of chunk edges. Rows of `state` at position 0
        start afresh whatever their tensors hold. Gradients flow through the state; `state.detach()` cuts them.
        Raises `ValueError` when tokens and state do not fit together.
        """
        x_BTD, state = self.hidden(tokens_BT, state)
        return self.logits(x_BTD), state

    def hidden(self, tokens_BT: Tensor, state: ModelState | None = None) -> tuple[Tensor, ModelState]:
        """As `forward`, but what the output matrix is applied to, [B, T, D], in the place of logits.

        A stage of a pipeline takes the residual stream [B, T, D] of the stage before it in the place of tokens, and
        gives its own unless it is the last.
        """
        is_stream = tokens_BT.is_floating_point()
        if tokens_BT.ndim != 2 + is_stream or tokens_BT.shape[1] == 0:
            raise ValueError(f"tokens have shape {list(tokens_BT.shape)}; expected [B, T] with T >= 1")
        batch, num_tokens = tokens_BT.shape[:2]
        if state is None:
            state, positions = self.initial_state(batch), [0] * batch
        else:
            positions = state.position.tolist()
        if len(positions) != batch:
            raise ValueError(f"tokens have {batch} rows, the state has {len(positions)}")
        held = next(tensor.shape[2] for name, tensor in state.tensors.items() if name.startswith("past_key."))
        needed = max(p % self.config.chunk_size for p in positions)
        if held < needed:
            raise ValueError(f"the state holds {held} key/value rows, its positions need {needed}")
        attend = plan_attention(positions, num_tokens, self.config.chunk_size, tokens_BT.device)
        x_BTD = tokens_BT if is_stream else self._embedded(tokens_BT)
        x_BTD, present = self._run(x_BTD, state.position, state.tensors, attend)
        return x_BTD, state.advance(present, positions, num_tokens, self.config.chunk_size)

    @property
    def output_matrix(self) -> Tensor:
        """[V, D]."""
        assert self.output is not None, "Bug: not the last stage"
        if self.output.output is not None:
            return self.output.output.weight
        assert self.embed is not None, "Bug: a last stage without the embedding that serves as output"
        return self.embed.weight

    def logits(self, x_BTD: Tensor) -> Tensor:
        """Of what `hidden` gives: [B, T, V], float32 (float64 in a float64 model)."""
        logits_BTV = functional.linear(x_BTD, self.output_matrix)
        return logits_BTV.to(torch.promote_types(logits_BTV.dtype, torch.float32))

    def forward_one_chunk(
        self, tokens_BT: Tensor, position_B: Tensor, past: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """One call as the exported graph makes it, traceable: no row crosses a chunk edge.

        Args:
            tokens_BT, position_B: int64, with (position mod C) + T <= C in every row (not checked).
            past: tensors by the input names of `state.state_specs`; key/value memory of any capacity S.

        Returns:
            Logits [B, T, V], and new key/value rows and present tensors by the output names of `state.state_specs`.
        """
        attend = OneChunk(position_B, self.config.chunk_size)
        x_BTD, present = self._run(self._embedded(tokens_BT), position_B, past, attend)
        return self.logits(x_BTD), {_output_name(name): tensor for name, tensor in present.items()}

    def _embedded(self, tokens_BT: Tensor) -> Tensor:
        """The residual stream [B, T, D] that enters the first layer, in float32 at least: see `half_precision`."""
        assert self.embed is not None, "Bug: tokens for a stage that is not the first"
        x_BTD: Tensor = self.embed(tokens_BT)
        x_BTD = x_BTD.to(torch.promote_types(x_BTD.dtype, torch.float32))
        return x_BTD * math.sqrt(self.config.model_dim) if self.config.scale_emb else x_BTD

    def _run(
        self, x_BTD: Tensor, position_B: Tensor, past: Mapping[str, Tensor], attend: Attend
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """[B, T, D] after the final norm, and what the call adds to the state, by the names of `past`."""
        config, dtype = self.config, self.dtype
        in_chunk_BT = (position_B.unsqueeze(-1) + torch.arange(x_BTD.shape[1], device=x_BTD.device)) % config.chunk_size
        rotation = Rotation.at(in_chunk_BT, config.key_head_dim, config.rope_base, dtype)
        call = Call(position_B, rotation, attend)
        present: dict[str, Tensor] = {}
        for i, layer in self.layers.named_children():
            names = {kind: f"past_{kind}.{i}" for kind in LayerState._fields}
            layer_past = {kind: past[name] for kind, name in names.items() if name in past}
            x_BTD, added = layer(x_BTD, LayerState(**layer_past), call)
            present.update({names[kind]: getattr(added, kind) for kind in layer_past})
        if self.output is None:
            return x_BTD, present
        final = f"past_{_FINAL_NORM}"
        x_BTD, present[final] = self.output.final_norm(x_BTD, past[final], position_B)
        return x_BTD.to(dtype), present


def _output_name(past_name: str) -> str:
    """`past_key.0` -> `new_key.0`, `past_norm.0` -> `present_norm.0`."""
    kind = past_name.removeprefix("past_")
    return ("new_" if kind.startswith(("key", "value")) else "present_") + kind

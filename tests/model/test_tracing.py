"""What torch.export and torch.compile see: one node for each operator, and the same numbers."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from helpers import assert_close
from model.random_models import CONFIGS, random_model, random_tokens
from torch import Tensor, nn

from megalodon_deploy.model.megalodon import Megalodon
from megalodon_deploy.state import state_specs

CONFIG = CONFIGS["plain"]


class OneChunkCall(nn.Module):
    def __init__(self, model: Megalodon) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, position: Tensor, past: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        return self.model.forward_one_chunk(tokens, position, past)


def garbage_memory(model: Megalodon, capacity: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Three rows: fresh, five tokens into the second chunk, four into the first; held rows beyond those are garbage."""
    torch.manual_seed(3)
    starts, past = [0, CONFIG.chunk_size + 5, 4], {}
    with torch.no_grad():
        states = [model(random_tokens(CONFIG, 1, start, seed=start))[1] if start else None for start in starts]
    for spec in state_specs(CONFIG):
        shape = [capacity if dim == "S" else dim for dim in spec.past_shape[1:]]
        past[spec.past] = 1e4 * torch.randn(len(starts), *shape)
        for row, state in enumerate(states):
            if state is None:
                past[spec.past][row] = torch.nan
            elif spec.is_activation:
                held = state.tensors[spec.past]
                past[spec.past][row, :, : held.shape[2]] = held[0]
            else:
                past[spec.past][row] = state.tensors[spec.past][0]
    return torch.tensor(starts), past


def expected_logits(model: Megalodon, position: Tensor, tokens: Tensor) -> Tensor:
    rows = []
    for row, start in enumerate(position.tolist()):
        whole = torch.cat([random_tokens(CONFIG, 1, start, seed=start), tokens[row : row + 1]], 1)
        rows.append(model(whole)[0][:, start:])
    return torch.cat(rows)


@pytest.mark.parametrize("num_tokens", [1, 5])
@pytest.mark.parametrize("capacity", [5, 8, CONFIG.chunk_size])
def test_one_chunk_call_is_the_model_whatever_masked_rows_hold(num_tokens: int, capacity: int) -> None:
    model, tokens = random_model(CONFIG), random_tokens(CONFIG, 3, num_tokens)
    position, past = garbage_memory(model, capacity)
    with torch.no_grad():
        logits, present = model.forward_one_chunk(tokens, position, past)
        expected = expected_logits(model, position, tokens)
    assert_close(logits.numpy(), expected.numpy(), 2e-5, "logits")
    assert set(present) == {spec.present for spec in state_specs(CONFIG)}
    for spec in state_specs(CONFIG):
        dims = {"B": 3, "T": num_tokens}
        assert list(present[spec.present].shape) == [dims.get(str(dim), dim) for dim in spec.present_shape]
        assert present[spec.present].isfinite().all(), spec.present


def test_export_sees_each_operator_as_one_node() -> None:
    model = random_model(CONFIG)
    position, past = garbage_memory(model, 8)
    batch, length, capacity = (torch.export.Dim(name, min=2, max=64) for name in ("batch", "length", "capacity"))
    shapes = {spec.past: {0: batch, 2: capacity} if spec.is_activation else {0: batch} for spec in state_specs(CONFIG)}
    program = torch.export.export(
        OneChunkCall(model),
        (random_tokens(CONFIG, 3, 4), position, past),
        dynamic_shapes=({0: batch, 1: length}, {0: batch}, shapes),
    )
    calls = Counter(str(node.target) for node in program.graph.nodes if node.op == "call_function")
    assert calls["megalodon.complex_ema.default"] == CONFIG.num_layers
    assert calls["megalodon.timestep_norm.default"] == CONFIG.num_layers + 1
    assert calls["megalodon.chunk_attention.default"] == CONFIG.num_layers
    tokens = random_tokens(CONFIG, 3, 6, seed=5)
    position, past = garbage_memory(model, 11)
    with torch.no_grad():
        exported, _ = program.module()(tokens, position, past)
        assert_close(exported.numpy(), expected_logits(model, position, tokens).numpy(), 2e-5, "exported")


def test_compiled_training_step_has_the_same_gradients() -> None:
    model, tokens = random_model(CONFIG).train(), random_tokens(CONFIG, 2, 2 * CONFIG.chunk_size + 3)
    gradients = []
    for function in (model, torch.compile(model, backend="aot_eager")):
        model.zero_grad()
        logits, _ = function(tokens)
        logits.square().mean().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, expected in gradients[0].items():
        compiled = gradients[1][name]
        assert expected is not None
        assert compiled is not None
        assert (compiled - expected).norm() <= 1e-5 * expected.norm(), name


def test_compiled_calls_with_state_agree() -> None:
    model, tokens = random_model(CONFIG), random_tokens(CONFIG, 2, 9)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        _, state = compiled(tokens[:, :5])
        logits, _ = compiled(tokens[:, 5:], state)
        assert_close(logits.numpy(), model(tokens)[0][:, 5:].numpy(), 2e-5, "logits")

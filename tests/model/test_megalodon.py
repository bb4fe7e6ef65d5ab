"""The model against golden cases and against the architecture page in float64, whole and in calls of any length."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conftest import GoldenCase
from helpers import assert_close, small_config
from hypothesis import given, settings
from hypothesis import strategies as st
from model.random_models import CONFIGS, numpy_weights, random_model, random_tokens, run_in_calls
from model.reference import reference_forward
from torch.nn.functional import cross_entropy

from megalodon_deploy.config import PRESETS, MegalodonConfig
from megalodon_deploy.model.checkpoint import load_checkpoint
from megalodon_deploy.model.megalodon import Megalodon, ModelState
from megalodon_deploy.parameters import num_parameters, parameter_specs

SPLITS = {"whole": [], "token_by_token": [1] * 200, "odd": [5, 1, 13, 2, 40]}


def next_token_loss(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def assert_states_close(state: ModelState, expected: ModelState, tolerance: float) -> None:
    assert torch.equal(state.position, expected.position)
    assert state.tensors.keys() == expected.tensors.keys()
    for name, tensor in state.tensors.items():
        assert_close(tensor.detach().numpy(), expected.tensors[name].detach().numpy(), tolerance, name)


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
def test_golden_logits(golden_case: GoldenCase, split: list[int]) -> None:
    model = load_checkpoint(golden_case.path)
    with torch.no_grad():
        logits, _ = run_in_calls(model, torch.from_numpy(golden_case.expected["tokens"]), split)
    assert logits.dtype == torch.float32
    assert np.abs(logits.numpy() - golden_case.expected["logits"]).max() <= 2e-5


@pytest.mark.parametrize("split", [[], [5, 1, 13, 2, 40]], ids=["whole", "segments"])
def test_golden_loss_and_gradients(golden_case: GoldenCase, split: list[int]) -> None:
    """In segments the gradient flows back through the states between the calls."""
    model = load_checkpoint(golden_case.path).train()
    tokens = torch.from_numpy(golden_case.expected["tokens"])
    loss = next_token_loss(run_in_calls(model, tokens, split)[0], tokens)
    loss.backward()
    assert abs(loss.item() - golden_case.expected["loss"]) <= 1e-5
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert gradients.keys() == golden_case.gradients.keys()
    for name, expected in golden_case.gradients.items():
        gradient = gradients[name]
        assert gradient is not None, name
        assert np.linalg.norm(gradient.numpy() - expected) <= 1e-4 * np.linalg.norm(expected), name


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("name", CONFIGS)
def test_model_is_the_architecture_page(name: str, dtype: torch.dtype, tolerance: float) -> None:
    config = CONFIGS[name]
    model, tokens = random_model(config, dtype=dtype), random_tokens(config, 2, 3 * 12 + 5)
    expected = reference_forward(config, numpy_weights(model), tokens.numpy())
    with torch.no_grad():
        logits, state = model(tokens)
    assert_close(logits.numpy(), expected, tolerance, name)
    assert state.position.tolist() == [41, 41]
    assert all(tensor.dtype == dtype for tensor in state.tensors.values())


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(sorted(CONFIGS)),
    lengths=st.lists(st.integers(1, 30), max_size=8),
    double=st.booleans(),
)
def test_any_split_gives_the_same_logits_and_state(name: str, lengths: list[int], double: bool) -> None:
    dtype, tolerance = (torch.float64, 1e-10) if double else (torch.float32, 2e-5)
    model, tokens = random_model(CONFIGS[name], dtype=dtype), random_tokens(CONFIGS[name], 2, 61)
    with torch.no_grad():
        logits, state = model(tokens)
        split_logits, split_state = run_in_calls(model, tokens, lengths)
    assert_close(split_logits.numpy(), logits.numpy(), tolerance, "logits")
    assert_states_close(split_state, state, tolerance)


def stack_states(states: list[ModelState]) -> ModelState:
    """Rows of several streams as one batch; memories of different sizes are filled up with zeros."""
    tensors = {}
    for name in states[0].tensors:
        rows = [state.tensors[name] for state in states]
        most = max(row.shape[2] for row in rows)
        if name.startswith(("past_key", "past_value")):
            rows = [torch.nn.functional.pad(row, (0, 0, 0, most - row.shape[2])) for row in rows]
        tensors[name] = torch.cat(rows)
    return ModelState(torch.cat([state.position for state in states]), tensors)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    starts=st.lists(st.integers(0, 30), min_size=2, max_size=4),
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=4),
    grad=st.booleans(),
)
def test_rows_at_different_positions_are_streams_of_their_own(
    starts: list[int], lengths: list[int], grad: bool
) -> None:
    model = random_model(CONFIGS["plain"], dtype=torch.float64)
    tokens = [random_tokens(model.config, 1, 120, seed=seed) for seed in range(len(starts))]
    with torch.set_grad_enabled(grad):
        alone = [model(row)[0] for row in tokens]
        states = [
            model(row[:, :start])[1] if start else model.initial_state(1)
            for row, start in zip(tokens, starts, strict=True)
        ]
        state, done = stack_states(states), 0
        for length in lengths:
            batch = torch.cat([row[:, start + done :][:, :length] for row, start in zip(tokens, starts, strict=True)])
            logits, state = model(batch, state)
            for i, start in enumerate(starts):
                expected = alone[i][0, start + done :][:length]
                assert_close(logits[i].detach().numpy(), expected.detach().numpy(), 1e-10, f"row {i}")
            done += length
    assert state.position.tolist() == [start + done for start in starts]
    ends = [model(row[:, : start + done])[1] for row, start in zip(tokens, starts, strict=True)]
    assert_states_close(state, stack_states(ends), 1e-10)


@pytest.mark.parametrize("num_tokens", [1, 4, 40])
@pytest.mark.parametrize("offsets", [[0, 0], [0, 5]], ids=["all_rows", "one_row"])
def test_a_row_at_position_0_starts_afresh_whatever_its_tensors_hold(num_tokens: int, offsets: list[int]) -> None:
    model, tokens = random_model(CONFIGS["plain"]), random_tokens(CONFIGS["plain"], 2, 45)
    with torch.no_grad():
        _, state = model(tokens[:, :5])
        fresh = model(tokens[:, 5 : 5 + num_tokens])[0]
        continued = model(tokens[:, : 5 + num_tokens])[0][:, 5:]
        restarted = torch.tensor(offsets) == 0
        state.position[restarted] = 0
        for tensor in state.tensors.values():
            tensor[restarted] = torch.nan
        logits, after = model(tokens[:, 5 : 5 + num_tokens], state)
    expected = torch.where(restarted.view(-1, 1, 1), fresh, continued)
    assert_close(logits.numpy(), expected.numpy(), 2e-5, "logits")
    assert all(tensor.isfinite().all() for tensor in after.tensors.values())
    assert after.position.tolist() == [offset + num_tokens for offset in offsets]


def test_gradients_flow_through_the_state_and_stop_at_detach() -> None:
    model, tokens = random_model(CONFIGS["plain"], dtype=torch.float64), random_tokens(CONFIGS["plain"], 2, 40)

    def gradient(cut: bool) -> torch.Tensor:
        model.zero_grad()
        _, state = model(tokens[:, :17])
        logits, _ = model(tokens[:, 17:], state.detach() if cut else state)
        logits.square().mean().backward()
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])

    model.zero_grad()
    model(tokens)[0][:, 17:].square().mean().backward()
    whole = torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])
    assert_close(gradient(cut=False).numpy(), whole.numpy(), 1e-10, "through the state")
    assert (gradient(cut=True) - whole).norm() > 1e-3 * whole.norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_norms_coefficients_and_state_in_float32(dtype: torch.dtype) -> None:
    config = CONFIGS["swiglu_rescaled"]
    model, tokens = random_model(config), random_tokens(config, 2, 30)
    exact = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        expected, _ = model(tokens)
        logits, state = run_in_calls(model.to(dtype), tokens, [13, 1, 1])
    wide = ("timenorm.", "final_norm.", ".cema.", "rmsnorm.", ".norm.")
    for name, tensor in model.state_dict().items():
        keeps = any(part in name for part in wide)
        assert tensor.dtype == (torch.float32 if keeps else dtype), name
        assert not keeps or torch.equal(tensor, exact[name]), name
    for name, tensor in state.tensors.items():
        assert tensor.dtype == (dtype if name.startswith(("past_key", "past_value")) else torch.float32), name
    assert logits.dtype == torch.float32
    error = (logits - expected).norm() / expected.norm()
    assert 0 < error <= 4 * torch.finfo(dtype).eps


def test_autocast_leaves_the_operators_in_float32() -> None:
    model, tokens = random_model(CONFIGS["plain"]).train(), random_tokens(CONFIGS["plain"], 2, 30)
    expected, _ = model(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        _, state = model(tokens[:, :17])
        logits, state = model(tokens[:, 17:], state)
        logits.square().mean().backward()
    assert 0 < (logits - expected[:, 17:]).norm() <= 4 * torch.finfo(torch.bfloat16).eps * expected.norm()
    for name, tensor in state.tensors.items():
        assert tensor.dtype == torch.float32 or name.startswith(("past_key", "past_value")), name
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("name", [*CONFIGS, *PRESETS])
def test_parameters_are_those_of_the_released_layout(name: str) -> None:
    config = CONFIGS.get(name) or MegalodonConfig.preset(name)
    with torch.device("meta"):
        model = Megalodon(config)
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == {
        spec.name: spec.shape for spec in parameter_specs(config)
    }
    assert sum(parameter.numel() for parameter in model.parameters()) == num_parameters(config)
    assert not list(model.buffers())


def test_initialisation_is_the_released_one() -> None:
    torch.manual_seed(0)
    config = small_config(model_dim=256, norm_num_groups=8, z_dim=64, value_dim=512, rescale_nffn=True, cema_ndim=16)
    weights = Megalodon(config).state_dict()

    def std(name: str) -> float:
        return float(weights[name].double().std())

    truncated = math.sqrt(1 - 6 * math.exp(-4.5) / math.sqrt(2 * math.pi) / math.erf(3 / math.sqrt(2)))
    assert std("embed.weight") == pytest.approx(truncated / 16, rel=0.02)
    assert std("output.output.weight") == pytest.approx(truncated / 16, rel=0.02)
    assert std("layers.0.mega.wh2.weight") == pytest.approx(1 / math.sqrt(3 * 512), rel=0.02)
    assert std("layers.1.nffn.fc1.weight") == pytest.approx(1 / math.sqrt(3 * 256), rel=0.02)
    assert std("layers.0.mega.cema.alpha") == pytest.approx(0.2, rel=0.05)
    assert std("layers.0.mega.cema.delta") == pytest.approx(0.2, rel=0.05)
    assert weights["layers.0.mega.cema.omega"].abs().max() <= 1
    gamma = weights["layers.0.mega.cema.gamma"]
    assert float(gamma[..., 0].std()) == pytest.approx(1, rel=0.05)
    assert gamma[..., 1].abs().max() == 0
    angles = torch.sigmoid(weights["layers.0.mega.cema.theta"].double()).flatten()
    expected = torch.exp(-torch.arange(1, 257).double() * math.log(256) / 256)
    assert_close(angles.sort(descending=True).values.numpy(), expected.numpy(), 1e-6, "theta")
    assert not torch.equal(angles, angles.sort(descending=True).values)
    assert torch.equal(weights["layers.1.nffn.alpha"], torch.full((256,), 0.05))
    for name, tensor in weights.items():
        zero = name.endswith((".bias", "mega.gamma", "mega.beta")) or "norm." in name
        assert (tensor.abs().max() == 0) == zero, name


def test_evaluation_notices_changed_coefficients() -> None:
    model, tokens = random_model(CONFIGS["plain"]), random_tokens(CONFIGS["plain"], 1, 9)
    other = random_model(CONFIGS["plain"], seed=1)
    with torch.no_grad():
        model(tokens)
        model.load_state_dict(other.state_dict())
        assert torch.equal(model(tokens)[0], other(tokens)[0])
        model.load_state_dict(random_model(CONFIGS["plain"], seed=2).state_dict(), assign=True)
        assert torch.equal(model(tokens)[0], random_model(CONFIGS["plain"], seed=2)(tokens)[0])
        assert_close(model.double()(tokens)[0].numpy(), model.float()(tokens)[0].numpy(), 1e-5)


def test_refused_inputs_are_named() -> None:
    model = random_model(CONFIGS["plain"])
    with pytest.raises(ValueError, match=r"shape \[2, 0\]"):
        model(torch.zeros(2, 0, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"shape \[3\]"):
        model(torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="tokens have 2 rows, the state has 3"):
        model(torch.zeros(2, 1, dtype=torch.int64), model.initial_state(3))
    _, state = model(torch.zeros(2, 5, dtype=torch.int64))
    state.position += 1
    with pytest.raises(ValueError, match="holds 5 key/value rows, its positions need 6"):
        model(torch.zeros(2, 1, dtype=torch.int64), state)

"""States as values: used twice, forked, reset and mixed between modes, they never disturb one another."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import assert_close
from model.random_models import CONFIGS, random_model, random_tokens, run_in_calls

from megalodon_deploy.model.megalodon import Megalodon, ModelState
from megalodon_deploy.state import concrete_shape, state_specs

CONFIG = CONFIGS["one_head_wide_block"]  # a chunk of 100 tokens: memory grows several times within it


@pytest.fixture(scope="module")
def model() -> Megalodon:
    return random_model(CONFIG)


def assert_same_logits(logits: torch.Tensor, expected: torch.Tensor) -> None:
    assert_close(logits.detach().numpy(), expected.detach().numpy(), 2e-5, "logits")


@torch.no_grad()
@pytest.mark.parametrize("start", [3, 20, 99])
def test_two_continuations_of_one_state(model: Megalodon, start: int) -> None:
    first, second = random_tokens(CONFIG, 1, 140, seed=1), random_tokens(CONFIG, 1, 140, seed=2)
    second[:, :start] = first[:, :start]
    _, state = run_in_calls(model, first[:, :start], [1] * start)
    for tokens in (first, second, first):
        logits, _ = run_in_calls(model, tokens[:, start:], [1] * 140, state)
        assert_same_logits(logits, model(tokens)[0][:, start:])


@torch.no_grad()
def test_a_copied_state_continues_on_its_own(model: Megalodon) -> None:
    tokens = random_tokens(CONFIG, 1, 30)
    _, state = run_in_calls(model, tokens[:, :20], [1] * 20)
    copies = [copy.copy(state), copy.deepcopy(state), state.detach()]
    model(random_tokens(CONFIG, 1, 5, seed=9), state)
    for copied in copies:
        assert_same_logits(model(tokens[:, 20:], copied)[0], model(tokens)[0][:, 20:])


@torch.no_grad()
def test_resetting_a_row_leaves_the_older_state_as_it_was(model: Megalodon) -> None:
    tokens = random_tokens(CONFIG, 2, 40)
    _, older = run_in_calls(model, tokens[:, :20], [19, 1])
    _, newer = model(tokens[:, 20:21], older)
    newer.position[0] = 0
    logits, newer = model(tokens[:, 21:22], newer)
    model(tokens[:, 22:30], newer)
    assert_same_logits(logits[0], model(tokens[:, 21:22])[0][0])
    assert_same_logits(model(tokens[:, 20:], older)[0], model(tokens)[0][:, 20:])


def test_states_pass_between_inference_mode_and_training(model: Megalodon) -> None:
    tokens = random_tokens(CONFIG, 1, 60)
    with torch.inference_mode():
        _, state = run_in_calls(model, tokens[:, :20], [19, 1])
    with torch.no_grad():
        _, state = run_in_calls(model, tokens[:, 20:40], [1] * 20, state)
    logits, _ = run_in_calls(model, tokens[:, 40:], [1] * 10, state)
    assert logits.requires_grad
    with torch.no_grad():
        assert_same_logits(logits, model(tokens)[0][:, 40:])


def test_a_state_with_gradients_is_not_written_to(model: Megalodon) -> None:
    tokens = random_tokens(CONFIG, 1, 30)
    _, state = model(tokens[:, :20])
    logits, _ = model(tokens[:, 20:], state)
    with torch.no_grad():
        run_in_calls(model, tokens[:, 20:], [1] * 10, state.detach())
    logits.sum().backward()  # raises if a tensor that backward needs was changed
    model.zero_grad()


@torch.no_grad()
def test_memory_holds_the_open_chunk_and_no_more(model: Megalodon) -> None:
    tokens, state = random_tokens(CONFIG, 2, 230), None
    for t in range(230):
        _, state = model(tokens[:, t : t + 1], state)
        assert state.tensors["past_key.0"].shape[2] == (t + 1) % CONFIG.chunk_size
        assert state.tensors["past_value.0"].untyped_storage().nbytes() <= 4 * 2 * CONFIG.chunk_size * CONFIG.value_dim


def test_states_have_the_table_s_names_and_shapes(model: Megalodon) -> None:
    _, after = model(random_tokens(CONFIG, 3, 7))
    for state, rows in ((model.initial_state(3), 0), (after, 7)):
        assert isinstance(state, ModelState)
        assert {name: tuple(tensor.shape) for name, tensor in state.tensors.items()} == {
            spec.past: concrete_shape(spec.past_shape, batch=3, capacity=rows) for spec in state_specs(CONFIG)
        }

"""The PyTorch operators on the library's kernels, compiled for the CPU; the bridge is the one of CUDA tensors."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from attention_helpers import attention_inputs, attention_reference
from helpers import assert_close
from kernel_helpers import EPSILON, complex_ema_inputs, timestep_norm_inputs
from model.random_models import CONFIGS, random_model, random_tokens
from torch import Tensor

from megalodon_deploy.engine import library
from megalodon_deploy.errors import UserError
from megalodon_deploy.model.operators import chunk_attention, complex_ema, kernels, timestep_norm
from megalodon_deploy.model.operators.complex_ema import complex_ema_backward
from megalodon_deploy.model.operators.timestep_norm import timestep_norm_backward

Operator = Callable[..., tuple[Tensor, Tensor]]

# Of the largest value; one rounding to the activations' type, float32 sums.
TOLERANCES = {torch.float32: 4e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@pytest.fixture(scope="session")
def emulated(emulated_path: Path) -> kernels.Kernels:
    return kernels.Kernels(emulated_path)


@pytest.fixture
def calls(emulated: kernels.Kernels, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Sends the operators of float32 states to the emulated kernels; the list names the functions that were called."""
    called: list[str] = []
    run = emulated._run

    def recorded(name: str, *rest: Any) -> None:
        called.append(name)
        run(name, *rest)

    monkeypatch.setattr(emulated, "_run", recorded)

    def chosen(x: Tensor, state: Tensor | None = None) -> kernels.Kernels | None:
        return None if x.dtype == torch.float64 or (state is not None and state.dtype == torch.float64) else emulated

    monkeypatch.setattr(kernels, "kernels_for", chosen)
    return called


def tensors(arrays: list[Any], dtype: torch.dtype) -> list[Tensor]:
    x, *others = (torch.from_numpy(array) for array in arrays)
    return [x.to(dtype), *others]


def operator_cases(num_tokens: int, dtype: torch.dtype) -> list[tuple[Operator, list[Tensor], tuple[float, ...]]]:
    cema = complex_ema_inputs(B=3, T=num_tokens, D=12, N=5)
    norm = timestep_norm_inputs(B=3, T=num_tokens, D=12, G=3)
    return [(complex_ema, tensors(cema, dtype), ()), (timestep_norm, tensors(norm, dtype), (EPSILON,))]


def float64_leaves(inputs: list[Tensor]) -> list[Tensor]:
    return [t.double().requires_grad_() if t.is_floating_point() else t for t in inputs]


def as_numbers(present: Tensor, operator: Operator) -> Tensor:
    """A state as the float64 numbers that it stands for."""
    if operator is complex_ema:
        return present.double()
    return present.double().unflatten(-1, (2, 2)).sum(-1)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("num_tokens", [1, 40])
def test_operators_and_gradients_are_those_of_the_reference(
    calls: list[str], num_tokens: int, dtype: torch.dtype
) -> None:
    for operator, inputs, rest in operator_cases(num_tokens, dtype):
        exact = float64_leaves(inputs)
        leaves = [t.clone().requires_grad_() if t.is_floating_point() else t for t in inputs]
        torch.manual_seed(0)
        # Gradients as they come: of no dense layout, and of float32 for a half-precision y.
        grad_y, grad_present = torch.randn(12, 3, num_tokens), torch.randn_like(inputs[1])
        for given in (exact, leaves):
            y, present = operator(*given, *rest)
            (y * grad_y.permute(1, 2, 0)).sum().backward(retain_graph=True)
            number = present if operator is complex_ema else present[..., ::2]
            (number * (grad_present if operator is complex_ema else grad_present[..., ::2])).sum().backward()
        expected_y, expected_present = operator(*exact, *rest)
        assert (y.dtype, present.dtype) == (dtype, torch.float32)
        assert_close(y.detach().double().numpy(), expected_y.detach().numpy(), TOLERANCES[dtype], "y")
        states = (as_numbers(state.detach(), operator).numpy() for state in (present, expected_present))
        assert_close(*states, TOLERANCES[torch.float32], "present")
        for index, (leaf, wanted) in enumerate(zip(leaves, exact, strict=True)):
            if not leaf.is_floating_point():
                continue
            assert leaf.grad is not None
            assert wanted.grad is not None
            tolerance = TOLERANCES[dtype] if leaf.dtype == dtype else TOLERANCES[torch.float32]
            if dtype != torch.float32:
                tolerance = max(tolerance, TOLERANCES[dtype])  # the gradient of y is rounded as y is
            assert_close(leaf.grad.double().numpy(), wanted.grad.numpy(), tolerance, f"gradient {index}")
    assert calls == [
        name for operator in ("complex_ema", "timestep_norm") for name in (operator, *[f"{operator}_backward"] * 2)
    ]


def test_tensors_of_any_layout_are_read_right(calls: list[str]) -> None:
    for operator, inputs, rest in operator_cases(20, torch.float32):
        expected = operator(*inputs, *rest)
        scattered = [t.mT.contiguous().mT if t.ndim > 1 else torch.stack([t, t], 1)[:, 0] for t in inputs]
        assert not any(t.is_contiguous() for t in scattered)
        for one, other in zip(operator(*scattered, *rest), expected, strict=True):
            assert one.is_contiguous()
            torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert len(calls) == 4


@pytest.mark.parametrize("num_tokens", [1, 40])
def test_opcheck(calls: list[str], num_tokens: int) -> None:
    cases = operator_cases(num_tokens, torch.float32)
    for operator, inputs, rest in cases:
        inputs[1] = torch.nan_to_num(inputs[1])  # opcheck counts NaN as a difference
        leaves = [t.clone().requires_grad_() if t.is_floating_point() else t for t in inputs]
        torch.library.opcheck(operator, (*leaves, *rest))
    (_, (x, past, *others), _), (_, (y, norm, position, weight, _), _) = cases
    torch.library.opcheck(complex_ema_backward, (x.cos(), past.cos(), x, past, *others))
    torch.library.opcheck(timestep_norm_backward, (y.cos(), norm.cos(), y, norm, position, weight, EPSILON))
    assert "complex_ema_backward" in calls
    assert "timestep_norm_backward" in calls


def test_a_compiled_training_step_calls_each_kernel_once_a_layer(calls: list[str]) -> None:
    config = CONFIGS["plain"]
    model, tokens = random_model(config).train(), random_tokens(config, 2, config.chunk_size)

    def gradients(function: Callable[..., Any], wanted: torch.dtype) -> list[Tensor]:
        model.to(wanted).zero_grad()
        logits, _ = function(tokens)
        logits.square().mean().backward()
        return [parameter.grad.double() for parameter in model.parameters() if parameter.grad is not None]

    expected = gradients(model, torch.float64)
    assert not calls
    found = gradients(torch.compile(model, backend="aot_eager"), torch.float32)
    num_norms = config.num_layers + 1
    expected_calls = {"complex_ema": config.num_layers, "timestep_norm": num_norms}
    expected_calls |= {f"{name}_backward": count for name, count in expected_calls.items()}
    assert Counter(calls) == expected_calls
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= 1e-4 * other.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_attention_of_one_token_takes_the_kernel(calls: list[str], dtype: torch.dtype) -> None:
    call = attention_inputs(T=1, S=30, dz=8, dv=16, filled=[30, 0, 7])
    arrays = (call.q, call.k, call.v, call.past_key, call.past_value)
    inputs = [torch.from_numpy(array).to(dtype) for array in arrays]
    out = chunk_attention(*inputs, torch.from_numpy(call.position), call.chunk_size)
    assert calls == ["chunk_attention"]
    assert out.dtype == dtype
    assert_close(out.double().numpy(), attention_reference(call), 4 * TOLERANCES[dtype])  # all inputs are rounded


@pytest.mark.parametrize(("B", "H"), [(1, 1), (1, 3), (3, 1), (2, 3)])
def test_growing_memory_is_not_copied(emulated: kernels.Kernels, B: int, H: int) -> None:
    """A stream's memory is the begin of a buffer; what lies behind is never read."""
    call = attention_inputs(T=1, S=20, dz=4, dv=6, filled=[9] * B, H=H)
    q, k, v, *buffers = (torch.from_numpy(getattr(call, name)) for name in ("q", "k", "v", "past_key", "past_value"))
    memory = [buffer[:, :, :9] for buffer in buffers]
    for rows, buffer in zip(memory, buffers, strict=True):
        found = kernels._buffer(rows)
        assert found.is_contiguous()
        assert found.data_ptr() == buffer.data_ptr()
        assert torch.equal(found[:, :, :9], rows)
        for other in (buffer[:, :, 3:12], buffer.mT.contiguous().mT[:, :, :9], buffer[:, :1].expand(B, 2, 20, -1)):
            again = kernels._buffer(other)
            assert torch.equal(again[:, :, : other.shape[2]].nan_to_num(), other.nan_to_num())
    out = emulated.chunk_attention(q, k, v, *memory, torch.from_numpy(call.position), call.chunk_size)
    assert_close(out.numpy(), attention_reference(call), TOLERANCES[torch.float32])


def test_a_failing_call_says_what_the_library_says(calls: list[str]) -> None:
    inputs = tensors(complex_ema_inputs(B=1, T=2, D=3, N=257), torch.float32)
    with pytest.raises(RuntimeError, match=r"mgd_complex_ema: unsupported: more modes"):
        complex_ema(*inputs)


CUDA_TENSOR: Any = SimpleNamespace(is_cuda=True, dtype=torch.float32)


@pytest.fixture
def no_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(library.LIBRARY_VARIABLE, str(tmp_path / "none.so"))
    monkeypatch.delenv(library.KERNELS_VARIABLE, raising=False)
    kernels._load.cache_clear()
    yield
    kernels._load.cache_clear()


@pytest.mark.usefixtures("no_library")
def test_without_a_library_there_is_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.warns(UserWarning, match=r"none\.so: no such file.*PyTorch's operators") as caught:
        assert [kernels.kernels_for(CUDA_TENSOR, CUDA_TENSOR) for _ in range(3)] == [None] * 3
    assert len(caught) == 1
    assert "\n" not in str(caught[0].message)
    monkeypatch.setenv(library.KERNELS_VARIABLE, "cuda")
    with pytest.raises(UserError, match=r"none\.so: no such file"):
        kernels.kernels_for(CUDA_TENSOR, CUDA_TENSOR)


@pytest.mark.usefixtures("no_library")
def test_the_variable_turns_kernels_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(library.KERNELS_VARIABLE, "reference")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert kernels.kernels_for(CUDA_TENSOR, CUDA_TENSOR) is None
    monkeypatch.setenv(library.KERNELS_VARIABLE, "cude")
    with pytest.raises(UserError, match="MEGALODON_KERNELS = cude: expected reference or cuda"):
        kernels.kernels_for(CUDA_TENSOR, CUDA_TENSOR)


@pytest.mark.usefixtures("no_library")
def test_a_library_of_another_abi_is_not_called(emulated_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(library.LIBRARY_VARIABLE, str(emulated_path))
    assert kernels.kernels_for(CUDA_TENSOR, CUDA_TENSOR) is not None
    kernels._load.cache_clear()
    monkeypatch.setattr(library, "ABI_VERSION", library.ABI_VERSION + 1)
    with pytest.warns(UserWarning, match="ABI version"):
        assert kernels.kernels_for(CUDA_TENSOR, CUDA_TENSOR) is None


def test_other_tensors_take_the_reference() -> None:
    float64: Any = SimpleNamespace(is_cuda=True, dtype=torch.float64)
    assert kernels.kernels_for(torch.zeros(1), torch.zeros(1)) is None
    assert kernels.kernels_for(float64, CUDA_TENSOR) is None
    assert kernels.kernels_for(CUDA_TENSOR, float64) is None

"""PyTorch's operators and a whole model on CUDA tensors: our kernels against the same operators in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from helpers import assert_close
from kernel_helpers import EPSILON, complex_ema_inputs, timestep_norm_inputs
from model.random_models import CONFIGS, random_model, random_tokens

from megalodon_deploy.engine.library import KERNELS_VARIABLE

torch = pytest.importorskip("torch")

pytestmark = pytest.mark.gpu

TOLERANCES = {"float32": 4e-6, "float16": 1e-3, "bfloat16": 8e-3}  # of the largest value of y and of the state
GRADIENT_FACTOR = 5  # gradients here come from outputs that are rounded already


@pytest.fixture(autouse=True)
def our_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing library is an error here, not a silent run of the reference."""
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU: torch.cuda.is_available() is False")
    monkeypatch.setenv(KERNELS_VARIABLE, "cuda")


def operator_case(name: str, num_tokens: int) -> tuple[Callable[..., Any], list[Any], tuple[float, ...]]:
    from megalodon_deploy.model.operators import complex_ema, timestep_norm

    if name == "complex_ema":
        arrays, operator, rest = complex_ema_inputs(B=3, T=num_tokens, D=96, N=16), complex_ema, ()
    else:
        arrays, operator, rest = timestep_norm_inputs(B=3, T=num_tokens, D=96, G=3), timestep_norm, (EPSILON,)
    return operator, [torch.from_numpy(array) for array in arrays], rest


def outputs_and_gradients(operator: Callable[..., Any], inputs: list[Any], rest: tuple[float, ...]) -> list[Any]:
    """y, the state, and the gradients of all floating-point inputs, on the CPU in float64."""
    leaves = [tensor.clone().requires_grad_() if tensor.is_floating_point() else tensor for tensor in inputs]
    y, present = operator(*leaves, *rest)
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64, device=y.device).view(y.shape)
    (y.double() * weights).sum().backward(retain_graph=True)
    present[..., 0].double().square().sum().backward()
    grads = [leaf.grad for leaf in leaves if leaf.is_floating_point()]
    return [tensor.detach().double().cpu() for tensor in (y, present, *grads)]


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("num_tokens", [1, 17, 300])
@pytest.mark.parametrize("name", ["complex_ema", "timestep_norm"])
def test_operators_and_gradients_on_gpu(name: str, num_tokens: int, dtype: str) -> None:
    operator, inputs, rest = operator_case(name, num_tokens)
    inputs[0] = inputs[0].to(getattr(torch, dtype))
    exact = [tensor.double() if tensor.is_floating_point() else tensor for tensor in inputs]
    expected = outputs_and_gradients(operator, exact, rest)
    found = outputs_and_gradients(operator, [tensor.cuda() for tensor in inputs], rest)
    assert len(found) == len(expected)
    for index, (one, other) in enumerate(zip(found, expected, strict=True)):
        if index == 1 and name == "timestep_norm":
            one, other = (state.unflatten(-1, (2, 2)).sum(-1) for state in (one, other))
        tolerance = TOLERANCES[dtype] * (GRADIENT_FACTOR if index > 1 else 1)
        assert_close(one.numpy(), other.numpy(), tolerance, f"result {index}")


def gradients(model: Any, function: Callable[..., Any], tokens: Any) -> list[Any]:
    model.zero_grad()
    logits, _ = function(tokens)
    logits.square().mean().backward()
    return [parameter.grad.double().cpu() for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("is_compiled", [False, True])
def test_a_training_step_on_gpu(is_compiled: bool) -> None:
    config = CONFIGS["plain"]
    model, tokens = random_model(config).train(), random_tokens(config, 2, 2 * config.chunk_size)
    expected = gradients(model.double(), model, tokens)
    model = model.float().cuda()
    function = torch.compile(model) if is_compiled else model
    found = gradients(model, function, tokens.cuda())
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= 1e-3 * other.norm()


def test_kernels_and_reference_agree_on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    operator, inputs, rest = operator_case("complex_ema", 300)
    on_gpu = [tensor.cuda() for tensor in inputs]
    ours, _ = operator(*on_gpu, *rest)
    monkeypatch.setenv(KERNELS_VARIABLE, "reference")
    reference, _ = operator(*on_gpu, *rest)
    assert not torch.equal(ours, reference), "the variable changes nothing"
    assert_close(ours.double().cpu().numpy(), reference.double().cpu().numpy(), 4e-6)


def test_work_goes_to_the_current_stream_and_into_graphs() -> None:
    operator, inputs, rest = operator_case("complex_ema", 70)
    on_gpu = [tensor.cuda() for tensor in inputs]
    expected, _ = operator(*on_gpu, *rest)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured, _ = operator(*on_gpu, *rest)
    captured.fill_(torch.nan)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, expected)

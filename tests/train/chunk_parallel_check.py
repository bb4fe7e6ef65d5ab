"""Run under torchrun: chunk-parallel loss, gradients and state against one process; writes the errors as JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from helpers import small_config
from torch import Tensor
from torch import distributed as dist

from megalodon_deploy.model.megalodon import Megalodon, ModelState
from megalodon_deploy.train.objective import Objective
from megalodon_deploy.train.parallel.chunk import ChunkParallel, summary_bytes
from megalodon_deploy.train.parallel.collectives import Traffic

BATCH = 3
RESET_ROW = 1  # starts a new document with the second call


def make_model(dtype: torch.dtype) -> Megalodon:
    torch.manual_seed(0)
    model = Megalodon(small_config(vocab_size=40)).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith(("bias", "beta", "gamma")):
                parameter.normal_(std=0.3)
    return model


def two_calls(objective: torch.nn.Module, tokens: Tensor) -> tuple[Tensor, ModelState, dict[str, Tensor]]:
    """Loss, last state and gradients of two sequences, the second going on from the first but in one row."""
    length = tokens.shape[1] // 2
    objective.zero_grad()
    first, state = objective(tokens[:, :length], tokens[:, 1 : length + 1], None, None)
    first.backward()
    carried = state.detach()
    position = carried.position.clone()
    position[RESET_ROW] = 0
    second, state = objective(
        tokens[:, length:-1], tokens[:, length + 1 :], None, ModelState(position, carried.tensors)
    )
    second.backward()
    grads = {name.removeprefix("objective."): p.grad.clone() for name, p in objective.named_parameters()}
    return (first + second).detach(), state, grads


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def errors(dtype: torch.dtype) -> dict[str, float]:
    model, group = make_model(dtype), dist.group.WORLD
    config = model.config
    length = config.chunk_size * dist.get_world_size() * 2
    tokens = torch.randint(0, 40, (BATCH, 2 * length + 1))
    objective = Objective(model, 1000)
    loss, state, grads = two_calls(objective, tokens)
    with torch.no_grad():
        evaluation = objective(tokens[:, :length], tokens[:, 1 : length + 1])[0]
    parallel = ChunkParallel(objective, group)
    Traffic.received = 0
    found_loss, found_state, found_grads = two_calls(parallel, tokens)
    passes = 2 * (1 + 2)  # two calls, forward and backward
    claimed = passes * (dist.get_world_size() - 1) * summary_bytes(config, BATCH, dtype)
    traffic = abs(Traffic.received - claimed)
    dist.all_reduce(found_loss)
    for gradient in found_grads.values():
        dist.all_reduce(gradient)
    with torch.no_grad():
        found_evaluation = parallel(tokens[:, :length], tokens[:, 1 : length + 1])[0]
    recurrent = [name for name in state.tensors if name.startswith(("past_cema", "past_norm"))]
    assert bool((found_state.position == state.position).all())
    return {
        "loss": relative(found_loss, loss),
        "evaluation": relative(found_evaluation, evaluation),
        "gradient": max(relative(found_grads[name], gradient) for name, gradient in grads.items()),
        "state": max(relative(found_state.tensors[name], state.tensors[name]) for name in recurrent),
        "traffic": traffic,
    }


def main() -> None:
    dist.init_process_group("gloo")
    report = {str(dtype).removeprefix("torch."): errors(dtype) for dtype in (torch.float64, torch.float32)}
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(report))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

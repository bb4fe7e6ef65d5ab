"""Under torchrun, on four ranks: tensor-parallel loss, gradients and state against one process."""

from __future__ import annotations

import copy
from typing import Any

import torch
from helpers import small_config
from torch import Tensor
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from train.relative_errors import largest, relative
from train.traffic import Traffic

from megalodon_deploy.model.megalodon import Megalodon, ModelState
from megalodon_deploy.train.objective import Objective
from megalodon_deploy.train.parallel.chunk import ChunkParallel
from megalodon_deploy.train.parallel.dtensors import whole
from megalodon_deploy.train.parallel.tensor import cut_state, join_state, parallelize
from megalodon_deploy.train.parallel.traffic import chunk_bytes, tensor_bytes

BATCH, VOCABULARY = 3, 40
RESET_ROW = 1  # starts a new document with the second call


def make_model(dtype: torch.dtype, **shape: Any) -> Megalodon:
    torch.manual_seed(0)
    model = Megalodon(small_config(vocab_size=VOCABULARY, **shape)).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith(("bias", "beta", "gamma")):
                parameter.normal_(std=0.3)
    return model


def second_call(objective: torch.nn.Module, tokens: Tensor, state: ModelState) -> tuple[Tensor, ModelState]:
    """Of two that split the tokens, the second going on from the first but in one row."""
    position = state.position.clone()
    position[RESET_ROW] = 0
    loss, after = objective(tokens[:, :-1], tokens[:, 1:], None, ModelState(position, state.detach().tensors))
    return loss, after


def errors(dtype: torch.dtype, mesh: DeviceMesh, *, has_chunks: bool = False, **shape: Any) -> dict[str, float]:
    """`mesh` has the axes chunk and tensor; without chunks, all ranks of the first compute the same."""
    model = make_model(dtype, **shape)
    config, ways = model.config, mesh["tensor"].size()
    chunks = mesh["chunk"].size() if has_chunks else 1
    length = 2 * chunks * config.chunk_size if chunks > 1 else 17
    tokens = torch.randint(0, VOCABULARY, (BATCH, 2 * length + 1))
    first, second = tokens[:, : length + 1], tokens[:, length:]

    alone = Objective(copy.deepcopy(model), 1000)
    loss, middle = alone(first[:, :-1], first[:, 1:])
    loss.backward()
    second_loss, state = second_call(alone, second, middle)
    second_loss.backward()
    with torch.no_grad():
        evaluation, middle = alone(first[:, :-1], first[:, 1:])
        evaluation += second_call(alone, second, middle)[0]

    parallelize(model, mesh["tensor"])
    objective: torch.nn.Module = Objective(model, 1000)
    if chunks > 1:
        objective = ChunkParallel(objective, mesh.get_group("chunk"))
    with Traffic() as traffic:
        found, found_middle = objective(first[:, :-1], first[:, 1:], None, None)
        found.backward()
    claimed = tensor_bytes(config, BATCH * length // chunks, ways, dtype.itemsize)
    if chunks > 1:
        claimed += chunk_bytes(config, BATCH, chunks, dtype.itemsize)
    found_second, found_state = second_call(objective, second, found_middle)
    found_second.backward()
    with torch.no_grad():
        found_evaluation, found_middle = objective(first[:, :-1], first[:, 1:])
        found_evaluation += second_call(objective, second, found_middle)[0]

    found = (found + found_second).detach()
    gradients = {name: whole(p.grad) for name, p in model.named_parameters()}
    if chunks > 1:
        for tensor in (found, *gradients.values()):
            dist.all_reduce(tensor, group=mesh.get_group("chunk"))
    parts: list[ModelState] = [found_state] * ways
    dist.all_gather_object(parts, found_state.detach(), group=mesh.get_group("tensor"))
    joined = join_state(parts, config)
    again = cut_state(joined, config, mesh["tensor"].get_local_rank(), ways)
    assert all(torch.equal(again.tensors[name], tensor) for name, tensor in found_state.tensors.items())
    return {
        "bytes": abs(sum(traffic.received.values()) - claimed),
        "loss": relative(found, (loss + second_loss).detach()),
        "evaluation": relative(found_evaluation, evaluation),
        "gradient": largest(gradients, {name: p.grad for name, p in alone.model.named_parameters()}),
        "state": largest(joined.tensors, state.tensors),
    }


def report() -> dict[str, dict[str, float]]:
    """Relative errors of each case, and bytes more or fewer than stated."""
    four = init_device_mesh("cpu", (1, 4), mesh_dim_names=("chunk", "tensor"))
    two = init_device_mesh("cpu", (2, 2), mesh_dim_names=("chunk", "tensor"))
    found = {}
    for dtype, heads in ((torch.float64, 1), (torch.float64, 2), (torch.float64, 4), (torch.float32, 2)):
        shape = {"num_heads": heads, "swiglu": heads != 2, "share_emb": heads == 1}
        found[f"{dtype} 4 ranks {heads} heads"] = errors(dtype, four, **shape)
        found[f"{dtype} 2 ranks {heads} heads"] = errors(dtype, two, **shape)
    for dtype in (torch.float64, torch.float32):
        found[f"{dtype} 2 ranks with chunks"] = errors(dtype, two, has_chunks=True, rescale_nffn=True)
    return found

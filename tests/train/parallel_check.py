"""Run under torchrun: losses, gradients and states of distributed plans against one process, as JSON of errors.

Usage: parallel_check.py REPORT CASE...; the cases are those of `CASES`.
"""

from __future__ import annotations

import functools
import json
import sys
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from helpers import small_config
from torch import Tensor
from torch import distributed as dist
from train.relative_errors import largest, relative
from train.traffic import Traffic

from megalodon_deploy.model.megalodon import Megalodon, ModelState
from megalodon_deploy.model.packing import group_by_length
from megalodon_deploy.train.config import RunConfig
from megalodon_deploy.train.objective import MicroBatch, Objective
from megalodon_deploy.train.parallel.dtensors import whole
from megalodon_deploy.train.parallel.layout import Layout
from megalodon_deploy.train.parallel.plan import Distributed
from megalodon_deploy.train.parallel.traffic import chunk_bytes, replica_bytes, shard_bytes, tensor_bytes
from megalodon_deploy.train.plan import OneProcess, Plan, join_rows
from megalodon_deploy.train.trainer import prepare_blocks

BATCH = 4
RESET_ROW = 1  # starts a new document with the second call
DOCUMENTS = np.array([(0, 0, 24), (1, 0, 24), (2, 0, 3), (2, 5, 19), (3, 0, 9), (3, 9, 15)])  # row, first token, length
CLIP_NORM = 0.3
LENGTH = 24  # tokens of a sequence that a rank computes


@dataclass(frozen=True)
class Case:
    """A way of training; `tolerance` is relative, of float32 unless `dtype` says otherwise."""

    chunk: int = 1
    tensor: int = 1  # its bytes are counted in tensor_cases, but those with shard
    shard: bool = False
    documents: bool = False
    micro: int = 1  # micro-batches of a rank's rows
    tolerance: float = 1e-5
    dtype: torch.dtype = torch.float32
    bfloat16: bool = False
    recompute: bool = False
    compile: bool = False
    model: dict[str, Any] = field(default_factory=dict)

    @property
    def run(self) -> RunConfig:
        return RunConfig(out=Path(), steps=1, compile=self.compile, checkpoint_activations=self.recompute)


EXACT: dict[str, Any] = {"dtype": torch.float64, "tolerance": 1e-12}
CASES = {
    "data": Case(**EXACT),
    "data accumulated": Case(micro=2, **EXACT),
    "chunk": Case(chunk=2),
    "chunk accumulated": Case(chunk=2, micro=2, recompute=True, **EXACT),
    "chunk recomputed": Case(chunk=2, recompute=True, **EXACT),
    "chunk compiled": Case(chunk=2, compile=True, recompute=True),
    "chunk bfloat16": Case(chunk=2, bfloat16=True, recompute=True, tolerance=2e-2),
    "chunk real": Case(chunk=2, recompute=True, model={"ema": "real"}, **EXACT),
    "chunk none": Case(chunk=2, recompute=True, model={"ema": "none"}, **EXACT),
    "chunk layer": Case(chunk=2, recompute=True, model={"stream_norm": "layer"}, **EXACT),
    "chunk without memory": Case(chunk=2, model={"ema": "none", "stream_norm": "layer"}, **EXACT),
    "shard": Case(shard=True),
    "shard accumulated": Case(shard=True, micro=2, **EXACT),
    "shard exact": Case(shard=True, recompute=True, **EXACT),
    "shard compiled": Case(shard=True, compile=True, recompute=True),
    "shard bfloat16": Case(shard=True, bfloat16=True, tolerance=2e-2),
    "shard real": Case(shard=True, model={"ema": "real", "share_emb": True}, **EXACT),
    "shard documents": Case(shard=True, documents=True, recompute=True, **EXACT),
    "shard chunk": Case(shard=True, chunk=2, recompute=True),
    "shard tensor chunk": Case(shard=True, tensor=2, chunk=2, **EXACT),
    "tensor recomputed": Case(tensor=2, chunk=2, recompute=True, micro=2, **EXACT),
    "tensor compiled": Case(tensor=2, compile=True, recompute=True),
    "tensor bfloat16": Case(tensor=2, bfloat16=True, recompute=True, tolerance=2e-2),
    "tensor documents": Case(tensor=2, documents=True, **EXACT),
    "four chunks": Case(chunk=4, **EXACT),
    "four chunks recomputed": Case(chunk=4, recompute=True),
}


def make_model(case: Case) -> Megalodon:
    torch.manual_seed(0)
    model = Megalodon(small_config(vocab_size=40, **case.model)).to(case.dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith(("bias", "beta", "gamma")):
                parameter.normal_(std=0.3)
    return model


@dataclass
class Outcome:
    loss: Tensor
    norm: Tensor
    evaluation: Tensor
    grads: dict[str, Tensor]
    state: ModelState | None
    received: dict[str, float]  # bytes of the two calls, by collective


def two_calls(case: Case, plan: Plan, tokens: Tensor, micro: int = 1) -> Outcome:
    """Two sequences in `micro` parts whose gradients add up; the second goes on from the first but in one row."""
    model = make_model(case)
    prepare_blocks(model, case.run, plan)
    objective = plan.prepare(Objective(model, 1000, autocasts=case.bfloat16))
    mine, length = plan.rows(BATCH), tokens.shape[1] // 2
    width = (mine.stop - mine.start) // micro
    ranges = [slice(begin, begin + width) for begin in range(mine.start, mine.stop, width)]
    inside = (DOCUMENTS[:, 0] >= mine.start) & (DOCUMENTS[:, 0] < mine.stop)
    documents = DOCUMENTS[inside] - [mine.start, 0, 0] if case.documents else None
    states = [None if case.documents else model.initial_state(width) for _ in ranges]
    loss = torch.zeros((), dtype=torch.float64)
    traffic = Traffic()
    for begin in (0, length):
        parts = []
        for rows, state in zip(ranges, states, strict=True):
            if state is not None:
                fresh = torch.arange(BATCH)[rows] == RESET_ROW
                state = ModelState(state.position.masked_fill(fresh, 0), state.tensors)
            sequence = tokens[rows, begin : begin + length + 1]
            parts.append(MicroBatch(sequence[:, :-1], sequence[:, 1:], documents, state))
        with nullcontext() if case.compile else traffic:  # nothing is compiled under such a mode
            value, states = plan.accumulate(objective, parts, 1)
        loss += value
    plan.reduce_gradients(objective)
    norm = plan.clip_gradients(objective, CLIP_NORM)
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    evaluation = plan.measure(objective, [MicroBatch(tokens[:, :length], tokens[:, 1 : length + 1])])
    grads = {name: whole(grad).clone() for name, grad in grads.items()}
    held = join_rows([state for state in states if state is not None]) if not case.documents else None
    return Outcome(plan.sum(loss), norm, torch.tensor(evaluation), grads, held, traffic.received)


def errors(case: Case) -> dict[str, float]:
    """Relative errors over the tolerance."""
    device = torch.device("cpu")
    world_size = dist.get_world_size()
    torch.manual_seed(1)
    tokens = torch.randint(0, 40, (BATCH, 2 * LENGTH * case.chunk + 1))
    expected = two_calls(case, OneProcess(device), tokens)
    layout = Layout(world_size // (case.chunk * case.tensor), case.chunk, case.tensor, shard=case.shard)
    plan = Distributed(layout, device)
    found = two_calls(case, plan, tokens, case.micro)
    assert found.grads.keys() == expected.grads.keys()
    rows = plan.rows(BATCH)
    received = sum(size for name, size in found.received.items() if name != "broadcast_")  # DDP's, once in a run
    found_errors = {
        "loss": relative(found.loss, expected.loss),
        "norm": relative(found.norm, expected.norm),
        "evaluation": relative(found.evaluation, expected.evaluation),
        "gradient": largest(found.grads, expected.grads),
        "state": state_error(found.state, expected.state, rows),
    }
    scaled = {name: error / case.tolerance for name, error in found_errors.items()}
    if case.tensor > 1 and not case.shard:
        return {**scaled, "bytes": 0}
    claimed = 0 if case.compile else 2 * claimed_bytes(case, rows.stop - rows.start)
    return {**scaled, "bytes": abs(received - claimed)}


def state_error(found: ModelState | None, expected: ModelState | None, rows: slice) -> float:
    """The largest of the recurrent tensors; 0 where documents leave no state."""
    if found is None or expected is None:
        return 0.0 if found is expected else float("nan")
    assert bool((found.position == expected.position[rows]).all())
    recurrent = [name for name in expected.tensors if name.startswith(("past_cema", "past_norm"))]
    own = {name: expected.tensors[name][rows] for name in recurrent}
    return largest({name: found.tensors[name] for name in recurrent}, own)


def claimed_bytes(case: Case, rows: int) -> float:
    """Of one call."""
    config, itemsize = small_config(vocab_size=40, **case.model), case.dtype.itemsize
    exchanged = chunk_bytes(config, rows, case.chunk, itemsize) if case.chunk > 1 else 0
    world_size = dist.get_world_size() // case.tensor
    if not case.shard:
        return exchanged + replica_bytes(config, world_size, itemsize)
    if case.tensor > 1:
        exchanged += tensor_bytes(config, rows * LENGTH, case.tensor, itemsize)
    if not case.documents:
        return exchanged + case.micro * shard_bytes(config, world_size, itemsize, tensor=case.tensor)
    runs = max(len(group_by_length(DOCUMENTS[DOCUMENTS[:, 0] // rows == rank, 2])) for rank in range(world_size))
    agreed = 2 * torch.int64.itemsize * (1 - 1 / world_size)  # how often the blocks run
    return shard_bytes(config, world_size, itemsize, runs=runs) + agreed


def main(report: str, *names: str) -> None:
    graphs: list[Any] = []

    def tracer(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    torch.compile = functools.partial(torch.compile, backend=tracer)  # without the code generator, which takes minutes
    dist.init_process_group("gloo")
    found = {}
    for name in names:
        graphs.clear()
        found[name] = errors(CASES[name])
        assert bool(graphs) == CASES[name].compile
    if dist.get_rank() == 0:
        Path(report).write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])

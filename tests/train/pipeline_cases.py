"""Under torchrun, on four ranks: steps over stages of a pipeline against one process."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from helpers import small_config
from torch import Tensor
from torch import distributed as dist
from train.relative_errors import largest
from train.traffic import Traffic

from megalodon_deploy.model.megalodon import Megalodon, ModelState
from megalodon_deploy.train.config import RunConfig
from megalodon_deploy.train.objective import MicroBatch, Objective
from megalodon_deploy.train.parallel.dtensors import whole
from megalodon_deploy.train.parallel.layout import Layout
from megalodon_deploy.train.parallel.pipeline import Pipelined
from megalodon_deploy.train.parallel.traffic import pipeline_bytes
from megalodon_deploy.train.plan import OneProcess, Plan, Snapshot
from megalodon_deploy.train.trainer import prepare_blocks

BATCH, TOKENS, VOCABULARY = 8, 17, 40  # the second step begins within a chunk
FRESH = torch.arange(BATCH) == 1  # rows that start a new document with the second step
DOCUMENTS = np.array([[row, 0, 5 + row] for row in range(BATCH)])
CLIP_NORM = 0.5


@dataclass(frozen=True)
class Case:
    data: int = 1
    tensor: int = 1
    num_parts: int = 4  # micro-batches of a rank
    documents: bool = False
    recompute: bool = False
    bfloat16: bool = False
    dtype: torch.dtype = torch.float64
    model: dict[str, Any] = field(default_factory=dict)


CASES = {
    "two by two": Case(data=2, num_parts=2),
    "four": Case(),
    "four, float32": Case(dtype=torch.float32),
    "four, few parts, bfloat16 beside float32": Case(num_parts=2, bfloat16=True, dtype=torch.float32),
    "four, recomputed documents": Case(documents=True, recompute=True),
    "four, tied": Case(model={"share_emb": True, "scale_emb": True}),
    "two, with tensor, tied": Case(tensor=2, model={"share_emb": True, "swiglu": True}),
}


@dataclass
class Outcome:
    loss: Tensor
    norm: Tensor
    evaluation: float
    grads: dict[str, Tensor]
    snapshot: Snapshot | None
    received: float  # bytes of the second accumulation


def two_steps(case: Case, plan: Plan, tokens: Tensor) -> Outcome:
    """Gradients of two accumulations add up, the second going on from the first but in one row; then an update."""
    torch.manual_seed(0)
    model = Megalodon(small_config(vocab_size=VOCABULARY, num_layers=5, **case.model)).to(case.dtype)
    prepare_blocks(model, RunConfig(out=Path(), steps=1, checkpoint_activations=case.recompute), plan)
    objective = plan.prepare(Objective(model, 1000, autocasts=case.bfloat16))
    optimizer = torch.optim.AdamW([{"params": group} for group in plan.parameter_groups(objective)], lr=1e-2)
    rows = plan.rows(BATCH)
    size = (rows.stop - rows.start) // case.num_parts
    slices = [slice(begin, begin + size) for begin in range(rows.start, rows.stop, size)]
    states: list[ModelState | None] = [None if case.documents else model.initial_state(size) for _ in slices]
    total = torch.zeros((), dtype=torch.float64)
    for begin in (0, TOKENS):
        parts = [part_of(case, tokens[:, begin:], own, state) for own, state in zip(slices, states, strict=True)]
        with Traffic() as traffic:
            loss, states = plan.accumulate(objective, parts, 7)
        total += loss
        received = sum(traffic.received.values())
        if not case.documents:
            states = [
                state and ModelState(state.position.masked_fill(FRESH[own], 0), state.tensors)
                for own, state in zip(slices, states, strict=True)
            ]
    plan.reduce_gradients(objective)
    norm = plan.clip_gradients(objective, CLIP_NORM)
    grads = {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    optimizer.step()
    held_out = [part_of(case, tokens, slice(begin, begin + 3), None) for begin in (0, 2, 4)]
    held_out.append(part_of(case, tokens, slice(7, 8), None))
    evaluation = plan.measure(objective, held_out)
    snapshot = plan.capture(model, optimizer, states[0])
    return Outcome(plan.sum(total), norm, evaluation, grads, snapshot, received)


def part_of(case: Case, tokens: Tensor, rows: slice, state: ModelState | None) -> MicroBatch:
    documents = DOCUMENTS[rows] - [rows.start, 0, 0] if case.documents else None
    return MicroBatch(tokens[rows, :TOKENS], tokens[rows, 1 : TOKENS + 1], documents, state)


def errors(case: Case) -> dict[str, float]:
    torch.manual_seed(1)
    tokens = torch.randint(0, VOCABULARY, (BATCH, 2 * TOKENS + 1))
    alone = Case(**{**vars(case), "data": 1, "tensor": 1, "num_parts": case.data * case.num_parts})
    expected = two_steps(alone, OneProcess(torch.device("cpu")), tokens)
    num_stages = dist.get_world_size() // (case.data * case.tensor)
    plan = Pipelined(Layout(case.data, 1, case.tensor, pipeline=num_stages), torch.device("cpu"))
    found = two_steps(case, plan, tokens)
    report = {
        "loss": abs(float(found.loss / expected.loss) - 1),
        "norm": abs(float(found.norm / expected.norm) - 1),
        "evaluation": abs(found.evaluation / expected.evaluation - 1),
        "gradient": largest(found.grads, {name: expected.grads[name] for name in found.grads}),
    }
    if case.tensor == 1:
        config, itemsize = small_config(**case.model), case.dtype.itemsize
        claimed = pipeline_bytes(config, BATCH // case.data * TOKENS, itemsize)
        place = plan._mesh.get_local_rank("pipeline")
        report["bytes"] = abs(found.received - claimed // (2 if place in (0, num_stages - 1) else 1))
    if dist.get_rank() == 0:
        assert found.snapshot is not None
        assert expected.snapshot is not None
        for kind, tensors in vars(found.snapshot).items():
            wanted = vars(expected.snapshot)[kind]
            if kind == "stream" and case.data > 1:
                joined = BATCH // case.num_parts  # rows of the first micro-batches of all data ranks
                assert all(tensor.shape[0] == joined for tensor in tensors.values())
                tensors = {name: tensor[: joined // case.data] for name, tensor in tensors.items()}
            report[kind] = largest(tensors, wanted)
    return report


def report() -> dict[str, dict[str, float]]:
    """This rank's relative errors of each case, and bytes more or fewer than stated."""
    return {name: errors(case) for name, case in CASES.items()}

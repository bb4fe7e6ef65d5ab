"""How a run lies on processes: what a rank computes, and what has to be brought together.

The loop asks a plan for everything that more than one process would change. `OneProcess` is the plan of a single one;
distributed plans live in `train.parallel`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.optim import Optimizer

from megalodon_deploy.model.megalodon import Megalodon, ModelState
from megalodon_deploy.train.objective import MicroBatch, Objective

Contexts = tuple[AbstractContextManager[None], AbstractContextManager[None]]
MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW, by the names of its own state


@dataclass(frozen=True)
class Snapshot:
    """A copy of what is trained, on the CPU, that later steps do not change: whole, or what one rank holds."""

    weights: dict[str, Tensor]  # by released name
    moments: dict[str, Tensor]  # `exp_avg.NAME` and `exp_avg_sq.NAME`; empty before the first step
    stream: dict[str, Tensor]  # state of all rows, where it is carried from step to step


class Plan(Protocol):
    """One rank's view of the run. Losses and gradients are sums over ranks, never means."""

    rank: int
    world_size: int
    device: torch.device
    checkpoint_group: dist.ProcessGroup | None  # on CPUs, of ranks that each write a part of a checkpoint

    def rows(self, batch_size: int) -> slice:
        """The rows of a step that this rank computes. Raises `TrainError` when they do not divide."""
        ...

    def prepare(self, objective: Objective) -> nn.Module:
        """The module whose forward the loop calls; parameters may be sharded from here on, and the optimiser is made
        of them afterwards."""
        ...

    def recomputation(self) -> Contexts:
        """Contexts of a block's forward pass and of its recomputation; each pass of a block asks for its own."""
        ...

    def parameter_groups(self, objective: nn.Module) -> list[list[nn.Parameter]]:
        """Parameters that one operator of the optimiser can take together."""
        ...

    def accumulate(
        self, objective: nn.Module, parts: Sequence[MicroBatch], num_targets: int
    ) -> tuple[Tensor, list[ModelState | None]]:
        """Forward and backward pass of every part, gradients added up: this rank's share of the sum of losses over
        `num_targets`, float64, and the states after the parts, cut from their graphs; None where there was none."""
        ...

    def measure(self, objective: nn.Module, parts: Sequence[MicroBatch]) -> float:
        """The sum of losses of parts that all ranks have, without gradients; the same on every rank."""
        ...

    def reduce_gradients(self, objective: nn.Module) -> None:
        """After the last backward pass of a step: every gradient becomes its sum over ranks."""
        ...

    def clip_gradients(self, objective: nn.Module, max_norm: float) -> Tensor:
        """Scale all gradients so that their norm is at most `max_norm`; returns the norm before."""
        ...

    def reading(self) -> AbstractContextManager[None]:
        """While it lasts the model may be called by itself, without gradients, by all ranks alike."""
        ...

    def sum(self, value: Tensor) -> Tensor:
        """A scalar's sum over ranks."""
        ...

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on one rank at least: signals do not reach all of them."""
        ...

    def capture(self, model: Megalodon, optimizer: Optimizer, state: ModelState | None) -> Snapshot | None:
        """A whole snapshot on rank 0, None elsewhere; with `checkpoint_group` each rank's own, but the stream of rank 0
        alone. All ranks call it. `state` is this rank's rows, on the CPU or not."""
        ...

    def own_state(self, state: ModelState) -> ModelState:
        """What this rank keeps of the state of whole rows."""
        ...

    def barrier(self) -> None:
        """Wait for all ranks."""
        ...


class OneProcess:
    """Everything on one device."""

    rank = 0
    world_size = 1
    checkpoint_group: dist.ProcessGroup | None = None

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def rows(self, batch_size: int) -> slice:
        return slice(0, batch_size)

    def prepare(self, objective: Objective) -> nn.Module:
        return objective.to(self.device)

    def recomputation(self) -> Contexts:
        return nullcontext(), nullcontext()

    def parameter_groups(self, objective: nn.Module) -> list[list[nn.Parameter]]:
        return [list(objective.parameters())]

    def accumulate(
        self, objective: nn.Module, parts: Sequence[MicroBatch], num_targets: int
    ) -> tuple[Tensor, list[ModelState | None]]:
        total = torch.zeros((), device=self.device, dtype=torch.float64)
        states: list[ModelState | None] = []
        for part in parts:
            loss, after = objective(*part)
            loss = loss / num_targets
            loss.backward()
            total += loss.detach()
            states.append(None if part.state is None else after.detach())
        return total, states

    @torch.no_grad()
    def measure(self, objective: nn.Module, parts: Sequence[MicroBatch]) -> float:
        return sum(float(objective(*part)[0]) for part in parts)

    def reduce_gradients(self, objective: nn.Module) -> None:
        pass

    def clip_gradients(self, objective: nn.Module, max_norm: float) -> Tensor:
        return torch.nn.utils.clip_grad_norm_(objective.parameters(), max_norm)

    def reading(self) -> AbstractContextManager[None]:
        return nullcontext()

    def sum(self, value: Tensor) -> Tensor:
        return value

    def any(self, flag: bool) -> bool:
        return flag

    def capture(self, model: Megalodon, optimizer: Optimizer, state: ModelState | None) -> Snapshot | None:
        tensors = training_tensors(model, optimizer)
        stream = {} if state is None else {"position": state.position, **state.tensors}
        kinds = (*tensors, stream)
        return Snapshot(*({name: self._copy(tensor) for name, tensor in kind.items()} for kind in kinds))

    def own_state(self, state: ModelState) -> ModelState:
        return state

    def _copy(self, tensor: Tensor) -> Tensor:
        return self._whole(tensor.detach()).to("cpu", copy=True).contiguous()

    def _whole(self, tensor: Tensor) -> Tensor:
        """What all ranks together hold of a parameter or moment."""
        return tensor

    def barrier(self) -> None:
        pass


def training_tensors(model: Megalodon, optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights by released name, and the moments that there are so far by `exp_avg.NAME`; nothing is copied."""
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    moments = {
        f"{moment}.{name}": optimizer.state[parameter][moment]
        for name, parameter in model.named_parameters()
        for moment in MOMENTS
        if parameter in optimizer.state
    }
    return weights, moments


def set_steps(model: Megalodon, optimizer: Optimizer, num_steps: int) -> None:
    """Let the optimiser have done `num_steps` steps; its moments are zeros, to be filled."""
    for parameter in model.parameters():
        if num_steps and parameter.requires_grad:
            moments = {moment: torch.zeros_like(parameter.detach()) for moment in MOMENTS}
            optimizer.state[parameter] = {"step": torch.tensor(float(num_steps), device=parameter.device), **moments}


def join_rows(states: list[ModelState]) -> ModelState:
    """One state of all rows; key/value memory is filled up with zeros to the longest."""
    names = list(states[0].tensors)
    most = {name: max(state.tensors[name].shape[2] for state in states) for name in names if "_norm" not in name}
    tensors = {}
    for name in names:
        parts = [state.tensors[name] for state in states]
        if name.startswith(("past_key.", "past_value.")):
            parts = [torch.nn.functional.pad(part, (0, 0, 0, most[name] - part.shape[2])) for part in parts]
        tensors[name] = torch.cat(parts)
    return ModelState(torch.cat([state.position for state in states]), tensors)

"""Chunk parallelism: a sequence split over ranks by chunks.

Attention never looks beyond its chunk, so a rank that holds whole chunks needs nothing of the others but the recurrent
state that enters them (`train.parallel.prefix`). It summarises its own tokens, all ranks gather the W summaries, and
each joins those before it: one exchange for each operator, and nobody waits for a chain of neighbours. The price is
that CEMA runs twice, for the summary and for the output. Gradients return the same way.

Shapes: B rows, T tokens of a sequence, L = T/W of a rank, W ranks of the group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from torch import distributed as dist

from megalodon_deploy.model.layers import ComplexEMA, TimestepNorm
from megalodon_deploy.model.megalodon import Megalodon, ModelState
from megalodon_deploy.train.objective import Objective
from megalodon_deploy.train.parallel.collectives import Group, all_gather, take_part
from megalodon_deploy.train.parallel.prefix import AveragePrefix, StatisticsPrefix
from megalodon_deploy.train.plan import Contexts

Inputs = tuple[Tensor, Tensor, Tensor]  # of both operators' modules: x [B, L, D], past, position [B]
Hook = Callable[[nn.Module, Inputs], Inputs]


@dataclass
class _Pass:
    """One forward pass over a sequence."""

    length: int  # L
    gathered: dict[str, Tensor] = field(default_factory=dict)  # summaries of all ranks, by past name
    after: dict[str, Tensor] = field(default_factory=dict)  # the state behind the whole sequence, by past name


class ChunkParallel(nn.Module):
    """An objective whose sequences are split over the ranks of `group`; every rank is given the whole of them."""

    def __init__(self, objective: Objective, group: Group) -> None:
        super().__init__()
        self.objective = objective
        self._group = group
        self._pass: _Pass | None = None  # within `forward`, and while a block of it is recomputed
        for name, module in recurrent_modules(objective.model).items():
            module.register_forward_pre_hook(self._enter(name))

    def _enter(self, name: str) -> Hook:
        """Gives an operator the state that enters this rank's segment as its past."""

        def hook(module: nn.Module, inputs: Inputs) -> Inputs:
            if (current := self._pass) is None:
                return inputs  # the model is used by itself
            x_BLD, past, position_B = inputs
            begin_B = position_B - self._group.rank() * current.length
            if isinstance(module, ComplexEMA):
                prefix: AveragePrefix | StatisticsPrefix = AveragePrefix(module, x_BLD, past, begin_B == 0)
            else:
                assert isinstance(module, TimestepNorm), "Bug: only these two are recurrent"
                prefix = StatisticsPrefix(module, x_BLD, past, begin_B)
            gathered = all_gather(prefix.summary, self._group, current.gathered.get(name))
            current.gathered[name] = gathered.detach()
            entering = past
            for rank, summary in enumerate(gathered):
                if rank == self._group.rank():
                    entering = prefix.past()
                prefix.append(summary)
            current.after[name] = prefix.past()
            return x_BLD, take_part(entering, gathered), position_B

        untraced: Hook = torch.compiler.disable(hook)  # type: ignore[no-untyped-call]  # as it has collectives
        return untraced

    @contextmanager
    def _during(self, current: _Pass | None) -> Iterator[None]:
        before, self._pass = self._pass, current
        try:
            yield
        finally:
            self._pass = before

    def recomputation(self) -> Contexts:
        """Contexts of a block's forward pass and of its recomputation in the backward pass, asked for by each block.

        A recomputation takes the summaries that the forward pass gathered, and nothing is sent again. Autograd wants
        all it kept of a block again in the same order, so this rank's summary is recomputed with the rest.
        """
        return nullcontext(), self._during(self._pass)

    def forward(
        self,
        tokens_BT: Tensor,
        targets_BT: Tensor,
        documents: np.ndarray | None = None,
        state: ModelState | None = None,
    ) -> tuple[Tensor, ModelState | None]:
        """As `Objective.forward`. The loss is the sum over this rank's targets where gradients are on, else over all.

        Documents are only measured, by every rank. Rows of `state` stand at chunk edges. Raises `ValueError` for the
        gradients of documents and for tokens that are not W times a multiple of the chunk size.
        """
        model, world_size = self.objective.model, self._group.size()
        chunk_size = model.config.chunk_size
        if documents is not None and not torch.is_grad_enabled():
            loss, _ = self.objective(tokens_BT, targets_BT, documents)  # each rank all of them: they are not cut
            return loss, None
        if documents is not None or tokens_BT.shape[1] % (world_size * chunk_size):
            found = "documents" if documents is not None else f"{tokens_BT.shape[1]} tokens"
            raise ValueError(f"chunk parallelism takes whole rows of {world_size} x {chunk_size} tokens, not {found}")
        state = state or model.initial_state(tokens_BT.shape[0])
        current = _Pass(tokens_BT.shape[1] // world_size)
        begin = self._group.rank() * current.length
        own = slice(begin, begin + current.length)
        with self._during(current):
            loss, _ = self.objective(
                tokens_BT[:, own], targets_BT[:, own], None, ModelState(state.position + begin, state.tensors)
            )
        if not torch.is_grad_enabled():
            dist.all_reduce(loss, group=self._group)
        tensors = {name: current.after.get(name, past) for name, past in state.tensors.items()}
        return loss, ModelState(state.position + tokens_BT.shape[1], tensors)


def recurrent_modules(model: Megalodon) -> dict[str, nn.Module]:
    """The modules whose state crosses chunk edges, by the past name of that state."""
    modules: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        if isinstance(module, TimestepNorm | ComplexEMA):
            kind = "norm" if isinstance(module, TimestepNorm) else "cema"
            place = path.split(".")[1] if path.startswith("layers.") else "final"
            modules[f"past_{kind}.{place}"] = module
    return modules

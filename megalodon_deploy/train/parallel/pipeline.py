"""Pipeline parallelism: P ranks hold consecutive layers each, and the micro-batches of a step go from rank to rank.

The first stage has the embedding besides, the last one final norm, output and loss; a tied embedding is on both, and
its gradients are summed. Stages send the residual stream [B, T, D] forward and its gradient back. PyTorch's
`torch.distributed.pipelining` orders the work: 1F1B, in which a stage holds P micro-batches at most, or GPipe where a
step has fewer than P. The state that streams carry stays with the layers that it is of.

Shapes: B rows, T tokens, D channels.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.distributed.pipelining.schedules import PipelineScheduleSingle
from torch.optim import Optimizer

from megalodon_deploy.model.megalodon import Megalodon, ModelState
from megalodon_deploy.train.objective import MicroBatch, Objective
from megalodon_deploy.train.parallel.dtensors import scale_gradients, squared_norm
from megalodon_deploy.train.parallel.layout import PIPELINE, Layout
from megalodon_deploy.train.parallel.plan import Distributed
from megalodon_deploy.train.plan import Snapshot

_MEASURED_PER_STAGE = 2  # micro-batches of an evaluation at a time: their streams stay in memory


class Stage(nn.Module):
    """The objective of one rank's layers. It is called once for each micro-batch, in their order."""

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.objective = objective
        self.begin([], 1)

    @property
    def is_last(self) -> bool:
        return self.objective.model.output is not None

    def begin(self, parts: Sequence[MicroBatch], num_targets: int) -> None:
        """Before the first micro-batch: what its calls are given besides the stream, and by what losses are divided."""
        self._parts, self._num_targets = parts, num_targets
        self.states: list[ModelState | None] = []  # after each
        self.losses: list[Tensor] = []  # of each, on the last stage

    def forward(self, x: Tensor) -> Tensor:
        """From tokens [B, T] or the stream [B, T, D] to the stream, or on the last stage to the loss."""
        part = self._parts[len(self.states)]
        out, after = self.objective(x, part.targets, part.documents, part.state)
        self.states.append(None if part.state is None or after is None else after.detach())
        if not self.is_last:
            stream: Tensor = out.contiguous()
            return stream
        loss: Tensor = out / self._num_targets
        self.losses.append(loss.detach().clone())
        return loss


def own_layers(num_layers: int, place: int, num_stages: int) -> range:
    """Layers of a stage; those that do not divide go to the first stages: the last one has the output matrix."""
    each, more = divmod(num_layers, num_stages)
    begin = place * each + min(place, more)
    return range(begin, begin + each + (place < more))


def cut(model: Megalodon, place: int, num_stages: int) -> None:
    """Leave a model what one stage needs."""
    is_first, is_last = place == 0, place == num_stages - 1
    own = own_layers(len(model.layers), place, num_stages)
    for i in range(len(model.layers)):
        if i not in own:
            model.layers.register_module(str(i), None)
    if not (is_first or (is_last and model.config.share_emb)):
        model.embed = None
    if not is_last:
        model.output = None


class Pipelined(Distributed):
    """A rank of a pipeline; the other axes are those of `Distributed`."""

    def __init__(self, layout: Layout, device: torch.device) -> None:
        super().__init__(layout, device)
        self._group, self._place = self._mesh.get_group(PIPELINE), self._mesh.get_local_rank(PIPELINE)
        self._is_first, self._is_last = self._place == 0, self._place == layout.pipeline - 1
        self._training: PipelineScheduleSingle | None = None

    def prepare(self, objective: Objective) -> nn.Module:
        cut(objective.model, self._place, self.layout.pipeline)
        super().prepare(objective)
        self._stage = Stage(objective)
        return self._stage

    def _schedule(self, parts: Sequence[MicroBatch], *, has_backward: bool) -> PipelineScheduleSingle:
        """For so many micro-batches of their shape."""
        model, tokens = self._stage.objective.model, parts[0].tokens
        dtype = torch.promote_types(model.dtype, torch.float32)
        shape = (*tokens.shape, model.config.model_dim)
        stream = torch.empty(shape, dtype=dtype, device="meta", requires_grad=has_backward)
        loss = torch.empty((), dtype=dtype, device="meta", requires_grad=has_backward)
        stage = PipelineStage(
            self._stage,
            self._place,
            self.layout.pipeline,
            self.device,
            input_args=tokens.to("meta") if self._is_first else stream,
            output_args=loss if self._is_last else stream,
            group=self._group,
        )
        alternates = has_backward and len(parts) >= self.layout.pipeline
        kind = Schedule1F1B if alternates else ScheduleGPipe
        return kind(stage, len(parts), (lambda loss, targets: loss) if has_backward else None, scale_grads=False)

    def accumulate(
        self, objective: nn.Module, parts: Sequence[MicroBatch], num_targets: int
    ) -> tuple[Tensor, list[ModelState | None]]:
        if self._training is None:
            self._training = self._schedule(parts, has_backward=True)
        self._stage.begin(parts, num_targets)
        targets = torch.cat([part.targets for part in parts])
        self._training.step(*self._tokens(parts), target=targets, return_outputs=False)
        return self._total(), self._stage.states

    @torch.no_grad()
    def measure(self, objective: nn.Module, parts: Sequence[MicroBatch]) -> float:
        total = torch.zeros((), device=self.device, dtype=torch.float64)
        most = _MEASURED_PER_STAGE * self.layout.pipeline
        for _, alike in itertools.groupby(parts, lambda part: part.tokens.shape):
            group = list(alike)
            for begin in range(0, len(group), most):
                some = group[begin : begin + most]
                self._stage.begin(some, 1)
                self._schedule(some, has_backward=False).eval(*self._tokens(some), return_outputs=False)
                total += self._total()
        dist.all_reduce(total, group=self._group)
        return float(total)

    def _tokens(self, parts: Sequence[MicroBatch]) -> list[Tensor]:
        """What a schedule is called with, which cuts it into the micro-batches again."""
        return [torch.cat([part.tokens for part in parts])] if self._is_first else []

    def _total(self) -> Tensor:
        zero = torch.zeros((), device=self.device, dtype=torch.float64)
        return torch.stack([zero, *(loss.double() for loss in self._stage.losses)]).sum()

    def reduce_gradients(self, objective: nn.Module) -> None:
        super().reduce_gradients(objective)
        embed = self._tied_embedding()
        if embed is None:
            return
        assert embed.grad is not None, "Bug: an embedding without gradient"
        own, other = embed.grad, torch.empty_like(embed.grad)
        peer = self.layout.pipeline - 1 if self._is_first else 0
        works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, own, group=self._group, group_peer=peer),
                dist.P2POp(dist.irecv, other, group=self._group, group_peer=peer),
            ]
        )
        for work in works:
            work.wait()
        own += other

    def _tied_embedding(self) -> Tensor | None:
        """On the two stages that have it."""
        model = self._stage.objective.model
        return model.embed.weight if model.config.share_emb and model.embed else None

    def clip_gradients(self, objective: nn.Module, max_norm: float) -> Tensor:
        again = None if self._is_first else self._tied_embedding()  # it counts once
        square = squared_norm(parameter for parameter in objective.parameters() if parameter is not again)
        dist.all_reduce(square, group=self._group)
        return scale_gradients(objective.parameters(), max_norm, square.sqrt())

    def sum(self, value: Tensor) -> Tensor:
        """Of what the last stages have; it is 0 on others."""
        total = super().sum(value)
        dist.all_reduce(total, group=self._group)
        return total

    def own_state(self, state: ModelState) -> ModelState:
        here = self._stage.objective.model.initial_state(1).tensors
        return super().own_state(ModelState(state.position, {name: state.tensors[name] for name in here}))

    def capture(self, model: Megalodon, optimizer: Optimizer, state: ModelState | None) -> Snapshot | None:
        own = super().capture(model, optimizer, state)
        if own is None or self.checkpoint_group is not None:
            return own
        joined = Snapshot(self._joined(own.weights), self._joined(own.moments), own.stream)
        return joined if self._is_first else None

    def _whole_state(self, state: ModelState) -> ModelState:
        own = super()._whole_state(state)
        return ModelState(own.position, self._joined(own.tensors)) if self._collects else own

    def _joined(self, own: dict[str, Tensor]) -> dict[str, Tensor]:
        """All stages' tensors, on the first stage; one after the other, so that a device never holds many."""
        here = [(name, tensor.shape, tensor.dtype) for name, tensor in own.items()]
        lists = [here] * self.layout.pipeline
        dist.all_gather_object(lists, here, group=self._group)
        joined = dict(own)
        for place in range(1, self.layout.pipeline):
            for name, shape, dtype in lists[place]:
                tensor = torch.empty(shape, dtype=dtype, device=self.device)
                if self._place == place and tensor.numel():
                    dist.send(own[name].to(self.device), group=self._group, group_dst=0)
                elif self._is_first:
                    if tensor.numel():
                        dist.recv(tensor, group=self._group, group_src=place)
                    joined[name] = tensor.cpu()
        return joined

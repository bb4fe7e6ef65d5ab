"""A run in progress: model, optimiser, place in the data and what has been measured.

B rows of T tokens are a step, cut into micro-batches whose gradients add up. Losses are in nats per token.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megalodon_deploy.errors import TrainError
from megalodon_deploy.model.checkpoint import load_checkpoint
from megalodon_deploy.model.megalodon import Megalodon, ModelState
from megalodon_deploy.train.checkpoints import RunFolder
from megalodon_deploy.train.config import Measurement, RunConfig, TrainConfig
from megalodon_deploy.train.data.rows import Batch, Part, evaluation_batches, open_rows
from megalodon_deploy.train.objective import MicroBatch, Objective
from megalodon_deploy.train.plan import Plan, Snapshot, join_rows, set_steps, training_tensors
from megalodon_deploy.train.schedule import learning_rate, run_fraction
from megalodon_deploy.train.speed import flops_per_token, peak_flops

_SMOOTHED_STEPS = 50  # over which the reported training loss is a mean
_DIVERGED = 2.0  # times the loss of a uniform guess


def build_model(config: TrainConfig) -> Megalodon:
    """Initialised as released from the run's seed, or with the weights that the run starts from."""
    torch.manual_seed(config.run.seed)
    if config.run.start_from is None:
        return Megalodon(config.model).train()
    model = load_checkpoint(config.run.start_from)
    for parameter in model.parameters():  # memory-mapped: a weight of a run is its own
        parameter.data = parameter.data.clone()
    return model.train()


def prepare_blocks(model: Megalodon, run: RunConfig, plan: Plan) -> None:
    """Compile and recompute by block. Both replace `forward`, so that hooks on a block's call stay outside."""
    for layer in model.layers:
        if run.compile:
            layer.forward = torch.compile(layer.forward)
        if run.checkpoint_activations:
            layer.forward = functools.partial(
                checkpoint, layer.forward, use_reentrant=False, context_fn=plan.recomputation
            )


class Trainer:
    """One rank's part of a run."""

    def __init__(self, config: TrainConfig, train: Part, held_out: Part, plan: Plan) -> None:
        run = config.run
        self.config, self.plan = config, plan
        self.mine = plan.rows(run.batch_size)
        shape = {"seq_len": run.seq_len, "batch_size": run.batch_size}
        self.rows = open_rows(config.data.rows, train, seed=run.seed, **shape)
        micro = run.micro_batch_size or run.batch_size
        self.evaluation = evaluation_batches(
            config.data.rows, held_out, seq_len=run.seq_len, num_rows=config.evaluation.rows, batch_size=micro
        )
        self.bytes_per_token = held_out.bytes_per_token
        self.model = build_model(config)
        prepare_blocks(self.model, run, plan)
        self.objective = plan.prepare(Objective(self.model, run.logits_at_once, autocasts=run.precision == "bfloat16"))
        settings = config.optimizer
        # Decay acts on every stored weight, as released: norm weights are stored minus one, so it pulls scales to 1.
        self.optimizer = torch.optim.AdamW(
            [{"params": group} for group in plan.parameter_groups(self.objective)],
            betas=settings.betas,
            eps=settings.epsilon,
            weight_decay=settings.weight_decay,
            fused=plan.device.type in ("cpu", "cuda"),
        )
        self.states: list[ModelState | None] = [None] * len(list(self._micro_ranges()))
        self.num_steps = 0
        self.first_loss: float | None = None
        self.recent_losses: deque[float] = deque(maxlen=_SMOOTHED_STEPS)
        self.curve: list[Measurement] = []
        self.best: tuple[int, float] | None = None  # step and held-out loss
        self.next_mark = 1  # of `evaluation.times` evenly spaced ones
        self.latest: dict[str, float] = {}  # what the log shows of the latest step
        self._seconds_before = 0.0
        self._started = time.monotonic()
        self._session_steps = 0
        name = torch.cuda.get_device_name(plan.device) if plan.device.type == "cuda" else plan.device.type
        self._peak_flops = peak_flops(name, config.log.peak_tflops)

    @property
    def seconds(self) -> float:
        """Of training, over all sessions of the run."""
        return self._seconds_before + time.monotonic() - self._started

    @property
    def fraction(self) -> float:
        return run_fraction(self.config.run, self.num_steps, self.seconds)

    @property
    def tokens_per_step(self) -> int:
        return self.config.run.batch_size * self.config.run.seq_len

    @property
    def num_tokens(self) -> int:
        return self.num_steps * self.tokens_per_step

    @property
    def train_loss(self) -> float | None:
        return sum(self.recent_losses) / len(self.recent_losses) if self.recent_losses else None

    def _micro_ranges(self) -> Iterator[tuple[int, int]]:
        """(begin, end) of each micro-batch among this rank's rows."""
        count = self.mine.stop - self.mine.start
        micro = self.config.run.micro_batch_size or count
        for begin in range(0, count, micro):
            yield begin, min(begin + micro, count)

    def step(self) -> None:
        """One update. Weights stay as they are when the loss or a gradient is not finite."""
        rate = learning_rate(self.config.optimizer, self.fraction, self.num_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        batch = self.rows.next(self.mine)
        self.optimizer.zero_grad()
        parts = [
            self.micro_batch(batch.part(begin, end), state)
            for (begin, end), state in zip(self._micro_ranges(), self.states, strict=True)
        ]
        loss, self.states = self.plan.accumulate(self.objective, parts, batch.num_targets)
        self.plan.reduce_gradients(self.objective)
        norm = self.plan.clip_gradients(self.objective, self.config.optimizer.clip_norm)
        value = self.plan.sum(loss).item()
        self._check(value, norm.item())
        self.optimizer.step()
        self.num_steps += 1
        self._session_steps += 1
        self.recent_losses.append(value)
        if self.first_loss is None:
            self.first_loss = value
        self.latest = {"loss": value, "learning_rate": rate, "gradient_norm": norm.item()}

    def micro_batch(self, batch: Batch, state: ModelState | None) -> MicroBatch:
        """On the device; rows of streams go on from `state`, those of new documents from position 0."""
        device = self.plan.device
        tokens, targets = (torch.from_numpy(values).to(device) for values in (batch.tokens, batch.targets))
        if batch.fresh is None:
            return MicroBatch(tokens, targets, batch.documents)
        state = state or self.model.initial_state(len(tokens))
        position = state.position.masked_fill(torch.from_numpy(batch.fresh).to(device), 0)
        return MicroBatch(tokens, targets, None, ModelState(position, state.tensors))

    def is_evaluation_due(self) -> bool:
        """Whether the run has passed the next mark."""
        if every := self.config.evaluation.every_steps:
            return self.num_steps % every == 0 or self.fraction == 1
        return self.fraction * self.config.evaluation.times >= self.next_mark or self.fraction == 1

    def _mark(self) -> int:
        """The first one that lies ahead."""
        return int(self.fraction * self.config.evaluation.times) + 1

    @property
    def is_evaluated(self) -> bool:
        """Whether an evaluation would tell nothing new."""
        return not self.evaluation or bool(self.curve and self.curve[-1].step == self.num_steps)

    @property
    def best_step(self) -> int | None:
        """Where the held-out loss was lowest."""
        return self.best[0] if self.best else None

    def is_checkpoint_due(self, *, evaluated: bool) -> bool:
        """When it is time, and whenever an evaluation is the best so far: the best model is always on disk."""
        every = self.config.checkpoint.every_steps
        return evaluated if every is None else self.num_steps % every == 0 or self.best_step == self.num_steps

    def evaluate(self) -> None:
        """Add the held-out loss to the curve; all ranks call it and have the same number."""
        self.next_mark = self._mark()
        if not self.evaluation:
            return
        parts = [self.micro_batch(batch, None) for batch in self.evaluation]
        loss = self.plan.measure(self.objective, parts) / sum(batch.num_targets for batch in self.evaluation)
        self._check(loss)
        assert self.train_loss is not None, "Bug: evaluated before the first step"
        bits = loss / (math.log(2) * self.bytes_per_token)
        measured = Measurement(
            step=self.num_steps,
            seconds=self.seconds,
            train_loss=self.train_loss,
            held_out_loss=loss,
            bits_per_byte=bits,
        )
        self.curve.append(measured)
        if self.best is None or loss < self.best[1]:
            self.best = (self.num_steps, loss)
        self.latest |= {"held_out_loss": loss, "bits_per_byte": bits}

    def _check(self, loss: float, gradient_norm: float = 0.0) -> None:
        """Raises `TrainError` for a run that cannot recover."""
        limit = _DIVERGED * math.log(self.config.model.vocab_size)
        if loss <= limit and math.isfinite(gradient_norm):
            return
        raise TrainError(
            f"diverged at step {self.num_steps + 1}: loss {loss:.3f}, gradient norm {gradient_norm:.3g}; "
            "lower optimizer.learning_rate"
        )

    def log_line(self) -> dict[str, float]:
        """Values of `log.COLUMNS`."""
        line = {"step": self.num_steps, "seconds": self.seconds, "tokens": self.num_tokens}
        return {**line, **self.latest, "tokens_per_second": self.speed}

    @property
    def speed(self) -> float:
        """Tokens per second of this session."""
        return self._session_steps * self.tokens_per_step / max(time.monotonic() - self._started, 1e-9)

    def stage(self) -> str:
        """One line about the run, most important first: a narrow terminal cuts its end."""
        held_out = f" (held out {self.curve[-1].held_out_loss:.3f})" if self.curve else ""
        left_seconds = self.seconds * (1 / self.fraction - 1)
        share = ""
        if self._peak_flops is not None:
            achieved = self.speed * flops_per_token(self.config.model) / self.plan.world_size
            share = f", {achieved / self._peak_flops:.0%} of peak"
        times = f"{self.speed:,.0f} tokens/s{share}, {left_seconds:.0f} s left, step {self.num_steps}"
        return f"loss {self.train_loss:.3f}{held_out}, {times}"

    def capture(self) -> Snapshot | None:
        """A copy that later steps do not change, of ranks that write it."""
        held = [state for state in self.states if state is not None]
        return self.plan.capture(self.model, self.optimizer, join_rows(held) if held else None)

    def progress(self) -> dict[str, Any]:
        """Everything but tensors, for JSON."""
        return {
            "step": self.num_steps,
            "seconds": self.seconds,
            "rows": self.rows.state(),
            "random": torch.get_rng_state().numpy().tobytes().hex(),
            "first_loss": self.first_loss,
            "recent_losses": list(self.recent_losses),
            "curve": [dataclasses.asdict(point) for point in self.curve],
            "best": self.best,
        }

    def restore(self, folder: RunFolder, progress: dict[str, Any]) -> None:
        """Go on exactly where `capture` and `progress` were, with this rank's part of what lies in the folder."""
        self.num_steps = progress["step"]
        set_steps(self.model, self.optimizer, self.num_steps)
        folder.read_tensors(self.num_steps, *training_tensors(self.model, self.optimizer))
        self.rows.restore(progress["rows"])
        torch.set_rng_state(torch.from_numpy(np.frombuffer(bytes.fromhex(progress["random"]), np.uint8).copy()))
        self.first_loss = progress["first_loss"]
        self.recent_losses.extend(progress["recent_losses"])
        self.curve = [Measurement(**point) for point in progress["curve"]]
        self.best = tuple(progress["best"]) if progress["best"] else None
        self._seconds_before = progress["seconds"]
        self.next_mark = self._mark()
        if stream := folder.read_stream(self.num_steps):
            self._restore_stream(stream)

    def _restore_stream(self, stream: dict[str, Tensor]) -> None:
        for index, (begin, end) in enumerate(self._micro_ranges()):
            rows = slice(self.mine.start + begin, self.mine.start + end)
            tensors = {name: tensor[rows].to(self.plan.device) for name, tensor in stream.items()}
            position = tensors.pop("position")
            self.states[index] = self.plan.own_state(ModelState(position, tensors))

"""How processes lie on the axes of a run, and what does not fit.

Without PyTorch: a run on one process asks too, and needs nothing of the rest of this package.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megalodon_deploy.config import MegalodonConfig
from megalodon_deploy.errors import TrainError
from megalodon_deploy.train.config import TrainConfig

PIPELINE, DATA, CHUNK, TENSOR = "pipeline", "data", "chunk", "tensor"


@dataclass(frozen=True)
class Layout:
    """How many ranks each axis has, whether those of data and chunk share the weights out, and whether each rank writes
    its part of a checkpoint."""

    data: int
    chunk: int
    tensor: int = 1
    shard: bool = False
    sharded_checkpoints: bool = False
    pipeline: int = 1

    @property
    def replicas(self) -> int:
        """Ranks that compute gradients of the same weights."""
        return self.data * self.chunk

    @classmethod
    def of(cls, config: TrainConfig, world_size: int) -> Layout:
        """Raises `TrainError` when the run does not fit on `world_size` ranks."""
        parallel, run = config.parallel, config.run
        asked = {name: getattr(parallel, name) for name in (PIPELINE, CHUNK, TENSOR)}
        chunk, tensor = parallel.chunk, parallel.tensor
        data, left = divmod(world_size, math.prod(asked.values()))
        if left or not data:
            named = " x ".join(f"parallel.{name} = {number}" for name, number in asked.items() if number > 1)
            raise TrainError(
                f"{named} does not divide the number of processes, {world_size}; "
                "start more: torchrun --nproc-per-node N -m megalodon_deploy.cli train ..."
            )
        if tensor not in (ways := supported_ways(config.model)):
            raise TrainError(
                f"parallel.tensor = {tensor} does not cut this model's heads, value_dim and ffn_hidden_dim evenly; "
                f"these do: {', '.join(map(str, ways))}"
            )
        if run.batch_size % data:
            raise TrainError(f"run.batch_size = {run.batch_size} is not a multiple of {data} data-parallel processes")
        if run.minutes is not None and world_size > 1:
            raise TrainError("run.minutes: processes would end at different steps; give run.steps")
        segment = chunk * config.model.chunk_size
        if chunk > 1 and (config.data.rows == "documents" or run.seq_len % segment):
            raise TrainError(
                f"parallel.chunk = {chunk} needs data.rows = windows or streams and a run.seq_len that is a multiple "
                f"of {segment}; found {config.data.rows}, {run.seq_len}"
            )
        if parallel.pipeline > 1:
            _check_pipeline(config, run.batch_size // data)
        shard, sharded = parallel.shard, config.checkpoint.sharded
        return cls(data, chunk, tensor, shard, shard if sharded is None else sharded, parallel.pipeline)


def _check_pipeline(config: TrainConfig, num_rows: int) -> None:
    """Raises `TrainError` when a pipeline cannot run it; `num_rows` of a step go through each."""
    num_stages, micro = config.parallel.pipeline, config.run.micro_batch_size or num_rows
    asked = f"parallel.pipeline = {num_stages}"
    if num_stages > config.model.num_layers:
        raise TrainError(f"{asked} is more than model.num_layers = {config.model.num_layers}: a stage has a layer")
    if num_rows % micro:
        raise TrainError(
            f"{asked} needs micro-batches of one size: run.micro_batch_size = {micro} does not divide the {num_rows} "
            "rows of a step that go through a pipeline"
        )
    if config.parallel.chunk > 1 or config.parallel.shard:
        other = "shard = true" if config.parallel.shard else f"chunk = {config.parallel.chunk}"
        raise TrainError(f"{asked} with parallel.{other}: choose one of the two")
    if config.log.sample_tokens:
        raise TrainError(f"{asked} with log.sample_tokens: no process has the whole model; set it to 0")


def supported_ways(config: MegalodonConfig) -> list[int]:
    """The values of W that cut heads, values and feed-forward channels evenly."""
    heads, widths = config.num_heads, math.gcd(config.value_dim, config.ffn_hidden_dim)
    return [ways for ways in range(1, widths + 1) if widths % ways == 0 and (heads % ways == 0 or ways % heads == 0)]

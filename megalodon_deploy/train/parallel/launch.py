"""From torchrun's environment to a plan."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import distributed as dist

from megalodon_deploy.errors import TrainError
from megalodon_deploy.train.config import TrainConfig
from megalodon_deploy.train.parallel.layout import Layout
from megalodon_deploy.train.plan import OneProcess, Plan


@contextmanager
def open_plan(config: TrainConfig, device: torch.device) -> Iterator[Plan]:
    """The plan of this process; the group of all processes lives as long as the context.

    Raises `TrainError` when the run does not fit on as many processes as there are.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    layout = Layout.of(config, world_size)
    if world_size == 1:
        yield OneProcess(device)
        return
    # DTensors take half a second to import.
    from megalodon_deploy.train.parallel.pipeline import Pipelined
    from megalodon_deploy.train.parallel.plan import Distributed

    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if not dist.is_available():
        raise TrainError("this build of PyTorch has no torch.distributed; run one process")
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield (Pipelined if layout.pipeline > 1 else Distributed)(layout, device)
    finally:
        dist.destroy_process_group()

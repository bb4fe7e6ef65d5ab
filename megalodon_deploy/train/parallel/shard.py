"""Weights, gradients and moments in parts: W ranks hold 1/W of every tensor, and of a block all of it while it runs.

PyTorch's FSDP2, `fully_shard`, one group of weights for each block, and one at the root for embedding, output and final
norm. A tensor is cut along its first axis.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from megalodon_deploy.model.megalodon import Megalodon


def shard_weights(root: nn.Module, model: Megalodon, mesh: DeviceMesh) -> FSDPModule:
    """Share out the weights over a mesh of one axis, block by block and what is left at `root`; its forward gathers.

    Gradients come out as sums over ranks.
    """
    # That a block returns views: nothing of ours changes them in place.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    for module in (*model.layers, root):
        sharded: FSDPModule = fully_shard(module, mesh=mesh)
        sharded.set_gradient_divide_factor(1)
        sharded.set_force_sum_reduction_for_comms(True)  # gloo has no other, and a factor of 1 needs none
    return sharded


@contextmanager
def gathered_root(root: FSDPModule) -> Iterator[None]:
    """Embedding, output and final norm are whole for a while, so that blocks and they may be called by themselves."""
    root.unshard()
    try:
        yield
    finally:
        root.reshard()

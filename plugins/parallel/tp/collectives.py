"""Collectives of one stage over torch.distributed: NCCL between GPUs, gloo elsewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import distributed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from core.plan import Plan


class DistributedTensorParallel:
    """Fulfils `core.interfaces.TensorParallel`.

    :param ranks: of the stage, in the numbering of torch.distributed's world.
    """

    def __init__(self, group: distributed.ProcessGroup, ranks: Sequence[int], rank: int) -> None:
        self.size = len(ranks)
        self.rank = rank
        self._group = group
        self._first = ranks[0]

    def all_reduce(self, tensor: torch.Tensor, /) -> torch.Tensor:
        """Sum over the ranks, in place where the tensor is contiguous."""
        tensor = tensor.contiguous()
        distributed.all_reduce(tensor, group=self._group)
        return tensor

    def gather(self, tensor: torch.Tensor, sizes: Sequence[int], /) -> torch.Tensor:
        """Join the ranks' parts along the last dimension, on every rank.

        Parts may differ in size, which collectives do not allow: all are padded to the largest.
        """
        width = max(sizes)
        padded = tensor.new_zeros((*tensor.shape[:-1], width))
        padded[..., : tensor.shape[-1]] = tensor
        parts = [torch.empty_like(padded) for _ in sizes]
        distributed.all_gather(parts, padded, group=self._group)
        return torch.cat([part[..., :size] for part, size in zip(parts, sizes, strict=True)], dim=-1)

    def broadcast(self, tensor: torch.Tensor, /) -> torch.Tensor:
        """Give all ranks what rank 0 has, in place."""
        distributed.broadcast(tensor, src=self._first, group=self._group)
        return tensor


def join_stage(plan: Plan, rank: int) -> DistributedTensorParallel:
    """Make the groups of all stages, as torch wants it of every rank, and return this rank's."""
    size = plan.tensor_parallel_size
    joined: DistributedTensorParallel | None = None
    for first in range(0, plan.world_size, size):
        ranks = list(range(first, first + size))
        group = distributed.new_group(ranks)
        if rank in ranks:
            joined = DistributedTensorParallel(group, ranks, rank - first)
    if joined is None:
        raise ValueError(f"rank {rank} is not among the {plan.world_size} ranks of the plan")
    return joined

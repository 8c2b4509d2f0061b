"""What joins ranks, with one mistake each; in a module of its own, because ranks import it."""

from __future__ import annotations

import os

import torch
from torch import distributed

from core.testing.collectives import judge
from plugins.parallel.pp.transport import DistributedPipeline
from plugins.parallel.tp.collectives import DistributedTensorParallel, join_stage


class Wrong(DistributedTensorParallel):
    """Made of a right one."""

    @classmethod
    def make(cls, plan, rank):
        right = join_stage(plan, rank)
        first = rank - right.rank
        return cls(right._group, range(first, first + right.size), right.rank)


class Averages(Wrong):
    def all_reduce(self, tensor, /):
        return super().all_reduce(tensor) / self.size


class SumsOverAllStages(Wrong):
    def all_reduce(self, tensor, /):
        tensor = tensor.contiguous()
        distributed.all_reduce(tensor)
        return tensor


class RoundsOnOneRank(Wrong):
    def all_reduce(self, tensor, /):
        total = super().all_reduce(tensor)
        return total * (1 + 2**-23) if self.rank else total


class TakesOnlyContiguous(Wrong):
    def all_reduce(self, tensor, /):
        distributed.all_reduce(tensor.view(-1), group=self._group)
        return tensor


class GathersBackwards(Wrong):
    def gather(self, tensor, sizes, /):
        parts = super().gather(tensor, sizes).split(list(sizes), -1)
        return torch.cat(parts[::-1], -1)


class GathersPadding(Wrong):
    def gather(self, tensor, sizes, /):
        return super().gather(
            torch.nn.functional.pad(tensor, (0, max(sizes) - tensor.shape[-1])),
            [max(sizes)] * len(sizes),
        )


class BroadcastsFromTheLast(Wrong):
    def broadcast(self, tensor, /):
        distributed.broadcast(tensor, src=self._first + self.size - 1, group=self._group)
        return tensor


class BroadcastsACopy(Wrong):
    def broadcast(self, tensor, /):
        return super().broadcast(tensor.clone())


class ReusesItsBuffer(Wrong):
    buffer = torch.empty(0)

    def all_reduce(self, tensor, /):
        total = super().all_reduce(tensor)
        if self.buffer.dtype != total.dtype or self.buffer.numel() < total.numel():
            self.buffer = torch.empty(max(total.numel(), 10_000), dtype=total.dtype)
        return self.buffer[: total.numel()].view(total.shape).copy_(total)


class CountsAllRanks(Wrong):
    @classmethod
    def make(cls, plan, rank):
        link = super().make(plan, rank)
        link.rank = rank
        return link


WRONG_LINKS = {
    Averages: "all_reduce_sums",
    SumsOverAllStages: "all_reduce_sums",
    RoundsOnOneRank: "all_reduce_agrees",
    TakesOnlyContiguous: "all_reduce_takes_strided",
    GathersBackwards: "gather_joins_uneven_parts",
    GathersPadding: "gather_joins_uneven_parts",
    BroadcastsFromTheLast: "broadcast_gives_what_rank_0_has",
    BroadcastsACopy: "broadcast_gives_what_rank_0_has",
    ReusesItsBuffer: "results_stay_as_they_are",
    CountsAllRanks: "knows_its_place",
}
"""By kind: the law that must catch it."""


class WrongPipeline(DistributedPipeline):
    @classmethod
    def make(cls, plan, rank):
        return cls(plan.pipeline_parallel_size, plan.tensor_parallel_size, rank)


class LeavesTheGivenTensor(WrongPipeline):
    def recv(self, tensor, /):
        return super().recv(tensor.clone())


class ForgetsWhatItSends(WrongPipeline):
    def send(self, tensor, /):
        super().send(torch.zeros_like(tensor))


class CrossesRanks(WrongPipeline):
    """Rank 0 of a stage is joined to rank 1 of the next."""

    def __init__(self, num_stages, ranks_per_stage, rank):
        super().__init__(num_stages, ranks_per_stage, rank)
        if self.stage:
            self._previous = ranks_per_stage * self.stage - 1 - rank % ranks_per_stage
        else:
            self._next = 2 * ranks_per_stage - 1 - rank


WRONG_PIPELINES = {
    LeavesTheGivenTensor: "streams_arrive_in_order",
    ForgetsWhatItSends: "strided_streams_arrive",
    CrossesRanks: "streams_arrive_in_order",
}


def judge_all(rank, kinds, laws, sizes):
    """Judge every kind on the same ranks, so that they start once."""
    return {kind.__name__: judge(rank, kind.make, laws, sizes, "cpu") for kind in kinds}


# --- for tests of ranks as such ----------------------------------------------------------------------


def tell(rank, text):
    return f"{text} {rank} of {distributed.get_world_size()}"


def fail_on(rank, culprit):
    if rank == culprit:
        raise ValueError("no such thing")
    distributed.barrier()


def die_on(rank, culprit):
    if rank == culprit:
        os._exit(3)
    distributed.barrier()

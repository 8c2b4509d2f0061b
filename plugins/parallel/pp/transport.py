"""The stream between stages, over torch.distributed."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from torch import distributed

if TYPE_CHECKING:
    import torch


class DistributedPipeline:
    """Fulfils `core.interfaces.PipelineParallel`.

    Each rank is joined to the rank of the same number in the neighbouring stages; both ends know the
    stream's shape from the step, so nothing but the stream is sent.
    """

    def __init__(self, num_stages: int, ranks_per_stage: int, rank: int) -> None:
        self.size = num_stages
        self.stage = rank // ranks_per_stage
        self._previous = rank - ranks_per_stage
        self._next = rank + ranks_per_stage
        self._sending: deque[tuple[distributed.Work, torch.Tensor]] = deque()

    def send(self, tensor: torch.Tensor, /) -> None:
        """Start to send; the tensor is kept until it has left."""
        while self._sending and self._sending[0][0].is_completed():
            self._sending.popleft()
        tensor = tensor.contiguous()
        work = distributed.isend(tensor, dst=self._next)
        if work is not None:
            self._sending.append((work, tensor))

    def recv(self, tensor: torch.Tensor, /) -> torch.Tensor:
        """Take the stream of the previous stage into `tensor`."""
        distributed.recv(tensor, src=self._previous)
        return tensor

"""StepPlan -> device tensors, from state that stays on the device.

Every row of the batch keeps its tokens and its block table on the device.  A plan brings only what
is new: the tokens of requests that enter, the blocks that were appended, and three small lists of
integers.  A token drawn in one step is written into its row by the device itself, so the next step
can be launched before the host has seen it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from core.step import StepPlan


@dataclass(slots=True)
class StepBatch:
    """The device inputs of one step.

    T tokens of S scheduled rows, row by row; rows that decode (one token each) come first.
    The lists are the host's copies, so that no backend needs to synchronise to learn a length.
    """

    num_tokens: int
    num_rows: int
    num_decodes: int
    token_ids: torch.Tensor
    """[T] int64."""
    positions: torch.Tensor
    """[T] int64, within the sequence."""
    slots: torch.Tensor
    """[T] int64: block id · block_size + offset, where the token's key and value are stored."""
    rows: torch.Tensor
    """[S] int64, rows of the persistent state."""
    query_starts: torch.Tensor
    """[S + 1] int32, offsets into the T tokens."""
    seq_lens: torch.Tensor
    """[S] int32, positions after this step: starts + counts."""
    block_tables: torch.Tensor
    """[S, max_blocks] int32, padded with the null block; wide enough for the longest sequence."""
    starts: list[int]
    counts: list[int]


class BatchState:
    """The persistent rows of one rank.

    :param max_rows: R, rows of the batch.
    :param max_model_len: L, most tokens of one sequence.
    """

    def __init__(
        self, max_rows: int, max_model_len: int, block_size: int, device: torch.device
    ) -> None:
        self.block_size = block_size
        self.device = device
        max_blocks = -(-max_model_len // block_size)
        # One column more: the token drawn at the last position is stored, though never fed back.
        self.tokens = torch.zeros(max_rows, max_model_len + 1, dtype=torch.int32, device=device)
        self.block_tables = torch.zeros(max_rows, max_blocks, dtype=torch.int32, device=device)

    def update(self, plan: StepPlan) -> None:
        """Enter the tokens and blocks that a plan brings: one small copy for each of the two."""
        width = self.tokens.shape[1]
        indices: list[int] = []
        values: list[int] = []
        for entry in plan.added:
            first = entry.row * width
            indices.extend(range(first, first + len(entry.token_ids)))
            values.extend(entry.token_ids)
        self._scatter(self.tokens, indices, values)
        if plan.added:  # what the row's former request left behind its end becomes padding
            added = self._to_device([entry.row for entry in plan.added], torch.int64)
            self.block_tables.index_fill_(0, added, 0)
        width = self.block_tables.shape[1]
        indices, values = [], []
        for append in plan.appended:
            first = append.row * width + append.start
            indices.extend(range(first, first + len(append.block_ids)))
            values.extend(append.block_ids)
        self._scatter(self.block_tables, indices, values)

    def make_batch(self, plan: StepPlan) -> StepBatch:
        """Gather the inputs of one step.  Call `update` first."""
        num_tokens, num_rows = plan.num_tokens, len(plan.rows)
        ends = [start + count for start, count in zip(plan.starts, plan.counts, strict=True)]
        lists = self._to_device([plan.rows, plan.starts, plan.counts, ends], torch.int64)
        rows, starts, counts, seq_lens = lists.unbind()
        query_starts = torch.zeros(num_rows + 1, dtype=torch.int64, device=self.device)
        torch.cumsum(counts, 0, out=query_starts[1:])
        # Row and position of each token: position = start + (index - index of the row's first).
        index = torch.arange(num_rows, device=self.device).repeat_interleave(
            counts, output_size=num_tokens
        )
        offsets = starts - query_starts[:-1]
        positions = torch.arange(num_tokens, device=self.device) + offsets[index]
        token_rows = rows[index]
        blocks = self.block_tables[token_rows, positions // self.block_size].long()
        max_blocks = -(-max(ends) // self.block_size)
        return StepBatch(
            num_tokens=num_tokens,
            num_rows=num_rows,
            num_decodes=plan.num_decodes,
            token_ids=self.tokens[token_rows, positions].long(),
            positions=positions,
            slots=blocks * self.block_size + positions % self.block_size,
            rows=rows,
            query_starts=query_starts.int(),
            seq_lens=seq_lens.int(),
            block_tables=self.block_tables[rows, :max_blocks],
            starts=plan.starts,
            counts=plan.counts,
        )

    def store(self, rows: torch.Tensor, positions: torch.Tensor, tokens: torch.Tensor) -> None:
        """Write drawn tokens into their rows: three [N] int64 tensors on the device.

        A row that failed drew a negative number; a later step that is already planned may still
        read it, so it is stored as token 0.
        """
        self.tokens[rows, positions] = tokens.clamp(min=0).int()

    def _scatter(self, target: torch.Tensor, indices: list[int], values: list[int]) -> None:
        if indices:
            packed = self._to_device([indices, values], torch.int64)
            target.view(-1)[packed[0]] = packed[1].int()

    def _to_device(self, values: Any, dtype: torch.dtype) -> torch.Tensor:
        host = torch.tensor(values, dtype=dtype)
        if self.device.type == "cpu":
            return host
        return host.pin_memory().to(self.device, non_blocking=True)

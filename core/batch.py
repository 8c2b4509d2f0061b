"""StepPlan -> device tensors, from state that stays on the device.

Every row of the batch keeps its tokens and its block table on the device.  A plan brings only what
is new: the tokens of requests that enter, the blocks that were appended, and for the step itself one
array of integers, which says where in that state each input lies.  A token drawn in one step is
written into its row by the device itself, so the next step can be launched before the host has seen
it.

The inputs of a step are views of one buffer.  A captured step keeps its buffer, and a replay reads
what has been copied there since; the state has one row more than the batch, for padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from core.step import StepPlan


@dataclass(slots=True)
class StepBatch:
    """The device inputs of one step.

    T tokens of S scheduled rows, row by row; rows that decode (one token each) come first.
    The lists are the host's copies, so that no backend needs to synchronise to learn a length.

    In a step that is being captured, T and S are what the graph has room for; the lists are empty, and
    the tensors are filled anew before each replay.  See `core.interfaces.SupportsCudaGraph` for padding.
    """

    num_tokens: int
    num_rows: int
    num_decodes: int
    """At least so many rows decode; exactly so many in a step that is not captured."""
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


class StepShape(NamedTuple):
    """What the buffer of a step has room for."""

    num_tokens: int
    num_rows: int
    num_draws: int
    """Rows that draw a token."""

    @property
    def is_decode(self) -> bool:
        """Whether every row has one token and draws."""
        return self.num_tokens == self.num_rows == self.num_draws

    @property
    def num_words(self) -> int:
        """Of eight bytes, in the buffer."""
        return sum(_round_up(size, 2) for size in self._sizes)

    @property
    def _sizes(self) -> tuple[int, ...]:
        """Words of each field; the last two are of half the size."""
        tokens, rows, draws = self
        return (*[tokens] * 4, rows, *[draws] * 3, _round_up(rows + 1, 2) // 2, _round_up(rows, 2) // 2)


def _round_up(size: int, step: int) -> int:
    return -(-size // step) * step


class _Fields(NamedTuple):
    """The buffer's parts, as tensors on the device or as arrays on the host; int64 up to the last two."""

    positions: Any
    offsets: Any
    """[T], within the token's block."""
    token_index: Any
    """[T], into the tokens of all rows."""
    block_index: Any
    """[T], into the block tables of all rows."""
    rows: Any
    draw_tokens: Any
    """[N], which of the T tokens a drawing row's last one is."""
    draw_rows: Any
    draw_positions: Any
    """[N], of the token that is drawn."""
    query_starts: Any
    seq_lens: Any


def _split(words: Any, integers: Any, shape: StepShape) -> _Fields:
    """Cut a buffer up.

    :param words: the buffer as int64.
    :param integers: the same memory as int32.
    """
    parts, first = [], 0
    # Every field begins at a multiple of 16 bytes: kernels are compiled for that, and anew without.
    for size in shape._sizes:  # noqa: SLF001  of this module
        parts.append((first, size))
        first += _round_up(size, 2)
    *wide, starts, lens = parts
    fields = [words[start : start + size] for start, size in wide]
    fields.append(integers[2 * starts[0] :][: shape.num_rows + 1])
    fields.append(integers[2 * lens[0] :][: shape.num_rows])
    return _Fields._make(fields)


class Draws(NamedTuple):
    """The N rows of a step that draw a token."""

    tokens: torch.Tensor | None
    """[N] int64, which of the T tokens each row's last one is; `None`: all of them, in order."""
    rows: torch.Tensor
    """[N] int64."""
    positions: torch.Tensor
    """[N] int64, of the token that is drawn."""

    def first(self, count: int) -> Draws:
        """Leave the padding away."""
        tokens = None if self.tokens is None else self.tokens[:count]
        return Draws(tokens, self.rows[:count], self.positions[:count])


class StepInputs:
    """The buffer of a step, and what is read from it.

    :param shape: how much it has room for.
    """

    def __init__(self, shape: StepShape, device: torch.device) -> None:
        self.shape = shape
        self._buffer = torch.zeros(shape.num_words, dtype=torch.int64, device=device)
        self.fields = _split(self._buffer, self._buffer.view(torch.int32), shape)

    def upload(self, host: torch.Tensor) -> None:
        """Copy what `BatchState.describe` made, in order with what runs on the device."""
        self._buffer.copy_(host, non_blocking=True)

    @property
    def draws(self) -> Draws:
        """The rows that draw, padding included."""
        fields = self.fields
        tokens = None if self.shape.is_decode else fields.draw_tokens
        return Draws(tokens, fields.draw_rows, fields.draw_positions)


class BatchState:
    """The persistent rows of one rank.

    :param max_rows: R, rows of the batch; row R is for padding.
    :param max_model_len: L, most tokens of one sequence.
    """

    def __init__(
        self, max_rows: int, max_model_len: int, block_size: int, device: torch.device
    ) -> None:
        self.block_size = block_size
        self.device = device
        self._padding_row = max_rows
        max_blocks = -(-max_model_len // block_size)
        # One column more: the token drawn at the last position is stored, though never fed back.
        shapes = [(max_rows + 1, max_model_len + 1), (max_rows + 1, max_blocks)]
        first, second = (rows * columns for rows, columns in shapes)
        # In one piece, so that a single scatter enters whatever a plan brings.
        self._words = torch.zeros(first + second, dtype=torch.int32, device=device)
        self.tokens, self.block_tables = (
            part.view(shape)
            for part, shape in zip(self._words.split([first, second]), shapes, strict=True)
        )
        self._num_blocks = [0] * (max_rows + 1)
        """Of each row, that are or were its own."""

    def update(self, plan: StepPlan) -> None:
        """Enter the tokens and blocks that a plan brings."""
        width, max_blocks = self.tokens.shape[1], self.block_tables.shape[1]
        first_table = self.tokens.numel()
        runs, former = [], {}
        for entry in plan.added:
            runs.append((entry.row * width, entry.token_ids))
            former[entry.row] = self._num_blocks[entry.row]
            self._num_blocks[entry.row] = 0
        for append in plan.appended:
            runs.append((first_table + append.row * max_blocks + append.start, append.block_ids))
            self._num_blocks[append.row] = append.start + len(append.block_ids)
        for row, count in former.items():
            # What the row's former request left behind its end becomes padding.
            end = self._num_blocks[row]
            runs.append((first_table + row * max_blocks + end, [0] * (count - end)))
        self._scatter(runs)

    def describe(self, plan: StepPlan, shape: StepShape) -> torch.Tensor:
        """Say on the host where a step's inputs lie, padded to a shape.

        :return: what `StepInputs.upload` takes, pinned for a GPU.
        """
        host = torch.zeros(shape.num_words, dtype=torch.int64, pin_memory=self.device.type == "cuda")
        words = host.numpy()
        fields = _split(words, words.view(np.int32), shape)
        rows, starts, counts = (np.array(x) for x in (plan.rows, plan.starts, plan.counts))
        num_rows = len(rows)
        ends = starts + counts
        fields.rows[:num_rows] = rows
        fields.rows[num_rows:] = self._padding_row
        fields.seq_lens[:num_rows] = ends
        if shape.is_decode:
            token_rows, positions = rows, starts
            fields.query_starts[:] = np.arange(shape.num_rows + 1)
            drawing = np.arange(num_rows)
        else:
            firsts = np.zeros(num_rows + 1, dtype=np.int64)
            np.cumsum(counts, out=firsts[1:])
            token_rows = np.repeat(rows, counts)
            positions = np.arange(firsts[-1]) + np.repeat(starts - firsts[:-1], counts)
            fields.query_starts[: num_rows + 1] = firsts
            fields.query_starts[num_rows + 1 :] = firsts[-1]
            drawing = np.flatnonzero(plan.samples)
            fields.draw_tokens[: len(drawing)] = firsts[1:][drawing] - 1
        self._locate(fields, token_rows, positions)
        num_draws = len(drawing)
        fields.draw_rows[:num_draws] = rows[drawing]
        fields.draw_rows[num_draws:] = self._padding_row
        fields.draw_positions[:num_draws] = ends[drawing]
        return host

    def _locate(self, fields: _Fields, token_rows: NDArray[Any], positions: NDArray[Any]) -> None:
        """Say where each token lies, and where its key and value go; padding is in the last row."""
        num_tokens = len(positions)
        blocks, offsets = np.divmod(positions, self.block_size)
        fields.positions[:num_tokens] = positions
        fields.offsets[:num_tokens] = offsets
        fields.token_index[:] = self._padding_row * self.tokens.shape[1]
        fields.token_index[:num_tokens] = token_rows * self.tokens.shape[1] + positions
        fields.block_index[:] = self._padding_row * self.block_tables.shape[1]
        fields.block_index[:num_tokens] = token_rows * self.block_tables.shape[1] + blocks

    def make_batch(self, inputs: StepInputs, plan: StepPlan | None = None) -> StepBatch:
        """Gather the inputs of one step on the device.  Call `update` and `upload` first.

        :param plan: of a step that is run as it is, without padding; `None` while one is captured.
        """
        fields, shape = inputs.fields, inputs.shape
        tables = self.block_tables
        blocks = tables.view(-1).index_select(0, fields.block_index)
        if plan is not None:
            longest = max(map(sum, zip(plan.starts, plan.counts, strict=True)))
            tables = tables[:, : -(-longest // self.block_size)]
        num_decodes = shape.num_rows if shape.is_decode else 0
        return StepBatch(
            num_tokens=shape.num_tokens,
            num_rows=shape.num_rows,
            num_decodes=num_decodes if plan is None else plan.num_decodes,
            token_ids=self.tokens.view(-1).index_select(0, fields.token_index).long(),
            positions=fields.positions,
            slots=torch.add(fields.offsets, blocks, alpha=self.block_size),
            rows=fields.rows,
            query_starts=fields.query_starts,
            seq_lens=fields.seq_lens,
            block_tables=tables.index_select(0, fields.rows),
            starts=plan.starts if plan else [],
            counts=plan.counts if plan else [],
        )

    def store(self, rows: torch.Tensor, positions: torch.Tensor, tokens: torch.Tensor) -> None:
        """Write drawn tokens into their rows: three [N] int64 tensors on the device.

        A row that failed drew a negative number; a later step that is already planned may still
        read it, so it is stored as token 0.
        """
        index = torch.add(positions, rows, alpha=self.tokens.shape[1])
        self.tokens.view(-1)[index] = tokens.clamp(min=0).int()

    def _scatter(self, runs: Sequence[tuple[int, list[int]]]) -> None:
        """Write runs of numbers, each given by its first place: one small copy for all."""
        lengths = [len(values) for _, values in runs]
        total = sum(lengths)
        if not total:
            return
        packed = torch.empty(3 * total, dtype=torch.int32, pin_memory=self.device.type == "cuda")
        words = packed.numpy()
        ends = np.cumsum(lengths)
        places = np.arange(total)
        places += np.repeat(np.array([first for first, _ in runs]) - (ends - lengths), lengths)
        words[: 2 * total].view(np.int64)[:] = places
        for (_, values), end in zip(runs, ends, strict=True):
            words[2 * total + end - len(values) : 2 * total + end] = values
        packed = packed.to(self.device, non_blocking=True)
        self._words.scatter_(0, packed[: 2 * total].view(torch.int64), packed[2 * total :])

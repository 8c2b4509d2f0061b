"""The sampler: kernels for rows that ask for nothing but chance, plain torch for the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
import triton

from core.sampling import (
    INT_COLUMNS,
    REAL_COLUMNS,
    Sampled,
    SampleRows,
    Stage,
    TorchSampler,
    gather_logprobs,
)
from core.step import BAD_LOGITS
from plugins.sampler.triton.kernels import find_likeliest, race

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

KERNEL_STAGES: Final = Stage.RANDOM | Stage.LOGPROBS
"""Rows that want no other are drawn by the kernels; log-probabilities do not change what is drawn."""
KERNEL_DTYPES: Final = (torch.bfloat16, torch.float16, torch.float32)
GATHERED_ROWS: Final = 64
"""Rows whose logits are copied at a time because they need torch and others of the step do not."""
MAX_LAUNCH_ROWS: Final = 65535
"""CUDA's limit for the second dimension of a grid."""


COLUMNS: Final = (
    REAL_COLUMNS.index("temperature"),
    INT_COLUMNS.index("seed"),
    INT_COLUMNS.index("stages"),
)
"""What `race` reads of the tables of parameters."""


@dataclass(frozen=True, slots=True)
class Cut:
    """How a kernel cuts the vocabulary."""

    block: int
    """Tokens of a tile."""
    num_warps: int
    num_programs: int
    """Of a grid, unless the rows alone are more."""

    def divide(self, num_rows: int, vocab_size: int) -> tuple[int, int]:
        """Choose the parts of a row, and the tiles of a part."""
        num_tiles = triton.cdiv(vocab_size, self.block)
        part_tiles = triton.cdiv(num_tiles, min(max(self.num_programs // num_rows, 1), num_tiles))
        return triton.cdiv(num_tiles, part_tiles), part_tiles

    def max_parts(self, vocab_size: int) -> int:
        """Bound the parts of a row by a power of two."""
        limit: int = triton.next_power_of_2(triton.cdiv(vocab_size, self.block))
        return limit


@dataclass(frozen=True, slots=True)
class Tuning:
    """Of both kernels."""

    likeliest: Cut
    race: Cut

    @property
    def num_programs(self) -> int:
        """Of a grid, unless the rows alone are more."""
        return max(self.likeliest.num_programs, self.race.num_programs)


FOR_INTERPRETER: Final = Tuning(Cut(1024, 1, 6), Cut(1024, 1, 6))
"""Few programs, as they run one after another."""


@dataclass(frozen=True, slots=True)
class Workspace:
    """What programs leave for one another, for launches of up to `max_rows` rows."""

    max_rows: int
    values: torch.Tensor
    """float32, of each part of each row."""
    ids: torch.Tensor
    """int32, of the same."""
    bests: torch.Tensor
    """[max_rows] float32."""
    arrivals: torch.Tensor
    """[max_rows] int32; 0 between launches."""


class TritonSampler(TorchSampler):
    """Draws as `TorchSampler` does, with one launch or two where a row wants nothing but chance.

    Which way a row goes depends on its own parameters alone, so that what it draws does not depend on
    the rows beside it.

    :param dtype: of the logits, if known: then `allocate` compiles, so that no graph has to.
    :param tuning: instead of what suits the card.
    """

    _tuning: Tuning
    _workspace: Workspace

    def __init__(self, dtype: str | None = None, tuning: Tuning | None = None) -> None:
        self._dtype = None if dtype is None else getattr(torch, dtype)
        self._wanted_tuning = tuning
        self._has_pdl = False

    def memory_bytes(self, max_rows: int, vocab_size: int, device: torch.device, /) -> int:
        """Bound what this sampler may ever allocate, lazy matrices and workspace included."""
        tuning = self._wanted_tuning or choose_tuning(device)
        num_cells = max(tuning.num_programs, max_rows)
        gathered = min(GATHERED_ROWS, max_rows) * vocab_size * 4
        workspace = num_cells * 8 + max_rows * 8
        return super().memory_bytes(max_rows, vocab_size, device) + gathered + workspace

    @torch.inference_mode()
    def allocate(
        self, max_rows: int, vocab_size: int, max_model_len: int, device: torch.device, /
    ) -> None:
        """Allocate the state of all rows and the workspace, or allocate them anew."""
        super().allocate(max_rows, vocab_size, max_model_len, device)
        self._tuning = self._wanted_tuning or choose_tuning(device)
        self._has_pdl = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
        self._workspace = _make_workspace(min(max_rows, MAX_LAUNCH_ROWS), self._tuning, device)
        if self._dtype in KERNEL_DTYPES and device.type == "cuda":
            zero = torch.zeros(1, dtype=torch.int64, device=device)
            logits = torch.zeros((1, vocab_size), dtype=self._dtype, device=device)
            self._draw_with_kernels(logits, SampleRows(zero, zero, ()), is_random=True)

    @torch.inference_mode()
    def sample(self, logits: torch.Tensor, rows: SampleRows, /) -> Sampled:
        """Draw one token per row; see `TorchSampler`."""
        stages = self.state.stages(rows.row_list)
        others = self._rows_for_torch(rows.row_list) if stages & ~KERNEL_STAGES else []
        if others and len(others) == len(rows.row_list):
            return super().sample(logits, rows)
        tokens = self._draw_with_kernels(logits, rows, is_random=Stage.RANDOM in stages)
        for first in range(0, len(others), GATHERED_ROWS):
            self._draw_with_torch(logits, rows, others[first : first + GATHERED_ROWS], tokens)
        num_top = self.state.num_logprobs(rows.row_list)
        if num_top < 0:
            return Sampled(tokens)
        return Sampled(tokens, gather_logprobs(logits, tokens.clamp(min=0), num_top))

    def capture_keys(self) -> list[Hashable]:
        """List the keys that are worth capturing beforehand: one for greedy and random rows alike."""
        return [Stage.RANDOM]

    def capture_key(self, row_list: Sequence[int], /) -> Hashable | None:
        """Return what these rows want of torch, if none of it reads state that may move."""
        key = super().capture_key(row_list)
        return Stage.RANDOM if key == Stage(0) else key

    def sample_captured(self, logits: torch.Tensor, rows: SampleRows, key: Hashable, /) -> torch.Tensor:
        """Draw as `sample` does for rows with that key.

        :raises TypeError: this is no key of `capture_key`.
        """
        if key == Stage.RANDOM:
            return self._draw_with_kernels(logits, rows, is_random=True)
        by_torch = super().sample_captured(logits, rows, key)
        tokens = self._draw_with_kernels(logits, rows, is_random=True)
        stages = self.state.params(rows.rows).stages.squeeze(1)
        return torch.where(stages & ~int(KERNEL_STAGES) != 0, by_torch, tokens)

    # --- the two ways ---

    def _rows_for_torch(self, row_list: Sequence[int]) -> list[int]:
        """List which of the rows of a step the kernels cannot draw for."""
        return [
            index for index, row in enumerate(row_list) if self.state.stages([row]) & ~KERNEL_STAGES
        ]

    def _draw_with_torch(
        self, logits: torch.Tensor, rows: SampleRows, chosen: Sequence[int], tokens: torch.Tensor
    ) -> None:
        """Draw for some rows of a step, into their places in `tokens`."""
        index = torch.tensor(chosen).to(logits.device, non_blocking=True)
        part = SampleRows(
            rows.rows.index_select(0, index),
            rows.positions.index_select(0, index),
            [rows.row_list[i] for i in chosen],
        )
        # Draws and counts with any stages, and leaves log-probabilities for later.
        stages = self.state.stages(part.row_list)
        drawn = super().sample_captured(logits.index_select(0, index), part, stages)
        tokens.index_copy_(0, index, drawn)

    def _draw_with_kernels(
        self, logits: torch.Tensor, rows: SampleRows, *, is_random: bool
    ) -> torch.Tensor:
        """Draw for all rows; what comes out for those that want more means nothing.

        :param is_random: whether any row may want chance.
        """
        if logits.dtype not in KERNEL_DTYPES or logits.stride(1) != 1:
            logits = logits.float().contiguous()
        tokens = torch.empty_like(rows.rows)
        size = self._workspace.max_rows
        for first in range(0, len(logits), size):
            part = slice(first, first + size)
            self._launch(logits[part], rows.part(part), tokens[part], is_random=is_random)
        return tokens

    def _launch(
        self, logits: torch.Tensor, rows: SampleRows, tokens: torch.Tensor, *, is_random: bool
    ) -> None:
        num_rows, vocab_size = logits.shape
        stride, workspace, pdl = logits.stride(0), self._workspace, self._has_pdl
        shared = (workspace.values, workspace.ids, workspace.arrivals, workspace.bests, tokens)
        cut = self._tuning.likeliest
        num_parts, part_tiles = cut.divide(num_rows, vocab_size)
        find_likeliest[num_parts, num_rows](
            logits, *shared, stride, num_parts, part_tiles,
            vocab_size, cut.block, cut.max_parts(vocab_size), BAD_LOGITS, pdl,
            num_warps=cut.num_warps, launch_pdl=pdl,
        )  # fmt: skip
        if not is_random:
            return
        state, cut = self.state, self._tuning.race
        num_parts, part_tiles = cut.divide(num_rows, vocab_size)
        race[num_parts, num_rows](
            logits, rows.rows, rows.positions, state.reals, state.ints, *shared,
            stride, num_parts, part_tiles,
            len(REAL_COLUMNS), len(INT_COLUMNS), *COLUMNS, int(Stage.RANDOM), int(Stage.LOGPROBS),
            vocab_size, cut.block, cut.max_parts(vocab_size), BAD_LOGITS, pdl,
            num_warps=cut.num_warps, launch_pdl=pdl,
        )  # fmt: skip


def choose_tuning(device: torch.device) -> Tuning:
    """Choose for a card; what is not CUDA is Triton's interpreter."""
    if device.type != "cuda":
        return FOR_INTERPRETER
    properties: Any = torch.cuda.get_device_properties(device)
    num_sms = properties.multi_processor_count
    return Tuning(Cut(2048, 4, 16 * num_sms), Cut(1024, 4, 16 * num_sms))


def _make_workspace(max_rows: int, tuning: Tuning, device: torch.device) -> Workspace:
    num_cells = max(max_rows, tuning.num_programs)
    return Workspace(
        max_rows,
        torch.empty(num_cells, dtype=torch.float32, device=device),
        torch.empty(num_cells, dtype=torch.int32, device=device),
        torch.empty(max_rows, dtype=torch.float32, device=device),
        torch.zeros(max_rows, dtype=torch.int32, device=device),
    )

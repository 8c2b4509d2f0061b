"""Where the rows of a step have their pages, in the form that FlashInfer's wrappers take.

The library describes ragged rows as offsets into one flat list of pages.  Lengths come from the host's
lists, since it plans on the host; which blocks the pages are is known on the device alone, and stays there.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from core.batch import StepBatch


@dataclass(frozen=True, slots=True)
class Rows:
    """Some rows of a step that one kernel takes.  All but `pages` lies on the host, pinned for a GPU."""

    tokens: slice
    """Their tokens in the step."""
    query_starts: torch.Tensor
    """[R + 1] int32, offsets into these tokens."""
    page_starts: torch.Tensor
    """[R + 1] int32, offsets into `pages`."""
    last_lens: torch.Tensor
    """[R] int32, positions in each row's last page, 1 to the block size."""
    longest: int
    """Most tokens of one row."""
    pages: torch.Tensor
    """[P] int32 on the device, blocks of all rows in order."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Where the tokens of a step are stored, on the device."""

    rows: torch.Tensor
    """[T] int32, the row of each token."""
    positions: torch.Tensor
    """[T] int32."""
    page_starts: torch.Tensor
    """[S + 1] int32, offsets into `pages`."""
    last_lens: torch.Tensor
    """[S] int32, positions in each row's last page after this step."""
    pages: torch.Tensor
    """[P] int32, blocks of all rows in order."""


@dataclass(frozen=True, slots=True)
class Layout:
    """The pages of a step."""

    placement: Placement
    decodes: Rows | None
    """Rows with one token, which come first."""
    prompts: Rows | None
    """Rows with several."""


def lay_out(batch: StepBatch, block_size: int) -> Layout:
    """Describe the pages of a step, without waiting for the device."""
    device = batch.block_tables.device
    counts = np.array(batch.counts, dtype=np.int64)
    ends = np.array(batch.starts, dtype=np.int64) + counts
    num_pages = -(-ends // block_size)
    page_starts, query_starts = _offsets(num_pages), _offsets(counts)
    num_rows, width = batch.block_tables.shape
    first_places = np.arange(num_rows) * width - page_starts[:-1]
    places = np.repeat(first_places, num_pages) + np.arange(page_starts[-1])
    parts = {
        "page_starts": page_starts,
        "last_lens": ends - (num_pages - 1) * block_size,
        "rows": np.repeat(np.arange(num_rows), counts),
        "places": places,
    }
    # One copy for all: each would cost the host as much as a launch.
    packed = np.concatenate(list(parts.values())).astype(np.int32)
    bounds = _offsets(np.array([len(part) for part in parts.values()]))
    uploaded = _upload(packed, device)
    fields = {
        name: uploaded[first:last] for name, (first, last) in zip(parts, pairwise(bounds), strict=True)
    }
    pages = batch.block_tables.reshape(-1).index_select(0, fields.pop("places"))
    cut = batch.num_decodes

    def rows(first: int, last: int) -> Rows | None:
        if first == last:
            return None
        starts = query_starts[first : last + 1]
        return Rows(
            tokens=slice(int(starts[0]), int(starts[-1])),
            query_starts=_pinned(starts - starts[0], device),
            page_starts=_pinned(page_starts[first : last + 1] - page_starts[first], device),
            last_lens=_pinned(parts["last_lens"][first:last], device),
            longest=int(counts[first:last].max()),
            pages=pages[int(page_starts[first]) : int(page_starts[last])],
        )

    placement = Placement(positions=batch.positions.int(), pages=pages, **fields)
    return Layout(placement, decodes=rows(0, cut), prompts=rows(cut, num_rows))


def _offsets(sizes: np.ndarray) -> np.ndarray:
    """Sum up: [N] -> [N + 1], from 0 on."""
    return np.concatenate(([0], np.cumsum(sizes)))


def _pinned(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """Bring integers into memory from which they are copied without the host waiting: int32."""
    host = torch.from_numpy(values.astype(np.int32))
    return host.pin_memory() if device.type == "cuda" else host


def _upload(values: np.ndarray, device: torch.device) -> torch.Tensor:
    return _pinned(values, device).to(device, non_blocking=True)

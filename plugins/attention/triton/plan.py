"""Which program attends what: computed on the device once a step, as no length is known to the host.

Work is counted in units (tiles of keys for decodes, blocks of queries for prompts).  `unit_starts` is
the exclusive prefix sum of the rows' units; as many lie in front of each of the G key-value heads of a
row, so that row r, head h begins at unit_starts[r] · G + h · (its units).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def first_tile(seq_len: tl.tensor, window: tl.tensor, BLOCK_N: tl.constexpr) -> tl.tensor:
    """Return the first tile of keys that the last token of a sequence sees."""
    return (seq_len - tl.minimum(seq_len, window)) // BLOCK_N


@triton.jit
def find_rows(unit_starts: tl.tensor, units: tl.tensor, num_rows: tl.tensor) -> tl.tensor:
    """Find the row of each unit: the first whose end lies behind it.

    :param units: [N] int32, in units of one head.
    :return: [N] int32; `num_rows` for units behind the last.
    """
    low = units * 0
    high = low + num_rows
    size = num_rows
    while size > 0:
        middle = (low + high) // 2
        is_open = low < high
        end = tl.load(unit_starts + middle + 1, mask=is_open, other=0)
        low = tl.where(is_open & (end <= units), middle + 1, low)
        high = tl.where(is_open & (end > units), middle, high)
        size = size // 2
    return low


@triton.jit(do_not_specialize=["num_rows", "window"])
def plan_decodes(
    seq_lens: tl.tensor,  # [S] int32
    query_starts: tl.tensor,  # [S + 1] int32
    plan: tl.tensor,  # [S + 1 + NUM_CTAS] int32, written
    num_rows: tl.tensor,
    window: tl.tensor,
    G: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_CTAS: tl.constexpr,
    MIN_TILES: tl.constexpr,
    IS_FUSED: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """Count the tiles of each row with one query, then find the row with which each program begins.

    A row has at least one tile, even if its only key is the one that the program brings itself.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
    total = 0
    for base in range(0, num_rows, BLOCK):
        row = base + tl.arange(0, BLOCK)
        is_row = row < num_rows
        length = tl.load(seq_lens + row, mask=is_row, other=0)
        start = tl.load(query_starts + row, mask=is_row, other=0)
        count = tl.load(query_starts + row + 1, mask=is_row, other=0) - start
        num_keys = length - 1 if IS_FUSED else length
        tiles = tl.cdiv(num_keys, BLOCK_N) - first_tile(length, window, BLOCK_N)
        tiles = tl.where((count == 1) & (length > 0), tl.maximum(tiles, 1), 0)
        tl.store(plan + row + 1, total + tl.cumsum(tiles, 0), mask=is_row)
        total += tl.sum(tiles, 0)
    tl.store(plan, 0)
    tl.debug_barrier()  # other threads read what this one wrote
    chunk = tl.maximum(tl.cdiv(total * G, NUM_CTAS), MIN_TILES)
    for base in range(0, NUM_CTAS, BLOCK):
        cta = base + tl.arange(0, BLOCK)
        row = find_rows(plan, cta * chunk // G, num_rows)
        tl.store(plan + num_rows + 1 + cta, row, mask=cta < NUM_CTAS)


@triton.jit(do_not_specialize=["num_rows", "num_blocks"])
def plan_prompts(
    query_starts: tl.tensor,  # [S + 1] int32
    plan: tl.tensor,  # [S + 1 + num_blocks] int32, written
    num_rows: tl.tensor,
    num_blocks: tl.tensor,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """Count the blocks of queries of each row with several, then find the row of each block.

    :param num_blocks: at least as many as there are.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
    total = 0
    for base in range(0, num_rows, BLOCK):
        row = base + tl.arange(0, BLOCK)
        is_row = row < num_rows
        start = tl.load(query_starts + row, mask=is_row, other=0)
        count = tl.load(query_starts + row + 1, mask=is_row, other=0) - start
        blocks = tl.where(count > 1, tl.cdiv(count, BLOCK_TOKENS), 0)
        tl.store(plan + row + 1, total + tl.cumsum(blocks, 0), mask=is_row)
        total += tl.sum(blocks, 0)
    tl.store(plan, 0)
    tl.debug_barrier()
    for base in range(0, num_blocks, BLOCK):
        block = base + tl.arange(0, BLOCK)
        row = find_rows(plan, block, num_rows)
        tl.store(plan + num_rows + 1 + block, row, mask=block < num_blocks)

"""Several queries of each of some rows: FlashAttention-2 (Dao, 2023) over pages.

A program takes a block of consecutive queries of one row with all query heads of one key-value head, as
the rows of one matrix: each key is read once for all of them.  Keys and values of the step itself were
written to their pages before.  Tiles that every query sees whole come first and need no mask.

The longest blocks come first, so that the last programs to run are short.
"""

from __future__ import annotations

import triton
import triton.language as tl

from plugins.attention.triton.numbers import LOG2_E, LOWEST, cap, widen


@triton.jit(do_not_specialize=["table_stride", "num_rows", "window"])
def prefill(
    q: tl.tensor,  # [T, H, D], rows of q_stride
    out: tl.tensor,  # [T, H, D], written
    k_cache: tl.tensor,  # [num_blocks, G, BLOCK_SIZE, D]
    v_cache: tl.tensor,  # as k_cache
    k_boxes: tl.tensor,  # descriptor of k_cache as [num_blocks · G · BLOCK_SIZE, D], in boxes of BLOCK_N rows
    v_boxes: tl.tensor,  # as k_boxes
    k_scales: tl.tensor,  # [G] float32
    v_scales: tl.tensor,  # [G] float32
    plan: tl.tensor,  # of plan_prompts
    query_starts: tl.tensor,  # [S + 1] int32
    seq_lens: tl.tensor,  # [S] int32
    tables: tl.tensor,  # [S, table_stride] int32
    q_stride: tl.tensor,
    table_stride: tl.tensor,
    num_rows: tl.tensor,
    window: tl.tensor,
    scale: tl.tensor,
    G: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    IS_NARROW: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    HAS_FP8: tl.constexpr,
    HAS_BOXES: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """Attend for every block of queries whose turn it is."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    num_units = tl.load(plan + num_rows) * G
    for unit in tl.range(tl.program_id(0), num_units, tl.num_programs(0)):
        row = tl.load(plan + num_rows + 1 + unit // G)
        row_start = tl.load(plan + row)
        num_blocks = tl.load(plan + row + 1) - row_start
        local = unit - row_start * G
        attend_block(
            q, out, k_cache, v_cache, k_boxes, v_boxes, k_scales, v_scales,
            query_starts, seq_lens, tables + row * table_stride, row,
            local // num_blocks, num_blocks - 1 - local % num_blocks,
            q_stride, window, scale,
            G, GROUP, D, D_PADDED, BLOCK_SIZE, BLOCK_M, BLOCK_N, NUM_STAGES, SOFTCAP,
            HAS_WINDOW, IS_NARROW, HAS_SCALES, HAS_FP8, HAS_BOXES,
        )  # fmt: skip


@triton.jit
def attend_block(
    q: tl.tensor,
    out: tl.tensor,
    k_cache: tl.tensor,
    v_cache: tl.tensor,
    k_boxes: tl.tensor,
    v_boxes: tl.tensor,
    k_scales: tl.tensor,
    v_scales: tl.tensor,
    query_starts: tl.tensor,
    seq_lens: tl.tensor,
    table: tl.tensor,
    row: tl.tensor,
    head: tl.tensor,
    query_block: tl.tensor,
    q_stride: tl.tensor,
    window: tl.tensor,
    scale: tl.tensor,
    G: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    IS_NARROW: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    HAS_FP8: tl.constexpr,
    HAS_BOXES: tl.constexpr,
) -> None:
    """Attend for one block of queries and one key-value head."""
    BLOCK_TOKENS: tl.constexpr = BLOCK_M // GROUP
    # Where a tile lies in several pages, each iteration has two loads that depend on each other.
    STAGES: tl.constexpr = NUM_STAGES if BLOCK_N <= BLOCK_SIZE else 2 * NUM_STAGES - 1
    dtype: tl.constexpr = q.dtype.element_ty
    first_token = tl.load(query_starts + row)
    num_queries = tl.load(query_starts + row + 1) - first_token
    seq_len = tl.load(seq_lens + row)
    first_query = query_block * BLOCK_TOKENS
    first_position = seq_len - num_queries + first_query
    end_position = tl.minimum(first_position + BLOCK_TOKENS, seq_len)

    member = tl.arange(0, BLOCK_M)
    dim = tl.arange(0, D_PADDED)
    query = member // GROUP
    is_query = (query < BLOCK_TOKENS) & (first_query + query < num_queries)
    token = (first_token + first_query + query).to(tl.int64)
    columns = (head * GROUP + member % GROUP)[:, None] * D + dim[None, :]
    is_real = is_query[:, None] & (dim[None, :] < D)
    queries = tl.load(q + token[:, None] * q_stride + columns, mask=is_real, other=0.0)
    position = first_position + query

    if HAS_SCALES:
        scale = scale * tl.load(k_scales + head)
    top = tl.full([BLOCK_M], LOWEST, tl.float32)
    total_weight = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, D_PADDED], tl.float32)
    oldest = first_position + 1 - tl.minimum(first_position + 1, window)
    first_masked = (first_position + 1) // BLOCK_N
    if HAS_WINDOW:  # every tile may be cut for some query
        first_masked = oldest // BLOCK_N
    num_tiles = tl.cdiv(end_position, BLOCK_N)
    # Loaded one tile ahead.  If the address of a tile came from a load of the same iteration, the
    # compiler would share the stages of the pipeline out between the two.
    next_block = tl.load(table + oldest // BLOCK_N * BLOCK_N // BLOCK_SIZE)
    for tile in tl.range(oldest // BLOCK_N, first_masked, num_stages=STAGES):
        k, v = load_tile(
            k_cache, v_cache, k_boxes, v_boxes, table, next_block, head, tile, oldest, seq_len,
            G, D, D_PADDED, BLOCK_SIZE, BLOCK_N, False, IS_NARROW, HAS_FP8, HAS_BOXES, dtype,
        )  # fmt: skip
        next_block = tl.load(table + tl.minimum(tile + 1, num_tiles - 1) * BLOCK_N // BLOCK_SIZE)
        scores = tl.dot(queries, k, input_precision="ieee")
        if SOFTCAP > 0:
            scores = cap(scores * scale, SOFTCAP) * LOG2_E
        else:
            scores = scores * (scale * LOG2_E)
        new_top = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total_weight = total_weight * shrink + tl.sum(weights, 1)
        acc = tl.dot(weights.to(dtype), v, acc * shrink[:, None], input_precision="ieee")
        top = new_top
    for tile in tl.range(first_masked, num_tiles, num_stages=STAGES):
        k, v = load_tile(
            k_cache, v_cache, k_boxes, v_boxes, table, next_block, head, tile, oldest, seq_len,
            G, D, D_PADDED, BLOCK_SIZE, BLOCK_N, True, IS_NARROW, HAS_FP8, False, dtype,
        )  # fmt: skip
        next_block = tl.load(table + tl.minimum(tile + 1, num_tiles - 1) * BLOCK_N // BLOCK_SIZE)
        scores = tl.dot(queries, k, input_precision="ieee")
        if SOFTCAP > 0:
            scores = cap(scores * scale, SOFTCAP) * LOG2_E
        else:
            scores = scores * (scale * LOG2_E)
        key = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        is_visible = key[None, :] <= position[:, None]
        if HAS_WINDOW:
            is_visible &= key[None, :] > position[:, None] - window
        scores = tl.where(is_visible, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total_weight = total_weight * shrink + tl.sum(weights, 1)
        acc = tl.dot(weights.to(dtype), v, acc * shrink[:, None], input_precision="ieee")
        top = new_top

    if HAS_SCALES:
        acc = acc * tl.load(v_scales + head)
    acc = acc / total_weight[:, None]
    tl.store(out + token[:, None] * (G * GROUP * D) + columns, acc.to(dtype), mask=is_real)


@triton.jit
def load_tile(
    k_cache: tl.tensor,
    v_cache: tl.tensor,
    k_boxes: tl.tensor,
    v_boxes: tl.tensor,
    table: tl.tensor,
    block: tl.tensor,
    head: tl.tensor,
    tile: tl.tensor,
    oldest: tl.tensor,
    seq_len: tl.tensor,
    G: tl.constexpr,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    IS_MASKED: tl.constexpr,
    IS_NARROW: tl.constexpr,
    HAS_FP8: tl.constexpr,
    HAS_BOXES: tl.constexpr,
    dtype: tl.constexpr,
) -> tl.tensor:
    """Load keys [D_PADDED, BLOCK_N] and values [BLOCK_N, D_PADDED] of one tile.

    :param block: the page in which the tile begins.
    :param oldest: first position that any query sees.
    :param IS_MASKED: whether what is seen may begin or end within the tile.
    """
    if HAS_BOXES:
        tl.static_assert(BLOCK_N <= BLOCK_SIZE)
        place = (block * G + head) * BLOCK_SIZE + tile * BLOCK_N % BLOCK_SIZE
        return tl.trans(k_boxes.load([place, 0])), v_boxes.load([place, 0])
    else:
        dim = tl.arange(0, D_PADDED)
        key = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        is_key = (key >= oldest) & (key < seq_len)
        if BLOCK_N <= BLOCK_SIZE:
            place = (block.to(tl.int64) * G + head) * (BLOCK_SIZE * D)
            k_tile, v_tile = k_cache + place, v_cache + place
            offset = (tile * BLOCK_N % BLOCK_SIZE + tl.arange(0, BLOCK_N)) * D
        else:
            blocks = tl.load(table + key // BLOCK_SIZE, mask=is_key, other=0).to(tl.int64)
            offset = ((blocks * G + head) * BLOCK_SIZE + key % BLOCK_SIZE) * D
            k_tile, v_tile = k_cache, v_cache
        k_pointers = k_tile + offset[None, :] + dim[:, None]
        v_pointers = v_tile + offset[:, None] + dim[None, :]
        if D == D_PADDED:
            k = tl.load(k_pointers)
        else:
            k = tl.load(k_pointers, mask=dim[:, None] < D, other=0)
        # Beside the keys anything may lie, and no weight, not even zero, is proof against NaN.
        if IS_MASKED:
            v = tl.load(v_pointers, mask=is_key[:, None] & (dim < D)[None, :], other=0)
        elif D == D_PADDED:
            v = tl.load(v_pointers)
        else:
            v = tl.load(v_pointers, mask=dim[None, :] < D, other=0)
        if IS_NARROW:
            k, v = widen(k, dtype, HAS_FP8), widen(v, dtype, HAS_FP8)
        return k, v

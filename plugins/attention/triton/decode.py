"""One query of each of many rows: reads every key and value once, at the speed of the memory.

All tiles of keys of all rows and key-value heads stand in one line (see `plan`), which is cut into equal
chunks, one for each program of a grid that always has the same size.  A chunk is a run of *segments*, each
of one row and head.  A segment that is all of its row and head writes the output.  Others leave what
they have in the workspace, and whichever program arrives last adds the parts up, always in the same
order.  Splitting keys over programs is Flash-Decoding (Dao et al., 2023); adding up parts without a second
launch is that of Stream-K (Osama et al., PPoPP 2023).

The query heads of one key-value head are the rows of a matrix that is padded to the 16 rows which
matrix units want.

In the fused form queries and keys are not rotated yet, and the newest key and value not yet stored.
Rotation mixes the two halves of a head only, so that scores are the sum of two products, one for each
half, and no half has to be put beside the other.
"""

from __future__ import annotations

import triton
import triton.language as tl

from plugins.attention.triton.numbers import LOG2_E, LOWEST, cap, stored, widen
from plugins.attention.triton.plan import first_tile

NUM_QUERY_ROWS: tl.constexpr = tl.constexpr(16)


@triton.jit(do_not_specialize=["table_stride", "num_rows", "window", "is_early"])
def decode(
    q: tl.tensor,  # [T, ...], rows of q_stride: H heads, in the fused form followed by G keys and G values
    out: tl.tensor,  # [T, H, D], written
    k_cache: tl.tensor,  # [num_blocks, G, BLOCK_SIZE, D]
    v_cache: tl.tensor,  # as k_cache
    k_scales: tl.tensor,  # [G] float32
    v_scales: tl.tensor,  # [G] float32
    cos: tl.tensor,  # [L, D / 2]
    sin: tl.tensor,  # [L, D / 2]
    plan: tl.tensor,  # of plan_decodes
    query_starts: tl.tensor,  # [S + 1] int32
    seq_lens: tl.tensor,  # [S] int32
    slots: tl.tensor,  # [T] int64
    tables: tl.tensor,  # [S, table_stride] int32
    parts: tl.tensor,  # [2 · NUM_CTAS, 16, D_PADDED] float32, workspace
    stats: tl.tensor,  # [2 · NUM_CTAS, 2, 16] float32, workspace: maximum and sum
    counters: tl.tensor,  # [NUM_CTAS] int32, zero before and after
    q_stride: tl.tensor,
    table_stride: tl.tensor,
    num_rows: tl.tensor,
    window: tl.tensor,
    is_early: tl.tensor,  # 1 if the plan is older than the kernel in front of this one, else 0
    scale: tl.tensor,
    G: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,  # of D, padded to a power of two
    D_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_CTAS: tl.constexpr,
    MIN_TILES: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    SOFTCAP: tl.constexpr,
    IS_FUSED: tl.constexpr,
    IS_NARROW: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    HAS_FP8: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """Attend over one chunk."""
    if PDL:
        if is_early != 0:
            prefetch_first_tile(
                plan, seq_lens, tables, k_cache, v_cache, num_rows, table_stride, window,
                G, D, BLOCK_SIZE, BLOCK_N, NUM_CTAS, MIN_TILES,
            )  # fmt: skip
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    dtype: tl.constexpr = q.dtype.element_ty
    cta = tl.program_id(0)
    row = tl.load(plan + num_rows + 1 + cta)
    total = tl.load(plan + num_rows) * G
    chunk = tl.maximum(tl.cdiv(total, NUM_CTAS), MIN_TILES)
    chunk_start = cta * chunk
    chunk_end = tl.minimum(chunk_start + chunk, total)
    unit = chunk_start
    while unit < chunk_end:
        row_end = tl.load(plan + row + 1)
        while row_end * G <= unit:
            row += 1
            row_end = tl.load(plan + row + 1)
        row_start = tl.load(plan + row)
        num_tiles = row_end - row_start
        head = (unit - row_start * G) // num_tiles
        head_start = row_start * G + head * num_tiles
        seg_start = unit - head_start
        seg_end = tl.minimum(num_tiles, chunk_end - head_start)
        seq_len = tl.load(seq_lens + row)
        token = tl.load(query_starts + row).to(tl.int64)

        num_keys = seq_len - 1 if IS_FUSED else seq_len
        q_row = q + token * q_stride
        q1, q2 = load_queries(q_row, cos, sin, seq_len, head, GROUP, D, HALF, IS_FUSED)
        score_scale = scale * tl.load(k_scales + head) if HAS_SCALES else scale
        top, total_weight, acc = attend_segment(
            q1, q2, k_cache, v_cache, tables + row * table_stride, head, seg_start, seg_end,
            seq_len, num_keys, window, score_scale,
            G, D, HALF, D_PADDED, BLOCK_SIZE, BLOCK_N, NUM_STAGES, SOFTCAP, IS_NARROW, HAS_FP8, dtype,
        )  # fmt: skip
        if IS_FUSED:
            if seg_end == num_tiles:
                top, total_weight, acc = attend_newest(
                    q1, q2, top, total_weight, acc, q_row, cos, sin,
                    k_cache, v_cache, k_scales, v_scales,
                    tl.load(slots + token), seq_len, head, score_scale,
                    G, GROUP, D, HALF, D_PADDED, BLOCK_SIZE,
                    SOFTCAP, IS_NARROW, HAS_SCALES, HAS_FP8, dtype,
                )  # fmt: skip

        out_row = out + (token * G + head) * (GROUP * D)
        v_scale = tl.load(v_scales + head) if HAS_SCALES else 1.0
        first_cta = head_start // chunk
        num_parts = (head_start + num_tiles - 1) // chunk - first_cta + 1
        if num_parts == 1:
            store_output(
                out_row, acc * (v_scale / total_weight)[:, None], GROUP, D, NUM_QUERY_ROWS, D_PADDED
            )
        else:
            slot = 2 * cta + (head_start > chunk_start).to(tl.int32)
            store_part(parts, stats, slot, top, total_weight, acc, GROUP, D_PADDED)
            tl.debug_barrier()  # all threads' stores come before the arrival is announced
            arrived = tl.atomic_add(counters + first_cta, 1, sem="acq_rel")
            if arrived == num_parts - 1:
                combine(out_row, parts, stats, v_scale, first_cta, num_parts, head_start, chunk,
                        GROUP, D, D_PADDED)  # fmt: skip
                tl.store(counters + first_cta, 0)
        unit = head_start + seg_end


@triton.jit
def prefetch_first_tile(
    plan: tl.tensor,
    seq_lens: tl.tensor,
    tables: tl.tensor,
    k_cache: tl.tensor,
    v_cache: tl.tensor,
    num_rows: tl.tensor,
    table_stride: tl.tensor,
    window: tl.tensor,
    G: tl.constexpr,
    D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_CTAS: tl.constexpr,
    MIN_TILES: tl.constexpr,
) -> None:
    """Have the first keys and values of the chunk on their way while the kernel in front still runs.

    It writes none of what this reads: the plan, tables and pages of the step are complete by then.
    """
    total = tl.load(plan + num_rows) * G
    chunk = tl.maximum(tl.cdiv(total, NUM_CTAS), MIN_TILES)
    unit = tl.program_id(0) * chunk
    if unit < total:
        row = tl.load(plan + num_rows + 1 + tl.program_id(0))
        row_start = tl.load(plan + row)
        num_tiles = tl.load(plan + row + 1) - row_start
        head = (unit - row_start * G) // num_tiles
        tile = unit - row_start * G - head * num_tiles
        tile += first_tile(tl.load(seq_lens + row), window, BLOCK_N)
        block = tl.load(tables + row * table_stride + tile * BLOCK_N // BLOCK_SIZE).to(tl.int64)
        place = ((block * G + head) * BLOCK_SIZE + tile * BLOCK_N % BLOCK_SIZE) * D
        num_bytes: tl.constexpr = (
            min(BLOCK_N, BLOCK_SIZE) * D * k_cache.dtype.element_ty.primitive_bitwidth // 8
        )
        prefetch(k_cache + place, num_bytes)
        prefetch(v_cache + place, num_bytes)


@triton.jit
def prefetch(pointer: tl.tensor, num_bytes: tl.constexpr) -> None:
    """Bring consecutive bytes to the L2 cache, a multiple of 16."""
    tl.inline_asm_elementwise(
        """{
        .reg .pred p;
        .reg .u32 t;
        mov.u32 t, %tid.x;
        setp.eq.u32 p, t, 0;
        @p cp.async.bulk.prefetch.L2.global [$1], $2;
        mov.u32 $0, 0;
        }""",
        "=r,l,r",
        [pointer.to(tl.int64), tl.full([], num_bytes, tl.int32)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def load_queries(
    q_row: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    seq_len: tl.tensor,
    head: tl.tensor,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    IS_FUSED: tl.constexpr,
) -> tl.tensor:
    """Load the queries of a key-value head, rotated in the fused form: two halves, [16, HALF] each."""
    member = tl.arange(0, NUM_QUERY_ROWS)[:, None]
    dim = tl.arange(0, HALF)[None, :]
    is_real = (member < GROUP) & (dim < D // 2)
    pointers = q_row + (head * GROUP + member) * D + dim
    q1 = tl.load(pointers, mask=is_real, other=0.0)
    q2 = tl.load(pointers + D // 2, mask=is_real, other=0.0)
    if IS_FUSED:
        angle = (seq_len - 1).to(tl.int64) * (D // 2) + dim
        c = tl.load(cos + angle, mask=dim < D // 2, other=0.0).to(tl.float32)
        s = tl.load(sin + angle, mask=dim < D // 2, other=0.0).to(tl.float32)
        x1, x2 = q1.to(tl.float32), q2.to(tl.float32)
        return (x1 * c - x2 * s).to(q1.dtype), (x2 * c + x1 * s).to(q1.dtype)
    return q1, q2


@triton.jit
def attend_segment(
    q1: tl.tensor,
    q2: tl.tensor,
    k_cache: tl.tensor,
    v_cache: tl.tensor,
    table: tl.tensor,
    head: tl.tensor,
    seg_start: tl.tensor,
    seg_end: tl.tensor,
    seq_len: tl.tensor,
    num_keys: tl.tensor,
    window: tl.tensor,
    scale: tl.tensor,
    G: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    D_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    SOFTCAP: tl.constexpr,
    IS_NARROW: tl.constexpr,
    HAS_FP8: tl.constexpr,
    dtype: tl.constexpr,
) -> tl.tensor:
    """Attend over the cached keys of a segment.

    :return: running maximum in powers of two [16], sum of weights [16], weighted sum of values
        [16, D_PADDED].
    """
    top = tl.full([NUM_QUERY_ROWS], LOWEST, tl.float32)
    # The sum over keys is left to the end: until then each thread adds up what it holds anyway.
    weights = tl.zeros([NUM_QUERY_ROWS, BLOCK_N], tl.float32)
    acc = tl.zeros([NUM_QUERY_ROWS, D_PADDED], tl.float32)
    half_dim = tl.arange(0, HALF)
    dim = tl.arange(0, D_PADDED)
    tile_base = first_tile(seq_len, window, BLOCK_N)
    oldest = seq_len - tl.minimum(seq_len, window)
    # Where a tile lies in several pages, each iteration has two loads that depend on each other.
    STAGES: tl.constexpr = NUM_STAGES if BLOCK_N <= BLOCK_SIZE else 2 * NUM_STAGES - 1
    first, end = tile_base + seg_start, tile_base + seg_end
    # Loaded one tile ahead.  If the address of a tile came from a load of the same iteration, the
    # compiler would share the stages of the pipeline out between the two.
    next_block = tl.load(table + first * BLOCK_N // BLOCK_SIZE)
    # A window of 1 leaves nothing of the cache to be seen in the fused form, but a tile all the same.
    for tile in tl.range(first, end, num_stages=STAGES):
        key = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        is_key = (key < num_keys) & (key >= oldest)
        if BLOCK_N <= BLOCK_SIZE:  # all of them lie in one page
            place = (next_block.to(tl.int64) * G + head) * (BLOCK_SIZE * D)
            next_block = tl.load(table + tl.minimum(tile + 1, end - 1) * BLOCK_N // BLOCK_SIZE)
            k_tile, v_tile = k_cache + place, v_cache + place
            # Behind the last key the last one again: what is not needed should not be read.
            nearest = tl.minimum(tl.arange(0, BLOCK_N), tl.maximum(num_keys - 1 - tile * BLOCK_N, 0))
            offset = (tile * BLOCK_N % BLOCK_SIZE + nearest) * D
        else:
            block = tl.load(table + key // BLOCK_SIZE, mask=is_key, other=0).to(tl.int64)
            offset = ((block * G + head) * BLOCK_SIZE + key % BLOCK_SIZE) * D
            k_tile, v_tile = k_cache, v_cache
        k_pointers = k_tile + offset[None, :] + half_dim[:, None]
        if HALF == D // 2:
            k1 = tl.load(k_pointers)
            k2 = tl.load(k_pointers + D // 2)
        else:
            is_half = half_dim[:, None] < D // 2
            k1 = tl.load(k_pointers, mask=is_half, other=0)
            k2 = tl.load(k_pointers + D // 2, mask=is_half, other=0)
        # Beside the keys anything may lie, and no weight, not even zero, is proof against NaN.
        is_value = is_key[:, None] & (dim[None, :] < D)
        v = tl.load(v_tile + offset[:, None] + dim[None, :], mask=is_value, other=0)
        if IS_NARROW:
            k1, k2 = widen(k1, dtype, HAS_FP8), widen(k2, dtype, HAS_FP8)
            v = widen(v, dtype, HAS_FP8)
        scores = tl.dot(q1, k1, input_precision="ieee")
        scores = tl.dot(q2, k2, scores, input_precision="ieee")
        if SOFTCAP > 0:
            scores = cap(scores * scale, SOFTCAP) * LOG2_E
        else:
            scores = scores * (scale * LOG2_E)
        scores = tl.where(is_key[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        shrink = tl.exp2(top - new_top)
        weight = tl.exp2(scores - new_top[:, None])
        weights = weights * shrink[:, None] + weight
        acc = tl.dot(weight.to(dtype), v, acc * shrink[:, None], input_precision="ieee")
        top = new_top
    return top, tl.sum(weights, 1), acc


@triton.jit
def attend_newest(
    q1: tl.tensor,
    q2: tl.tensor,
    top: tl.tensor,
    total_weight: tl.tensor,
    acc: tl.tensor,
    q_row: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    k_cache: tl.tensor,
    v_cache: tl.tensor,
    k_scales: tl.tensor,
    v_scales: tl.tensor,
    slot: tl.tensor,
    seq_len: tl.tensor,
    head: tl.tensor,
    scale: tl.tensor,
    G: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    D_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    IS_NARROW: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    HAS_FP8: tl.constexpr,
    dtype: tl.constexpr,
) -> tl.tensor:
    """Rotate and store the newest key, store its value, and attend to it as the cache holds it.

    :return: the running state with one key more.
    """
    half_dim = tl.arange(0, HALF)
    is_half = half_dim < D // 2
    k_new = q_row + (G * GROUP + head) * D + half_dim
    x1 = tl.load(k_new, mask=is_half, other=0.0).to(tl.float32)
    x2 = tl.load(k_new + D // 2, mask=is_half, other=0.0).to(tl.float32)
    angle = (seq_len - 1).to(tl.int64) * (D // 2) + half_dim
    c = tl.load(cos + angle, mask=is_half, other=0.0).to(tl.float32)
    s = tl.load(sin + angle, mask=is_half, other=0.0).to(tl.float32)
    dim = tl.arange(0, D_PADDED)
    v = tl.load(q_row + (G * GROUP + G + head) * D + dim, mask=dim < D, other=0.0).to(tl.float32)
    k_scale = tl.load(k_scales + head) if HAS_SCALES else 1.0
    v_scale = tl.load(v_scales + head) if HAS_SCALES else 1.0
    # Rounded to the model's dtype first, as a key that was rotated elsewhere would be.
    k1 = stored((x1 * c - x2 * s).to(dtype).to(tl.float32), k_scale, IS_NARROW, dtype)
    k2 = stored((x2 * c + x1 * s).to(dtype).to(tl.float32), k_scale, IS_NARROW, dtype)
    v = stored(v, v_scale, IS_NARROW, dtype)
    place = ((slot // BLOCK_SIZE * G + head) * BLOCK_SIZE + slot % BLOCK_SIZE) * D
    tl.store(k_cache + place + half_dim, k1, mask=is_half)
    tl.store(k_cache + place + D // 2 + half_dim, k2, mask=is_half)
    tl.store(v_cache + place + dim, v, mask=dim < D)
    if IS_NARROW:
        k1, k2 = widen(k1, dtype, HAS_FP8), widen(k2, dtype, HAS_FP8)
        v = widen(v, dtype, HAS_FP8)
    products = q1.to(tl.float32) * k1.to(tl.float32)[None, :]
    products += q2.to(tl.float32) * k2.to(tl.float32)[None, :]
    score = tl.sum(products, 1)
    if SOFTCAP > 0:
        score = cap(score * scale, SOFTCAP) * LOG2_E
    else:
        score = score * (scale * LOG2_E)
    new_top = tl.maximum(top, score)
    shrink = tl.exp2(top - new_top)
    weight = tl.exp2(score - new_top)
    acc = acc * shrink[:, None] + weight[:, None] * v.to(tl.float32)[None, :]
    return new_top, total_weight * shrink + weight, acc


# --- parts -----------------------------------------------------------------------------------------


@triton.jit
def store_output(
    out_row: tl.tensor,
    values: tl.tensor,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    D_PADDED: tl.constexpr,
) -> None:
    """Write [ROWS, D_PADDED] to the query heads of one key-value head."""
    member = tl.arange(0, ROWS)[:, None]
    dim = tl.arange(0, D_PADDED)[None, :]
    tl.store(
        out_row + member * D + dim,
        values.to(out_row.dtype.element_ty),
        mask=(member < GROUP) & (dim < D),
    )


@triton.jit
def store_part(
    parts: tl.tensor,
    stats: tl.tensor,
    slot: tl.tensor,
    top: tl.tensor,
    total_weight: tl.tensor,
    acc: tl.tensor,
    GROUP: tl.constexpr,
    D_PADDED: tl.constexpr,
) -> None:
    """Leave a segment's state in the workspace."""
    member = tl.arange(0, NUM_QUERY_ROWS)
    dim = tl.arange(0, D_PADDED)
    base = slot * NUM_QUERY_ROWS
    pointers = parts + (base + member)[:, None] * D_PADDED + dim[None, :]
    tl.store(pointers, acc, mask=(member < GROUP)[:, None])
    tl.store(stats + 2 * base + member, top)
    tl.store(stats + 2 * base + NUM_QUERY_ROWS + member, total_weight)


@triton.jit
def combine(
    out_row: tl.tensor,
    parts: tl.tensor,
    stats: tl.tensor,
    v_scale: tl.tensor,
    first_cta: tl.tensor,
    num_parts: tl.tensor,
    head_start: tl.tensor,
    chunk: tl.tensor,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
) -> None:
    """Add the parts of one row and head up, several at a time, in the order of their keys."""
    ROWS: tl.constexpr = triton.next_power_of_2(GROUP)
    BATCH: tl.constexpr = 4096 // (ROWS * D_PADDED) if ROWS * D_PADDED <= 2048 else 2
    member = tl.arange(0, ROWS)
    dim = tl.arange(0, D_PADDED)
    top = tl.full([ROWS], LOWEST, tl.float32)
    total_weight = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, D_PADDED], tl.float32)
    for base in range(0, num_parts, BATCH):
        part = base + tl.arange(0, BATCH)
        is_part = (part < num_parts)[:, None]
        cta = first_cta + part
        # A program whose chunk begins in front of this head came to it with its last segment.
        slot = 2 * cta + (head_start > cta * chunk).to(tl.int32)
        pointers = stats + (2 * NUM_QUERY_ROWS) * slot[:, None] + member[None, :]
        tops = tl.load(pointers, mask=is_part, other=LOWEST, cache_modifier=".cg")
        sums = tl.load(pointers + NUM_QUERY_ROWS, mask=is_part, other=0.0, cache_modifier=".cg")
        rows = (slot * NUM_QUERY_ROWS)[:, None, None] + member[None, :, None]
        values = tl.load(
            parts + rows * D_PADDED + dim[None, None, :],
            mask=is_part[:, :, None] & (member < GROUP)[None, :, None],
            other=0.0,
            cache_modifier=".cg",
        )
        new_top = tl.maximum(top, tl.max(tops, 0))
        shrink = tl.exp2(top - new_top)
        weights = tl.exp2(tops - new_top[None, :])
        weights = tl.where(is_part, weights, 0.0)
        total_weight = total_weight * shrink + tl.sum(sums * weights, 0)
        acc = acc * shrink[:, None] + tl.sum(values * weights[:, :, None], 0)
        top = new_top
    store_output(out_row, acc * (v_scale / total_weight)[:, None], GROUP, D, ROWS, D_PADDED)

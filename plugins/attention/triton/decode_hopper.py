"""The decode kernel for Hopper: keys and values come through a ring of buffers that is never drained.

It cuts the work as `decode` does, takes the same plan, and leaves the same parts in the same workspace.
What differs is how bytes travel.  One warp, the producer, walks the tiles of a chunk and has the tensor
memory accelerator copy each into the next free stage of a ring in shared memory; it runs ahead of the four
warps that attend, across the borders of segments too.  Warps of different roles, and a ring guarded by pairs
of barriers: Warp specialization as in FlashAttention-3 (Shah et al., 2024).

A page is a box of 64 keys, and a box may stand out of it: where a tile is not full, the box is moved back
until it ends with the last key.  What lies in front of the page is not read but filled with zeros.
So no byte is read that is not needed, and beside the values there is never anything but zeros.

Keys are the rows of the products and queries the columns, as 8 columns are the fewest that matrix units
take, but 16 rows.  Each warp attends to 16 keys of each tile by itself, with a maximum, a sum and an
accumulator of its own; the four are merged once a segment.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from plugins.attention.triton.numbers import LOG2_E, LOWEST

if TYPE_CHECKING:
    import torch

BLOCK_N = gl.constexpr(64)
"""Keys of a tile, and of the box that holds it."""
NUM_WARPS = gl.constexpr(4)
"""That attend."""
PRODUCER_REGISTERS = gl.constexpr(56)
BOX_WIDTH = gl.constexpr(64)
"""Numbers of a row of a box: the 128 bytes over which the accelerator can swizzle."""
NUM_QUERY_ROWS = gl.constexpr(16)
"""Of a part in the workspace, as `decode` has them."""


def make_boxes(pages: torch.Tensor) -> TensorDescriptor:
    """Describe the keys or values of a layer to the tensor memory accelerator.

    :param pages: [num_blocks, G, block_size, D], contiguous, of two bytes a number; block_size a multiple
        of 64 and D of 64.
    """
    dim, width = pages.shape[-1], BOX_WIDTH.value
    num_tiles = pages.numel() // (BLOCK_N.value * dim)
    return TensorDescriptor(
        pages,
        [num_tiles, dim // width, BLOCK_N.value, width],
        [BLOCK_N.value * dim, width, dim, 1],
        [1, dim // width, BLOCK_N.value, width],
        gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4),
    )


@gluon.jit(do_not_specialize=["table_stride", "num_rows", "window", "is_early"])
def decode_hopper(
    q: gl.tensor,  # [T, ...], rows of q_stride: H heads, in the fused form followed by G keys and G values
    out: gl.tensor,  # [T, H, D], written
    k_boxes: tma.tensor_descriptor,  # of make_boxes
    v_boxes: tma.tensor_descriptor,
    k_cache: gl.tensor,  # [num_blocks, G, BLOCK_SIZE, D]
    v_cache: gl.tensor,  # as k_cache
    cos: gl.tensor,  # [L, D / 2]
    sin: gl.tensor,  # [L, D / 2]
    plan: gl.tensor,  # of plan_decodes, with tiles of BLOCK_N
    query_starts: gl.tensor,  # [S + 1] int32
    seq_lens: gl.tensor,  # [S] int32
    slots: gl.tensor,  # [T] int64
    tables: gl.tensor,  # [S, table_stride] int32
    parts: gl.tensor,  # [2 · NUM_CTAS, 16, D] float32, workspace
    stats: gl.tensor,  # [2 · NUM_CTAS, 2, 16] float32, workspace: maximum and sum
    counters: gl.tensor,  # [NUM_CTAS] int32, zero before and after
    q_stride: gl.tensor,
    table_stride: gl.tensor,
    num_rows: gl.tensor,
    window: gl.tensor,
    is_early: gl.tensor,  # 1 if the plan is older than the kernel in front of this one, else 0
    scale: gl.tensor,
    G: gl.constexpr,
    GROUP: gl.constexpr,
    D: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    NUM_CTAS: gl.constexpr,
    MIN_TILES: gl.constexpr,
    NUM_STAGES: gl.constexpr,
    IS_FUSED: gl.constexpr,
) -> None:
    """Attend over one chunk."""
    ring = gl.allocate_shared_memory(
        q.dtype.element_ty, [2 * NUM_STAGES, 1, D // BOX_WIDTH, BLOCK_N, BOX_WIDTH], k_boxes.layout
    )
    full = gl.allocate_shared_memory(gl.int64, [NUM_STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [NUM_STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(NUM_STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(free.index(stage), count=1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (
                attend_chunk,
                (
                    q, out, k_cache, v_cache, cos, sin, plan, query_starts, seq_lens, slots,
                    parts, stats, counters, ring, full, free, q_stride, num_rows, window, is_early, scale,
                    G, GROUP, D, BLOCK_SIZE, NUM_CTAS, MIN_TILES, NUM_STAGES, IS_FUSED,
                ),
            ),
            (
                load_chunk,
                (
                    k_boxes, v_boxes, plan, seq_lens, tables, ring, full, free,
                    table_stride, num_rows, window, is_early,
                    G, D, BLOCK_SIZE, NUM_CTAS, MIN_TILES, NUM_STAGES, IS_FUSED,
                ),
            ),
        ],
        [1],
        [PRODUCER_REGISTERS],
    )  # fmt: skip


# --- where a program's work lies -------------------------------------------------------------------


@gluon.jit
def find_chunk(
    plan: gl.tensor,
    num_rows: gl.tensor,
    G: gl.constexpr,
    NUM_CTAS: gl.constexpr,
    MIN_TILES: gl.constexpr,
) -> gl.tuple:
    """Return the first row of this program's chunk, the size of chunks, and its first and last + 1 unit."""
    cta = gl.program_id(0)
    row = gl.load(plan + num_rows + 1 + cta)
    total = gl.load(plan + num_rows) * G
    chunk = gl.maximum(gl.cdiv(total, NUM_CTAS), MIN_TILES)
    return row, chunk, cta * chunk, gl.minimum(cta * chunk + chunk, total)


@gluon.jit
def find_row(plan: gl.tensor, row: gl.tensor, unit: gl.tensor, G: gl.constexpr) -> gl.tuple:
    """Return the row, from this one on, that holds a unit, with its first and last + 1 tile of one head."""
    row_end = gl.load(plan + row + 1)
    while row_end * G <= unit:
        row += 1
        row_end = gl.load(plan + row + 1)
    return row, gl.load(plan + row), row_end


# --- producer --------------------------------------------------------------------------------------


@gluon.jit
def load_chunk(
    k_boxes: tma.tensor_descriptor,
    v_boxes: tma.tensor_descriptor,
    plan: gl.tensor,
    seq_lens: gl.tensor,
    tables: gl.tensor,
    ring: gl.shared_memory_descriptor,
    full: gl.shared_memory_descriptor,
    free: gl.shared_memory_descriptor,
    table_stride: gl.tensor,
    num_rows: gl.tensor,
    window: gl.tensor,
    is_early: gl.tensor,
    G: gl.constexpr,
    D: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    NUM_CTAS: gl.constexpr,
    MIN_TILES: gl.constexpr,
    NUM_STAGES: gl.constexpr,
    IS_FUSED: gl.constexpr,
) -> None:
    """Copy all tiles of a chunk into the ring, each as soon as a stage is free.

    In the fused form no page is read that the kernel in front might have written: keys and values of
    earlier tokens were stored in earlier steps, and the newest are not read from pages.
    """
    if IS_FUSED:
        if is_early == 0:
            gdc_wait()
    else:
        gdc_wait()
    TILES_OF_BLOCK: gl.constexpr = BLOCK_SIZE // BLOCK_N
    TILE_BYTES: gl.constexpr = 2 * BLOCK_N * D * 2
    row, _, unit, chunk_end = find_chunk(plan, num_rows, G, NUM_CTAS, MIN_TILES)
    stage = 0
    phase = 1  # a barrier in its first phase takes the one before for completed
    while unit < chunk_end:
        row, row_start, row_end = find_row(plan, row, unit, G)
        num_tiles = row_end - row_start
        seq_len = gl.load(seq_lens + row)
        table = tables + row.to(gl.int64) * table_stride
        tile_base = (seq_len - gl.minimum(seq_len, window)) // BLOCK_N
        num_keys = seq_len - 1 if IS_FUSED else seq_len
        place = unit - row_start * G
        head = place // num_tiles
        tile = tile_base + place - head * num_tiles
        row_tiles_end = tile_base + num_tiles
        next_block = gl.load(table + tile // TILES_OF_BLOCK)
        # All heads of the row that lie in the chunk.
        units_end = gl.minimum(row_end * G, chunk_end)
        while unit < units_end:
            box = (next_block * G + head) * TILES_OF_BLOCK + tile % TILES_OF_BLOCK
            start = gl.minimum(num_keys - tile * BLOCK_N, BLOCK_N) - BLOCK_N
            unit += 1
            tile += 1
            is_next_head = tile == row_tiles_end
            tile = gl.where(is_next_head, tile_base, tile)
            head += is_next_head.to(gl.int32)
            # Loaded before the wait, so that it does not come on top of it.
            next_block = gl.load(table + tile // TILES_OF_BLOCK)
            mbarrier.wait(free.index(stage), phase)
            mbarrier.expect(full.index(stage), TILE_BYTES)
            coordinates = [box, 0, start, 0]
            tma.async_copy_global_to_shared(
                k_boxes, coordinates, full.index(stage), ring.index(2 * stage)
            )
            tma.async_copy_global_to_shared(
                v_boxes, coordinates, full.index(stage), ring.index(2 * stage + 1)
            )
            stage += 1
            phase ^= (stage == NUM_STAGES).to(gl.int32)
            stage = gl.where(stage == NUM_STAGES, 0, stage)


# --- consumers -------------------------------------------------------------------------------------


@gluon.jit
def attend_chunk(
    q: gl.tensor,
    out: gl.tensor,
    k_cache: gl.tensor,
    v_cache: gl.tensor,
    cos: gl.tensor,
    sin: gl.tensor,
    plan: gl.tensor,
    query_starts: gl.tensor,
    seq_lens: gl.tensor,
    slots: gl.tensor,
    parts: gl.tensor,
    stats: gl.tensor,
    counters: gl.tensor,
    ring: gl.shared_memory_descriptor,
    full: gl.shared_memory_descriptor,
    free: gl.shared_memory_descriptor,
    q_stride: gl.tensor,
    num_rows: gl.tensor,
    window: gl.tensor,
    is_early: gl.tensor,
    scale: gl.tensor,
    G: gl.constexpr,
    GROUP: gl.constexpr,
    D: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    NUM_CTAS: gl.constexpr,
    MIN_TILES: gl.constexpr,
    NUM_STAGES: gl.constexpr,
    IS_FUSED: gl.constexpr,
) -> None:
    """Attend to the tiles of a chunk as they come, segment by segment.

    Where the first segment lies is found out while the kernel in front still runs, if that is allowed.
    """
    if is_early == 0:
        gdc_wait()
    dtype: gl.constexpr = q.dtype.element_ty
    COLUMNS: gl.constexpr = 8 if GROUP <= 8 else 16
    KEYS: gl.constexpr = BLOCK_N // NUM_WARPS  # of a warp
    # Of [keys, queries]: each warp has 16 keys.
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [NUM_WARPS, 1], [16, 8])
    k_layout: gl.constexpr = gl.DotOperandLayout(0, scores_layout, 2)
    q_layout: gl.constexpr = gl.DotOperandLayout(1, scores_layout, 2)
    # Of [warps, keys or dimensions, queries].
    state_layout: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [NUM_WARPS, 1, 1], [1, 16, 8])
    v_layout: gl.constexpr = gl.DotOperandLayout(0, state_layout, 2)
    weights_layout: gl.constexpr = gl.DotOperandLayout(1, state_layout, 2)
    top_layout: gl.constexpr = gl.SliceLayout(1, state_layout)
    # All four summands of a number in one thread, and runs of four dimensions.
    merged_layout: gl.constexpr = gl.BlockedLayout([1, 4, 1], [1, 16, 2], [1, 1, NUM_WARPS], [1, 2, 0])
    keys_in_ring: gl.constexpr = swizzled(D, False)
    values_in_ring: gl.constexpr = swizzled(D, True)

    key_row = gl.arange(0, KEYS, gl.SliceLayout(0, gl.SliceLayout(2, state_layout)))[None, :, None]
    warp = gl.arange(0, NUM_WARPS, gl.SliceLayout(1, gl.SliceLayout(2, state_layout)))[:, None, None]
    key_row = warp * KEYS + key_row
    score_scale = scale * LOG2_E

    cta = gl.program_id(0)
    row, chunk, chunk_start, chunk_end = find_chunk(plan, num_rows, G, NUM_CTAS, MIN_TILES)
    unit = chunk_start
    stage = 0
    phase = 0
    while unit < chunk_end:
        row, row_start, row_end = find_row(plan, row, unit, G)
        seq_len = gl.load(seq_lens + row)
        token = gl.load(query_starts + row).to(gl.int64)
        num_tiles = row_end - row_start
        head = (unit - row_start * G) // num_tiles
        head_start = row_start * G + head * num_tiles
        seg_start = unit - head_start
        seg_end = gl.minimum(num_tiles, chunk_end - head_start)
        if unit == chunk_start:
            gdc_wait()
            gdc_launch_dependents()

        has_newest = seg_end == num_tiles
        queries, newest, v_new = begin_segment(
            q + token * q_stride, cos, sin, k_cache, v_cache, slots + token, seq_len, head, has_newest,
            q_layout, gl.SliceLayout(0, merged_layout), G, GROUP, COLUMNS, D, BLOCK_SIZE, IS_FUSED,
        )  # fmt: skip
        top = gl.full([NUM_WARPS, COLUMNS], LOWEST, gl.float32, top_layout)
        # The sum over keys is left to the end: until then each thread adds up what it holds anyway.
        weights = gl.zeros([NUM_WARPS, KEYS, COLUMNS], gl.float32, state_layout)
        acc = gl.zeros([NUM_WARPS, D, COLUMNS], gl.float32, state_layout)

        oldest = seq_len - gl.minimum(seq_len, window)
        tile_base = oldest // BLOCK_N
        num_keys = seq_len - 1 if IS_FUSED else seq_len
        for tile in range(tile_base + seg_start, tile_base + seg_end):
            # Not sooner: a barrier does not wait for loads from shared memory that are on their way, but
            # the products, all of which were issued in the iteration before, had to.
            release(free, stage, tile > tile_base + seg_start, NUM_STAGES)
            # Where a tile is not full, its keys are the last rows of the box.
            shift = BLOCK_N - gl.minimum(num_keys - tile * BLOCK_N, BLOCK_N)
            first_row = gl.maximum(shift, oldest - tile * BLOCK_N + shift)
            mbarrier.wait(full.index(stage), phase)
            keys = view(ring.index(2 * stage), [BLOCK_N, D], keys_in_ring).load(k_layout)
            values = view(ring.index(2 * stage + 1), [NUM_WARPS, D, KEYS], values_in_ring).load(
                v_layout
            )
            stage += 1
            phase ^= (stage == NUM_STAGES).to(gl.int32)
            stage = gl.where(stage == NUM_STAGES, 0, stage)

            scores = mma_v2(keys, queries, gl.zeros([BLOCK_N, COLUMNS], gl.float32, scores_layout))
            scores = scores.reshape([NUM_WARPS, KEYS, COLUMNS])
            scores = gl.convert_layout(scores, state_layout, assert_trivial=True) * score_scale
            scores = gl.where(key_row >= first_row, scores, float("-inf"))
            new_top = gl.maximum(top, gl.max(scores, 1))
            shrink = gl.exp2(top - new_top)
            weight = gl.exp2(scores - gl.expand_dims(new_top, 1))
            weights = weights * gl.expand_dims(shrink, 1) + weight
            acc = acc * gl.expand_dims(shrink, 1)
            acc = mma_v2(values, gl.convert_layout(weight.to(dtype), weights_layout), acc)
            top = new_top
        release(free, stage, True, NUM_STAGES)

        if IS_FUSED:
            newest = gl.convert_layout(newest, gl.SliceLayout(0, top_layout))
            newest = gl.where(has_newest, newest * score_scale, LOWEST)
        end_segment(
            out + (token * G + head) * (GROUP * D), parts, stats, counters,
            top, weights, acc, newest, v_new, cta, chunk, chunk_start, head_start, num_tiles,
            merged_layout, GROUP, COLUMNS, D, IS_FUSED,
        )  # fmt: skip
        unit = head_start + seg_end
    if chunk_start >= chunk_end:  # whoever waits for this kernel relies on its having waited itself
        gdc_wait()


@gluon.jit
def release(
    free: gl.shared_memory_descriptor,
    stage: gl.tensor,
    is_wanted: gl.tensor,
    NUM_STAGES: gl.constexpr,
) -> None:
    """Give the stage in front of this one back to the producer."""
    # Computed, not kept: a variable set to another one before a loop and in it counts as unchanged.
    previous = gl.where(stage == 0, NUM_STAGES - 1, stage - 1)
    mbarrier.arrive(free.index(previous), count=1, pred=is_wanted)


@gluon.constexpr_function
def swizzled(dim: int, is_by_warps: bool) -> gl.SharedLinearLayout:
    """Tell where in a box the numbers lie: [BLOCK_N, dim], or [NUM_WARPS, dim, keys of a warp].

    Chunks of 64 dimensions lie one behind the other.  In each a row has 128 bytes, of which the 16-byte
    pieces are permuted by exclusive or with the row's number modulo 8.
    """

    def place(key: int, d: int) -> list[int]:
        keys_of_warp = BLOCK_N.value // NUM_WARPS.value
        return [key // keys_of_warp, d, key % keys_of_warp] if is_by_warps else [key, d]

    bases = [place(0, 1 << bit) for bit in range(6)]
    bases += [place(1 << bit, 8 << bit) for bit in range(3)]
    bases += [place(8 << bit, 0) for bit in range(3)]
    width = 64
    while width < dim:
        bases.append(place(0, width))
        width *= 2
    return gl.SharedLinearLayout(bases, alignment=1024)


@gluon.jit
def view(
    box: gl.shared_memory_descriptor, shape: gl.constexpr, layout: gl.constexpr
) -> gl.shared_memory_descriptor:
    """Look at a box as if it had another shape."""
    return box._reinterpret(box.dtype, shape, layout)  # noqa: SLF001  there is no other way


@gluon.jit
def begin_segment(
    q_row: gl.tensor,
    cos: gl.tensor,
    sin: gl.tensor,
    k_cache: gl.tensor,
    v_cache: gl.tensor,
    slot: gl.tensor,
    seq_len: gl.tensor,
    head: gl.tensor,
    has_newest: gl.tensor,
    q_layout: gl.constexpr,
    values_layout: gl.constexpr,
    G: gl.constexpr,
    GROUP: gl.constexpr,
    COLUMNS: gl.constexpr,
    D: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    IS_FUSED: gl.constexpr,
) -> gl.tuple:
    """Load the queries; in the fused form rotate them, and store the newest key and value.

    All loads are on their way at once.

    :return: queries [D, COLUMNS], in the fused form also their products with the newest key [COLUMNS],
        without a scale and only if `has_newest`, and the newest value [D].
    """
    HALF: gl.constexpr = D // 2
    layout: gl.constexpr = gl.BlockedLayout([HALF // 16, 1], [16, 2], [1, NUM_WARPS], [0, 1])
    half_dim = gl.arange(0, HALF, gl.SliceLayout(1, layout))
    dim = gl.arange(0, D, gl.SliceLayout(1, values_layout))
    member = gl.arange(0, COLUMNS, gl.SliceLayout(0, layout))
    pointers = q_row + (head * GROUP + member)[None, :] * D + half_dim[:, None]
    is_real = (member < GROUP)[None, :]
    q1 = gl.load(pointers, mask=is_real, other=0.0)
    q2 = gl.load(pointers + HALF, mask=is_real, other=0.0)
    products = gl.full([COLUMNS], LOWEST, gl.float32, gl.SliceLayout(0, layout))
    v_new = gl.zeros([D], q1.dtype, gl.SliceLayout(1, values_layout))
    if IS_FUSED:
        angle = (seq_len - 1).to(gl.int64) * HALF + half_dim
        c = gl.load(cos + angle).to(gl.float32)
        s = gl.load(sin + angle).to(gl.float32)
        k_new = q_row + (G * GROUP + head) * D + half_dim
        k1 = gl.load(k_new)
        k2 = gl.load(k_new + HALF)
        v_new = gl.load(q_row + (G * GROUP + G + head) * D + dim)
        # No branch around what only the last segment of a head needs: loads would sink into it.
        place = gl.load(slot)
        place = ((place // BLOCK_SIZE * G + head) * BLOCK_SIZE + place % BLOCK_SIZE) * D
        q1, q2 = rotate(q1, q2, c[:, None], s[:, None])
        k1, k2 = rotate(k1, k2, c, s)
        gl.store(k_cache + place + half_dim, k1, mask=has_newest)
        gl.store(k_cache + place + HALF + half_dim, k2, mask=has_newest)
        gl.store(v_cache + place + dim, v_new, mask=has_newest)
        each = q1.to(gl.float32) * k1.to(gl.float32)[:, None]
        each += q2.to(gl.float32) * k2.to(gl.float32)[:, None]
        products = gl.where(has_newest, gl.sum(each, 0), products)
    queries = gl.permute(gl.join(q1, q2), (2, 0, 1)).reshape([D, COLUMNS])
    return gl.convert_layout(queries, q_layout), products, v_new


@gluon.jit
def rotate(x1: gl.tensor, x2: gl.tensor, c: gl.tensor, s: gl.tensor) -> gl.tuple:
    """Rotate the halves of heads; :return: them in their own dtype."""
    y1, y2 = x1.to(gl.float32), x2.to(gl.float32)
    return (y1 * c - y2 * s).to(x1.dtype), (y2 * c + y1 * s).to(x1.dtype)


# --- parts -----------------------------------------------------------------------------------------


@gluon.jit
def end_segment(
    out_row: gl.tensor,
    parts: gl.tensor,
    stats: gl.tensor,
    counters: gl.tensor,
    top: gl.tensor,
    weights: gl.tensor,
    acc: gl.tensor,
    newest: gl.tensor,
    v_new: gl.tensor,
    cta: gl.tensor,
    chunk: gl.tensor,
    chunk_start: gl.tensor,
    head_start: gl.tensor,
    num_tiles: gl.tensor,
    merged_layout: gl.constexpr,
    GROUP: gl.constexpr,
    COLUMNS: gl.constexpr,
    D: gl.constexpr,
    IS_FUSED: gl.constexpr,
) -> None:
    """Merge what the warps have, in the fused form with the newest key's score and value.

    Then write the output or leave a part; whoever comes last adds parts up.
    """
    total_top = gl.max(top, 0)
    if IS_FUSED:
        total_top = gl.maximum(total_top, newest)
    factor = gl.exp2(top - total_top[None, :])
    total_weight = gl.sum(gl.sum(weights, 1) * factor, 0)
    acc = acc * gl.expand_dims(factor, 1)
    acc = gl.sum(gl.convert_layout(acc, merged_layout), 0)
    layout: gl.constexpr = gl.SliceLayout(0, merged_layout)
    if IS_FUSED:
        weight = gl.exp2(newest - total_top)
        total_weight += weight
        acc += (
            gl.convert_layout(weight, gl.SliceLayout(0, layout))[None, :]
            * v_new.to(gl.float32)[:, None]
        )
    dim = gl.arange(0, D, gl.SliceLayout(1, layout))[:, None]
    member = gl.arange(0, COLUMNS, gl.SliceLayout(0, layout))[None, :]
    total_weight = gl.convert_layout(total_weight, gl.SliceLayout(0, layout))
    first_cta = head_start // chunk
    num_parts = (head_start + num_tiles - 1) // chunk - first_cta + 1
    if num_parts == 1:
        values = acc * (1.0 / total_weight)[None, :]
        gl.store(out_row + member * D + dim, values.to(out_row.dtype.element_ty), mask=member < GROUP)
    else:
        base = (2 * cta + (head_start > chunk_start).to(gl.int32)) * NUM_QUERY_ROWS
        gl.store(parts + (base + member) * D + dim, acc, mask=member < GROUP)
        pointers = stats + 2 * base + gl.arange(0, COLUMNS, gl.SliceLayout(0, layout))
        gl.store(pointers, gl.convert_layout(total_top, gl.SliceLayout(0, layout)))
        gl.store(pointers + NUM_QUERY_ROWS, total_weight)
        gl.thread_barrier()  # all threads' stores come before the arrival is announced
        arrived = gl.atomic_add(counters + first_cta, 1, sem="acq_rel")
        if arrived == num_parts - 1:
            combine(out_row, parts, stats, first_cta, num_parts, head_start, chunk, GROUP, D)
            gl.store(counters + first_cta, 0)


@gluon.jit
def combine(
    out_row: gl.tensor,
    parts: gl.tensor,
    stats: gl.tensor,
    first_cta: gl.tensor,
    num_parts: gl.tensor,
    head_start: gl.tensor,
    chunk: gl.tensor,
    GROUP: gl.constexpr,
    D: gl.constexpr,
) -> None:
    """Add the parts of one row and head up, several at a time, in the order of their keys."""
    ROWS: gl.constexpr = triton.next_power_of_2(GROUP)
    BATCH: gl.constexpr = 4096 // (ROWS * D) if ROWS * D <= 1024 else 4
    LANES: gl.constexpr = D // 4
    # Each warp takes every fourth part.
    layout: gl.constexpr = gl.BlockedLayout(
        [1, 1, 4], [1, 32 // LANES, LANES], [NUM_WARPS, 1, 1], [2, 1, 0]
    )
    stats_layout: gl.constexpr = gl.SliceLayout(2, layout)
    out_layout: gl.constexpr = gl.SliceLayout(0, layout)
    member = gl.arange(0, ROWS, gl.SliceLayout(0, stats_layout))
    dim = gl.arange(0, D, gl.SliceLayout(0, out_layout))
    top = gl.full([ROWS], LOWEST, gl.float32, gl.SliceLayout(0, stats_layout))
    total_weight = gl.zeros([ROWS], gl.float32, gl.SliceLayout(0, stats_layout))
    acc = gl.zeros([ROWS, D], gl.float32, out_layout)
    for base in range(0, num_parts, BATCH):
        part = base + gl.arange(0, BATCH, gl.SliceLayout(1, stats_layout))
        is_part = (part < num_parts)[:, None]
        cta = first_cta + part
        # A program whose chunk begins in front of this head came to it with its last segment.
        rows = (2 * cta + (head_start > cta * chunk).to(gl.int32)) * NUM_QUERY_ROWS
        pointers = stats + 2 * rows[:, None] + member[None, :]
        tops = gl.load(pointers, mask=is_part, other=LOWEST, cache_modifier=".cg")
        sums = gl.load(pointers + NUM_QUERY_ROWS, mask=is_part, other=0.0, cache_modifier=".cg")
        places = gl.expand_dims(rows[:, None] + member[None, :], 2) * D
        places += gl.expand_dims(gl.expand_dims(dim, 0), 0)
        is_real = gl.expand_dims(is_part & (member < GROUP)[None, :], 2)
        values = gl.load(parts + places, mask=is_real, other=0.0, cache_modifier=".cg")
        new_top = gl.maximum(top, gl.max(tops, 0))
        shrink = gl.exp2(top - new_top)
        weight = gl.where(is_part, gl.exp2(tops - new_top[None, :]), 0.0)
        total_weight = total_weight * shrink + gl.sum(sums * weight, 0)
        added = gl.sum(values * gl.expand_dims(weight, 2), 0)
        acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, out_layout))[:, None] + added
        top = new_top
    scale = gl.convert_layout(1.0 / total_weight, gl.SliceLayout(1, out_layout))
    members = gl.arange(0, ROWS, gl.SliceLayout(1, out_layout))[:, None]
    gl.store(
        out_row + members * D + dim[None, :],
        (acc * scale[:, None]).to(out_row.dtype.element_ty),
        mask=members < GROUP,
    )

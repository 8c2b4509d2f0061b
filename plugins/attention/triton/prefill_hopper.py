"""Several queries of each of some rows on Hopper: FlashAttention-3 (Shah et al., 2024) over pages.

A program stays on its multiprocessor and takes one block of queries after the other, from a counter.  One
of its warps copies queries, keys and values by the tensor memory accelerator, some tiles ahead and on into
the next block; each group of four warps attends for 64 rows of the matrix, tokens times query heads of
one key-value head, and has the products of one tile under way while it computes the softmax of another.

Tiles are walked from the last to the first, so that those which need a mask come first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from plugins.attention.triton.numbers import LOG2_E, LOWEST

if TYPE_CHECKING:
    import torch

BOX = gl.constexpr(64)
"""Keys, and numbers of a head, that are copied at once: 128 bytes are the width of the swizzle."""

ROWS = gl.constexpr(64)
"""Rows of one group of warps."""

NUM_GROUPS = gl.constexpr(2)
"""Groups of warps that attend, in turns."""

BLOCK_N = gl.constexpr(128)
"""Keys of a tile: two boxes."""

NUM_STAGES = gl.constexpr(2)
ATTENDING_REGISTERS = gl.constexpr(240)
COPYING_REGISTERS = gl.constexpr(24)
"""Of a thread.  All sizes together: the best of eight on an H200, at 2k to 32k tokens."""

PACK_BF16 = gl.constexpr("cvt.rn.bf16x2.f32 $0, $2, $1;")
PACK_FP16 = gl.constexpr("cvt.rn.f16x2.f32 $0, $2, $1;")

NUM_NOTES = gl.constexpr(4)
"""Numbers that describe a block of queries to those who attend."""


BOXES = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=3)


def make_boxes(pages: torch.Tensor) -> TensorDescriptor:
    """Describe the keys or values of a layer to the tensor memory accelerator.

    :param pages: [num_blocks, G, block_size, D], contiguous, of two bytes a number; block_size a multiple
        of 64 and D of 64.
    """
    width = BOX.value
    return TensorDescriptor.from_tensor(pages.flatten(0, 1), [1, width, width], BOXES)


def make_query_boxes(q: torch.Tensor, num_heads: int, group: int, dim: int) -> TensorDescriptor:
    """Describe queries.

    :param q: [T, ...], each row beginning with its heads and aligned to 16 bytes.
    :param group: query heads of a key-value head, padded to a power of two.
    """
    return TensorDescriptor(
        q,
        [q.shape[0], num_heads, dim],
        [q.stride(0), dim, 1],
        [ROWS.value // group, group, BOX.value],
        BOXES,
    )


@gluon.jit(do_not_specialize=["table_stride", "num_rows", "is_early"])
def prefill_hopper(
    q_boxes: gl.tensor,  # descriptor of q as [T, H, D], in boxes [ROWS / GROUP_PADDED, GROUP_PADDED, BOX]
    k_boxes: gl.tensor,  # descriptor of the keys as [num_blocks · G, BLOCK_SIZE, D], in boxes [1, BOX, BOX]
    v_boxes: gl.tensor,  # as k_boxes
    out: gl.tensor,  # [T, H, D], written
    plan: gl.tensor,  # of plan_prompts, for blocks of NUM_GROUPS · ROWS / GROUP_PADDED tokens
    query_starts: gl.tensor,  # [S + 1] int32
    seq_lens: gl.tensor,  # [S] int32
    tables: gl.tensor,  # [S, table_stride] int32
    counters: gl.tensor,  # [2] int32, zero before and after
    table_stride: gl.tensor,
    num_rows: gl.tensor,
    is_early: gl.tensor,  # 1 if the plan is older than the kernel in front of this one, else 0
    scale: gl.tensor,
    G: gl.constexpr,
    GROUP: gl.constexpr,
    GROUP_PADDED: gl.constexpr,
    D: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
) -> None:
    """Attend for blocks of queries until none is left."""
    dtype: gl.constexpr = k_boxes.dtype
    flat: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    boxes: gl.constexpr = BLOCK_N // BOX * (D // BOX)
    k_ring = gl.allocate_shared_memory(dtype, [NUM_STAGES * boxes, 1, BOX, BOX], k_boxes.layout)
    v_ring = gl.allocate_shared_memory(dtype, [NUM_STAGES * boxes, 1, BOX, BOX], v_boxes.layout)
    q_ring = gl.allocate_shared_memory(
        dtype,
        [NUM_GROUPS * (D // BOX), ROWS // GROUP_PADDED, GROUP_PADDED, BOX],
        q_boxes.layout,
    )
    k_tiles = k_ring._reinterpret(dtype, [NUM_STAGES, BLOCK_N, D], flat)  # noqa: SLF001  there is no other
    v_tiles = v_ring._reinterpret(dtype, [NUM_STAGES, BLOCK_N, D], flat)  # noqa: SLF001  there is no other
    q_tiles = q_ring._reinterpret(dtype, [NUM_GROUPS, ROWS, D], flat)  # noqa: SLF001
    notes = gl.allocate_shared_memory(gl.int32, [NUM_NOTES, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    k_full = make_barriers(NUM_STAGES, 1)
    v_full = make_barriers(NUM_STAGES, 1)
    q_full = make_barriers(1, 1)
    k_empty = make_barriers(NUM_STAGES, NUM_GROUPS)
    v_empty = make_barriers(NUM_STAGES, NUM_GROUPS)
    q_empty = make_barriers(1, NUM_GROUPS)
    fence_async_shared()

    # Constants would not stay constant in a tuple with a name.
    copied = (
        q_boxes, k_boxes, v_boxes, q_ring, k_ring, v_ring, notes,
        q_full, k_full, v_full, q_empty, k_empty, v_empty,
        plan, query_starts, seq_lens, tables, counters, table_stride, num_rows, is_early,
    )  # fmt: skip
    attended = (
        q_tiles, k_tiles, v_tiles, notes, q_full, k_full, v_full, q_empty, k_empty, v_empty, out, scale,
    )  # fmt: skip
    gl.warp_specialize([
        (attend, (attended, 0, G, GROUP, GROUP_PADDED, D)),
        (attend, (attended, 1, G, GROUP, GROUP_PADDED, D)),
        (copy_blocks, (copied, G, GROUP, GROUP_PADDED, D, BLOCK_SIZE)),
    ], [4, 1], [ATTENDING_REGISTERS, COPYING_REGISTERS])  # fmt: skip


@gluon.jit
def make_barriers(NUM: gl.constexpr, COUNT: gl.constexpr) -> gl.shared_memory_descriptor:
    """Make barriers, each of which is passed after so many arrivals."""
    barriers = gl.allocate_shared_memory(gl.int64, [NUM, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(NUM):
        mbarrier.init(barriers.index(i), count=COUNT)
    return barriers


# --- the warp that copies --------------------------------------------------------------------------


@gluon.jit
def copy_blocks(
    copied: gl.tuple,
    G: gl.constexpr,
    GROUP: gl.constexpr,
    GROUP_PADDED: gl.constexpr,
    D: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
) -> None:
    """Take blocks of queries and copy what they need, in the order in which it is wanted.

    Units are numbered by row, then from the last block of queries to the first, then by head.
    """
    (
        q_boxes, k_boxes, v_boxes, q_ring, k_ring, v_ring, notes,
        q_full, k_full, v_full, q_empty, k_empty, v_empty,
        plan, query_starts, seq_lens, tables, counters, table_stride, num_rows, is_early,
    ) = copied  # fmt: skip
    # Where the first block lies is found out while the kernel in front still runs, if that is allowed.
    if is_early == 0:
        gdc_wait()
    BLOCK_TOKENS: gl.constexpr = NUM_GROUPS * ROWS // GROUP_PADDED
    num_programs = gl.num_programs(0)
    num_units = gl.load(plan + num_rows) * G
    unit = gl.program_id(0)
    num_copied = 0  # tiles
    turn = 0
    while unit < num_units:
        next_unit = gl.atomic_add(counters, 1) + num_programs
        row = gl.load(plan + num_rows + 1 + unit // G)
        row_end = gl.load(plan + row + 1)
        head = unit % G
        first_query = (row_end - 1 - unit // G) * BLOCK_TOKENS
        query_start = gl.load(query_starts + row)
        num_left = gl.load(query_starts + row + 1) - query_start - first_query
        seq_len = gl.load(seq_lens + row)
        first_position = seq_len - num_left
        table = tables + row * table_stride
        tile = gl.cdiv(first_position + gl.minimum(num_left, BLOCK_TOKENS), BLOCK_N) - 1
        places = find_boxes(table, tile, seq_len, head, G, BLOCK_SIZE)
        if turn == 0:
            gdc_wait()
        copy_tile(k_boxes, k_ring, k_full, k_empty, num_copied, places, D)

        mbarrier.wait(q_empty.index(0), turn & 1 ^ 1)
        write_note(notes, 0, num_left)
        write_note(notes, 1, query_start + first_query)
        write_note(notes, 2, first_position)
        write_note(notes, 3, head)
        mbarrier.expect(q_full.index(0), NUM_GROUPS * ROWS * D * 2)
        for group in gl.static_range(NUM_GROUPS):
            for half in gl.static_range(D // BOX):
                tma.async_copy_global_to_shared(
                    q_boxes,
                    [
                        query_start + first_query + group * (ROWS // GROUP_PADDED),
                        head * GROUP,
                        half * BOX,
                    ],
                    q_full.index(0),
                    q_ring.index(group * (D // BOX) + half),
                )

        for _ in range(tile):
            tile -= 1
            next_places = find_boxes(table, tile, seq_len, head, G, BLOCK_SIZE)
            copy_tile(k_boxes, k_ring, k_full, k_empty, num_copied + 1, next_places, D)
            copy_tile(v_boxes, v_ring, v_full, v_empty, num_copied, places, D)
            places = next_places
            num_copied += 1
        copy_tile(v_boxes, v_ring, v_full, v_empty, num_copied, places, D)
        num_copied += 1
        turn += 1
        unit = next_unit

    mbarrier.wait(q_empty.index(0), turn & 1 ^ 1)
    write_note(notes, 0, num_units * 0)
    mbarrier.arrive(q_full.index(0), count=1)
    if gl.atomic_add(counters + 1, 1) == num_programs - 1:  # all others have taken their last
        gl.store(counters, 0)
        gl.store(counters + 1, 0)


@gluon.jit
def write_note(notes: gl.shared_memory_descriptor, place: gl.tensor, value: gl.tensor) -> None:
    """Leave a number for those who attend."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    notes.index(place).store(gl.full([1], value, gl.int32, layout))


@gluon.jit
def find_boxes(
    table: gl.tensor,
    tile: gl.tensor,
    seq_len: gl.tensor,
    head: gl.tensor,
    G: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
) -> gl.tensor:
    """Find page and first place in it of the first and the last box of a tile."""
    first_key = tile * BLOCK_N
    page, start = find_box(table, first_key, seq_len, head, G, BLOCK_SIZE)
    last_page, last_start = find_box(table, first_key + BOX, seq_len, head, G, BLOCK_SIZE)
    return page, start, last_page, last_start


@gluon.jit
def find_box(
    table: gl.tensor,
    first_key: gl.tensor,
    seq_len: gl.tensor,
    head: gl.tensor,
    G: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
) -> gl.tensor:
    """Find page and first place in it of the box that holds some keys.

    Behind the keys of a sequence anything may lie, and no weight, not even zero, is proof against NaN.
    The last box of a sequence therefore ends with the last key, not behind it: what comes in front of
    the keys are earlier ones, which have no weight, or what the accelerator puts in front of a page, zeros.
    """
    num_keys = gl.minimum(seq_len - first_key, BOX)
    page = gl.load(table + gl.minimum(first_key, seq_len - 1) // BLOCK_SIZE) * G + head
    return page, gl.where(num_keys > 0, first_key % BLOCK_SIZE + num_keys, 0) - BOX


@gluon.jit
def copy_tile(
    boxes: gl.tensor,
    ring: gl.shared_memory_descriptor,
    full: gl.shared_memory_descriptor,
    empty: gl.shared_memory_descriptor,
    count: gl.tensor,
    places: gl.tensor,
    D: gl.constexpr,
) -> None:
    """Copy a tile, the count-th of all, as soon as there is room."""
    stage = count % NUM_STAGES
    barrier = full.index(stage)
    mbarrier.wait(empty.index(stage), count // NUM_STAGES & 1 ^ 1)
    mbarrier.expect(barrier, BLOCK_N * D * 2)
    num: gl.constexpr = BLOCK_N // BOX
    for half in gl.static_range(D // BOX):
        for i in gl.static_range(num):
            tma.async_copy_global_to_shared(
                boxes,
                [places[2 * i], places[2 * i + 1], half * BOX],
                barrier,
                ring.index((stage * (D // BOX) + half) * num + i),
            )


# --- the warps that attend -------------------------------------------------------------------------


@gluon.jit
def attend(
    attended: gl.tuple,
    INDEX: gl.constexpr,
    G: gl.constexpr,
    GROUP: gl.constexpr,
    GROUP_PADDED: gl.constexpr,
    D: gl.constexpr,
) -> None:
    """Attend for the INDEX-th 64 rows of each block, as one group of four warps."""
    (
        q_tiles, k_tiles, v_tiles, notes, q_full, k_full, v_full, q_empty, k_empty, v_empty, out, scale,
    ) = attended  # fmt: skip
    gdc_wait()
    gdc_launch_dependents()
    BLOCK_TOKENS: gl.constexpr = NUM_GROUPS * ROWS // GROUP_PADDED
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    dtype: gl.constexpr = k_tiles.dtype
    factor = scale * LOG2_E
    num_seen = 0  # tiles
    turn = 0
    if INDEX == NUM_GROUPS - 1:
        give_turn(INDEX)
    mbarrier.wait(q_full.index(0), 0)
    num_left = read_note(notes, 0)
    while num_left > 0:
        # Read long before the place is given back, though first used after that.
        first_token = read_note(notes, 1)
        first_position = read_note(notes, 2)
        head = read_note(notes, 3)
        queries = q_tiles.index(INDEX)

        row = INDEX * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, SCORES))
        position = first_position + row // GROUP_PADDED
        own_position = first_position + INDEX * (ROWS // GROUP_PADDED)
        seq_len = first_position + num_left
        num_tiles = gl.cdiv(first_position + gl.minimum(num_left, BLOCK_TOKENS), BLOCK_N)
        last = num_tiles - 1
        num_whole = gl.minimum((own_position + 1) // BLOCK_N, last)

        weights, top, total = weigh_last_tile(
            queries, k_tiles, k_full, k_empty, num_seen, factor, last, seq_len, position,
            SCORES,
        )  # fmt: skip
        shrink = gl.full([ROWS], 0.0, gl.float32, gl.SliceLayout(1, SCORES))
        acc = gl.zeros([ROWS, D], gl.float32, SUMS)
        for i in range(1, num_tiles - num_whole):
            acc, weights, top, total, shrink = attend_tile(
                queries, k_tiles, v_tiles, k_full, v_full, k_empty, v_empty,
                acc, weights, top, total, shrink, num_seen, factor, last - i, seq_len, position,
                INDEX, True, SCORES, SUMS,
            )  # fmt: skip
            num_seen += 1
        for i in range(num_whole):
            acc, weights, top, total, shrink = attend_tile(
                queries, k_tiles, v_tiles, k_full, v_full, k_empty, v_empty,
                acc, weights, top, total, shrink, num_seen, factor, i, seq_len, position,
                INDEX, False, SCORES, SUMS,
            )  # fmt: skip
            num_seen += 1
        mbarrier.arrive(q_empty.index(0))
        acc *= gl.convert_layout(shrink, gl.SliceLayout(1, SUMS))[:, None]
        stage = num_seen % NUM_STAGES
        mbarrier.wait(v_full.index(stage), num_seen // NUM_STAGES & 1)
        acc = warpgroup_mma(as_operand(weights, dtype, SUMS), v_tiles.index(stage), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(v_empty.index(stage))
        num_seen += 1
        store_block(
            out, acc, 1.0 / gl.sum(total, 1), first_token, head, num_left,
            INDEX, G, GROUP, GROUP_PADDED, D, SUMS,
        )  # fmt: skip
        turn += 1
        mbarrier.wait(q_full.index(0), turn & 1)
        num_left = read_note(notes, 0)


@gluon.jit
def weigh_last_tile(
    queries: gl.shared_memory_descriptor,
    k_tiles: gl.shared_memory_descriptor,
    k_full: gl.shared_memory_descriptor,
    k_empty: gl.shared_memory_descriptor,
    num_seen: gl.tensor,
    factor: gl.tensor,
    tile: gl.tensor,
    seq_len: gl.tensor,
    position: gl.tensor,
    SCORES: gl.constexpr,
) -> gl.tensor:
    """Weigh the keys of the tile with which a block of queries begins.

    :return: weights, top, total.
    """
    stage = num_seen % NUM_STAGES
    mbarrier.wait(k_full.index(stage), num_seen // NUM_STAGES & 1)
    scores = warpgroup_mma(
        queries,
        k_tiles.index(stage).permute((1, 0)),
        gl.zeros([ROWS, BLOCK_N], gl.float32, SCORES),
        use_acc=False,
        is_async=True,
    )
    scores = warpgroup_mma_wait(0, deps=[scores])
    mbarrier.arrive(k_empty.index(stage))
    scores = mask_tile(scores, tile, seq_len, position, SCORES)
    top = gl.maximum(gl.max(scores, 1), LOWEST)
    weights = gl.exp2(scores * factor - (top * factor)[:, None])
    return pack(weights, k_tiles.dtype), top, sum_own(weights)


@gluon.jit
def attend_tile(
    queries: gl.shared_memory_descriptor,
    k_tiles: gl.shared_memory_descriptor,
    v_tiles: gl.shared_memory_descriptor,
    k_full: gl.shared_memory_descriptor,
    v_full: gl.shared_memory_descriptor,
    k_empty: gl.shared_memory_descriptor,
    v_empty: gl.shared_memory_descriptor,
    acc: gl.tensor,
    weights: gl.tensor,
    top: gl.tensor,
    total: gl.tensor,
    shrink: gl.tensor,
    num_seen: gl.tensor,
    factor: gl.tensor,
    tile: gl.tensor,
    seq_len: gl.tensor,
    position: gl.tensor,
    INDEX: gl.constexpr,
    IS_MASKED: gl.constexpr,
    SCORES: gl.constexpr,
    SUMS: gl.constexpr,
) -> gl.tensor:
    """Add up the values of the tile before, and meanwhile weigh the keys of this one.

    :param weights: of the tile before.
    :param shrink: by which `acc` must be multiplied before.
    :return: the same for the next tile: acc, weights, top, total, shrink.
    """
    dtype: gl.constexpr = k_tiles.dtype
    v_stage = num_seen % NUM_STAGES
    k_stage = (num_seen + 1) % NUM_STAGES
    mbarrier.wait(k_full.index(k_stage), (num_seen + 1) // NUM_STAGES & 1)
    await_turn(INDEX)
    scores = warpgroup_mma(
        queries,
        k_tiles.index(k_stage).permute((1, 0)),
        gl.zeros([ROWS, BLOCK_N], gl.float32, SCORES),
        use_acc=False,
        is_async=True,
    )
    acc *= gl.convert_layout(shrink, gl.SliceLayout(1, SUMS))[:, None]
    mbarrier.wait(v_full.index(v_stage), num_seen // NUM_STAGES & 1)
    acc = warpgroup_mma(as_operand(weights, dtype, SUMS), v_tiles.index(v_stage), acc, is_async=True)
    give_turn(INDEX)
    scores = warpgroup_mma_wait(1, deps=[scores])
    mbarrier.arrive(k_empty.index(k_stage))
    if IS_MASKED:
        scores = mask_tile(scores, tile, seq_len, position, SCORES)
    new_top = gl.maximum(top, gl.max(scores, 1))
    shrink = gl.exp2((top - new_top) * factor)
    new_weights = gl.exp2(scores * factor - (new_top * factor)[:, None])
    by_thread: gl.constexpr = gl.SliceLayout(1, total.type.layout)
    total *= gl.convert_layout(shrink, by_thread, assert_trivial=True)[:, None]
    total += sum_own(new_weights)
    # The assembler would move the wait in front of the softmax, were there no branch between the two.
    mbarrier.wait(v_full.index(v_stage), num_seen // NUM_STAGES & 1)
    acc = warpgroup_mma_wait(0, deps=[acc])
    mbarrier.arrive(v_empty.index(v_stage))
    return acc, pack(new_weights, dtype), new_top, total, shrink


@gluon.jit
def mask_tile(
    scores: gl.tensor,
    tile: gl.tensor,
    seq_len: gl.tensor,
    position: gl.tensor,
    SCORES: gl.constexpr,
) -> gl.tensor:
    """Hide keys behind a query, and what lies in front of the keys in the last box of a sequence."""
    column = gl.arange(0, BLOCK_N, gl.SliceLayout(0, SCORES))
    # Which box it is in is known to the compiler by this form alone.
    box_start = column & BOX
    first_key = tile * BLOCK_N + box_start
    num_keys = gl.minimum(gl.maximum(seq_len - first_key, 0), BOX)
    # Negative where there is no key, and then a large number without sign.
    key = column - box_start + num_keys - BOX
    num_visible = gl.maximum(position[:, None] + 1 - first_key[None, :], 0)
    # A `where` would do, but the compiler gathers its conditions in bit masks and takes them apart again.
    return gl.inline_asm_elementwise(
        "{.reg .pred p; setp.lt.u32 p, $2, $3; selp.f32 $0, $1, 0fFF800000, p;}",
        "=r,r,r,r",
        [scores, gl.expand_dims(key, 0), num_visible],
        dtype=gl.float32,
        is_pure=True,
        pack=1,
    )


@gluon.jit
def pack(weights: gl.tensor, dtype: gl.constexpr) -> gl.tensor:
    """Round weights, two to a register.

    :param weights: [ROWS, BLOCK_N] float32.
    :return: [ROWS, BLOCK_N / 2] int32.
    """
    pairs = weights.reshape([weights.shape[0], weights.shape[1] // 2, 2])
    low, high = gl.split(pairs)
    assembly: gl.constexpr = PACK_BF16 if dtype == gl.bfloat16 else PACK_FP16
    return gl.inline_asm_elementwise(
        assembly, "=r,r,r", [low, high], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def as_operand(packed: gl.tensor, dtype: gl.constexpr, SUMS: gl.constexpr) -> gl.tensor:
    """See packed weights as the left side of a product; no number leaves its thread.

    :return: [ROWS, BLOCK_N].
    """
    pairs = gl.join(packed.to(gl.int16), (packed >> 16).to(gl.int16))
    weights = pairs.reshape([packed.shape[0], packed.shape[1] * 2]).to(dtype, bitcast=True)
    return gl.convert_layout(weights, gl.DotOperandLayout(0, SUMS, 2))


@gluon.jit
def sum_own(weights: gl.tensor) -> gl.tensor:
    """Add up what one thread has of each row: every fourth pair.

    :param weights: [ROWS, BLOCK_N].
    :return: [ROWS, 4].
    """
    return gl.sum(gl.sum(weights.reshape([weights.shape[0], weights.shape[1] // 8, 4, 2]), 3), 1)


@gluon.jit
def store_block(
    out: gl.tensor,
    acc: gl.tensor,
    norm: gl.tensor,
    first_token: gl.tensor,
    head: gl.tensor,
    num_left: gl.tensor,
    INDEX: gl.constexpr,
    G: gl.constexpr,
    GROUP: gl.constexpr,
    GROUP_PADDED: gl.constexpr,
    D: gl.constexpr,
    SUMS: gl.constexpr,
) -> None:
    """Store what the queries of one group of warps have seen."""
    acc *= gl.convert_layout(norm, gl.SliceLayout(1, SUMS))[:, None]
    row = INDEX * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, SUMS))
    query, member = row // GROUP_PADDED, row % GROUP_PADDED
    dim = gl.arange(0, D, gl.SliceLayout(0, SUMS))
    start = ((first_token + query).to(gl.int64) * G + head) * (GROUP * D) + member * D
    is_real = (query < num_left) & (member < GROUP)
    gl.store(
        out + start[:, None] + dim[None, :],
        acc.to(out.dtype.element_ty),
        mask=is_real[:, None] & (dim < D)[None, :],
    )


@gluon.jit
def read_note(notes: gl.shared_memory_descriptor, place: gl.tensor) -> gl.tensor:
    """Read what the warp that copies left."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    return gl.max(notes.index(place).load(layout), 0)


@gluon.jit
def await_turn(INDEX: gl.constexpr) -> None:
    """Wait until the other group of warps has issued its products."""
    if INDEX == 0:
        issue("bar.sync 8, 256; mov.u32 $0, 0;")
    else:
        issue("bar.sync 9, 256; mov.u32 $0, 0;")


@gluon.jit
def give_turn(INDEX: gl.constexpr) -> None:
    """Let the other group of warps issue its products."""
    if INDEX == 1:
        issue("bar.arrive 8, 256; mov.u32 $0, 0;")
    else:
        issue("bar.arrive 9, 256; mov.u32 $0, 0;")


@gluon.jit
def issue(ASSEMBLY: gl.constexpr) -> None:
    """Issue instructions that have an effect but no result."""
    gl.inline_asm_elementwise(ASSEMBLY, "=r", [], dtype=gl.int32, is_pure=False, pack=1)

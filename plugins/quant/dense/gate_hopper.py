"""activation(gate) · up of many tokens on Hopper, in one kernel: x [M, K] by a weight of 2 N rows -> [M, N].

The library's product leaves both halves in memory, rounded, for a second kernel.  Here the halves of a
tile meet in the registers of one thread, and what is written is a quarter of it, rounded once.

A program stays on its multiprocessor and takes one tile after the other.  One of its warps copies the next
columns of x and the weight into a ring of buffers in shared memory, by the tensor memory accelerator; two groups
of four warps multiply, each 64 tokens (warp specialization as in CUTLASS).  At 8192 tokens a card is at the limit
of its power, and fewer bytes on their way make it faster than more arithmetic would.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import triton
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

from plugins.quant.dense.kernels import activate

if TYPE_CHECKING:
    import torch

ROWS = gl.constexpr(64)
"""Tokens of a group of warps."""
NUM_GROUPS = gl.constexpr(2)
COLUMNS = gl.constexpr(128)
"""Outputs of a tile."""
BLOCK_K = gl.constexpr(64)
"""Inputs of a stage: 128 bytes are the width of the swizzle."""
NUM_STAGES = gl.constexpr(4)
TILES_TOGETHER = gl.constexpr(12)
"""Tiles of tokens that share a piece of the weight while it is in the L2 cache."""
FEW_TOKENS: Final = 256
MIN_EFFICIENCY: Final = (0.8, 0.9)
"""Share of the time in which multiprocessors have something to do, at least, for few tokens and for more:
below, the library with a kernel behind it was faster on an H200 (at 192, 320, 384, 512 and 640 tokens)."""
BOXES: Final = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)


@gluon.jit(do_not_specialize=["num_tokens"])
def gate_hopper(
    x_boxes: tma.tensor_descriptor,  # of x [M, K], in boxes [ROWS, BLOCK_K]
    w_boxes: tma.tensor_descriptor,  # of the weight [2 N, K], in boxes [COLUMNS, BLOCK_K]
    out_boxes: tma.tensor_descriptor,  # of [M, N], in boxes [ROWS, COLUMNS]
    num_tokens: gl.tensor,
    N: gl.constexpr,
    K: gl.constexpr,
    ACTIVATION: gl.constexpr,
    OVERLAP: gl.constexpr,
) -> None:
    """Compute tiles of [NUM_GROUPS · ROWS, COLUMNS] until none is left."""
    dtype: gl.constexpr = x_boxes.dtype
    x_ring = gl.allocate_shared_memory(dtype, [NUM_STAGES * NUM_GROUPS, ROWS, BLOCK_K], x_boxes.layout)
    w_ring = gl.allocate_shared_memory(dtype, [NUM_STAGES, 2 * COLUMNS, BLOCK_K], w_boxes.layout)
    results = gl.allocate_shared_memory(dtype, [NUM_GROUPS, ROWS, COLUMNS], out_boxes.layout)
    full = gl.allocate_shared_memory(gl.int64, [NUM_STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [NUM_STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(NUM_STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(free.index(stage), count=NUM_GROUPS)
    fence_async_shared()
    num_blocks = gl.cdiv(num_tokens, NUM_GROUPS * ROWS)
    gl.warp_specialize(
        [
            (multiply, (x_ring, w_ring, results, out_boxes, full, free, num_blocks, N, K, ACTIVATION, OVERLAP, 0)),
            (multiply, (x_ring, w_ring, results, out_boxes, full, free, num_blocks, N, K, ACTIVATION, OVERLAP, 1)),
            (copy_tiles, (x_boxes, w_boxes, x_ring, w_ring, full, free, num_blocks, N, K, OVERLAP)),
        ],
        [4, 1],
        [232, 24],
    )  # fmt: skip


@gluon.jit
def locate(tile: gl.tensor, num_blocks: gl.tensor, N: gl.constexpr) -> gl.tuple:
    """Find a tile's block of tokens, and its block of columns: down TILES_TOGETHER, then to the right."""
    NUM_COLUMNS: gl.constexpr = (N + COLUMNS - 1) // COLUMNS
    first = tile // (TILES_TOGETHER * NUM_COLUMNS) * TILES_TOGETHER
    together = gl.minimum(num_blocks - first, TILES_TOGETHER)
    inner = tile % (TILES_TOGETHER * NUM_COLUMNS)
    return first + inner % together, inner // together


@gluon.jit
def copy_tiles(
    x_boxes: tma.tensor_descriptor,
    w_boxes: tma.tensor_descriptor,
    x_ring: gl.shared_memory_descriptor,
    w_ring: gl.shared_memory_descriptor,
    full: gl.shared_memory_descriptor,
    free: gl.shared_memory_descriptor,
    num_blocks: gl.tensor,
    N: gl.constexpr,
    K: gl.constexpr,
    OVERLAP: gl.constexpr,
) -> None:
    """Copy what the tiles need, each stage as soon as it is free."""
    NUM_COLUMNS: gl.constexpr = (N + COLUMNS - 1) // COLUMNS
    STAGE_BYTES: gl.constexpr = (NUM_GROUPS * ROWS + 2 * COLUMNS) * BLOCK_K * 2
    if OVERLAP:
        gdc_wait()
    count = 0
    for tile in range(gl.program_id(0), num_blocks * NUM_COLUMNS, gl.num_programs(0)):
        block, column = locate(tile, num_blocks, N)
        for k in range(0, K, BLOCK_K):
            stage = count % NUM_STAGES
            barrier = full.index(stage)
            mbarrier.wait(free.index(stage), count // NUM_STAGES & 1 ^ 1)
            mbarrier.expect(barrier, STAGE_BYTES)
            weights = w_ring.index(stage)
            for half in gl.static_range(2):
                tma.async_copy_global_to_shared(
                    w_boxes, [half * N + column * COLUMNS, k], barrier,
                    weights.slice(half * COLUMNS, COLUMNS),
                )  # fmt: skip
            for group in gl.static_range(NUM_GROUPS):
                tma.async_copy_global_to_shared(
                    x_boxes, [(block * NUM_GROUPS + group) * ROWS, k], barrier,
                    x_ring.index(stage * NUM_GROUPS + group),
                )  # fmt: skip
            count += 1


@gluon.jit
def multiply(
    x_ring: gl.shared_memory_descriptor,
    w_ring: gl.shared_memory_descriptor,
    results: gl.shared_memory_descriptor,
    out_boxes: tma.tensor_descriptor,
    full: gl.shared_memory_descriptor,
    free: gl.shared_memory_descriptor,
    num_blocks: gl.tensor,
    N: gl.constexpr,
    K: gl.constexpr,
    ACTIVATION: gl.constexpr,
    OVERLAP: gl.constexpr,
    GROUP: gl.constexpr,
) -> None:
    """Multiply the tokens of one group of warps, tile by tile."""
    NUM_COLUMNS: gl.constexpr = (N + COLUMNS - 1) // COLUMNS
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 2 * COLUMNS, 16])
    result = results.index(GROUP)
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    count = 0
    for tile in range(gl.program_id(0), num_blocks * NUM_COLUMNS, gl.num_programs(0)):
        block, column = locate(tile, num_blocks, N)
        sums = gl.zeros([ROWS, 2 * COLUMNS], gl.float32, layout)
        for k in range(0, K, BLOCK_K):
            stage = count % NUM_STAGES
            mbarrier.wait(full.index(stage), count // NUM_STAGES & 1)
            tokens, weights = x_ring.index(stage * NUM_GROUPS + GROUP), w_ring.index(stage)
            sums = warpgroup_mma(tokens, weights.permute((1, 0)), sums, is_async=True)
            # All products but the last are complete: what they read may be overwritten.
            sums = warpgroup_mma_wait(1, deps=(sums,))
            mbarrier.arrive(free.index((count + NUM_STAGES - 1) % NUM_STAGES), pred=k > 0)
            count += 1
        sums = warpgroup_mma_wait(0, deps=(sums,))
        mbarrier.arrive(free.index((count + NUM_STAGES - 1) % NUM_STAGES))
        gate, up = sums.reshape([ROWS, 2, COLUMNS]).permute((0, 2, 1)).split()
        tma.store_wait(0)
        result.store((activate(gate, ACTIVATION) * up).to(result.dtype))
        fence_async_shared()
        row = (block * NUM_GROUPS + GROUP) * ROWS
        tma.async_copy_shared_to_global(out_boxes, [row, column * COLUMNS], result)
    tma.store_wait(0)


def is_worth_it(num_tokens: int, num_outputs: int, num_sms: int) -> bool:
    """Whether tiles of these sizes keep the multiprocessors busy enough."""
    tile_tokens = NUM_GROUPS.value * ROWS.value
    num_columns = -(-num_outputs // COLUMNS.value)
    num_rounds = -(-num_columns * -(-num_tokens // tile_tokens) // num_sms)
    efficiency = num_tokens * num_columns / (num_rounds * num_sms * tile_tokens)
    return bool(efficiency >= MIN_EFFICIENCY[num_tokens > FEW_TOKENS])


def launch_gate(
    x: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    activation: str,
    *,
    num_sms: int,
    overlap: bool,
) -> None:
    """Compute activation(gate) · up.

    :param x: [M, K] of two bytes a number, rows 16 bytes aligned; K a multiple of 8.
    :param weight: [2 N, K], contiguous.
    :param out: [M, N], contiguous; N a multiple of 8.
    """
    num_tokens, size = out.shape
    tile_tokens = NUM_GROUPS.value * ROWS.value
    num_tiles = triton.cdiv(num_tokens, tile_tokens) * triton.cdiv(size, COLUMNS.value)
    gate_hopper[(min(num_sms, num_tiles),)](
        _describe(x, ROWS.value, BLOCK_K.value),
        _describe(weight, COLUMNS.value, BLOCK_K.value),
        _describe(out, ROWS.value, COLUMNS.value),
        num_tokens, size, x.shape[1], activation, overlap,
        num_warps=4, launch_pdl=overlap,
    )  # fmt: skip


def _describe(matrix: torch.Tensor, num_rows: int, num_columns: int) -> TensorDescriptor:
    return TensorDescriptor(
        matrix, list(matrix.shape), [matrix.stride(0), 1], [num_rows, num_columns], BOXES
    )

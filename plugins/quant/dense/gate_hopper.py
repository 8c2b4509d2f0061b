"""activation(gate) · up of many tokens on Hopper, in one kernel: x [M, K] by a weight of 2 N rows -> [M, N].

The library's product leaves both halves in memory, rounded, for a second kernel.  Here the halves of a
tile meet in the registers of one thread, and what is written is a quarter of it, rounded once.

A program stays on its multiprocessor and takes one tile after the other.  One of its warps copies the next
columns of x and the weight into a ring of buffers in shared memory, by the tensor memory accelerator; two groups
of four warps multiply, each 64 tokens (warp specialization as in CUTLASS).  At 8192 tokens a card is at the limit
of its power, and fewer bytes on their way make it faster than more arithmetic would.

Where the tiles of few tokens would not fill the last round, programs share them: the steps of all tiles over the
same tokens are cut into ranges of equal length, which may end within a tile (Stream-K, Osama et al., 2023).
Whoever has the beginning of a tile adds what others leave in a workspace; they come to it first and he comes
to it last, so that he hardly ever waits.  Programs of one range have the same piece of the weight at the same
time, each for other tokens, and it is read from memory once.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, Final, NamedTuple

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

    from plugins.quant.dense.launch import Weights, Workspace
    from plugins.quant.dense.operation import Kernel

ROWS = gl.constexpr(64)
"""Tokens of a group of warps."""
NUM_GROUPS = gl.constexpr(2)
COLUMNS = gl.constexpr(128)
"""Outputs of a tile."""
BLOCK_K = gl.constexpr(64)
"""Inputs of a stage: 128 bytes are the width of the swizzle."""
NUM_STAGES = gl.constexpr(4)
TILES_TOGETHER = gl.constexpr(16)
"""Tiles of tokens that share a piece of the weight while it is in the L2 cache."""
SHARING_ROUNDS: Final = 0.25
"""What it takes to leave sums and to add them, in times of a tile."""
MIN_EFFICIENCY: Final = 0.8
"""Share of the time in which multiprocessors have something to do, at least: below, the library with a
kernel behind it is faster on an H200."""
BOXES: Final = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)


@gluon.jit(do_not_specialize=["num_tokens"])
def gate_hopper(
    x_boxes: tma.tensor_descriptor,  # of x [M, K], in boxes [ROWS, BLOCK_K]
    w_boxes: tma.tensor_descriptor,  # of the weight [2 N, K], in boxes [COLUMNS, BLOCK_K]
    out_boxes: tma.tensor_descriptor,  # of [M, N], in boxes [ROWS, COLUMNS]
    partials: gl.tensor,  # [programs, NUM_GROUPS, ROWS, 2 · COLUMNS] float32, workspace
    arrivals: gl.tensor,  # [programs, NUM_GROUPS] int32, zero before and after
    num_tokens: gl.tensor,
    N: gl.constexpr,
    K: gl.constexpr,
    ACTIVATION: gl.constexpr,
    IS_SHARED: gl.constexpr,
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
            (
                multiply,
                (
                    x_ring, w_ring, results, out_boxes, partials, arrivals, full, free,
                    num_blocks, N, K, ACTIVATION, IS_SHARED, OVERLAP, 0,
                ),
            ),
            (
                multiply,
                (
                    x_ring, w_ring, results, out_boxes, partials, arrivals, full, free,
                    num_blocks, N, K, ACTIVATION, IS_SHARED, OVERLAP, 1,
                ),
            ),
            (
                copy_tiles,
                (x_boxes, w_boxes, x_ring, w_ring, full, free, num_blocks, N, K, IS_SHARED, OVERLAP),
            ),
        ],
        [4, 1],
        [232, 24],
    )  # fmt: skip


# --- who does what ---------------------------------------------------------------------------------


@gluon.jit
def find_range(
    place: gl.tensor, num_blocks: gl.tensor, NUM_COLUMNS: gl.constexpr, NUM_STEPS: gl.constexpr
) -> gl.tuple:
    """Return the first step of a range and its last + 1, counted from column to column of tiles."""
    num_ranges = gl.num_programs(0) // num_blocks
    steps = NUM_COLUMNS * NUM_STEPS
    return place * steps // num_ranges, (place + 1) * steps // num_ranges


@gluon.jit
def count_segments(
    num_blocks: gl.tensor, NUM_COLUMNS: gl.constexpr, NUM_STEPS: gl.constexpr, IS_SHARED: gl.constexpr
) -> gl.tensor:
    """Count the tiles of which a program has something to do."""
    program = gl.program_id(0)
    if IS_SHARED:
        first, end = find_range(program // num_blocks, num_blocks, NUM_COLUMNS, NUM_STEPS)
        return gl.cdiv(end, NUM_STEPS) - first // NUM_STEPS
    return gl.cdiv(num_blocks * NUM_COLUMNS - program, gl.num_programs(0))


@gluon.jit
def locate(
    segment: gl.tensor,
    num_blocks: gl.tensor,
    NUM_COLUMNS: gl.constexpr,
    NUM_STEPS: gl.constexpr,
    IS_SHARED: gl.constexpr,
) -> gl.tuple:
    """Find a tile's block of tokens and its column, and of its steps the first and the last + 1.

    Tiles that are not shared go down TILES_TOGETHER, then to the right.
    """
    program = gl.program_id(0)
    if IS_SHARED:
        first, end = find_range(program // num_blocks, num_blocks, NUM_COLUMNS, NUM_STEPS)
        column = first // NUM_STEPS + segment
        begin = gl.maximum(first - column * NUM_STEPS, 0)
        return program % num_blocks, column, begin, gl.minimum(end - column * NUM_STEPS, NUM_STEPS)
    tile = program + segment * gl.num_programs(0)
    top = tile // (TILES_TOGETHER * NUM_COLUMNS) * TILES_TOGETHER
    together = gl.minimum(num_blocks - top, TILES_TOGETHER)
    inner = tile % (TILES_TOGETHER * NUM_COLUMNS)
    return top + inner % together, inner // together, 0, NUM_STEPS


# --- producer --------------------------------------------------------------------------------------


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
    IS_SHARED: gl.constexpr,
    OVERLAP: gl.constexpr,
) -> None:
    """Copy what the tiles need, each stage as soon as it is free."""
    NUM_COLUMNS: gl.constexpr = (N + COLUMNS - 1) // COLUMNS
    NUM_STEPS: gl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    STAGE_BYTES: gl.constexpr = (NUM_GROUPS * ROWS + 2 * COLUMNS) * BLOCK_K * 2
    if OVERLAP:
        gdc_wait()
    count = 0
    for segment in range(count_segments(num_blocks, NUM_COLUMNS, NUM_STEPS, IS_SHARED)):
        block, column, begin, stop = locate(segment, num_blocks, NUM_COLUMNS, NUM_STEPS, IS_SHARED)
        for k in range(begin * BLOCK_K, stop * BLOCK_K, BLOCK_K):
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


# --- consumers -------------------------------------------------------------------------------------


@gluon.jit
def multiply(
    x_ring: gl.shared_memory_descriptor,
    w_ring: gl.shared_memory_descriptor,
    results: gl.shared_memory_descriptor,
    out_boxes: tma.tensor_descriptor,
    partials: gl.tensor,
    arrivals: gl.tensor,
    full: gl.shared_memory_descriptor,
    free: gl.shared_memory_descriptor,
    num_blocks: gl.tensor,
    N: gl.constexpr,
    K: gl.constexpr,
    ACTIVATION: gl.constexpr,
    IS_SHARED: gl.constexpr,
    OVERLAP: gl.constexpr,
    GROUP: gl.constexpr,
) -> None:
    """Multiply the tokens of one group of warps, tile by tile."""
    NUM_COLUMNS: gl.constexpr = (N + COLUMNS - 1) // COLUMNS
    NUM_STEPS: gl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 2 * COLUMNS, 16])
    result = results.index(GROUP)
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    count = 0
    for segment in range(count_segments(num_blocks, NUM_COLUMNS, NUM_STEPS, IS_SHARED)):
        block, column, begin, stop = locate(segment, num_blocks, NUM_COLUMNS, NUM_STEPS, IS_SHARED)
        sums = gl.zeros([ROWS, 2 * COLUMNS], gl.float32, layout)
        for step in range(begin, stop):
            stage = count % NUM_STAGES
            mbarrier.wait(full.index(stage), count // NUM_STAGES & 1)
            tokens, weights = x_ring.index(stage * NUM_GROUPS + GROUP), w_ring.index(stage)
            sums = warpgroup_mma(tokens, weights.permute((1, 0)), sums, is_async=True)
            # All products but the last are complete: what they read may be overwritten.
            sums = warpgroup_mma_wait(1, deps=(sums,))
            mbarrier.arrive(free.index((count + NUM_STAGES - 1) % NUM_STAGES), pred=step > begin)
            count += 1
        sums = warpgroup_mma_wait(0, deps=(sums,))
        mbarrier.arrive(free.index((count + NUM_STAGES - 1) % NUM_STAGES))
        if IS_SHARED and begin > 0:
            leave(sums, partials, arrivals, GROUP)
        else:
            if IS_SHARED and stop < NUM_STEPS:
                sums = add_others(
                    sums, partials, arrivals, column, stop, num_blocks, NUM_COLUMNS, NUM_STEPS, GROUP
                )
            gate, up = sums.reshape([ROWS, 2, COLUMNS]).permute((0, 2, 1)).split()
            tma.store_wait(0)
            result.store((activate(gate, ACTIVATION) * up).to(result.dtype))
            fence_async_shared()
            row = (block * NUM_GROUPS + GROUP) * ROWS
            tma.async_copy_shared_to_global(out_boxes, [row, column * COLUMNS], result)
    tma.store_wait(0)


# --- tiles of several programs ---------------------------------------------------------------------


@gluon.constexpr_function
def in_order() -> gl.BlockedLayout:
    """Tell where a thread's sums lie: four in a row, which are those of two rows and two columns."""
    return gl.BlockedLayout([1, 4], [1, 32], [1, 4], [1, 0])


@gluon.jit
def find_places(program: gl.tensor, GROUP: gl.constexpr) -> gl.tensor:
    """Tell where in the workspace the sums of a program's group lie: [COLUMNS / 4, 512]."""
    line = gl.arange(0, COLUMNS // 4, gl.SliceLayout(1, in_order()))[:, None]
    number = gl.arange(0, 512, gl.SliceLayout(0, in_order()))[None, :]
    return (program * NUM_GROUPS + GROUP) * (ROWS * 2 * COLUMNS) + line * 512 + number


@gluon.jit
def leave(sums: gl.tensor, partials: gl.tensor, arrivals: gl.tensor, GROUP: gl.constexpr) -> None:
    """Leave sums to whoever has the beginning of the tile, each thread for the same one of his."""
    program = gl.program_id(0)
    values = sums.reshape([4, 2, 8, COLUMNS // 4, 4, 2]).permute((3, 0, 2, 4, 1, 5))
    values = gl.convert_layout(values.reshape([COLUMNS // 4, 512]), in_order(), assert_trivial=True)
    gl.store(partials + find_places(program, GROUP), values, cache_modifier=".cg")
    gl.thread_barrier()  # all threads' stores come before the arrival is announced
    gl.atomic_add(arrivals + program * NUM_GROUPS + GROUP, 1, sem="release")


@gluon.jit
def add_others(
    sums: gl.tensor,
    partials: gl.tensor,
    arrivals: gl.tensor,
    column: gl.tensor,
    stop: gl.tensor,
    num_blocks: gl.tensor,
    NUM_COLUMNS: gl.constexpr,
    NUM_STEPS: gl.constexpr,
    GROUP: gl.constexpr,
) -> gl.tensor:
    """Add what the programs of the next ranges have of this tile, in their order."""
    layout: gl.constexpr = sums.type.layout
    program = gl.program_id(0)
    while stop < NUM_STEPS:
        program += num_blocks
        arrival = arrivals + program * NUM_GROUPS + GROUP
        arrived = gl.atomic_add(arrival, 0, sem="acquire")
        while arrived == 0:
            arrived = gl.atomic_add(arrival, 0, sem="acquire")
        values = gl.load(partials + find_places(program, GROUP), cache_modifier=".cg")
        values = values.reshape([COLUMNS // 4, 4, 8, 4, 2, 2]).permute((1, 4, 2, 0, 3, 5))
        values = values.reshape([ROWS, 2 * COLUMNS])
        sums += gl.convert_layout(values, layout, assert_trivial=True)
        gl.thread_barrier()  # all threads have seen the arrival
        gl.store(arrival, 0)
        _, end = find_range(program // num_blocks, num_blocks, NUM_COLUMNS, NUM_STEPS)
        stop = end - column * NUM_STEPS
    return sums


# --- launch ----------------------------------------------------------------------------------------


class Schedule(NamedTuple):
    """Who computes which tiles."""

    num_programs: int
    is_shared: bool
    num_rounds: float
    """What it takes, in times of a tile."""


@functools.lru_cache(maxsize=4096)
def make_schedule(num_tokens: int, num_outputs: int, num_sms: int, *, is_shared: bool) -> Schedule:
    """Divide the work; tiles are not shared if there are more of them for each column than programs."""
    num_blocks = triton.cdiv(num_tokens, NUM_GROUPS.value * ROWS.value)
    num_columns = triton.cdiv(num_outputs, COLUMNS.value)
    num_ranges = num_sms // num_blocks
    if is_shared and num_ranges:
        num_rounds = num_columns / num_ranges + SHARING_ROUNDS
        return Schedule(num_ranges * num_blocks, True, num_rounds)
    num_tiles = num_blocks * num_columns
    return Schedule(min(num_sms, num_tiles), False, triton.cdiv(num_tiles, num_sms))


@functools.lru_cache(maxsize=4096)
def choose_schedule(num_tokens: int, num_outputs: int, num_sms: int) -> Schedule | None:
    """Guess the faster schedule; None if neither keeps the multiprocessors busy enough."""
    schedules = [
        make_schedule(num_tokens, num_outputs, num_sms, is_shared=is_shared)
        for is_shared in (False, True)
    ]
    best = min(schedules, key=lambda schedule: schedule.num_rounds)
    num_tiles = num_tokens / (NUM_GROUPS.value * ROWS.value) * triton.cdiv(num_outputs, COLUMNS.value)
    return best if num_tiles / (best.num_rounds * num_sms) >= MIN_EFFICIENCY else None


class Gate:
    """activation(gate) · up by one weight, for any number of tokens that is worth it.

    Both schedules are compiled now, so that no number of tokens will have to wait for a compiler.

    :param layer: its weight is [2 N, K] of two bytes a number, contiguous; N and K multiples of 8.
    :param workspace: with room for a tile of each multiprocessor.
    :param kernel: `whole` or `shared` tiles, or `fused`: as `choose_schedule` says.
    :param overlap: whether the kernel may start while the one in front of it still runs.
    """

    def __init__(
        self,
        layer: Weights,
        activation: str,
        workspace: Workspace,
        num_sms: int,
        *,
        kernel: Kernel = "fused",
        overlap: bool,
    ) -> None:
        self._layer = layer
        self._kernel = kernel
        self._activation = activation
        self._workspace = workspace
        self._num_sms = num_sms
        self._overlap = overlap
        rows, num_inputs = layer.weight.shape
        x, out = layer.weight.new_empty((1, num_inputs)), layer.weight.new_empty((1, rows // 2))
        for is_shared in (False, True):
            arguments = self._arguments(x, out, is_shared=is_shared)
            gate_hopper.warmup(*arguments, grid=(1,), **self._options)

    def schedule_for(self, num_tokens: int) -> Schedule | None:
        """Return how to compute it for a number of tokens; None: the library is faster."""
        num_outputs = self._layer.weight.shape[0] // 2
        if self._kernel == "fused":
            return choose_schedule(num_tokens, num_outputs, self._num_sms)
        is_shared = self._kernel == "shared"
        return make_schedule(num_tokens, num_outputs, self._num_sms, is_shared=is_shared)

    def __call__(self, x: torch.Tensor, out: torch.Tensor, schedule: Schedule) -> None:
        """Compute.

        :param x: [M, K], rows 16 bytes aligned.
        :param out: [M, N], contiguous.
        """
        arguments = self._arguments(x, out, is_shared=schedule.is_shared)
        gate_hopper[(schedule.num_programs,)](*arguments, **self._options)

    @property
    def _options(self) -> dict[str, Any]:
        return {"num_warps": 4, "launch_pdl": self._overlap}

    def _arguments(self, x: torch.Tensor, out: torch.Tensor, *, is_shared: bool) -> tuple[Any, ...]:
        num_tokens, num_outputs = out.shape
        return (
            _describe(x, ROWS.value, BLOCK_K.value),
            _describe(self._layer.weight, COLUMNS.value, BLOCK_K.value),
            _describe(out, ROWS.value, COLUMNS.value),
            *self._workspace,
            num_tokens, num_outputs, x.shape[1], self._activation, is_shared, self._overlap,
        )  # fmt: skip


def _describe(matrix: torch.Tensor, num_rows: int, num_columns: int) -> TensorDescriptor:
    return TensorDescriptor(
        matrix, list(matrix.shape), [matrix.stride(0), 1], [num_rows, num_columns], BOXES
    )

"""Two kernels that draw tokens: the likeliest one of each row, then a race for rows that want chance.

The vocabulary of a row is cut into as many parts as fill the card.  Each program leaves the best of its
part in the workspace, and whichever of a row arrives last picks the best of those.  What is compared
is a number that depends on row and token alone, and equals go to the lower id, so that the cut
decides nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl

_GAMMA: tl.constexpr = tl.constexpr(0x9E3779B97F4A7C15)
_FACTOR_1: tl.constexpr = tl.constexpr(0xBF58476D1CE4E5B9)
_FACTOR_2: tl.constexpr = tl.constexpr(0x94D049BB133111EB)
_UNIT: tl.constexpr = tl.constexpr(2.0**-63 * (1.0 - 2.0**-24))
_LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
_SLACK: tl.constexpr = tl.constexpr(1.001)
"""More than what the approximate weights can be off by."""


@triton.jit
def _mix(value: tl.tensor) -> tl.tensor:
    """Apply SplitMix64's finaliser, as in `core.counter_rng`."""
    value = (value ^ (value >> 30)) * _FACTOR_1
    value = (value ^ (value >> 27)) * _FACTOR_2
    return value ^ (value >> 31)


@triton.jit
def _stream(seed: tl.tensor, position: tl.tensor) -> tl.tensor:
    """Hash seed and position, both int64, to the state of a stream of random numbers."""
    state = _mix(seed.to(tl.uint64) + _GAMMA)
    return _mix(state + position.to(tl.uint64) * _GAMMA + _GAMMA)


@triton.jit
def _uniform(stream: tl.tensor, ids: tl.tensor) -> tl.tensor:
    """Draw float32 in (0, 1) for tokens: `core.counter_rng.exponentials` before the logarithm."""
    bits = _mix(stream + (ids + 1).to(tl.uint64) * _GAMMA)
    bits = (bits & 0x7FFFFFFFFFFFFFFF) | 1
    return bits.to(tl.int64).to(tl.float32) * _UNIT


@triton.jit
def _exponential(uniform: tl.tensor) -> tl.tensor:
    """Compute -log(1 - uniform) with full relative precision (Kahan; HP-15C Advanced Functions)."""
    rest = 1.0 - uniform
    is_one = rest == 1.0
    slope = uniform / tl.where(is_one, -1.0, rest - 1.0)
    return tl.where(is_one, uniform, tl.log(rest) * slope)


@triton.jit
def _best_of(values: tl.tensor, ids: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Find the greatest value, and the lowest id that has it."""
    best = tl.max(values, 0)
    return best, tl.min(tl.where(values == best, ids, 0x7FFFFFFF), 0)


@triton.jit
def _pick(
    value: tl.tensor,
    index: tl.tensor,
    values: tl.tensor,
    ids: tl.tensor,
    arrivals: tl.tensor,
    num_parts: tl.tensor,
    MAX_PARTS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Leave the best of a part, and read all parts of the row if this is the last one.

    :return: whether it is, and then the best value and its id.
    """
    row = tl.program_id(1)
    cell = row * num_parts + tl.program_id(0)
    tl.store(values + cell, value)
    tl.store(ids + cell, index)
    tl.debug_barrier()  # all that this program stores and has read comes before its arrival
    arrived = tl.atomic_add(arrivals + row, 1, sem="acq_rel", scope="gpu")
    is_last = arrived == num_parts - 1
    if is_last:
        tl.store(arrivals + row, 0)  # for the next launch
        parts = tl.arange(0, MAX_PARTS)
        cells = row * num_parts + parts
        is_part = parts < num_parts
        # The first-level cache may hold what lay there before.
        all_values = tl.load(values + cells, mask=is_part, other=-float("inf"), cache_modifier=".cg")
        all_ids = tl.load(ids + cells, mask=is_part, other=0x7FFFFFFF, cache_modifier=".cg")
        value, index = _best_of(all_values, all_ids)
    return is_last, value, index


@triton.jit(do_not_specialize=["num_parts", "part_tiles"], do_not_specialize_on_alignment=["tokens"])
def find_likeliest(
    logits: tl.tensor,  # [N, V], rows of `stride`
    values: tl.tensor,  # [N · num_parts] float32, workspace
    ids: tl.tensor,  # [N · num_parts] int32, workspace
    arrivals: tl.tensor,  # [N] int32, zero before and after
    bests: tl.tensor,  # [N] float32, written: the greatest logit; +inf if any is NaN
    tokens: tl.tensor,  # [N] int64, written: the lowest id that has it, or BAD
    stride: tl.tensor,
    num_parts: tl.tensor,
    part_tiles: tl.tensor,  # tiles of a part
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    MAX_PARTS: tl.constexpr,
    BAD: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """Find the likeliest token of each row; grid (num_parts, N)."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(1)
    lanes = tl.arange(0, BLOCK)
    first = tl.program_id(0) * part_tiles * BLOCK
    last = tl.minimum(first + part_tiles * BLOCK, V)
    logits += row.to(tl.int64) * stride
    best = tl.full([BLOCK], -float("inf"), tl.float32)
    starts = tl.full([BLOCK], 0, tl.int32) + first
    for start in range(first, last, BLOCK):
        index = start + lanes
        x = tl.load(logits + index, mask=index < V, other=-float("inf")).to(tl.float32)
        # A NaN stays for good, and whatever id is noted then does not matter.
        greater = tl.maximum(x, best, propagate_nan=tl.PropagateNan.ALL)
        starts = tl.where(greater != best, start, starts)
        best = greater
    best = tl.where(best != best, float("inf"), best)
    value, index = _best_of(best, starts + lanes)
    is_last, value, index = _pick(value, index, values, ids, arrivals, num_parts, MAX_PARTS)
    if is_last:
        is_finite = tl.abs(value) < float("inf")
        tl.store(bests + row, value)
        tl.store(tokens + row, tl.where(is_finite, index, BAD).to(tl.int64))


@triton.jit(
    do_not_specialize=["num_parts", "part_tiles"],
    do_not_specialize_on_alignment=["rows", "positions", "tokens"],
)
def race(
    logits: tl.tensor,  # [N, V], rows of `stride`
    rows: tl.tensor,  # [N] int64
    positions: tl.tensor,  # [N] int64
    reals: tl.tensor,  # [., NUM_REALS] float64, parameters by row
    ints: tl.tensor,  # [., NUM_INTS] int64, parameters by row
    values: tl.tensor,  # as for `find_likeliest`
    ids: tl.tensor,
    arrivals: tl.tensor,
    bests: tl.tensor,  # what `find_likeliest` has written
    tokens: tl.tensor,  # the same; overwritten where a row wants chance and nothing else
    stride: tl.tensor,
    num_parts: tl.tensor,
    part_tiles: tl.tensor,
    NUM_REALS: tl.constexpr,
    NUM_INTS: tl.constexpr,
    TEMPERATURE: tl.constexpr,  # column
    SEED: tl.constexpr,  # column
    STAGES: tl.constexpr,  # column
    RANDOM: tl.constexpr,  # the stage
    UNSEEN: tl.constexpr,  # stages that do not change what is drawn
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    MAX_PARTS: tl.constexpr,
    BAD: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """Draw from softmax(logits / temperature), by the race of `TorchSampler`; grid (num_parts, N).

    A token runs weight / Exp(1), where the likeliest token weighs 1.  Since -log(1 - u) >= u, no token
    with u · score > weight runs as much as `score`.  What the likeliest token runs is known from the
    start, so that few tiles hold a token for which exact weight and logarithm have to be computed.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()  # also where nothing is to be done: who comes next relies on it
    n = tl.program_id(1)
    row = tl.load(rows + n)
    stages = tl.load(ints + row * NUM_INTS + STAGES)
    likeliest = tl.load(tokens + n)
    if ((stages & ~UNSEEN) == RANDOM) & (likeliest != BAD):
        best = tl.load(bests + n)
        temperature = tl.load(reals + row * NUM_REALS + TEMPERATURE).to(tl.float32)
        stream = _stream(tl.load(ints + row * NUM_INTS + SEED), tl.load(positions + n))
        score = 1.0 / _exponential(_uniform(stream, likeliest))
        slope = _LOG2_E / temperature
        lanes = tl.arange(0, BLOCK)
        first = tl.program_id(0) * part_tiles * BLOCK
        last = tl.minimum(first + part_tiles * BLOCK, V)
        logits += n.to(tl.int64) * stride
        top = tl.zeros([BLOCK], tl.float32)
        starts = tl.full([BLOCK], 0, tl.int32) + first
        for start in range(first, last, BLOCK):
            index = start + lanes
            x = tl.load(logits + index, mask=index < V, other=-float("inf")).to(tl.float32) - best
            uniform = _uniform(stream, index)
            can_win = uniform * score <= tl.exp2(x * slope) * _SLACK
            if tl.max(can_win.to(tl.int32), 0) > 0:
                scores = tl.exp(tl.div_rn(x, temperature)) / _exponential(uniform)
                starts = tl.where(scores > top, start, starts)
                top = tl.maximum(top, scores)
                score = tl.maximum(score, tl.max(scores, 0))
        value, winner = _best_of(top, starts + lanes)
        is_last, value, winner = _pick(value, winner, values, ids, arrivals, num_parts, MAX_PARTS)
        if is_last:
            tl.store(tokens + n, winner.to(tl.int64))

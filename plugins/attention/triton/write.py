"""Keys and values into their pages, queries and keys rotated on the way: one pass over the tokens."""

from __future__ import annotations

import triton
import triton.language as tl

from plugins.attention.triton.numbers import stored


@triton.jit(do_not_specialize=["num_tokens"])
def write(
    q: tl.tensor,  # [T, H, D], rows of q_stride; rotated in place; not touched without rotation
    k: tl.tensor,  # [T, G, D], rows of k_stride
    v: tl.tensor,  # [T, G, D], rows of v_stride
    k_cache: tl.tensor,  # [num_blocks, G, BLOCK_SIZE, D], written
    v_cache: tl.tensor,  # as k_cache
    k_scales: tl.tensor,  # [G] float32
    v_scales: tl.tensor,  # [G] float32
    cos: tl.tensor,  # [L, R / 2]
    sin: tl.tensor,  # [L, R / 2]
    positions: tl.tensor,  # [T] int64
    slots: tl.tensor,  # [T] int64
    num_tokens: tl.tensor,
    q_stride: tl.tensor,
    k_stride: tl.tensor,
    v_stride: tl.tensor,
    G: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,  # dimensions that are rotated
    BLOCK_SIZE: tl.constexpr,
    BLOCK_H: tl.constexpr,  # heads of one program, of several tokens if a token has fewer
    IS_NARROW: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """Take some heads: the first programs of keys and values, with rotation the others of queries."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    num_kv_programs = tl.cdiv(num_tokens * G, BLOCK_H)
    program = tl.program_id(0)
    if program < num_kv_programs:
        index = program * BLOCK_H + tl.arange(0, BLOCK_H)
        is_head = (index < num_tokens * G)[:, None]
        token = (index // G).to(tl.int64)
        head = index % G
        slot = tl.load(slots + token, mask=index < num_tokens * G, other=0)
        place = (((slot // BLOCK_SIZE * G + head) * BLOCK_SIZE + slot % BLOCK_SIZE) * D)[:, None]
        k_scale = tl.load(k_scales + head)[:, None] if HAS_SCALES else 1.0
        v_scale = tl.load(v_scales + head)[:, None] if HAS_SCALES else 1.0
        source = k + (token * k_stride + head * D)[:, None]
        if R > 0:
            rotate(source, k_cache + place, k_scale, cos, sin, positions, token, is_head, R, IS_NARROW)
        if D > R:
            move(source, k_cache + place, k_scale, is_head, R, D, IS_NARROW)
        source = v + (token * v_stride + head * D)[:, None]
        move(source, v_cache + place, v_scale, is_head, 0, D, IS_NARROW)
    else:
        index = (program - num_kv_programs) * BLOCK_H + tl.arange(0, BLOCK_H)
        is_head = (index < num_tokens * H)[:, None]
        token = (index // H).to(tl.int64)
        queries = q + (token * q_stride + index % H * D)[:, None]
        rotate(queries, queries, 1.0, cos, sin, positions, token, is_head, R, False)


@triton.jit
def rotate(
    source: tl.tensor,
    target: tl.tensor,
    scale: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    positions: tl.tensor,
    token: tl.tensor,
    is_head: tl.tensor,
    R: tl.constexpr,
    IS_NARROW: tl.constexpr,
) -> None:
    """Rotate the first R dimensions of some heads and store them; may work in place."""
    dtype: tl.constexpr = cos.dtype.element_ty
    dim = tl.arange(0, triton.next_power_of_2(R // 2))[None, :]
    is_real = is_head & (dim < R // 2)
    position = tl.load(positions + token[:, None], mask=is_head, other=0)
    x1 = tl.load(source + dim, mask=is_real, other=0.0).to(tl.float32)
    x2 = tl.load(source + R // 2 + dim, mask=is_real, other=0.0).to(tl.float32)
    angle = position * (R // 2) + dim
    c = tl.load(cos + angle, mask=is_real, other=0.0).to(tl.float32)
    s = tl.load(sin + angle, mask=is_real, other=0.0).to(tl.float32)
    # Rounded to the model's dtype before anything else, as a key that was rotated elsewhere would be.
    y1 = (x1 * c - x2 * s).to(dtype)
    y2 = (x2 * c + x1 * s).to(dtype)
    tl.store(target + dim, stored(y1.to(tl.float32), scale, IS_NARROW, dtype), mask=is_real)
    tl.store(target + R // 2 + dim, stored(y2.to(tl.float32), scale, IS_NARROW, dtype), mask=is_real)


@triton.jit
def move(
    source: tl.tensor,
    target: tl.tensor,
    scale: tl.tensor,
    is_head: tl.tensor,
    FIRST: tl.constexpr,
    D: tl.constexpr,
    IS_NARROW: tl.constexpr,
) -> None:
    """Store the dimensions from FIRST on of some heads."""
    dim = FIRST + tl.arange(0, triton.next_power_of_2(D - FIRST))[None, :]
    is_real = is_head & (dim < D)
    x = tl.load(source + dim, mask=is_real, other=0.0)
    tl.store(target + dim, stored(x.to(tl.float32), scale, IS_NARROW, x.dtype), mask=is_real)

"""Triton kernels: y = epilogue(norm(x) Wᵀ) for few tokens, and the small kernels around large ones.

Weights are [rows, K] with K contiguous, as they are stored.  A gated layer has 2 N rows: N of the gate,
then N that it multiplies.

With programmatic dependent launch (PDL not 0) a kernel starts while the one before it still runs, as
soon as all programs of that one allow it: EARLY at their start, LATE when their sums are complete.
Nothing but weights may be touched before `gdc_wait`.
"""

from __future__ import annotations

import triton
import triton.language as tl

EARLY = tl.constexpr(1)
LATE = tl.constexpr(2)

NO_NORM = tl.constexpr(0)
PLAIN_NORM = tl.constexpr(1)
ONE_PLUS_NORM = tl.constexpr(2)

_INV_SQRT_2 = tl.constexpr(0.7071067811865476)
_SQRT_2_OVER_PI = tl.constexpr(0.7978845608028654)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """Apply an activation in float32."""
    if ACTIVATION == "silu":
        x = x / (1.0 + tl.exp(-x))
    elif ACTIVATION == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * _INV_SQRT_2))
    elif ACTIVATION == "gelu_tanh":
        # 0.5 (1 + tanh u) is the logistic function of 2 u.
        u = _SQRT_2_OVER_PI * (x + 0.044715 * x * x * x)
        x = x / (1.0 + tl.exp(-2.0 * u))
    else:
        tl.static_assert(ACTIVATION == "relu")
        x = tl.maximum(x, 0.0)
    return x


@triton.jit
def _load_gamma(norm_weight, k, NORM: tl.constexpr, K: tl.constexpr, EVEN_K: tl.constexpr):
    """Load what a norm multiplies columns k by, in float32."""
    if EVEN_K:
        gamma = tl.load(norm_weight + k).to(tl.float32)
    else:
        gamma = tl.load(norm_weight + k, mask=k < K, other=0.0).to(tl.float32)
    if NORM == ONE_PLUS_NORM:
        gamma += 1.0
    return gamma


@triton.jit
def _scale_input(x, norm_weight, k, NORM: tl.constexpr, K: tl.constexpr, EVEN_K: tl.constexpr):
    """Multiply the columns k of x by the norm's weight, and round as x is."""
    gamma = _load_gamma(norm_weight, k, NORM, K, EVEN_K)
    return (x.to(tl.float32) * gamma[None, :]).to(x.dtype)


@triton.jit
def _prefetch_rows(w, rows, k, num_bytes, NUM_ROWS: tl.constexpr, K: tl.constexpr):
    """Ask for `num_bytes` of each row, from column k on, to be brought to the L2 cache."""
    addresses = (w + rows.to(tl.int64) * K + k).to(tl.int64)
    num_threads = tl.where(num_bytes > 0, NUM_ROWS, 0)
    # Small tensors are replicated over threads; only the first NUM_ROWS threads need to ask.
    tl.inline_asm_elementwise(
        """{
        .reg .pred p;
        .reg .u32 t;
        mov.u32 t, %tid.x;
        setp.lt.u32 p, t, $3;
        @p cp.async.bulk.prefetch.L2.global [$1], $2;
        mov.u32 $0, 0;
        }""",
        "=r,l,r,r",
        [addresses, num_bytes, num_threads],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _load_weight(
    w, tiles, row, k, NUM_ROWS, K: tl.constexpr, EVEN: tl.constexpr, TMA: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Load [BLOCK_N, BLOCK_K] of the weight, from `row` and column k on; zeros beyond its columns."""
    if TMA:
        tile = tiles.load([row, k])
    else:
        rows = row + tl.arange(0, BLOCK_N)
        cols = k + tl.arange(0, BLOCK_K)
        pointers = w + rows.to(tl.int64)[:, None] * K + cols[None, :]
        if EVEN:
            tile = tl.load(pointers, eviction_policy="evict_first")
        else:
            mask = (rows < NUM_ROWS)[:, None] & (cols < K)[None, :]
            tile = tl.load(pointers, mask=mask, other=0.0, eviction_policy="evict_first")
    return tile


@triton.jit
def _load_tokens(x_rows, is_token, k, K: tl.constexpr, EVEN_K: tl.constexpr):
    """Load columns k of x; zeros beyond its rows and columns."""
    if EVEN_K:
        tokens = tl.load(x_rows + k[None, :], mask=is_token, other=0.0)
    else:
        tokens = tl.load(x_rows + k[None, :], mask=is_token & (k < K)[None, :], other=0.0)
    return tokens


@triton.jit
def _dot(x, w, acc, SWAP: tl.constexpr):
    """Add x wᵀ to acc, or w xᵀ if swapped: then the weight has the tensor cores' 64 rows."""
    if SWAP:
        acc = tl.dot(w, tl.trans(x), acc)
    else:
        acc = tl.dot(x, tl.trans(w), acc)
    return acc


@triton.jit
def _accumulate(
    tokens, weight, other, acc, gated, squares, norm_weight, k, K: tl.constexpr, EVEN_K: tl.constexpr,
    NORM: tl.constexpr, GATED: tl.constexpr, SWAP: tl.constexpr,
):  # fmt: skip
    """Add what columns k contribute to the sums."""
    if NORM != NO_NORM:
        wide = tokens.to(tl.float32)
        squares += wide * wide
        tokens = _scale_input(tokens, norm_weight, k, NORM, K, EVEN_K)
    acc = _dot(tokens, weight, acc, SWAP)
    if GATED:
        gated = _dot(tokens, other, gated, SWAP)
    return acc, gated, squares


@triton.jit
def _finish(
    acc, gated, squares, y, bias, residual, eps, m, n, M,
    N: tl.constexpr, K: tl.constexpr, NORM: tl.constexpr, ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
):  # fmt: skip
    """Turn sums [BLOCK_M, BLOCK_N] into outputs, and store them rounded once."""
    mask = (m < M)[:, None] & (n < N)[None, :]
    if NORM != NO_NORM:
        scale = tl.rsqrt(squares / K + eps)[:, None]
        acc *= scale
        if ACTIVATION != "":
            gated *= scale
    if HAS_BIAS:
        acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
        if ACTIVATION != "":
            gated += tl.load(bias + N + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if ACTIVATION != "":
        acc = activate(acc, ACTIVATION) * gated
    offsets = m.to(tl.int64)[:, None] * N + n[None, :]
    if HAS_RESIDUAL:
        acc += tl.load(residual + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + offsets, acc.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _arrive(arrivals, SPLIT_K: tl.constexpr):
    """Count a part of a tile that has been stored; whether it was the last."""
    tl.debug_barrier()  # all threads have stored before one of them says so
    arrived = tl.atomic_add(arrivals, 1, sem="acq_rel", scope="gpu")
    is_last = arrived == SPLIT_K - 1
    if is_last:
        tl.store(arrivals, 0)  # for the next launch
    return is_last


@triton.jit(do_not_specialize=["M"])
def linear_kernel(
    x, w, tiles, y, norm_weight, bias, residual, partials, arrivals, eps, M, x_stride,
    N: tl.constexpr, K: tl.constexpr, NORM: tl.constexpr, ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT_K: tl.constexpr,
    SWAP: tl.constexpr, TMA: tl.constexpr, PREFETCH: tl.constexpr, PDL: tl.constexpr,
    STAGES: tl.constexpr, EAGER: tl.constexpr,
):  # fmt: skip
    """Compute a tile [BLOCK_M, BLOCK_N] of y with the tensor cores, or its part of a sum over K.

    Grid: (tiles of M · tiles of N, SPLIT_K).  Programs that share weights are neighbours.

    :param x: [M, K], its rows `x_stride` elements apart.
    :param y: [M, N], contiguous; may be the residual.
    :param partials: float32 workspace of the parts; with SPLIT_K > 1.
    :param arrivals: int32, one per tile, all 0 before and after.
    :param PREFETCH: columns of the weight to bring to the L2 cache before the wait.
    :param tiles: descriptor of w in tiles [BLOCK_N, BLOCK_K], if they are to be fetched with TMA.
    :param EAGER: weights go through registers, the next tile always on its way, the first before the
        wait; else through STAGES buffers of shared memory.
    """
    GATED: tl.constexpr = ACTIVATION != ""
    TILES_M: tl.constexpr = 1 if BLOCK_M <= 64 else 0
    EVEN_K: tl.constexpr = K % (BLOCK_K * SPLIT_K) == 0
    EVEN: tl.constexpr = EVEN_K and N % BLOCK_N == 0
    NUM_ROWS: tl.constexpr = 2 * N if GATED else N
    ELEMENT_BYTES: tl.constexpr = x.dtype.element_ty.primitive_bitwidth // 8
    SPLIT_COLS: tl.constexpr = (K + BLOCK_K * SPLIT_K - 1) // (BLOCK_K * SPLIT_K) * BLOCK_K
    if PDL == EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    tile = tl.program_id(0)
    if TILES_M:
        tile_m = 0
        tile_n = tile
    else:
        num_tiles_m = tl.cdiv(M, BLOCK_M)
        tile_m = tile % num_tiles_m
        tile_n = tile // num_tiles_m
    split = tl.program_id(1)
    first = split * SPLIT_COLS
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    if PREFETCH > 0:
        num_bytes = tl.minimum(tl.minimum(PREFETCH, SPLIT_COLS), K - first) * ELEMENT_BYTES
        rows = tl.minimum(n, N - 1)
        _prefetch_rows(w, rows, first, num_bytes, BLOCK_N, K)
        if GATED:
            _prefetch_rows(w, N + rows, first, num_bytes, BLOCK_N, K)
    row = tile_n * BLOCK_N
    if EAGER:
        weight = _load_weight(w, tiles, row, first, NUM_ROWS, K, EVEN, TMA, BLOCK_N, BLOCK_K)
        other = weight
        if GATED:
            other = _load_weight(w, tiles, N + row, first, NUM_ROWS, K, EVEN, TMA, BLOCK_N, BLOCK_K)
    if PDL:
        tl.extra.cuda.gdc_wait()

    if SWAP:
        acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    else:
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    gated = acc
    squares = acc
    if NORM != NO_NORM:
        squares = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    is_token = (m < M)[:, None]
    x_rows = x + m.to(tl.int64)[:, None] * x_stride
    cols = tl.arange(0, BLOCK_K)
    if EAGER:
        tokens = _load_tokens(x_rows, is_token, first + cols, K, EVEN_K)
        for step in tl.range(0, SPLIT_COLS - BLOCK_K, BLOCK_K, num_stages=1):
            start = first + step
            after = start + BLOCK_K
            next_weight = _load_weight(w, tiles, row, after, NUM_ROWS, K, EVEN, TMA, BLOCK_N, BLOCK_K)
            next_other = next_weight
            if GATED:
                next_other = _load_weight(
                    w, tiles, N + row, after, NUM_ROWS, K, EVEN, TMA, BLOCK_N, BLOCK_K
                )
            next_tokens = _load_tokens(x_rows, is_token, after + cols, K, EVEN_K)
            acc, gated, squares = _accumulate(
                tokens, weight, other, acc, gated, squares, norm_weight, start + cols, K, EVEN_K, NORM,
                GATED, SWAP,
            )  # fmt: skip
            weight = next_weight
            other = next_other
            tokens = next_tokens
        k = first + SPLIT_COLS - BLOCK_K + cols
        acc, gated, squares = _accumulate(
            tokens, weight, other, acc, gated, squares, norm_weight, k, K, EVEN_K, NORM, GATED, SWAP
        )
    else:
        for step in tl.range(0, SPLIT_COLS, BLOCK_K, num_stages=STAGES):
            start = first + step
            tokens = _load_tokens(x_rows, is_token, start + cols, K, EVEN_K)
            weight = _load_weight(w, tiles, row, start, NUM_ROWS, K, EVEN, TMA, BLOCK_N, BLOCK_K)
            other = weight
            if GATED:
                other = _load_weight(w, tiles, N + row, start, NUM_ROWS, K, EVEN, TMA, BLOCK_N, BLOCK_K)
            acc, gated, squares = _accumulate(
                tokens, weight, other, acc, gated, squares, norm_weight, start + cols, K, EVEN_K, NORM,
                GATED, SWAP,
            )  # fmt: skip
    if PDL == LATE:
        tl.extra.cuda.gdc_launch_dependents()
    if SWAP:
        acc = tl.trans(acc)
        gated = tl.trans(gated)
    if NORM != NO_NORM:
        sums = tl.sum(squares, 1)
    else:
        sums = tl.zeros([BLOCK_M], tl.float32)

    if SPLIT_K == 1:
        _finish(
            acc, gated, sums, y, bias, residual, eps, m, n, M,
            N, K, NORM, ACTIVATION, HAS_BIAS, HAS_RESIDUAL,
        )  # fmt: skip
    else:
        TILE: tl.constexpr = BLOCK_M * BLOCK_N
        PART: tl.constexpr = TILE * (2 if GATED else 1) + BLOCK_M
        rows = tl.arange(0, BLOCK_M)
        cells = rows[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        parts = partials + tile.to(tl.int64) * (SPLIT_K * PART)
        part = parts + split * PART
        # What lies beyond M holds nothing; not storing it saves traffic.
        tl.store(part + cells, acc, mask=is_token)
        if GATED:
            tl.store(part + TILE + cells, gated, mask=is_token)
        if NORM != NO_NORM:
            tl.store(part + PART - BLOCK_M + rows, sums)
        if _arrive(arrivals + tile, SPLIT_K):
            # In the order of the parts, whoever came last: results repeat to the bit.
            acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            gated = acc
            sums = tl.zeros([BLOCK_M], tl.float32)
            for s in tl.static_range(SPLIT_K):
                part = parts + s * PART
                acc += tl.load(part + cells, mask=is_token, other=0.0, cache_modifier=".cg")
                if GATED:
                    gated += tl.load(
                        part + TILE + cells, mask=is_token, other=0.0, cache_modifier=".cg"
                    )
                if NORM != NO_NORM:
                    sums += tl.load(part + PART - BLOCK_M + rows, cache_modifier=".cg")
            _finish(
                acc, gated, sums, y, bias, residual, eps, m, n, M,
                N, K, NORM, ACTIVATION, HAS_BIAS, HAS_RESIDUAL,
            )  # fmt: skip


@triton.jit
def _multiply_rows(w, x, VECTOR: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Sum w · x over runs of VECTOR columns, which lie in one thread: [BLOCK_N, BLOCK_K / VECTOR]."""
    products = w.to(tl.float32) * x[None, :]
    return tl.sum(tl.reshape(products, [BLOCK_N, BLOCK_K // VECTOR, VECTOR]), 2)


@triton.jit(do_not_specialize=["M"])
def vector_kernel(
    x, w, y, norm_weight, bias, residual, eps, M, x_stride,
    N: tl.constexpr, K: tl.constexpr, NORM: tl.constexpr, ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    TOKENS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, VECTOR: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Compute BLOCK_N outputs of a few tokens without tensor cores: weights go straight to registers.

    Grid: (tiles of N).  The next tile of weights is always on its way, the first before the wait.

    :param x: [M, K], its rows `x_stride` elements apart; M <= TOKENS.
    :param y: [M, N], contiguous; may be the residual.
    :param TOKENS: accumulators to keep; those beyond M repeat the last token and are not stored.
    :param VECTOR: elements of a 16-byte load.
    """
    GATED: tl.constexpr = ACTIVATION != ""
    EVEN: tl.constexpr = K % BLOCK_K == 0 and N % BLOCK_N == 0
    EVEN_K: tl.constexpr = K % BLOCK_K == 0
    NUM_ROWS: tl.constexpr = 2 * N if GATED else N
    NUM_STEPS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    if PDL == EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0) * BLOCK_N
    weight = _load_weight(w, None, row, 0, NUM_ROWS, K, EVEN, False, BLOCK_N, BLOCK_K)
    other = weight
    if GATED:
        other = _load_weight(w, None, N + row, 0, NUM_ROWS, K, EVEN, False, BLOCK_N, BLOCK_K)
    if PDL:
        tl.extra.cuda.gdc_wait()

    zero = tl.zeros([BLOCK_N, BLOCK_K // VECTOR], tl.float32)
    accs = (zero,) * TOKENS
    gates = (zero,) * TOKENS
    squares = (tl.zeros([BLOCK_K], tl.float32),) * TOKENS
    for step in tl.static_range(NUM_STEPS):
        k = step * BLOCK_K + tl.arange(0, BLOCK_K)
        next_weight = weight
        next_other = other
        if step + 1 < NUM_STEPS:
            next_k = (step + 1) * BLOCK_K
            next_weight = _load_weight(w, None, row, next_k, NUM_ROWS, K, EVEN, False, BLOCK_N, BLOCK_K)
            if GATED:
                next_other = _load_weight(
                    w, None, N + row, next_k, NUM_ROWS, K, EVEN, False, BLOCK_N, BLOCK_K
                )
        if NORM != NO_NORM:
            gamma = _load_gamma(norm_weight, k, NORM, K, EVEN_K)
        old_accs = accs
        old_gates = gates
        old_squares = squares
        accs = ()
        gates = ()
        squares = ()
        for t in tl.static_range(TOKENS):
            start = x
            if TOKENS > 1:
                start += tl.minimum(t, M - 1).to(tl.int64) * x_stride
            if EVEN_K:
                token = tl.load(start + k).to(tl.float32)
            else:
                token = tl.load(start + k, mask=k < K, other=0.0).to(tl.float32)
            if NORM != NO_NORM:
                squares = squares + (old_squares[t] + token * token,)
                token *= gamma
            accs = accs + (old_accs[t] + _multiply_rows(weight, token, VECTOR, BLOCK_N, BLOCK_K),)
            if GATED:
                gates = gates + (old_gates[t] + _multiply_rows(other, token, VECTOR, BLOCK_N, BLOCK_K),)
        weight = next_weight
        other = next_other

    if PDL == LATE:
        tl.extra.cuda.gdc_launch_dependents()
    n = row + tl.arange(0, BLOCK_N)
    for t in tl.static_range(TOKENS):
        out = tl.sum(accs[t], 1)
        gated = out
        if GATED:
            gated = tl.sum(gates[t], 1)
        if NORM != NO_NORM:
            scale = tl.rsqrt(tl.sum(squares[t], 0) / K + eps)
            out *= scale
            gated *= scale
        if HAS_BIAS:
            out += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
            if GATED:
                gated += tl.load(bias + N + n, mask=n < N, other=0.0).to(tl.float32)
        if GATED:
            out = activate(out, ACTIVATION) * gated
        mask = n < N
        if TOKENS > 1:
            mask = mask & (t < M)
        if HAS_RESIDUAL:
            out += tl.load(residual + t * N + n, mask=mask, other=0.0).to(tl.float32)
        tl.store(y + t * N + n, out.to(y.dtype.element_ty), mask=mask)


@triton.jit
def norm_kernel(
    x, weight, y, eps, x_stride,
    K: tl.constexpr, NORM: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Normalize one row, rounding where `core.model.layers.RMSNorm` does.

    Grid: (rows).

    :param y: [rows, K], contiguous.
    """
    k = tl.arange(0, BLOCK_K)
    mask = k < K
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    gamma = tl.load(weight + k, mask=mask, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    values = tl.load(x + row * x_stride + k, mask=mask, other=0.0).to(tl.float32)
    values *= tl.rsqrt(tl.sum(values * values, 0) / K + eps)
    dtype: tl.constexpr = y.dtype.element_ty
    if NORM == ONE_PLUS_NORM:
        out = values * (1.0 + gamma.to(tl.float32))
    else:
        out = values.to(dtype).to(tl.float32) * gamma.to(tl.float32)
    tl.store(y + row * K + k, out.to(dtype), mask=mask)


@triton.jit
def gate_kernel(
    x, y, N: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_N: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    """Compute activation(gate) · up of [rows, 2 N] = [gate, up].  Grid: (rows, tiles of N)."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = n < N
    if PDL:
        tl.extra.cuda.gdc_wait()
    gate = tl.load(x + row * (2 * N) + n, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(x + row * (2 * N) + N + n, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + row * N + n, (activate(gate, ACTIVATION) * up).to(y.dtype.element_ty), mask=mask)

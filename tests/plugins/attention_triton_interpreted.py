"""What needs Triton's interpreter, and so a process that was started for it: see test_attention_triton.py.

The interpreter multiplies matrices of bfloat16 wrongly; that dtype is for tests on a GPU.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
import triton_interpreter
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from core.interfaces import AttentionSpec, SupportsCudaGraph, SupportsRotary, missing_members
from core.model.rope import apply_rotary
from core.testing.attention import (
    TOLERANCES,
    AttentionConformance,
    Case,
    Rig,
    cache_spec,
    make_batch,
    random_inputs,
    round_to,
    row_lists,
)
from plugins.attention import triton as plugin
from plugins.attention.triton.backend import TritonAttention
from plugins.attention.triton.numbers import narrow, widen
from plugins.attention.triton.plan import plan_decodes, plan_prompts
from plugins.attention.triton.tuning import NO_CARD, choose_tuning

(ENTRY,) = plugin.core_register_attention()

triton_interpreter.patch()


def unsupported(requirements):
    return ENTRY.unsupported(replace(requirements, device="cuda"))


# Not made smaller: that would run into the time limit before it got far.
FEW = settings(AttentionConformance.settings, max_examples=2, phases=[Phase.generate], database=None)


class TestTritonAttention(AttentionConformance):
    entry = replace(ENTRY, unsupported=unsupported)
    dtypes = ("float32", "float16")
    settings = FEW
    block_sizes = (16, 32)  # the larger ones take long to fill with NaN

    def cases(self, **fixed):
        rows = fixed.get("rows", row_lists(max_rows=3))
        return super().cases(**(fixed | {"rows": rows.map(shorten)}))


def shorten(rows):
    return tuple((start % 24, min(count, 12)) for start, count in rows)


def make_case(**changes):
    usual = {
        "dtype": "float32",
        "block_size": 16,
        "head_dim": 64,
        "num_kv_heads": 2,
        "group": 2,
        "window": 20,
        "softcap": None,
        "scale": 0.125,
        "rows": ((40, 1), (3, 1), (0, 30), (15, 20)),
        "chunk": 50,
        "seed": 0,
    }
    return Case(**(usual | changes))


def make_backend(case, **decode):
    padded = 1 << (case.head_dim - 1).bit_length()
    tuning = choose_tuning(NO_CARD, padded, case.block_size, case.stored_dtype.itemsize)
    return TritonAttention(replace(tuning, decode=replace(tuning.decode, **decode)))


def run(case, backend):
    rig = Rig(backend, case, num_blocks=case.num_blocks(case.lengths))
    rows = [rig.add_row(random_inputs(case, n, n)) for n in case.lengths]
    rig.run(rows)
    return rig, rows


@pytest.mark.parametrize(
    "changes",
    [
        {"group": 16, "num_kv_heads": 1},
        {"group": 5, "softcap": 20.0},
        {"head_dim": 256, "dtype": "float16"},
        {"head_dim": 96, "window": 1},
        {"head_dim": 192, "num_kv_heads": 1, "group": 1},
        {"block_size": 64, "dtype": "float16", "rows": ((70, 1), (120, 2))},
        {"block_size": 128, "kv_cache_dtype": "fp8", "rows": ((130, 3),)},
    ],
    ids=str,
)
def test_shapes_match_dense_attention(changes):
    case = make_case(**changes)
    rig, rows = run(case, make_backend(case))
    for row in rows:
        rig.verify(row, TOLERANCES[case.dtype])


@pytest.mark.parametrize(("num_ctas", "min_tiles"), [(1, 1), (3, 1), (3, 3), (400, 1)])
def test_any_grid_gives_the_same(num_ctas, min_tiles):
    case = make_case(rows=((100, 1), (0, 1), (63, 1), (15, 2)))
    backend = make_backend(case, num_ctas=num_ctas, min_tiles=min_tiles, block_n=16)
    rig, rows = run(case, backend)
    for row in rows:
        rig.verify(row, TOLERANCES[case.dtype])
    assert not backend._workspace.counters.any(), "the next layer would wait for programs of this one"


# --- rotary embedding ------------------------------------------------------------------------------


def rotary_tables(length, rotary_dim, dtype):
    generator = torch.Generator().manual_seed(length)
    angles = 7 * torch.rand(length, rotary_dim // 2, generator=generator)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate_then_forward(backend, qkv, rotary, spec, batch):
    counts = [spec.num_heads, spec.num_kv_heads, spec.num_kv_heads]
    q, k, v = torch.split(qkv.view(len(qkv), -1, spec.head_dim), counts, dim=1)
    wide = (x.float()[batch.positions].unsqueeze(1) for x in rotary)
    q, k = (x.to(qkv.dtype) for x in apply_rotary(q.float(), k.float(), *wide))
    return backend.forward(q, k, v, spec, backend.prepare(batch)).flatten(1)


@pytest.mark.parametrize(("only_decodes", "is_fused"), [(True, True), (True, False), (False, True)])
@FEW
@given(
    rows=row_lists(max_rows=3),
    rotary_dim=st.sampled_from([None, 2, 24, 40]),
    head_dim=st.sampled_from([64, 80]),
    group=st.integers(1, 16),
    window=st.sampled_from([None, 1, 9]),
    softcap=st.sampled_from([None, 5.0]),
    kv_cache_dtype=st.sampled_from(["auto", "fp8"]),
)
def test_rotating_is_what_rotating_before_would_be(  # noqa: PLR0917  hypothesis passes them by name
    rows, only_decodes, is_fused, rotary_dim, head_dim, group, window, softcap, kv_cache_dtype
):
    rows = sorted(
        ((start, 1 if only_decodes else count) for start, count in rows), key=lambda x: x[1] != 1
    )
    case = make_case(
        dtype="float16", head_dim=head_dim, group=group, rows=tuple(rows), kv_cache_dtype=kv_cache_dtype
    )
    starts, counts = zip(*rows, strict=True)
    spec = AttentionSpec(1, 2 * group, 2, head_dim, case.scale, window, softcap)
    backends = [make_backend(case, is_fused=is_fused) for _ in range(2)]
    rigs = [Rig(b, case, num_blocks=case.num_blocks(case.lengths)) for b in backends]
    for rig in rigs:
        both = [rig.add_row(random_inputs(case, n, n)) for n in case.lengths]
        rig.advance(both, starts, 50)
    batch = make_batch(starts, counts, [row.table for row in both], case.block_size)
    generator = torch.Generator().manual_seed(1)
    qkv = torch.randn(sum(counts), (2 * group + 4) * head_dim, generator=generator).half()
    cos, sin = rotary_tables(100, rotary_dim or head_dim, torch.float16)
    expected = rotate_then_forward(backends[0], qkv, (cos, sin), spec, batch)
    assert not backends[1].rotary_objections(spec, rotary_dim or head_dim)
    actual = backends[1].forward_rotary(qkv.clone(), cos, sin, spec, backends[1].prepare(batch))
    torch.testing.assert_close(actual, expected, atol=4e-3, rtol=4e-3)
    for ours, theirs in zip(*(b._layers for b in backends), strict=True):
        for ours_, theirs_ in ((ours.k, theirs.k), (ours.v, theirs.v)):
            assert_same_cache(ours_, theirs_)


def assert_same_cache(actual, expected):
    """NaN included; a product that is added may be rounded once or twice."""
    if actual.dtype == torch.uint8:
        actual, expected = (x.view(torch.float8_e4m3fn).float() for x in (actual, expected))
        torch.testing.assert_close(actual, expected, atol=2**-8, rtol=0.13, equal_nan=True)
    else:
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=2e-3, equal_nan=True)


def test_refuses_to_rotate_more_than_there_is():
    spec = make_case().specs()[0]
    for rotary_dim in (0, 7, 66):
        (reason,) = TritonAttention().rotary_objections(spec, rotary_dim)
        assert reason.startswith(f"rotary_dim {rotary_dim} ")


def test_fulfils_the_optional_protocols():
    for protocol in (SupportsRotary, SupportsCudaGraph):
        assert not missing_members(TritonAttention(), protocol)


# --- captured steps --------------------------------------------------------------------------------


def pad(batch, num_rows, num_tokens):
    """Make of a step what its replay in a larger graph sees: rows and tokens of padding, no lists."""
    rows, tokens = num_rows - batch.num_rows, num_tokens - batch.num_tokens

    def extend(x, count, value=0):
        return torch.cat((x, x.new_full((count, *x.shape[1:]), value)))

    return replace(
        batch,
        num_rows=num_rows,
        num_tokens=num_tokens,
        num_decodes=num_rows if batch.num_decodes == batch.num_rows else 0,
        token_ids=extend(batch.token_ids, tokens),
        positions=extend(batch.positions, tokens),
        slots=extend(batch.slots, tokens),
        rows=extend(batch.rows, rows),
        query_starts=extend(batch.query_starts, rows, batch.num_tokens),
        seq_lens=extend(batch.seq_lens, rows),
        block_tables=extend(batch.block_tables, rows),
        starts=[],
        counts=[],
    )


@pytest.mark.parametrize("rows", [((40, 1), (3, 1)), ((40, 1), (3, 5))], ids=str)
def test_padding_changes_nothing(rows):
    case = make_case(rows=rows)
    starts, counts = zip(*rows, strict=True)
    outs = []
    for has_padding in (False, True):
        rig = Rig(make_backend(case), case, num_blocks=case.num_blocks(case.lengths))
        both = [rig.add_row(random_inputs(case, n, n)) for n in case.lengths]
        rig.advance(both, starts, 50)
        batch = make_batch(starts, counts, [row.table for row in both], case.block_size)
        qkv = torch.randn(12, 8 * 64, generator=torch.Generator().manual_seed(0))
        batch = pad(batch, 5, 12) if has_padding else batch
        qkv = qkv[: batch.num_tokens].clone()
        cos, sin = rotary_tables(100, 64, torch.float32)
        out = rig.backend.forward_rotary(qkv, cos, sin, rig.specs[0], rig.backend.prepare(batch))
        outs.append(out[: sum(counts)])
    assert torch.equal(*outs)


# --- plans -----------------------------------------------------------------------------------------

BLOCK_N = 16


@settings(FEW, max_examples=15)
@given(
    rows=st.lists(
        st.tuples(st.sampled_from([0, 1, 1, 1, 5]), st.integers(1, 200)), min_size=1, max_size=40
    ),
    window=st.sampled_from([1, 16, 17, 50, 1 << 30]),
    is_fused=st.booleans(),
    num_heads=st.integers(1, 3),
    num_ctas=st.integers(1, 20),
    min_tiles=st.integers(1, 4),
)
def test_decodes_are_cut_as_counting_says(  # noqa: PLR0917  hypothesis passes them by name
    rows, window, is_fused, num_heads, num_ctas, min_tiles
):
    counts = torch.tensor([count for count, _ in rows])
    lengths = torch.tensor([length if count else 0 for count, length in rows], dtype=torch.int32)
    starts = torch.cat((torch.zeros(1), counts.cumsum(0))).int()
    plan = torch.full((len(rows) + 1 + num_ctas,), -1, dtype=torch.int32)
    plan_decodes[(1,)](
        lengths, starts, plan, len(rows), window, num_heads, BLOCK_N, num_ctas, min_tiles, is_fused, 16, False
    )  # fmt: skip
    tiles = []
    for count, length in zip(counts.tolist(), lengths.tolist(), strict=True):
        seen = {key // BLOCK_N for key in range(max(length - window, 0), length - is_fused)}
        tiles.append(max(len(seen), 1) if count == 1 else 0)
    expected = [sum(tiles[:row]) for row in range(len(rows) + 1)]
    assert plan[: len(rows) + 1].tolist() == expected
    owners = [row for row, number in enumerate(tiles) for _ in range(number * num_heads)]
    chunk = max(-(-len(owners) // num_ctas), min_tiles)
    firsts = [owners[i * chunk] if i * chunk < len(owners) else len(rows) for i in range(num_ctas)]
    assert plan[len(rows) + 1 :].tolist() == firsts


def test_rows_of_padding_have_no_tiles_even_with_a_query():
    plan = torch.full((4,), -1, dtype=torch.int32)
    lengths, starts = torch.tensor([20, 0]).int(), torch.tensor([0, 1, 2]).int()
    plan_decodes[(1,)](lengths, starts, plan, 2, 1 << 30, 1, BLOCK_N, 1, 1, True, 16, False)
    assert plan.tolist() == [0, 2, 2, 0]


@settings(FEW, max_examples=10)
@given(counts=st.lists(st.integers(0, 90), min_size=1, max_size=40), size=st.integers(1, 40))
def test_prompts_are_cut_as_counting_says(counts, size):
    starts = torch.tensor([0, *itertools.accumulate(counts)]).int()
    num_blocks = sum(counts) // size + len(counts)
    plan = torch.full((len(counts) + 1 + num_blocks,), -1, dtype=torch.int32)
    plan_prompts[(1,)](starts, plan, len(counts), num_blocks, size, 16, False)
    blocks = [-(-count // size) if count > 1 else 0 for count in counts]
    assert plan[: len(counts) + 1].tolist() == [0, *itertools.accumulate(blocks)]
    owners = [row for row, number in enumerate(blocks) for _ in range(number)]
    padding = [len(counts)] * (num_blocks - len(owners))
    assert plan[len(counts) + 1 :].tolist() == owners + padding


# --- numbers ---------------------------------------------------------------------------------------


def make_converter():
    import triton  # noqa: PLC0415  only here is it needed by name
    import triton.language as tl  # noqa: PLC0415  as above

    @triton.jit
    def convert(x, scales, codes, wide, n, BLOCK: tl.constexpr):  # noqa: N803, PLR0917  as kernels do
        i = tl.arange(0, BLOCK)
        is_real = i < n
        code = narrow(
            tl.load(x + i, mask=is_real, other=0.0), tl.load(scales + i, mask=is_real, other=1.0)
        )
        tl.store(codes + i, code, mask=is_real)
        tl.store(wide + i, widen(code, tl.float32, False), mask=is_real)

    return convert


def test_codes_are_those_of_the_oracle():
    generator = torch.Generator().manual_seed(0)
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    finite = codes[codes.isfinite()].sort().values
    numbers = [finite, (finite[1:] + finite[:-1]) / 2]
    numbers += [torch.randn(500, generator=generator) * size for size in (1e-3, 1.0, 300.0)]
    numbers += [torch.tensor([math.inf, -math.inf, 449.0, 464.0, 1e38, 1e-38, -0.0])]
    x = torch.cat(numbers)
    scales = torch.ldexp(torch.ones(len(x)), torch.randint(-5, 5, x.shape, generator=generator))
    scales[: 2 * len(finite)] = 1.0
    stored, wide = torch.empty(len(x), dtype=torch.uint8), torch.empty(len(x))
    make_converter()[(1,)](x, scales, stored, wide, len(x), 1 << (len(x) - 1).bit_length())
    expected = round_to(x.double() / scales, torch.float8_e4m3fn)
    torch.testing.assert_close(stored.view(torch.float8_e4m3fn).double(), expected, atol=0, rtol=0)
    torch.testing.assert_close(wide.double(), expected, atol=0, rtol=0)


def test_not_a_number_stays_none():
    x, stored, wide = (
        torch.tensor([math.nan, -math.nan]),
        torch.empty(2, dtype=torch.uint8),
        torch.empty(2),
    )
    make_converter()[(1,)](x, torch.ones(2), stored, wide, 2, 2)
    assert stored.view(torch.float8_e4m3fn).float().isnan().all()
    assert wide.isnan().all()


def test_bytes_per_block_are_those_of_the_cache():
    spec = cache_spec(make_case(kv_cache_dtype="fp8"), num_blocks=7)
    backend = TritonAttention()
    backend.allocate_cache(spec)
    size = sum(layer.k.nbytes + layer.v.nbytes for layer in backend._layers)
    assert size == 7 * backend.cache_bytes_per_block(spec)

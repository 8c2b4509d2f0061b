from __future__ import annotations

import itertools
import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core.interfaces import AttentionSpec, KVCacheSpec
from core.registry import Requirements
from core.testing.attention import (
    AttentionConformance,
    Case,
    Rig,
    cache_spec,
    dense_attention,
    make_batch,
    random_inputs,
    round_to,
)
from plugins.attention import torch as plugin
from plugins.attention.torch.backend import NO_WINDOW, TileCutter, TileLimits, TorchAttention
from plugins.attention.torch.narrowing import narrow, rescale, widen

(ENTRY,) = plugin.core_register_attention()


class TestTorchAttention(AttentionConformance):
    entry = ENTRY
    dtypes = ("float32", "float64", "bfloat16", "float16")
    head_dims = (8, 24, 64, 80, 128, 256)
    settings = settings(AttentionConformance.settings, max_examples=15)


class TestSmallTiles(AttentionConformance):
    """Steps that fall into many tiles, each larger than the memory set aside for it."""

    entry = ENTRY
    dtypes = ("float32",)
    settings = settings(AttentionConformance.settings, max_examples=6)

    def make_backend(self):
        return TorchAttention(TileLimits(num_elements=100, num_queries=3))


def make_case(**changes):
    usual = {
        "dtype": "float32",
        "block_size": 16,
        "head_dim": 16,
        "num_kv_heads": 2,
        "group": 2,
        "window": 70,
        "softcap": None,
        "scale": 0.25,
        "rows": ((0, 300), (150, 200), (400, 1), (3, 1)),
        "chunk": 130,
        "seed": 0,
    }
    return Case(**(usual | changes))


@pytest.mark.parametrize("softcap", [None, 10.0])
def test_prompts_longer_than_a_tile(softcap):
    case = make_case(softcap=softcap)
    rig = Rig(TorchAttention(), case, num_blocks=case.num_blocks(case.lengths))
    rows = [rig.add_row(random_inputs(case, n, n)) for n in case.lengths]
    rig.run(rows)
    for row in rows:
        rig.verify(row, 2e-5)


@pytest.mark.parametrize("splits", [[9], [4, 5], [1] * 9], ids=str)
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_narrow_cache_is_what_every_query_sees(splits, softcap):
    case = make_case(softcap=softcap, rows=((0, 8),))
    q, k, v = random_inputs(case, 9, 0)[0]
    backend = TorchAttention()
    backend.allocate_cache(
        KVCacheSpec(1, 3, 16, 2, 16, dtype=torch.bfloat16, device=torch.device("cpu"))
    )
    outs = []
    for start, count in zip(itertools.accumulate([0, *splits]), splits, strict=False):
        part = slice(start, start + count)
        meta = backend.prepare(make_batch([start], [count], [[2]], 16))
        outs.append(backend.forward(q[part], k[part], v[part], case.specs()[0], meta))
    expected = dense_attention(q, k.bfloat16(), v.bfloat16(), case.specs()[0], 0)
    torch.testing.assert_close(torch.cat(outs).double(), expected, atol=1e-5, rtol=1e-5)


CODES = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
ALL_DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("count", [256, 255], ids=["pairs", "odd"])
def test_every_code_is_widened_to_its_number(dtype, count):
    codes = torch.arange(255, -1, -1, dtype=torch.uint8)[:count].view(CODES.dtype)
    expected = [decode(code) for code in codes.view(torch.uint8).tolist()]
    actual = widen(codes, torch.empty(count, dtype=dtype)).double()
    torch.testing.assert_close(actual, torch.tensor(expected).double(), atol=0, rtol=0, equal_nan=True)


def decode(code):
    """Read a code as the specification says: sign, 4 bits of exponent with bias 7, 3 of mantissa."""
    sign, exponent, mantissa = (-1) ** (code >> 7), code >> 3 & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    if exponent == 0:
        return sign * mantissa * 2.0**-9
    return sign * (8 + mantissa) * 2.0 ** (exponent - 10)


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_every_code_is_narrowed_to_itself(dtype):
    numbers = CODES.to(dtype)
    actual = narrow(numbers.view(16, 2, 8), torch.float8_e4m3fn, None).flatten()
    is_nan = numbers.isnan()
    assert torch.equal(actual.view(torch.uint8)[~is_nan], CODES.view(torch.uint8)[~is_nan])
    assert actual.float()[is_nan].isnan().all()


def test_the_kit_rounds_to_the_nearest_code_and_ties_to_even():
    """Checks the oracle itself: against the distance to every code."""
    numbers = [decode(code) for code in range(256)]
    finite = torch.tensor(sorted({x for x in numbers if not math.isnan(x)}), dtype=torch.float64)
    midpoints = (finite[1:] + finite[:-1]) / 2
    generator = torch.Generator().manual_seed(0)
    anything = 500 * torch.randn(2000, generator=generator, dtype=torch.float64)
    for x in torch.cat((finite, midpoints, anything, anything / 2**12)).tolist():
        rounded = float(round_to(torch.tensor(x), torch.float8_e4m3fn))
        distances = (finite - x).abs()
        nearest = finite[distances == distances.min()].tolist()
        even = [y for y in nearest if numbers.index(y) % 2 == 0]
        assert rounded == (nearest[0] if len(nearest) == 1 else even[0])


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.bfloat16, torch.float16], ids=str)
@given(seed=st.integers(0, 2**32 - 1), size=st.sampled_from([1e-3, 1.0, 1e4]))
def test_narrowing_is_what_the_oracle_says(dtype, stored, seed, size):
    generator = torch.Generator().manual_seed(seed)
    x = (size * torch.randn(7, 3, 8, generator=generator)).to(dtype)
    x[0, 0, :4] = torch.tensor([torch.inf, -torch.inf, torch.finfo(dtype).max, 0.0])
    scales = torch.tensor([0.5, 2.0, 0.0625])
    actual = narrow(x, stored, scales).double()
    torch.testing.assert_close(actual, round_to(x.double() / scales[:, None], stored), atol=0, rtol=0)
    if stored != dtype:
        torch.testing.assert_close(
            narrow(x, stored, None).double(), round_to(x, stored), atol=0, rtol=0
        )


def test_scales_belong_to_key_value_heads():
    x, scales = torch.randn(5, 6, 8).bfloat16(), torch.tensor([0.3, 0.7])
    expected = x.float() * torch.tensor([0.3] * 3 + [0.7] * 3)[:, None]
    assert torch.equal(rescale(x, scales), expected.bfloat16())
    assert rescale(x, None) is x


def test_each_layer_has_its_scales_until_the_cache_is_allocated_anew():
    spec = KVCacheSpec(2, 2, 4, 1, 8, torch.float8_e4m3fn, torch.device("cpu"))
    backend = TorchAttention()
    values = torch.full((1, 1, 8), 1000.0)

    def read(layer):
        attention = AttentionSpec(layer, 1, 1, 8, scale=1.0)
        meta = backend.prepare(make_batch([0], [1], [[1]], 4))
        return float(backend.forward(values, values, values, attention, meta)[0, 0, 0])

    backend.allocate_cache(spec)
    assert [read(0), read(1)] == [448.0, 448.0]
    backend.set_kv_scales(torch.ones(2, 1), torch.tensor([[1.0], [4.0]]))
    assert [read(0), read(1)] == [448.0, 1024.0]
    backend.allocate_cache(spec)
    assert [read(0), read(1)] == [448.0, 448.0]


def test_works_outside_of_inference_mode():
    q = torch.randn(3, 4, 8, requires_grad=True)
    k, v = torch.randn(2, 3, 2, 8)
    backend = TorchAttention()
    backend.allocate_cache(KVCacheSpec(1, 2, 4, 2, 8, torch.float32, torch.device("cpu")))
    spec = AttentionSpec(0, 4, 2, 8, scale=0.3)
    out = backend.forward(q, k, v, spec, backend.prepare(make_batch([0], [3], [[1]], 4)))
    assert not out.requires_grad
    expected = dense_attention(q.detach(), k, v, spec, 0)
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)


def test_bytes_per_block_are_those_of_the_cache():
    spec = cache_spec(make_case(dtype="bfloat16"), num_blocks=7)
    backend = TorchAttention()
    backend.allocate_cache(spec)
    assert backend._cache.nbytes == 7 * backend.cache_bytes_per_block(spec)


rows_of_a_step = st.lists(
    st.tuples(st.integers(0, 90), st.just(1) | st.integers(1, 40)), min_size=1, max_size=20
)


@settings(max_examples=100, deadline=None)
@given(
    rows=rows_of_a_step,
    window=st.sampled_from([NO_WINDOW, 1, 7]),
    limits=st.builds(TileLimits, st.integers(1, 4000), st.integers(1, 50)),
)
def test_tiles_cover_each_token_once_within_the_limits(rows, window, limits):
    rows.sort(key=lambda row: row[1] != 1)
    starts, counts = zip(*rows, strict=True)
    spec = cache_spec(make_case(), num_blocks=100)
    batch = make_batch(starts, counts, [list(range(1, 10))] * len(rows), 16)
    covered = []
    for tile in TileCutter(batch, spec, window, limits).cut():
        num_rows, num_queries, num_keys = tile.mask.shape
        size = num_rows * spec.num_kv_heads * num_keys * spec.head_dim
        assert num_queries <= limits.num_queries
        assert num_rows == 1 or size <= limits.num_elements
        assert tile.mask.any(dim=-1).all()
        covered += torch.arange(sum(counts))[tile.tokens].tolist()
    assert sorted(covered) == list(range(sum(counts)))


@pytest.mark.parametrize(
    ("wanted", "named"),
    [
        ({}, []),
        ({"kv_cache_dtype": "bfloat16", "has_window": True, "has_softcap": True}, []),
        ({"kv_cache_dtype": "fp8"}, []),
        ({"kv_cache_dtype": "fp8_e4m3"}, []),
        ({"kv_cache_dtype": "fp8_e5m2"}, ["kv_cache_dtype 'fp8_e5m2' is none of auto, float32, "]),
        ({"dtype": "int8", "kv_cache_dtype": "int8"}, ["dtype 'int8'"]),
    ],
)
def test_names_everything_that_it_cannot_serve(wanted, named):
    reasons = ENTRY.unsupported(Requirements(**({"device": "cpu", "dtype": "float32"} | wanted)))
    assert len(reasons) == len(named)
    for reason, start in zip(reasons, named, strict=True):
        assert reason.startswith(start)


def test_registering_does_not_import_torch():
    code = (
        "import sys; from plugins.attention import torch as plugin; "
        "plugin.core_register_attention(); sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)  # noqa: S603  the arguments are ours

from __future__ import annotations

import itertools
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
)
from plugins.attention import torch as plugin
from plugins.attention.torch.backend import NO_WINDOW, TileCutter, TileLimits, TorchAttention

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
        ({"kv_cache_dtype": "fp8"}, ["kv_cache_dtype 'fp8'"]),
        ({"dtype": "int8", "kv_cache_dtype": "fp8"}, ["dtype 'int8'", "kv_cache_dtype 'fp8'"]),
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

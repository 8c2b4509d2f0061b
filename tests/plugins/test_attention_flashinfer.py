from __future__ import annotations

import importlib.util
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core.interfaces import AttentionSpec, KVCacheSpec, SupportsCudaGraph, SupportsQuantizedKV
from core.registry import Requirements
from core.testing.attention import (
    AttentionConformance,
    Case,
    Rig,
    dense_attention,
    make_batch,
    random_inputs,
)
from plugins.attention import flashinfer as plugin
from plugins.attention.flashinfer import backend as backend_module
from plugins.attention.flashinfer.backend import (
    MIN_WORKSPACE_BYTES,
    FlashInferAttention,
    workspace_bytes,
)
from plugins.attention.flashinfer.pages import lay_out

(ENTRY,) = plugin.core_register_attention()


@pytest.fixture(autouse=True)
def small_workspace(monkeypatch):
    """Spare the host from filling 128 MiB with zeros for each cache."""
    monkeypatch.setattr(backend_module, "MIN_WORKSPACE_BYTES", 1 << 12)


# --- what the library's documentation says of its wrappers, in float64 -----------------------------


class Wrapper:
    """Holds what was planned; `plans` counts."""

    all: list[Wrapper]

    def __init__(self, workspace, kv_layout="NHD", **_options):
        assert workspace.dtype == torch.uint8
        assert not workspace[:1000].any(), "must be zero for its first use"
        self.kv_layout, self.plans = kv_layout, 0
        self.all.append(self)

    def _plan(self, query_starts, page_starts, pages, last_lens, *sizes, **options):
        for host in (query_starts, page_starts, last_lens):
            assert host.device.type == "cpu"  # else the library waits for the device
            assert host.dtype == torch.int32
        assert pages.dtype == torch.int32
        self.num_heads, self.num_kv_heads, self.head_dim, self.page_size = sizes
        assert self.num_heads % self.num_kv_heads == 0
        lens = last_lens.tolist()
        assert all(1 <= n <= self.page_size for n in lens)
        starts = page_starts.tolist()
        assert starts[0] == 0
        assert starts[-1] == len(pages)
        self.tables = [pages[a:b] for a, b in pairwise(starts)]
        self.lengths = [
            (len(table) - 1) * self.page_size + n for table, n in zip(self.tables, lens, strict=True)
        ]
        self.query_starts = query_starts.tolist()
        self.options, self.plans = options, self.plans + 1

    def run(self, q, paged_kv_cache, *, out):
        assert self.kv_layout == "HND"
        assert q.dtype == self.options["q_data_type"]
        assert q.shape == out.shape == (self.query_starts[-1], self.num_heads, self.head_dim)
        for x in paged_kv_cache:
            assert x.dtype == self.options["kv_data_type"]
            assert x.shape[1:] == (self.num_kv_heads, self.page_size, self.head_dim)
        left, scale = self.options["window_left"], self.options["sm_scale"]
        spec = AttentionSpec(
            layer=0,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            scale=self.head_dim**-0.5 if scale is None else scale,
            window=None if left == -1 else left + 1,
            softcap=self.options["logits_soft_cap"] or None,
        )
        bounds = pairwise(self.query_starts)
        for (first, last), table, length in zip(bounds, self.tables, self.lengths, strict=True):
            k, v = (x[table.long()].transpose(1, 2).flatten(0, 1)[:length] for x in paged_kv_cache)
            out[first:last] = dense_attention(q[first:last], k, v, spec, length - (last - first))
        return out


class DecodeWrapper(Wrapper):
    def plan(self, indptr, indices, last_page_len, *sizes, **options):
        starts = torch.arange(len(last_page_len) + 1, dtype=torch.int32)
        self._plan(starts, indptr, indices, last_page_len, *sizes, **options)


class PrefillWrapper(Wrapper):
    def plan(
        self,
        qo_indptr,
        paged_kv_indptr,
        paged_kv_indices,
        paged_kv_last_page_len,
        *sizes,
        causal=False,
        max_token_per_sequence=None,
        **options,
    ):
        assert causal
        assert max_token_per_sequence == max(qo_indptr.diff()).item()
        self._plan(
            qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, *sizes, **options
        )


def append_paged_kv_cache(  # noqa: PLR0917  as the library has it
    append_key,
    append_value,
    batch_indices,
    positions,
    paged_kv_cache,
    kv_indices,
    kv_indptr,
    kv_last_page_len,
    kv_layout="NHD",
):
    assert kv_layout == "HND"
    tables = (batch_indices, positions, kv_indices, kv_indptr, kv_last_page_len)
    assert {x.dtype for x in tables} == {torch.int32}
    assert len(batch_indices) == len(positions) == len(append_key)
    page_size = paged_kv_cache[0].shape[2]
    blocks = kv_indices[kv_indptr[batch_indices.long()] + positions // page_size]
    for pages, x in zip(paged_kv_cache, (append_key, append_value), strict=True):
        pages.transpose(1, 2)[blocks.long(), (positions % page_size).long()] = x


def make_library():
    made = []
    classes = {
        "BatchDecodeWithPagedKVCacheWrapper": type("Decode", (DecodeWrapper,), {"all": made}),
        "BatchPrefillWithPagedKVCacheWrapper": type("Prefill", (PrefillWrapper,), {"all": made}),
    }
    return SimpleNamespace(**classes, append_paged_kv_cache=append_paged_kv_cache, made=made)


def is_missing_here(requirements):
    """Say what a machine with a GPU and the library would say."""
    reasons = ENTRY.unsupported(replace(requirements, device="cuda"))
    return [reason for reason in reasons if "is not installed" not in reason]


class TestFlashInferAttention(AttentionConformance):
    entry = replace(
        ENTRY, factory=lambda _: FlashInferAttention(make_library()), unsupported=is_missing_here
    )
    dtypes = ("bfloat16", "float16")
    head_dims = (64, 80, 128)
    settings = settings(AttentionConformance.settings, max_examples=5)


# --- pages -----------------------------------------------------------------------------------------

row_lists = st.lists(
    st.tuples(st.integers(0, 60), st.just(1) | st.integers(2, 30)), min_size=1, max_size=7
)


@given(rows=row_lists, block_size=st.sampled_from([1, 4, 16]), seed=st.integers(0, 99))
def test_pages_are_those_of_the_block_tables(rows, block_size, seed):
    rows.sort(key=lambda row: row[1] != 1)
    starts, counts = zip(*rows, strict=True)
    sizes = [-(-sum(row) // block_size) for row in rows]
    blocks = (torch.randperm(sum(sizes), generator=torch.Generator().manual_seed(seed)) + 1).tolist()
    tables = [[blocks.pop() for _ in range(size)] for size in sizes]
    batch = make_batch(starts, counts, tables, block_size, num_padding=2)
    layout = lay_out(batch, block_size)
    place = layout.placement
    ends = [start + count for start, count in rows]
    assert place.pages.tolist() == [block for table in tables for block in table]
    blocks = place.pages[place.page_starts[place.rows.long()] + place.positions // block_size]
    assert (blocks * block_size + place.positions % block_size).tolist() == batch.slots.tolist()
    singles = sum(count == 1 for count in counts)
    for part, first, last in (
        (layout.decodes, 0, singles),
        (layout.prompts, singles, len(rows)),
    ):
        assert (part is None) == (first == last)
        if part is None:
            continue
        assert part.query_starts.diff().tolist() == list(counts[first:last])
        assert part.longest == max(counts[first:last])
        assert part.tokens == slice(sum(counts[:first]), sum(counts[:last]))
        bounds = part.page_starts.tolist()
        for row, a, b, n in zip(
            range(first, last), bounds, bounds[1:], part.last_lens.tolist(), strict=False
        ):
            assert part.pages[a:b].tolist() == tables[row]
            assert (b - a - 1) * block_size + n == ends[row]
            assert 1 <= n <= block_size


# --- plans -----------------------------------------------------------------------------------------


def make_case(**changes):
    usual = {
        "dtype": "bfloat16",
        "block_size": 16,
        "head_dim": 64,
        "num_kv_heads": 2,
        "group": 4,
        "window": 9,
        "softcap": None,
        "scale": 0.125,
        "rows": ((30, 1), (3, 1), (0, 20)),
        "chunk": 40,
        "seed": 0,
    }
    return Case(**(usual | changes))


@torch.inference_mode()
def test_a_plan_serves_all_layers_of_a_kind_for_one_step():
    library, case = make_library(), make_case()
    backend = FlashInferAttention(library)
    rig = Rig(backend, case, num_blocks=case.num_blocks(case.lengths))
    rows = [rig.add_row(random_inputs(case, n, n)) for n in case.lengths]
    rig.advance(rows, [start for start, _ in case.rows], case.chunk)
    before = [wrapper.plans for wrapper in library.made]
    assert len(before) == 4  # for decodes and for prompts, with and without the window
    batch = make_batch([30, 3, 0], [1, 1, 20], [row.table for row in rows], case.block_size)
    meta = backend.prepare(batch)
    q, k, v = random_inputs(case, 22, 0)[0]
    for layer in (0, 1, 0, 1, 1):
        backend.forward(q, k, v, rig.specs[layer], meta)
    assert [wrapper.plans for wrapper in library.made] == [n + 1 for n in before]


@torch.inference_mode()
def test_steps_may_be_prepared_before_others_have_run():
    case = make_case()
    backend = FlashInferAttention(make_library())
    rig = Rig(backend, case, num_blocks=8)
    lengths = (5, 20)
    metas, inputs = [], []
    for first, length in zip((1, 4), lengths, strict=True):
        metas.append(backend.prepare(make_batch([0], [length], [[first, first + 1]], 16)))
        inputs.append(random_inputs(case, length, length))
    for layer, spec in enumerate(rig.specs):
        for meta, tensors in zip(metas, inputs, strict=True):
            q, k, v = tensors[layer]
            out = backend.forward(q, k, v, spec, meta)
            expected = dense_attention(q, k, v, spec, 0)
            torch.testing.assert_close(out.double(), expected, atol=3e-2, rtol=3e-2)


def test_layers_of_different_scales_and_heads_have_plans_of_their_own():
    library = make_library()
    backend = FlashInferAttention(library)
    cpu = torch.device("cpu")
    backend.allocate_cache(KVCacheSpec(2, 3, 16, 2, 64, dtype=torch.bfloat16, device=cpu))
    meta = backend.prepare(make_batch([0], [7], [[1]], 16))
    for layer, (num_heads, scale) in enumerate([(2, 0.1), (8, 0.1), (8, 0.3)]):
        q, k, v = (torch.randn(7, n, 64).bfloat16() for n in (num_heads, 2, 2))
        spec = AttentionSpec(layer % 2, num_heads, 2, 64, scale)
        out = backend.forward(q, k, v, spec, meta)
        expected = dense_attention(q, k, v, spec, 0)
        torch.testing.assert_close(out.double(), expected, atol=3e-2, rtol=3e-2)
    assert len(library.made) == 6


def test_kernels_are_compiled_with_the_first_layer_and_not_with_the_first_decode():
    library = make_library()
    backend = FlashInferAttention(library)
    case = make_case(rows=((0, 20),))
    rig = Rig(backend, case, num_blocks=4)  # fills the pool by one long prompt
    assert len(rig.specs) == 2
    assert all(wrapper.plans for wrapper in library.made)


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "is_larger"),
    [(32, 8, 128, False), (128, 8, 128, True), (16, 2, 256, True), (32, 32, 128, False)],
)
def test_workspace_grows_with_the_heads_that_share_keys(num_heads, num_kv_heads, head_dim, is_larger):
    cpu = torch.device("cpu")
    cache = KVCacheSpec(1, 2, 64, num_kv_heads, head_dim, dtype=torch.bfloat16, device=cpu)
    size = workspace_bytes(num_heads, cache, 132)
    assert (size > MIN_WORKSPACE_BYTES) == is_larger
    parts = 2 * 132 // num_kv_heads
    assert size >= num_heads * parts * 128 * head_dim * 4


# --- what can be served ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "named"),
    [
        ({}, []),
        ({"head_dims": frozenset({64, 128, 256}), "block_size": 16, "has_window": True}, []),
        ({"num_heads": 71, "num_kv_heads": 1, "has_softcap": True}, []),
        ({"kv_cache_dtype": "bfloat16"}, []),
        (
            {"device": "cpu", "dtype": "float32"},
            ["device 'cpu' is not 'cuda'", "dtype 'float32' is none of bfloat16, float16"],
        ),
        ({"kv_cache_dtype": "fp8"}, ["kv_cache_dtype 'fp8' is none of auto, bfloat16"]),
        ({"head_dims": frozenset({32, 80, 128})}, ["head_dim 32 is none", "head_dim 80 is none"]),
        ({"block_size": 8}, ["block_size 8 is none of 16, 32, 64, 128"]),
    ],
)
def test_names_everything_that_it_cannot_serve(wanted, named, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: "found")
    reasons = ENTRY.unsupported(Requirements(**({"device": "cuda", "dtype": "bfloat16"} | wanted)))
    assert len(reasons) == len(named)
    for reason, start in zip(reasons, named, strict=True):
        assert reason.startswith(start)


def test_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    reasons = ENTRY.unsupported(Requirements(device="cuda", dtype="bfloat16"))
    assert reasons == ["flashinfer is not installed; pip install cythera[flashinfer]"]


def test_steps_are_not_captured_and_caches_not_narrowed():
    backend = FlashInferAttention(make_library())
    assert isinstance(backend, SupportsCudaGraph)
    assert not backend.can_capture
    assert not isinstance(backend, SupportsQuantizedKV)


def test_registering_imports_neither_torch_nor_the_library():
    code = (
        "import sys; from plugins.attention import flashinfer as plugin; "
        "plugin.core_register_attention(); sys.exit(bool({'torch', 'flashinfer'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)  # noqa: S603  the arguments are ours


def test_factory_hands_the_library_over(monkeypatch):
    library = make_library()
    monkeypatch.setitem(sys.modules, "flashinfer", library)
    backend = ENTRY.factory(None)
    assert backend._library is library

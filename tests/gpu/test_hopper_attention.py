"""The kernels for Hopper beside those for all cards, and beside themselves: launched again and again.

Skipped on other cards.  A race between those who copy and those who attend shows once in a hundred
launches, as a few numbers of one head.
"""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch

from core.interfaces import AttentionSpec, KVCacheSpec
from core.testing.attention import make_batch

if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
    pytest.skip("needs a Hopper GPU", allow_module_level=True)

from plugins.attention.triton.backend import TritonAttention
from plugins.attention.triton.hopper import FEW_ROWS
from plugins.attention.triton.tuning import choose_tuning, describe_card

DEVICE = torch.device("cuda")
NUM_LAYERS = 2


class Step:
    """Random rows over a cache that two backends hold alike: NaN wherever nothing was stored."""

    def __init__(
        self,
        starts,
        counts,
        *,
        num_kv_heads=8,
        group=4,
        dim=128,
        window=None,
        block=64,
        dtype=torch.bfloat16,
        seed=0,
    ):
        generator = torch.Generator(DEVICE).manual_seed(seed)
        self.kv_heads, self.heads, self.dim = num_kv_heads, num_kv_heads * group, dim
        tables, first = [], 1
        for start, count in zip(starts, counts, strict=True):
            size = -(-(start + count) // block)
            tables.append(list(range(first, first + size)))
            first += size
        order = [0, *random.Random(seed).sample(range(1, first), first - 1)]
        tables = [[order[block] for block in table] for table in tables]
        self.batch = make_batch(starts, counts, tables, block, device="cuda")
        width = (self.heads + 2 * num_kv_heads) * dim
        self.qkv = torch.randn(
            self.batch.num_tokens, width, generator=generator, device=DEVICE, dtype=dtype
        )
        angles = torch.rand(4096, dim // 2, generator=generator, device=DEVICE) * math.tau
        self.cos, self.sin = angles.cos().to(dtype), angles.sin().to(dtype)
        self.specs = [
            AttentionSpec(layer, self.heads, num_kv_heads, dim, dim**-0.5, window)
            for layer in range(NUM_LAYERS)
        ]
        cache = KVCacheSpec(NUM_LAYERS, first, block, num_kv_heads, dim, dtype, DEVICE)
        self.backend, self.other = (
            self._make(cache, None),
            self._make(cache, choose_tuning(describe_card(DEVICE), dim, block, 2)),
        )
        for mine, others in zip(self.backend._layers, self.other._layers, strict=True):
            for pages, same in ((mine.k, others.k), (mine.v, others.v)):
                pages.normal_(generator=generator)
                for table, start in zip(tables, starts, strict=True):
                    for index, page in enumerate(table):
                        pages[page, :, max(0, start - index * block) :] = math.nan
                same.copy_(pages)

    @staticmethod
    def _make(cache, tuning):
        backend = TritonAttention(tuning)
        backend.allocate_cache(cache)
        return backend

    def run(self, backend, batch=None, qkv=None):
        meta = backend.prepare(batch or self.batch)
        qkv = self.qkv if qkv is None else qkv
        outs = [
            backend.forward_rotary(qkv.clone(), self.cos, self.sin, spec, meta) for spec in self.specs
        ]
        return torch.stack(outs)

    def pad(self, num_rows, num_tokens):
        """Return batch and qkv as a captured step has them: with room for more, and without lists."""
        batch = self.batch
        more_rows, more = num_rows - batch.num_rows, num_tokens - batch.num_tokens

        def extend(tensor, count, value=0):
            shape = (count, *tensor.shape[1:])
            return torch.cat([tensor, torch.full(shape, value, dtype=tensor.dtype, device=DEVICE)])

        padded = replace(
            batch,
            num_tokens=num_tokens,
            num_rows=num_rows,
            num_decodes=0,
            token_ids=extend(batch.token_ids, more),
            positions=extend(batch.positions, more),
            slots=extend(batch.slots, more),
            rows=extend(batch.rows, more_rows),
            query_starts=extend(batch.query_starts, more_rows, batch.num_tokens),
            seq_lens=extend(batch.seq_lens, more_rows),
            block_tables=extend(batch.block_tables, more_rows),
            starts=[],
            counts=[],
        )
        return padded, extend(self.qkv, more)


def check(step, num_runs):
    expected = step.run(step.backend)
    assert bool(expected.isfinite().all())
    others = step.run(step.other)
    assert ((expected - others).float().norm() / others.float().norm()).item() < 5e-3
    for run in range(num_runs):
        assert torch.equal(step.run(step.backend), expected), f"run {run} differs"


def test_they_are_in_use():
    step = Step([100], [1])
    assert step.backend._hopper is not None
    assert step.other._hopper is None
    assert step.backend._hopper.can_decode(step.specs[0], FEW_ROWS + 1, is_fused=True)


@pytest.mark.parametrize("num_rows", [FEW_ROWS, FEW_ROWS + 1, 37, 300])
def test_decodes_repeat(num_rows):
    lengths = [0, 63, 64, 127, *random.Random(num_rows).choices(range(1500), k=num_rows)][-num_rows:]
    check(Step(lengths, [1] * num_rows), 150)


@pytest.mark.parametrize(("num_kv_heads", "group"), [(8, 1), (4, 7), (2, 12), (1, 16)])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("window", [None, 100])
def test_decodes_of_all_groups_agree(num_kv_heads, group, dim, window):
    lengths = random.Random(group).choices(range(700), k=30)
    check(Step(lengths, [1] * 30, num_kv_heads=num_kv_heads, group=group, dim=dim, window=window), 5)


@pytest.mark.parametrize("seed", range(4))
def test_decodes_beside_prompts_repeat(seed):
    draw = random.Random(seed)
    starts = draw.choices(range(1500), k=25)
    counts = [1] * 20 + [2, 64, 65, 300, 129]
    check(Step(starts, counts, seed=seed), 40)


@pytest.mark.parametrize(("num_kv_heads", "group"), [(8, 1), (4, 7), (4, 8), (1, 16)])
@pytest.mark.parametrize("dim", [64, 128])
def test_prompts_of_all_groups_agree(num_kv_heads, group, dim):
    starts, counts = [0, 5, 63, 1000, 0], [128, 300, 17, 513, 2]
    check(Step(starts, counts, num_kv_heads=num_kv_heads, group=group, dim=dim), 5)


def test_a_long_prompt_repeats():
    check(Step([0, 700], [3000, 1100]), 20)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pages_of_128_tokens(dtype):
    lengths = [0, 63, 64, 65, 127, 128, *random.Random(1).choices(range(900), k=24)]
    check(Step(lengths, [1] * 30, block=128, dtype=dtype), 40)
    counts = [1] * 20 + [2, 64, 65, 300, 129]
    check(Step(lengths[:25], counts, block=128, dtype=dtype), 20)


def test_rows_with_one_query_may_come_as_prompts():
    step = Step([5, 70, 300], [1, 1, 1])
    step.batch = replace(step.batch, num_decodes=0)
    check(step, 10)


@pytest.mark.parametrize("counts", [[1] * 20, [1] * 5 + [2, 70, 129], [200], [1]])
def test_padding_changes_nothing_and_graphs_repeat(counts):
    step = Step(random.Random(2).choices(range(900), k=len(counts)), counts)
    expected = step.run(step.backend, replace(step.batch, num_decodes=0))
    num_tokens = step.batch.num_tokens
    batch, qkv = step.pad(step.batch.num_rows + 9, num_tokens + 50)
    assert torch.equal(step.run(step.backend, batch, qkv)[:, :num_tokens], expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = step.run(step.backend, batch, qkv)
    for _ in range(3):
        outs.fill_(math.nan)
        graph.replay()
        assert torch.equal(outs[:, :num_tokens], expected)
    lens = batch.seq_lens.clone()
    batch.seq_lens.zero_()  # a step of nothing but padding in between
    batch.query_starts.zero_()
    graph.replay()
    batch.seq_lens.copy_(lens)
    batch.query_starts.copy_(step.pad(step.batch.num_rows + 9, num_tokens + 50)[0].query_starts)
    graph.replay()
    assert torch.equal(outs[:, :num_tokens], expected)

"""The kernels for Hopper beside those for all cards, and beside themselves: launched again and again.

Skipped on other cards.  A race between those who copy and those who attend shows once in a hundred
launches, as a few numbers of one head.
"""

from __future__ import annotations

import math
import random

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
BLOCK = 64


class Step:
    """Random rows over a cache that two backends hold alike: NaN wherever nothing was stored."""

    def __init__(self, starts, counts, *, num_kv_heads=8, group=4, dim=128, window=None, seed=0):
        generator = torch.Generator(DEVICE).manual_seed(seed)
        self.kv_heads, self.heads, self.dim = num_kv_heads, num_kv_heads * group, dim
        tables, first = [], 1
        for start, count in zip(starts, counts, strict=True):
            size = -(-(start + count) // BLOCK)
            tables.append(list(range(first, first + size)))
            first += size
        order = [0, *random.Random(seed).sample(range(1, first), first - 1)]
        tables = [[order[block] for block in table] for table in tables]
        self.batch = make_batch(starts, counts, tables, BLOCK, device="cuda")
        width = (self.heads + 2 * num_kv_heads) * dim
        self.qkv = torch.randn(
            self.batch.num_tokens, width, generator=generator, device=DEVICE, dtype=torch.bfloat16
        )
        angles = torch.rand(4096, dim // 2, generator=generator, device=DEVICE) * math.tau
        self.cos, self.sin = angles.cos().bfloat16(), angles.sin().bfloat16()
        self.specs = [
            AttentionSpec(layer, self.heads, num_kv_heads, dim, dim**-0.5, window)
            for layer in range(NUM_LAYERS)
        ]
        cache = KVCacheSpec(NUM_LAYERS, first, BLOCK, num_kv_heads, dim, torch.bfloat16, DEVICE)
        self.backend, self.other = (
            self._make(cache, None),
            self._make(cache, choose_tuning(describe_card(DEVICE), dim, BLOCK, 2)),
        )
        for mine, others in zip(self.backend._layers, self.other._layers, strict=True):
            for pages, same in ((mine.k, others.k), (mine.v, others.v)):
                pages.normal_(generator=generator)
                for table, start in zip(tables, starts, strict=True):
                    for index, block in enumerate(table):
                        pages[block, :, max(0, start - index * BLOCK) :] = math.nan
                same.copy_(pages)

    @staticmethod
    def _make(cache, tuning):
        backend = TritonAttention(tuning)
        backend.allocate_cache(cache)
        return backend

    def run(self, backend):
        meta = backend.prepare(self.batch)
        outs = [
            backend.forward_rotary(self.qkv.clone(), self.cos, self.sin, spec, meta)
            for spec in self.specs
        ]
        return torch.stack(outs)


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

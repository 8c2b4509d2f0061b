"""Cards that nobody has tuned for, and that are not here: all their kernels compile, and fit."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from other_cards import compiling_for

from core.interfaces import AttentionSpec, KVCacheSpec, LinearSpec
from core.sampling import SampleRows
from core.testing.attention import make_batch
from plugins.attention.triton import backend
from plugins.attention.triton.tuning import Card as AttentionCard
from plugins.quant.dense import linear
from plugins.quant.dense.table import Card as DenseCard
from plugins.sampler.triton import sampler

CPU = torch.device("cpu")
NUM_HEADS, NUM_KV_HEADS = 8, 2


class Card(NamedTuple):
    name: str
    capability: tuple[int, int]
    num_sms: int
    shared_bytes: int

    def check(self, compiled, names):
        """Find these kernels, and none that takes more than a multiprocessor has."""
        assert names <= {kernel.name for kernel in compiled}
        assert [k for k in compiled if k.shared_bytes > self.shared_bytes] == []


A100 = Card("NVIDIA A100-SXM4-80GB", (8, 0), 108, 163 << 10)
RTX_3090 = Card("NVIDIA GeForce RTX 3090", (8, 6), 82, 99 << 10)
RTX_4090 = Card("NVIDIA GeForce RTX 4090", (8, 9), 128, 99 << 10)
H100 = Card("NVIDIA H100 80GB HBM3", (9, 0), 132, 227 << 10)
B200 = Card("NVIDIA B200", (10, 0), 148, 227 << 10)
RTX_5090 = Card("NVIDIA GeForce RTX 5090", (12, 0), 170, 99 << 10)

OF_ALL_CARDS = pytest.mark.parametrize(
    "card", [A100, RTX_3090, RTX_4090, H100, B200, RTX_5090], ids=lambda card: card.name
)


@pytest.mark.parametrize(
    ("card", "case"),
    [
        (A100, "plain"),
        (RTX_3090, "fp8"),
        (RTX_4090, "fp8"),
        (RTX_4090, "wide"),
        (B200, "plain"),
        (RTX_5090, "fp8"),
        (RTX_5090, "wide"),
    ],
    ids=lambda x: getattr(x, "name", x),
)
def test_attention(card, case, monkeypatch):
    dtype = torch.float16 if case == "wide" else torch.bfloat16
    cache_dtype = torch.float8_e4m3fn if case == "fp8" else dtype
    dim, block_size = (256, 16) if case == "wide" else (128, 64)
    _, capability, num_sms, shared_bytes = card
    described = AttentionCard(num_sms, capability, shared_bytes)
    monkeypatch.setattr(backend, "describe_card", lambda _: described)
    attention = backend.TritonAttention()
    attention.allocate_cache(KVCacheSpec(1, 20, block_size, NUM_KV_HEADS, dim, cache_dtype, CPU))
    if case == "fp8":
        attention.set_kv_scales(torch.ones(1, NUM_KV_HEADS), torch.ones(1, NUM_KV_HEADS))
    window, softcap = (24, 30.0) if case == "wide" else (None, None)
    spec = AttentionSpec(0, NUM_HEADS, NUM_KV_HEADS, dim, dim**-0.5, window, softcap)
    cos = torch.zeros(64, dim // 2, dtype=dtype)
    with compiling_for(capability, monkeypatch) as compiled:
        # Few decodes, more of them, and decodes beside prompts.
        for starts, counts in (([30], [1]), ([30] * 20, [1] * 20), ([5, 0], [1, 40])):
            batch = make_batch(starts, counts, [[1, 2, 3]] * len(starts), block_size, device="cpu")
            width = (NUM_HEADS + 2 * NUM_KV_HEADS) * dim
            qkv = torch.zeros(batch.num_tokens, width, dtype=dtype)
            attention.forward_rotary(qkv, cos, cos, spec, attention.prepare(batch))
    card.check(compiled, {"decode", "prefill", "write", "plan_decodes", "plan_prompts"})


@OF_ALL_CARDS
def test_linear_layers(card, monkeypatch):
    monkeypatch.setattr(linear, "card_of", lambda _: DenseCard(card.name, card.capability))
    norm = torch.ones(512, dtype=torch.bfloat16)
    with compiling_for(card.capability, monkeypatch) as compiled:
        for num_tokens in (1, 2, 4, 8, 64):
            x = torch.zeros(num_tokens, 512, dtype=torch.bfloat16)
            for num_outputs in (768, 2048):
                shards = (("up", num_outputs),)
                spec = LinearSpec("up", 512, shards, False, torch.bfloat16, CPU, "up")
                layer = linear.DenseLinear(spec, "plain", "silu")
                layer.forward_norm(x, norm, 1e-5)
                layer.forward_gate(x, norm, 1e-5)
                layer.forward_residual(x, torch.zeros(num_tokens, num_outputs, dtype=torch.bfloat16))
    card.check(compiled, {"vector_kernel", "norm_kernel"})


@OF_ALL_CARDS
def test_sampling(card, monkeypatch):
    tuning = sampler.Tuning(*[sampler.Cut(block, 4, 16 * card.num_sms) for block in (2048, 1024)])
    draws = sampler.TritonSampler("bfloat16", tuning)
    draws.allocate(8, 32_000, 64, CPU)
    draws._has_pdl = card.capability >= (9, 0)
    zeros = torch.zeros(2, dtype=torch.int64)
    logits = torch.zeros(2, 32_000, dtype=torch.bfloat16)
    with compiling_for(card.capability, monkeypatch) as compiled:
        draws._draw_with_kernels(logits, SampleRows(zeros, zeros, [0, 0]), is_random=True)
    card.check(compiled, {"find_likeliest", "race"})

"""Attention over whole sequences, against the plain definition in float64."""

from __future__ import annotations

import hypothesis.strategies as st
import torch
from hypothesis import given, settings

from core.interfaces import AttentionSpec
from core.quant.dense import DenseAttention
from core.testing.attention import dense_attention


@given(
    num_samples=st.integers(1, 3),
    length=st.integers(1, 9),
    num_kv_heads=st.integers(1, 2),
    per_group=st.integers(1, 3),
    window=st.none() | st.integers(1, 6),
    softcap=st.none() | st.floats(0.5, 4.0),
    seed=st.integers(0, 99),
)
@settings(max_examples=80, deadline=None)
def test_each_sequence_is_attended_alone(
    *, num_samples, length, num_kv_heads, per_group, window, softcap, seed
):
    num_heads = num_kv_heads * per_group
    spec = AttentionSpec(
        layer=0,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=4,
        scale=0.7,
        window=window,
        softcap=softcap,
    )
    generator = torch.Generator().manual_seed(seed)

    def draw(heads: int) -> torch.Tensor:
        shape = (num_samples * length, heads, 4)
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    q, k, v = draw(num_heads), draw(num_kv_heads), draw(num_kv_heads)
    actual = DenseAttention().forward(q, k, v, spec, length)
    parts = zip(q.split(length), k.split(length), v.split(length), strict=True)
    expected = torch.cat([dense_attention(*part, spec, 0) for part in parts])
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)

from __future__ import annotations

from core.testing.attention import AttentionConformance
from plugins.attention import torch as plugin

(ENTRY,) = plugin.core_register_attention()


class TestTorchAttention(AttentionConformance):
    entry = ENTRY
    dtypes = ("float32", "float64", "bfloat16", "float16")
    head_dims = (8, 24, 64, 80, 128, 256)

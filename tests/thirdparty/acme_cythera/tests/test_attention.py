from __future__ import annotations

from acme_cythera import attention
from hypothesis import settings

from core.registry import Requirements
from core.testing import AttentionConformance, PluginConformance

(ENTRY,) = attention.core_register_attention()


class TestPlugin(PluginConformance):
    module = "acme_cythera.attention"


class TestRowwise(AttentionConformance):
    entry = ENTRY
    dtypes = ("float32", "bfloat16", "float64")
    head_dims = (8, 24, 64)
    settings = settings(AttentionConformance.settings, max_examples=6)


def test_names_everything_that_it_cannot_serve():
    wanted = Requirements(device="cpu", dtype="int8", kv_cache_dtype="fp8")
    reasons = ENTRY.unsupported(wanted)
    assert [reason.split()[0] for reason in reasons] == ["dtype", "kv_cache_dtype"]

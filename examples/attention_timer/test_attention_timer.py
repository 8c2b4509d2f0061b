from __future__ import annotations

import gc
import itertools

import attention_timer as plugin
import pytest
import structlog
import torch
from hypothesis import settings
from timed_attention import Meter, TimedAttention

from core import LLM, SamplingParams
from core.interfaces import AttentionSpec
from core.registry import Requirements
from core.testing import AttentionConformance, PluginConformance
from core.testing.checkpoints import make_checkpoint

(ENTRY,) = plugin.core_register_attention()


class TestPlugin(PluginConformance):
    module = "attention_timer"


class TestTimer(AttentionConformance):
    entry = ENTRY
    dtypes = ("float32",)
    head_dims = (8, 64)
    settings = settings(AttentionConformance.settings, max_examples=4)


class Inner:
    def forward(self, q, k, v, spec, meta, /):
        if meta == "broken":
            raise ValueError(meta)
        return q + 1


def test_each_kind_of_layer_has_a_meter():
    ticks = itertools.count(step=0.5)
    backend = TimedAttention(Inner(), clock=lambda: next(ticks))
    full, sliding = (AttentionSpec(0, 2, 1, 4, 1.0, window=window) for window in (None, 8))
    for spec, num_tokens in ((full, 3), (sliding, 3), (full, 1)):
        q = torch.zeros(num_tokens, 2, 4)
        assert torch.equal(backend.forward(q, q, q, spec, None), q + 1)
    with pytest.raises(ValueError, match="broken"):
        backend.forward(q, q, q, full, "broken")
    assert backend.meters == {"full": Meter(2, 4, 1.0), "window 8": Meter(1, 3, 0.5)}


def test_it_is_reported_when_the_backend_is_gone(tmp_path):
    """Whole engine: 2 layers, one with a window; prompt of 4 tokens and 5 decodes."""
    folder = make_checkpoint("gemma2", tmp_path)
    options = {"attention_backend": "timer", "num_kv_blocks": 16, "device": "cpu"}
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    with structlog.testing.capture_logs() as lines:
        with LLM(str(folder), plugins=["py:attention_timer"], **options) as llm:
            llm.generate([[1, 2, 3, 4]], params)
        del llm
        gc.collect()
    found = {line["layers"]: line for line in lines if line["event"] == "attention"}
    assert set(found) == {"full", "window 8"}
    for line in found.values():
        assert (line["calls"], line["tokens"]) == (6, 9)
        assert line["seconds"] >= 0


@pytest.mark.parametrize(
    ("wanted", "num_reasons"),
    [
        ({}, 0),
        ({"kv_cache_dtype": "float32"}, 0),
        ({"kv_cache_dtype": "int3"}, 1),
        ({"dtype": "int8", "kv_cache_dtype": "int3"}, 2),
    ],
)
def test_refuses_what_the_wrapped_backend_refuses(wanted, num_reasons):
    requirements = Requirements(**({"device": "cpu", "dtype": "float32"} | wanted))
    assert len(ENTRY.unsupported(requirements)) == num_reasons


def test_is_never_chosen_by_itself(tmp_path):
    folder = make_checkpoint("llama3", tmp_path)
    with LLM(str(folder), plugins=["py:attention_timer"], num_kv_blocks=16, device="cpu") as llm:
        assert llm.assembly.plan.choices["attention"].name == "torch"

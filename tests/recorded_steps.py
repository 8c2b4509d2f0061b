"""Requests whose steps are recorded on one rank and replayed on several."""

from __future__ import annotations

import pytest

from core import LLM, SamplingParams
from core.testing.simulated_ranks import Recorder

PROMPTS = [[7, 3, 9, 11, 5], list(range(4, 44)), [100]]
PARAMS = [
    SamplingParams(max_tokens=8, temperature=0, ignore_eos=True, logprobs=2),
    SamplingParams(max_tokens=8, temperature=0, ignore_eos=True, prompt_logprobs=1),
    SamplingParams(max_tokens=8, temperature=1.0, seed=3, ignore_eos=True),
]


def settings_of(model, **changes):
    return {
        "model": str(model),
        "device": "cpu",
        "dtype": "float32",
        "num_kv_blocks": 40,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 24,  # cuts the long prompt into chunks
        "max_model_len": 64,
        **changes,
    }


def record(settings):
    """Run the requests on one rank and return the steps."""
    with LLM(**settings) as llm:
        recorder = llm.engine.executor = Recorder(llm.engine.executor)
        llm.generate(PROMPTS, PARAMS)
        return recorder.steps


def assert_same(results, steps, tolerance=1e-3):
    assert len(results) == len(steps)
    for result, (_, expected) in zip(results, steps, strict=True):
        assert result.tokens == expected.tokens
        assert result.logprobs.keys() == expected.logprobs.keys()
        for index, logprobs in result.logprobs.items():
            assert logprobs.top_ids == expected.logprobs[index].top_ids
            assert logprobs.logprob == pytest.approx(expected.logprobs[index].logprob, abs=tolerance)
        for index, prompt in result.prompt_logprobs.items():
            values = [entry.logprob for entry in prompt.entries]
            wanted = [entry.logprob for entry in expected.prompt_logprobs[index].entries]
            assert values == pytest.approx(wanted, abs=tolerance)

"""The whole engine against `transformers`, on the same weights, in float32.

Every family and variant, under every way in which the scheduler can cut the work: the tokens must
be the same ones, whatever the chunks, the cache hits, the preemptions or the order of arrival.
"""

from __future__ import annotations

import os
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import torch

from core import LLM, SamplingParams
from core.testing.checkpoints import (
    FAMILIES,
    make_checkpoint,
    reference_generate_batch,
    reference_logits,
)

if TYPE_CHECKING:
    from pathlib import Path

DEVICE = os.environ.get("CYTHERA_TEST_DEVICE", "cpu")

NUM_TOKENS = 64
PROMPT_LENGTHS = (3, 21, 9, 34, 17)
MAX_MODEL_LEN = 104


@dataclass(frozen=True)
class Reference:
    path: Path
    prompts: list[list[int]]
    outputs: list[list[int]]


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    path = make_checkpoint(request.param, tmp_path_factory.mktemp(request.param), num_shards=2)
    rng = random.Random(request.param)
    prompts = [[rng.randrange(3, 120) for _ in range(length)] for length in PROMPT_LENGTHS]
    prompts.append([*prompts[3][:30], 5, 6])  # shares a prefix with another
    outputs = reference_generate_batch(path, prompts, NUM_TOKENS, max_model_len=MAX_MODEL_LEN)
    return Reference(path, prompts, outputs)


GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
WAYS: dict[str, dict[str, Any]] = {
    "unlimited chunks": {},
    "chunks of 7, small pool": {
        "long_prefill_token_threshold": 7,
        "num_kv_blocks": 40,
        "block_size": 4,
    },
    "chunks of 1, no cache, overlapped": {
        "long_prefill_token_threshold": 1,
        "enable_prefix_caching": False,
        "max_in_flight": 2,
    },
    "few rows, overlapped, small pool": {
        "max_num_seqs": 3,
        "max_num_batched_tokens": 16,
        "num_kv_blocks": 30,
        "block_size": 4,
        "max_in_flight": 3,
    },
}


def make_llm(path: Path, **settings: Any) -> LLM:
    defaults = {
        "dtype": "float32",
        "device": DEVICE,
        "max_model_len": MAX_MODEL_LEN,
        "num_kv_blocks": 256,
        "block_size": 8,
        "max_num_seqs": 8,
    }
    return LLM(str(path), **defaults | settings)


@pytest.mark.parametrize("way", WAYS)
def test_same_tokens_as_transformers(reference: Reference, way: str) -> None:
    with make_llm(reference.path, **WAYS[way]) as llm:
        order = list(range(len(reference.prompts)))
        for round_ in range(2):  # the second round finds its prompts in the prefix cache
            random.Random(way + str(round_)).shuffle(order)
            results = llm.generate([reference.prompts[i] for i in order], GREEDY, use_tqdm=False)
            for i, result in zip(order, results, strict=True):
                assert result.outputs[0].token_ids == reference.outputs[i], (way, i, round_)
                assert result.outputs[0].finish_reason == "length"
        assert llm.engine.kv_cache.stats().num_used == 0
        llm.engine.kv_cache.check_integrity([])
        if "small pool" in way:
            assert llm.engine.scheduler.num_preemptions > 0, "the pool was meant to be too small"
        if WAYS[way].get("enable_prefix_caching", True) and "small pool" not in way:
            assert all(
                result.num_cached_tokens for result in results if len(result.prompt_token_ids) > 8
            )


def test_same_prefill_logits_as_transformers(reference: Reference) -> None:
    """Log-probabilities of the prompt are those of the reference's logits, to 1e-4 relative."""
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=20, ignore_eos=True)
    with make_llm(reference.path, long_prefill_token_threshold=7) as llm:
        results = llm.generate(reference.prompts, params, use_tqdm=False)
    for prompt, result in zip(reference.prompts, results, strict=True):
        logits = reference_logits(reference.path, prompt, max_model_len=MAX_MODEL_LEN)
        expected = torch.log_softmax(logits.double(), -1)
        assert result.prompt_logprobs is not None
        assert result.prompt_logprobs[0] is None
        assert len(result.prompt_logprobs) == len(prompt)
        scale = logits.abs().max().item()
        for position, table in enumerate(result.prompt_logprobs[1:]):
            assert len(table) in {20, 21}
            for token_id, entry in table.items():
                assert entry.logprob == pytest.approx(
                    expected[position, token_id].item(), abs=1e-4 * max(1.0, scale)
                )

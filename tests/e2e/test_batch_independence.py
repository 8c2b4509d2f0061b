"""A request's tokens do not depend on which others share its batch.

Over every sampling parameter, seeded and greedy, with preemption, chunks and overlapped steps.  The
model runs in float64, so that the order of a sum cannot flip a choice.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from core import LLM, SamplingParams
from core.testing.checkpoints import make_checkpoint

if TYPE_CHECKING:
    from collections.abc import Iterator

DEVICE = os.environ.get("CYTHERA_TEST_DEVICE", "cpu")

VOCAB = 100  # below the vocabulary of every checkpoint

token_ids = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=8, unique=True)


@st.composite
def sampling_params(draw: st.DrawFn) -> SamplingParams:
    max_tokens = draw(st.integers(1, 12))
    allowed = draw(
        st.none() | st.lists(st.integers(0, VOCAB - 1), min_size=12, max_size=40, unique=True)
    )
    return SamplingParams(
        n=draw(st.sampled_from([1, 1, 1, 2, 3])),
        temperature=draw(st.sampled_from([0.0, 0.3, 1.0, 2.5])),
        top_k=draw(st.sampled_from([0, -1, 1, 5, 40])),
        top_p=draw(st.sampled_from([1.0, 0.9, 0.4, 0.05])),
        min_p=draw(st.sampled_from([0.0, 0.05, 0.6])),
        presence_penalty=draw(st.sampled_from([0.0, 1.5, -1.0])),
        frequency_penalty=draw(st.sampled_from([0.0, 0.7, -0.3])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.3, 0.8])),
        logit_bias=draw(
            st.none() | st.dictionaries(st.integers(0, VOCAB - 1), st.floats(-5, 5), max_size=4)
        ),
        allowed_token_ids=allowed,
        banned_token_ids=draw(st.none() | token_ids),
        min_tokens=draw(st.integers(0, max_tokens)),
        max_tokens=max_tokens,
        stop_token_ids=draw(st.none() | token_ids),
        ignore_eos=draw(st.booleans()),
        logprobs=draw(st.none() | st.integers(0, 5)),
        prompt_logprobs=draw(st.sampled_from([None, None, 0, 3])),
        seed=draw(st.integers(0, 2**63 - 1)),
    )


prompts = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=20)
requests = st.lists(st.tuples(prompts, sampling_params()), min_size=2, max_size=6)


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LLM, LLM]]:
    path = str(make_checkpoint("llama3", tmp_path_factory.mktemp("independence")))
    common: dict[str, Any] = {
        "dtype": "float64",
        "device": DEVICE,
        "max_model_len": 64,
        "block_size": 4,
    }
    alone = LLM(path, **common, num_kv_blocks=64, enable_prefix_caching=False, max_num_seqs=3)
    crowded = LLM(
        path,
        **common,
        num_kv_blocks=16,
        max_num_seqs=5,
        max_num_batched_tokens=11,
        long_prefill_token_threshold=5,
        max_in_flight=2,
    )
    with alone, crowded:
        yield alone, crowded


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(batch=requests)
def test_tokens_do_not_depend_on_the_batch(
    engines: tuple[LLM, LLM], batch: list[tuple[list[int], SamplingParams]]
) -> None:
    alone, crowded = engines
    together = crowded.generate([p for p, _ in batch], [s for _, s in batch], use_tqdm=False)
    for (prompt, params), result in zip(batch, together, strict=True):
        solo = alone.generate([prompt], params, use_tqdm=False)[0]
        for expected, got in zip(solo.outputs, result.outputs, strict=True):
            assert got.token_ids == expected.token_ids
            assert (got.finish_reason, got.stop_reason) == (
                expected.finish_reason,
                expected.stop_reason,
            )
            _assert_same_logprobs(got.logprobs, expected.logprobs)
        _assert_same_logprobs(result.prompt_logprobs, solo.prompt_logprobs)
    crowded.engine.kv_cache.check_integrity([])
    assert crowded.engine.kv_cache.stats().num_used == 0


def _assert_same_logprobs(got: list[Any] | None, expected: list[Any] | None) -> None:
    assert (got is None) == (expected is None)
    for got_table, expected_table in zip(got or [], expected or [], strict=True):
        assert (got_table or {}).keys() == (expected_table or {}).keys()
        for token_id, entry in (got_table or {}).items():
            assert entry.logprob == pytest.approx(expected_table[token_id].logprob, abs=1e-5)
            assert entry.rank == expected_table[token_id].rank

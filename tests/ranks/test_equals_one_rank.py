"""A model on several ranks draws the tokens that it draws on one."""

from __future__ import annotations

import pytest

from core import LLM, SamplingParams
from core.testing.checkpoints import FAMILIES, make_checkpoint
from core.testing.simulated_ranks import Recorder, replay

PROMPTS = [[7, 3, 9, 11, 5], list(range(4, 44)), [100]]
PARAMS = [
    SamplingParams(max_tokens=8, temperature=0, ignore_eos=True, logprobs=2),
    SamplingParams(max_tokens=8, temperature=0, ignore_eos=True, prompt_logprobs=1),
    SamplingParams(max_tokens=8, temperature=1.0, seed=3, ignore_eos=True),
]
MESHES = [(2, 1), (3, 1), (4, 1), (1, 2), (2, 2)]


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


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Give settings and steps of a family, recorded at its first use."""
    made = {}

    def get(variant):
        if variant not in made:
            folder = make_checkpoint(variant, tmp_path_factory.mktemp(variant))
            settings = settings_of(folder)
            made[variant] = settings, record(settings)
        return made[variant]

    return get


def assert_same(results, steps):
    assert len(results) == len(steps)
    for result, (_, expected) in zip(results, steps, strict=True):
        assert result.tokens == expected.tokens
        assert result.logprobs.keys() == expected.logprobs.keys()
        for index, logprobs in result.logprobs.items():
            assert logprobs.top_ids == expected.logprobs[index].top_ids
            assert logprobs.logprob == pytest.approx(expected.logprobs[index].logprob, abs=1e-3)
        for index, prompt in result.prompt_logprobs.items():
            values = [entry.logprob for entry in prompt.entries]
            wanted = [entry.logprob for entry in expected.prompt_logprobs[index].entries]
            assert values == pytest.approx(wanted, abs=1e-3)


@pytest.mark.parametrize(
    ("variant", "mesh"),
    [("llama-many-heads", (5, 1)), ("llama-many-heads", (8, 1)), ("gemma3", (1, 3))],
)
def test_many_ranks(variant, mesh, recorded):
    settings, steps = recorded(variant)
    sizes = {"tensor_parallel_size": mesh[0], "pipeline_parallel_size": mesh[1]}
    assert_same(replay({**settings, **sizes}, steps, num_blocks=41), steps)


@pytest.mark.parametrize("mesh", MESHES, ids=lambda mesh: f"tp{mesh[0]}-pp{mesh[1]}")
@pytest.mark.parametrize("variant", sorted(FAMILIES))
def test_every_family_on_several_ranks(variant, mesh, recorded):
    settings, steps = recorded(variant)
    sizes = {"tensor_parallel_size": mesh[0], "pipeline_parallel_size": mesh[1]}
    assert_same(replay({**settings, **sizes}, steps, num_blocks=41), steps)

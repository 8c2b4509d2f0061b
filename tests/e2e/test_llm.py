"""The offline API as a user meets it, with text."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest

import core
from core import LLM, SamplingParams
from core.errors import (
    CapacityError,
    CheckpointError,
    InvalidRequestError,
    PlanError,
    PluginNotFoundError,
    RequestTooLargeError,
)
from core.testing.checkpoints import make_checkpoint
from core.testing.tokenizers import make_tokenizer

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

DEVICE = os.environ.get("CYTHERA_TEST_DEVICE", "cpu")

GREEDY = SamplingParams(temperature=0.0, max_tokens=12)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_checkpoint("llama3", tmp_path_factory.mktemp("text"), vocab_size=400)
    make_tokenizer("byte-level", folder)
    return folder


@pytest.fixture(scope="module")
def llm(path: Path) -> Iterator[LLM]:
    settings: dict[str, Any] = {"dtype": "float32", "device": DEVICE, "max_model_len": 96}
    with LLM(str(path), num_kv_blocks=64, block_size=4, **settings) as engine:
        yield engine


def test_prompts_of_every_form_come_back_in_order(llm: LLM) -> None:
    tokenizer = llm.get_tokenizer()
    assert tokenizer is not None
    ids = tokenizer.encode("Hello there")
    prompts = ["Hello there", ids, {"prompt": "Hello there"}, {"prompt_token_ids": ids}]
    results = llm.generate(prompts, GREEDY)
    assert [r.prompt for r in results] == ["Hello there", None, "Hello there", None]
    assert all(r.prompt_token_ids == ids for r in results)
    assert len({tuple(r.outputs[0].token_ids) for r in results}) == 1
    assert all(r.finished and r.outputs[0].finish_reason in {"length", "stop"} for r in results)
    one = llm.generate("Hello there", GREEDY)
    assert [r.outputs[0].text for r in one] == [results[0].outputs[0].text]


def test_text_is_the_decoded_output(llm: LLM) -> None:
    tokenizer = llm.get_tokenizer()
    assert tokenizer is not None
    result = llm.generate("Once", SamplingParams(temperature=0, max_tokens=20, ignore_eos=True))[0]
    whole = tokenizer.decode(
        result.prompt_token_ids + result.outputs[0].token_ids, skip_special_tokens=True
    )
    prompt = tokenizer.decode(result.prompt_token_ids, skip_special_tokens=True)
    assert result.outputs[0].text == whole.removeprefix(prompt)


def test_stop_string_ends_the_text_before_it_and_frees_the_blocks(llm: LLM) -> None:
    free = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    text = llm.generate("Once", free)[0].outputs[0].text
    stop = text[6:9]
    assert stop
    for include in (False, True):
        params = SamplingParams(
            temperature=0, max_tokens=30, ignore_eos=True, stop=stop, include_stop_str_in_output=include
        )
        output = llm.generate("Once", params)[0].outputs[0]
        end = text.index(stop)
        assert output.text == text[: end + len(stop) * include]
        assert (output.finish_reason, output.stop_reason) == ("stop", stop)
        assert llm.engine.kv_cache.stats().num_used == 0
        assert not llm.engine.has_work


def test_stop_token_is_reported_as_an_id_and_not_as_text(llm: LLM) -> None:
    free = llm.generate("Once", SamplingParams(temperature=0, max_tokens=9, ignore_eos=True))[
        0
    ].outputs[0]
    stop_id = free.token_ids[4]
    first = free.token_ids.index(stop_id)
    params = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True, stop_token_ids=[stop_id])
    output = llm.generate("Once", params)[0].outputs[0]
    assert output.token_ids == free.token_ids[: first + 1]
    assert (output.finish_reason, output.stop_reason) == ("stop", stop_id)
    assert free.text.startswith(output.text)
    assert len(output.text) < len(free.text)


def test_end_of_sequence_stops_without_a_stop_reason(llm: LLM) -> None:
    tokenizer = llm.get_tokenizer()
    assert tokenizer is not None
    eos = next(iter(tokenizer.eos_token_ids))
    output = llm.generate("Hi", SamplingParams(allowed_token_ids=[eos], max_tokens=5))[0].outputs[0]
    assert (output.token_ids, output.finish_reason, output.stop_reason) == ([eos], "stop", None)
    assert not output.text
    ignored = SamplingParams(allowed_token_ids=[eos], max_tokens=5, ignore_eos=True)
    assert llm.generate("Hi", ignored)[0].outputs[0].token_ids == [eos] * 5


def test_n_completions_share_a_prompt_and_are_reproducible(llm: LLM) -> None:
    params = SamplingParams(n=4, temperature=2.0, max_tokens=12, seed=3, ignore_eos=True)
    first, second = (llm.generate("Once upon", params)[0] for _ in range(2))
    assert [o.index for o in first.outputs] == [0, 1, 2, 3]
    assert [o.token_ids for o in first.outputs] == [o.token_ids for o in second.outputs]
    assert len({tuple(o.token_ids) for o in first.outputs}) == 4
    single = llm.generate(
        "Once upon", SamplingParams(temperature=2.0, max_tokens=12, seed=3, ignore_eos=True)
    )
    assert single[0].outputs[0].token_ids == first.outputs[0].token_ids


def test_logprobs_of_output_and_prompt(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=5, logprobs=3, prompt_logprobs=2, ignore_eos=True)
    result = llm.generate("Hello there", params)[0]
    output = result.outputs[0]
    assert output.logprobs is not None
    assert [next(iter(table)) for table in output.logprobs] == output.token_ids
    assert all(len(table) == 3 for table in output.logprobs), "greedy: the token is among the top 3"
    chosen = [table[t] for table, t in zip(output.logprobs, output.token_ids, strict=True)]
    assert all(entry.rank == 1 and entry.decoded_token is not None for entry in chosen)
    assert output.cumulative_logprob == pytest.approx(sum(entry.logprob for entry in chosen))
    assert result.prompt_logprobs is not None
    assert result.prompt_logprobs[0] is None
    for token, table in zip(result.prompt_token_ids[1:], result.prompt_logprobs[1:], strict=True):
        assert table is not None
        assert next(iter(table)) == token


def test_second_request_reports_its_cached_tokens(llm: LLM) -> None:
    prompt = list(range(10, 31))
    assert llm.generate([prompt], GREEDY, cache_salt="x")[0].num_cached_tokens == 0
    assert llm.generate([prompt], GREEDY, cache_salt="x")[0].num_cached_tokens == 20
    assert llm.generate([prompt], GREEDY, cache_salt="y")[0].num_cached_tokens == 0


def test_chat_renders_the_template(llm: LLM) -> None:
    tokenizer = llm.get_tokenizer()
    assert tokenizer is not None
    messages = [{"role": "user", "content": "Hi"}]
    result = llm.chat(messages, GREEDY)[0]
    assert result.prompt_token_ids == tokenizer.apply_chat_template(
        messages, add_generation_prompt=True
    )
    assert [r.prompt_token_ids for r in llm.chat([messages, messages], GREEDY)] == [
        result.prompt_token_ids
    ] * 2


def test_refused_prompt_starts_none_of_them(llm: LLM) -> None:
    cases: list[tuple[Any, Any, type[Exception], str]] = [
        (["ok", []], GREEDY, InvalidRequestError, "at least one token"),
        (["ok", ""], GREEDY, InvalidRequestError, "must not be empty"),
        ([[1, 2], [1, 400]], GREEDY, InvalidRequestError, "between 0 and 399, got 400"),
        ([[1, 2], [1, -1]], GREEDY, InvalidRequestError, "got -1"),
        ([[1, 2], [1] * 96], GREEDY, RequestTooLargeError, "--max-model-len"),
        ([[1, 2]], SamplingParams(temperature=float("nan")), InvalidRequestError, "finite"),
        ([[1, 2]], [GREEDY, GREEDY], InvalidRequestError, "2 given for 1"),
        ([{"text": "x"}], GREEDY, InvalidRequestError, "prompt_token_ids"),
        ([3.5], GREEDY, InvalidRequestError, "float"),
    ]
    for prompts, params, kind, words in cases:
        with pytest.raises(kind, match=words):
            llm.generate(prompts, params)
        assert not llm.engine.has_work
        assert llm.journal.num_open == 0
    assert llm.generate([[1, 2]], GREEDY)[0].finished


def test_priority_needs_one_number_each(llm: LLM) -> None:
    with pytest.raises(InvalidRequestError, match="1 values for 2 prompts"):
        llm.generate([[1], [2]], GREEDY, priority=[1])


def test_default_parameters_come_from_the_checkpoint(llm: LLM) -> None:
    assert isinstance(llm.get_default_sampling_params(), SamplingParams)
    assert llm.generate([[5, 6, 7]])[0].finished


def test_token_ids_need_no_tokenizer(tmp_path: Path) -> None:
    folder = make_checkpoint("qwen3", tmp_path)
    with LLM(str(folder), dtype="float32", device=DEVICE, max_model_len=32, num_kv_blocks=8) as llm:
        output = llm.generate([[3, 4]], GREEDY)[0].outputs[0]
        assert output.token_ids
        assert not output.text
        for prompts, params in (("text", GREEDY), ([[3]], SamplingParams(stop="x"))):
            with pytest.raises(InvalidRequestError, match="needs a tokenizer"):
                llm.generate(prompts, params)
        with pytest.raises(InvalidRequestError, match="needs a tokenizer"):
            llm.chat([{"role": "user", "content": "x"}])


def test_dummy_weights_need_no_checkpoint(tmp_path: Path) -> None:
    folder = make_checkpoint("llama3", tmp_path)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(CheckpointError):
        LLM(str(folder), device=DEVICE, num_kv_blocks=8)
    with LLM(str(folder), device=DEVICE, load_format="dummy", max_model_len=32, num_kv_blocks=8) as llm:
        assert (
            len(llm.generate([[3, 4]], SamplingParams(max_tokens=4, ignore_eos=True))[0].outputs) == 1
        )


def test_errors_at_the_door_of_the_engine(path: Path) -> None:
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"plugins": ["attention.torhc"]}, PluginNotFoundError, "attention.torch"),
        ({"plugins": ["no:attention.torch"]}, PlanError, "attention"),
        ({"max_model_len": 10**6}, PlanError, "--max-model-len 1000000"),
        ({"kv_cache_memory_bytes": 4096}, CapacityError, "--kv-cache-memory-bytes"),
        ({"scheduler": "fair"}, PlanError, "fair"),
        ({"tensor_parallel_size": 99}, PlanError, "--tensor-parallel-size 99"),
    ]
    for settings, kind, words in cases:
        with pytest.raises(kind, match=words):
            LLM(str(path), **{"device": DEVICE, **settings})


def test_public_names_are_importable_and_unknown_ones_are_not() -> None:
    assert all(getattr(core, name) for name in core.__all__)
    assert set(core.__all__) <= set(dir(core))
    with pytest.raises(AttributeError, match="Engin"):
        _ = core.Engin  # type: ignore[attr-defined]

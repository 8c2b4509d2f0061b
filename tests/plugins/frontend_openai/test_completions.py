from __future__ import annotations

import math

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.outputs import Logprob
from core.testing.tokenizers import BOS_ID, EOS_ID
from plugins.frontend.openai.logprobs import LOWEST, CompletionLogprobsWriter, TokenSpelling
from plugins.frontend.openai.types import CompletionAnswer


def test_an_answer_has_the_shape_that_clients_read(client):
    reply = client.complete("hello", model="tiny")
    answer = msgspec.json.decode(reply.body, type=CompletionAnswer)
    assert (answer.id, answer.object, answer.model) == ("cmpl-r1", "text_completion", "tiny")
    assert reply.json["choices"] == [
        {
            "index": 0,
            "text": answer.choices[0].text,
            "logprobs": None,
            "finish_reason": "length",
            "stop_reason": None,
        }
    ]


def test_sixteen_tokens_are_made_unless_the_client_says_otherwise(client):
    assert client.complete("hello").json["usage"]["completion_tokens"] == 16
    assert client.complete("hello", max_tokens=3).json["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("hello", ["hello"]),
        (["hello", "you"], ["hello", "you"]),
        ([30, 31, 32], [[30, 31, 32]]),
        ([[30], [31, 32]], [[30], [31, 32]]),
    ],
)
def test_a_prompt_can_be_written_in_four_ways(client, prompt, expected):
    encode = client.service.tokenizer.encode
    wanted = [encode(each) if isinstance(each, str) else each for each in expected]
    choices = client.complete(prompt, n=2).json["choices"]
    assert [ids for ids, _, _ in client.service.submitted] == wanted
    assert [choice["index"] for choice in choices] == list(range(2 * len(expected)))


@pytest.mark.parametrize(
    "prompt",
    ["", [], [""], [[]], ["a", ""], [[30], []], ["a", 30], [[30], "a"], [30, [30]], None, {}, 3],
)
def test_what_is_no_prompt_is_refused(client, prompt):
    reply = client.complete(prompt)
    assert reply.status == 400
    assert reply.error["param"].startswith("prompt")
    assert not client.service.admissions


@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize("token_id", [-1, -(2**31), 400, 2**31, 2**63, 2**64, 10**100])
def test_ids_outside_of_the_vocabulary_are_refused(client, token_id, echo):
    for prompt in ([token_id], [30, token_id], [[30], [token_id]]):
        reply = client.complete(prompt, echo=echo)
        assert (reply.status, reply.error["param"]) == (400, "prompt")


def test_each_prompt_is_cut_at_its_start(client):
    choices = client.complete(
        [[30, 31, 32], [33]], truncate_prompt_tokens=2, echo=True, return_token_ids=True
    ).json["choices"]
    assert [choice["prompt_token_ids"] for choice in choices] == [[31, 32], [33]]
    assert choices[0]["text"].startswith(client.service.tokenizer.decode([31, 32]))


def test_special_tokens_are_parsed_and_added_as_asked(client):
    client.complete("<eos>hi")
    client.complete("<eos>hi", add_special_tokens=False)
    with_bos, without = (ids for ids, _, _ in client.service.submitted)
    assert with_bos[:2] == [BOS_ID, EOS_ID]
    assert without == with_bos[1:]


@pytest.mark.parametrize(
    ("num_prompts", "n"), [(129, 1), (2, 65), (1, 129), (1, 10**18), (1, 10**4000)]
)
def test_prompts_times_n_is_bounded(client, num_prompts, n):
    reply = client.complete(["a"] * num_prompts, n=n)
    assert reply.status == 400
    assert "128" in reply.error["message"]
    assert client.service.submitted == []


def test_as_many_as_the_bound_are_served(client):
    reply = client.complete(["a"] * 64, n=2, max_tokens=1)
    assert [choice["index"] for choice in reply.json["choices"]] == list(range(128))


# --- echo and log-probabilities -------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["byte-level", "llama2"])
@pytest.mark.parametrize("prompt", ["Hello, the world", " leading", "Größe 😀 end", [30, 31, 300, 40]])
@pytest.mark.parametrize("stream", [False, True])
def test_an_echo_is_the_prompt_and_the_rest_is_aligned_with_it(make_client, kind, prompt, stream):
    client = make_client(kind)
    fields = {"echo": True, "logprobs": 2, "max_tokens": 5, "return_token_ids": True}
    reply = client.complete(prompt, stream=stream, **fields)
    plain = client.complete(prompt, max_tokens=5).json["choices"][0]["text"]
    choices = [chunk["choices"][0] for chunk in reply.events] if stream else [reply.json["choices"][0]]
    text = "".join(choice["text"] for choice in choices)
    shown = prompt if isinstance(prompt, str) else client.service.tokenizer.decode(prompt)
    assert text == shown + plain
    assert choices[0]["text"].startswith(shown)
    ids = choices[0]["prompt_token_ids"] + [i for choice in choices for i in choice["token_ids"]]
    parts = [choice["logprobs"] for choice in choices]
    offsets = [offset for part in parts for offset in part["text_offset"]]
    spelled = [token for part in parts for token in part["tokens"]]
    assert spelled == [client.service.tokenizer.token_text(i) for i in ids]
    assert len(offsets) == len(ids)
    assert offsets == sorted(offsets)
    assert offsets[len(choices[0]["prompt_token_ids"])] == len(shown)
    for token, offset in zip(spelled, offsets, strict=True):
        if token.isascii() and token.isalpha() and offset:
            assert text[offset:].startswith(token)


def test_loglikelihoods_are_where_evaluation_harnesses_look(client, expected_logprobs):
    prompts = [[9, 10, 11, 12], [30, 31, 32, 33, 34]]
    fields = {"echo": True, "logprobs": 1, "max_tokens": 1, "temperature": 0, "seed": 1234}
    for prompt, choice in zip(prompts, client.complete(prompts, **fields).json["choices"], strict=True):
        logprobs = choice["logprobs"]
        assert len(logprobs["token_logprobs"]) == len(prompt) + 1
        assert logprobs["token_logprobs"][0] is None
        assert logprobs["top_logprobs"][0] is None
        for position in range(1, len(prompt)):
            expected = expected_logprobs(prompt[position], position, 1)
            value, top = logprobs["token_logprobs"][position], logprobs["top_logprobs"][position]
            assert value == expected.logprob
            assert (value == max(top.values())) == (expected.rank == 1)


def test_an_echo_without_new_tokens(client):
    reply = client.complete([30, 31, 32], echo=True, max_tokens=0, logprobs=0, return_token_ids=True)
    choice = reply.json["choices"][0]
    assert choice["text"] == client.service.tokenizer.decode([30, 31, 32])
    assert (choice["token_ids"], choice["prompt_token_ids"]) == ([], [30, 31, 32])
    assert len(choice["logprobs"]["tokens"]) == 3
    assert choice["finish_reason"] == "length"
    assert reply.json["usage"]["completion_tokens"] == 0


def test_no_tokens_without_echo_make_no_sense(client):
    assert client.complete("a", max_tokens=0).error["param"] == "max_tokens"


def test_an_echo_without_new_tokens_streams_too(client):
    chunks = client.complete("hello", echo=True, max_tokens=0, stream=True, n=2).events
    texts = {chunk["choices"][0]["index"]: chunk["choices"][0]["text"] for chunk in chunks}
    assert texts == {0: "hello", 1: "hello"}
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == ["length", "length"]


def test_ids_cannot_be_echoed_without_a_tokenizer(make_client):
    client = make_client(None)
    assert client.complete([30], echo=True).error["param"] == "echo"
    assert client.complete("a").error["param"] == "prompt"
    choice = client.complete([30], logprobs=1, max_tokens=2).json["choices"][0]
    assert all(token.startswith("token_id:") for token in choice["logprobs"]["tokens"])


def test_prompt_logprobs_come_with_each_prompt(client):
    choices = client.complete([[30, 31], [32, 33]], prompt_logprobs=1).json["choices"]
    for choice, token_id in zip(choices, (31, 33), strict=True):
        first, second = choice["prompt_logprobs"]
        assert first is None
        assert str(token_id) in second


def test_tokens_around_the_text_that_is_shown_lie_at_its_ends(tokenizers):
    writer = CompletionLogprobsWriter(TokenSpelling(tokenizers["byte-level"]))
    shaped = writer.write_prompt([BOS_ID, 30, 31, EOS_ID, EOS_ID], [None] * 5, "89")
    assert shaped.text_offset == [0, 0, 1, 2, 2]


def test_minus_infinity_is_written_as_a_number(tokenizers):
    writer = CompletionLogprobsWriter(TokenSpelling(tokenizers["byte-level"]))
    shaped = writer.write([30], [{30: Logprob(-math.inf, 400, "A"), 31: Logprob(-0.5, 1, "B")}])
    assert shaped.token_logprobs == [LOWEST]
    assert sorted(shaped.top_logprobs[0].values()) == [LOWEST, -0.5]


@settings(max_examples=50)
@given(data=st.data())
def test_no_entry_is_lost_when_tokens_share_a_text(tokenizers, data):
    ids = data.draw(st.lists(st.integers(0, 399), min_size=1, max_size=20, unique=True))
    values = data.draw(
        st.lists(st.floats(-50, 0), min_size=len(ids), max_size=len(ids)).map(lambda v: sorted(v)[::-1])
    )
    chosen = data.draw(st.integers(0, len(ids) - 1))
    ids.insert(0, ids.pop(chosen))
    values.insert(0, values.pop(chosen))
    tokenizer = tokenizers["byte-level"]
    entry = {i: Logprob(value) for i, value in zip(ids, values, strict=True)}
    shaped = CompletionLogprobsWriter(TokenSpelling(tokenizer)).write(ids[:1], [entry])
    top = shaped.top_logprobs[0]
    assert sorted(top.values()) == sorted(values)
    assert top[tokenizer.token_text(ids[0])] == values[0] == shaped.token_logprobs[0]

"""Whatever is sent, the answer is a success or says what is wrong with the request."""

from __future__ import annotations

import json

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from plugins.frontend.openai.extras import IGNORED, MAX_NAMES, REFUSED, SILENT
from plugins.frontend.openai.types import ChatAnswer, ChatRequest, CompletionAnswer, CompletionRequest

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
ANSWERS = {CHAT: ChatAnswer, COMPLETIONS: CompletionAnswer}
BASE = {
    CHAT: {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2},
    COMPLETIONS: {"prompt": "hi", "max_tokens": 2},
}
FIELDS = {CHAT: ChatRequest.__struct_fields__, COMPLETIONS: CompletionRequest.__struct_fields__}

HUGE = st.sampled_from([-(2**63), 2**31, 2**63, 2**64, 10**18, -1, 0, 10**300, 129, 21, 400])
NUMBERS = st.integers() | HUGE | st.floats(allow_nan=False, allow_infinity=False)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(
    ["", "\x00", "<eos>", "<|end|>", "user", "x" * 300, "auto", "required", "none"]
)
LEAVES = st.none() | st.booleans() | NUMBERS | TEXTS
JSON = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            TEXTS | st.sampled_from(["role", "content", "type", "text", "30"]), inner, max_size=4
        )
    ),
    max_leaves=8,
)


def _check(reply, path):
    assert reply.status in (200, 400, 404), reply.body
    if reply.status != 200:
        error = reply.error
        assert error["message"]
        assert error["param"] is None or isinstance(error["param"], str)
    elif reply.headers["content-type"] == "application/json":
        msgspec.json.decode(reply.body, type=ANSWERS[path])
    else:
        assert not any("error" in event for event in reply.events)


@pytest.mark.parametrize(
    ("path", "field"), [(path, field) for path in FIELDS for field in FIELDS[path]]
)
@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(value=JSON)
def test_every_field_stands_every_value(client, path, field, value):
    _check(client(path, {**BASE[path], field: value}), path)
    assert client.service.admissions == {}
    assert client.service.journal.num_open == 0


@pytest.mark.parametrize("path", FIELDS)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_fields_stand_one_another(client, path, data):
    names = st.sampled_from([*FIELDS[path], *REFUSED, *IGNORED, *SILENT, "x"])
    fields = data.draw(st.dictionaries(names, JSON, max_size=6))
    _check(client(path, {**BASE[path], **fields}), path)
    assert client.service.journal.num_open == 0


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), path=st.sampled_from([CHAT, COMPLETIONS]))
def test_damaged_bodies(client, data, path):
    raw = bytearray(json.dumps(BASE[path]).encode())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(raw) - 1))
        raw[place : place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    _check(client(path, bytes(raw) or b" "), path)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(value=JSON, path=st.sampled_from(["/tokenize", "/detokenize"]), data=st.data())
def test_the_tokenizer_routes_stand_every_value(client, value, path, data):
    names = ["prompt", "messages", "tokens", "model", "add_special_tokens", "return_token_strs"]
    fields = data.draw(st.dictionaries(st.sampled_from(names), JSON, max_size=3))
    assert client(path, fields or {"tokens": value}).status in (200, 400, 404)


@pytest.mark.parametrize("path", FIELDS)
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", True),
        ("n", 1.0),
        ("n", "1"),
        ("n", 0),
        ("n", -1),
        ("max_tokens", -1),
        ("max_tokens", 2**63),
        ("min_tokens", 3),
        ("min_tokens", 2**63),
        ("temperature", "0"),
        ("temperature", -1),
        ("temperature", True),
        ("top_k", 1.5),
        ("top_p", 0),
        ("top_p", 1.5),
        ("min_p", -0.1),
        ("presence_penalty", 3),
        ("frequency_penalty", -3),
        ("repetition_penalty", 0),
        ("logit_bias", {"x": 1}),
        ("logit_bias", {"400": 1}),
        ("logit_bias", {"-1": 1}),
        ("logit_bias", {"30": 101}),
        ("logit_bias", []),
        ("allowed_token_ids", []),
        ("allowed_token_ids", [400]),
        ("banned_token_ids", [-1]),
        ("stop", 1),
        ("stop", ""),
        ("stop", ["x"] * 17),
        ("stop", ["x" * 257]),
        ("stop_token_ids", [2**63]),
        ("stop_token_ids", [True]),
        ("seed", -1),
        ("seed", 2**63),
        ("stream", "true"),
        ("stream_options", True),
        ("prompt_logprobs", -1),
        ("prompt_logprobs", 21),
        ("priority", 2**31),
        ("cache_salt", "x" * 257),
        ("cache_salt", 1),
        ("ignore_eos", 1),
        ("skip_special_tokens", "yes"),
        ("request_id", 1),
    ],
)
def test_a_bad_value_names_its_field(client, path, field, value):
    reply = client(path, {**BASE[path], field: value})
    assert reply.status == 400
    assert reply.error["param"].startswith(field)
    assert field in reply.error["message"]


# --- fields that no type has ----------------------------------------------------------------------


@pytest.mark.parametrize("path", FIELDS)
@pytest.mark.parametrize("field", REFUSED)
def test_what_the_answer_could_not_be_right_without_is_refused(client, path, field):
    reply = client(path, {**BASE[path], field: "something"})
    assert (reply.status, reply.error["param"]) == (400, field)


@pytest.mark.parametrize("field", [*REFUSED, *IGNORED])
def test_values_that_ask_for_nothing_are_passed_over(client, field):
    neutral = (REFUSED | IGNORED)[field]
    for value in (None, False, "", [], {}, 0, *neutral):
        reply = client(COMPLETIONS, {**BASE[COMPLETIONS], field: value})
        assert reply.status == 200
        assert "warnings" not in reply.json


@pytest.mark.parametrize("field", IGNORED)
def test_what_changes_the_answer_is_warned_of(client, field):
    reply = client(COMPLETIONS, {**BASE[COMPLETIONS], field: 0.7})
    assert reply.json["warnings"] == [f"field '{field}' is not supported and was ignored"]


@pytest.mark.parametrize("field", sorted(SILENT))
def test_what_changes_nothing_is_not_talked_about(client, field):
    assert "warnings" not in client(COMPLETIONS, {**BASE[COMPLETIONS], field: "x"}).json


def test_no_field_is_in_two_lists():
    names = [*REFUSED, *IGNORED, *SILENT, *{name for fields in FIELDS.values() for name in fields}]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("num_unknown", [1, MAX_NAMES, MAX_NAMES + 1, 5000])
def test_warnings_are_bounded(client, num_unknown):
    fields = {f"{number:05d}{'x' * 300}": 1 for number in range(num_unknown)}
    warnings = client(COMPLETIONS, {**BASE[COMPLETIONS], **fields}).json["warnings"]
    assert len(warnings) == min(num_unknown, MAX_NAMES + 1)
    assert all(len(warning) < 100 for warning in warnings)
    if num_unknown > MAX_NAMES:
        assert warnings[-1] == f"{num_unknown - MAX_NAMES} more fields were ignored"

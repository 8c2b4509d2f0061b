from __future__ import annotations

import anyio
import pytest

from core.errors import (
    DeadlineExceededError,
    EngineDeadError,
    InvalidRequestError,
    ModelNotFoundError,
    NotReadyError,
    OverloadedError,
    RequestTooLargeError,
)
from core.status import Phase, Status
from plugins.frontend.openai.errors import describe

PATHS = ["/v1/chat/completions", "/v1/completions"]


@pytest.fixture(params=PATHS)
def path(request):
    return request.param


@pytest.fixture
def make_body(path, body):
    def make(**fields):
        return body(**fields) if "chat" in path else {"prompt": "hello", "max_tokens": 8, **fields}

    return make


@pytest.mark.parametrize(
    ("error", "status", "kind", "more"),
    [
        (InvalidRequestError("x", field="top_p"), 400, "BadRequestError", {"param": "top_p"}),
        (
            RequestTooLargeError("x", field="prompt"),
            400,
            "BadRequestError",
            {"param": "prompt", "code": "context_length_exceeded"},
        ),
        (
            ModelNotFoundError("x", field="model"),
            404,
            "NotFoundError",
            {"param": "model", "code": "model_not_found"},
        ),
        (NotReadyError("x"), 503, "ServiceUnavailableError", {}),
        (OverloadedError("x"), 429, "RateLimitError", {}),
        (DeadlineExceededError("x"), 408, "RequestTimeoutError", {}),
        (EngineDeadError("x"), 500, "InternalServerError", {}),
    ],
)
def test_every_error_has_a_status_and_a_body(client, error, status, kind, more):
    client.service.admit_error = error
    reply = client.chat()
    assert reply.status == status
    assert reply.error == {"message": "x", "type": kind, "param": None, "code": None, **more}
    assert client.service.refused == [("r1", error)]


@pytest.mark.parametrize(
    ("seconds", "whole", "milliseconds"),
    [(0.0, "1", "1"), (0.2, "1", "200"), (2.5, "3", "2500"), (60.0, "60", "60000")],
)
@pytest.mark.parametrize("kind", [NotReadyError, OverloadedError])
def test_clients_are_told_when_to_come_back(kind, seconds, whole, milliseconds):
    headers = describe(kind("x", retry_after=seconds)).headers
    assert headers == {"retry-after": whole, "retry-after-ms": milliseconds}


def test_a_deadline_is_not_worth_another_try():
    assert describe(DeadlineExceededError("x")).headers == {"x-should-retry": "false"}


def test_what_nobody_foresaw_goes_to_the_server(client, path, make_body):
    client.service.admit_error = ZeroDivisionError("secret")
    with pytest.raises(ZeroDivisionError):
        client(path, make_body())
    assert len(client.service.refused) == 1


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"nonsense",
        b"[]",
        b"null",
        b'"text"',
        b"\xff\xfe",
        b'{"a": "\xff"}',
        b"\xef\xbb\xbf{}",
    ],
)
def test_what_is_no_json_object_is_refused(client, path, raw):
    reply = client(path, raw)
    assert (reply.status, reply.error["type"]) == (400, "BadRequestError")
    assert len(client.service.refused) == 1


@pytest.mark.parametrize("name", ["messages", "prompt", "metadata", "x"])
@pytest.mark.parametrize("opening", ["[", '{"a":'])
def test_deep_nesting_is_refused(client, path, name, opening):
    raw = f'{{"messages":[],"prompt":"","{name}":{opening * 100_000}'.encode()
    assert client(path, raw).status == 400


def test_a_small_body_does_not_become_a_large_heap(client, path):
    raw = b'{"messages":[' + b"{}," * 2**20 + b'{}],"prompt":"a"}'
    reply = client(path, raw)
    assert reply.status == 400
    assert "1048576" in reply.error["message"]


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"])
@pytest.mark.parametrize("field", ["temperature", "top_p", "timeout", "unknown"])
def test_numbers_are_finite(client, path, make_body, field, literal):
    raw = make_body(**{field: "HERE"})
    reply = client(path, str(raw).replace("'", '"').replace('"HERE"', literal).encode())
    assert reply.status == (200 if field == "unknown" and "999" in literal else 400)


def test_any_content_type_will_do(client, path, make_body):
    reply = client(path, make_body(), headers={"content-type": "text/plain"})
    assert reply.status == 200


# --- the door -------------------------------------------------------------------------------------


def test_an_unknown_model_is_not_found(client, path, make_body):
    reply = client(path, make_body(model="other"))
    assert (reply.status, reply.error["code"]) == (404, "model_not_found")
    assert len(client.service.refused) == 1


def test_nothing_is_tokenized_for_a_request_that_is_not_let_in(client, path, make_body):
    client.service.admit_error = OverloadedError("full")
    client.service.encode = client.service.render_chat = None
    assert client(path, make_body()).status == 429


def test_a_request_while_the_model_loads(client, path, make_body):
    client.service.status = Status(Phase.LOADING)
    reply = client(path, make_body())
    assert reply.status == 503
    assert reply.headers["retry-after"] == "3"


def test_what_the_limits_refuse_gives_up_its_place(client, path, make_body):
    reply = client(path, make_body(top_p=0))
    assert (reply.status, reply.error["param"]) == (400, "top_p")
    assert client.service.admissions == {}
    assert client.service.journal.num_open == 0
    assert len(client.service.refused) == 1


def test_one_bad_prompt_among_good_ones_refuses_all(client):
    reply = client.complete([[30], [31], [400]])
    assert reply.status == 400
    assert client.service.journal.num_open == 0
    assert len(client.service.refused) == 1


def test_a_request_that_is_served_is_not_reported_as_refused(client, path, make_body):
    assert client(path, make_body()).status == 200
    assert client.service.refused == []


# --- ids and timeouts -----------------------------------------------------------------------------


def test_the_id_is_that_of_the_client_or_the_server(client, path, make_body):
    assert client(path, make_body(), request_id="abc").json["id"].endswith("-abc")
    assert client(path, make_body(request_id="own"), request_id="abc").json["id"].endswith("-own")
    made = {client(path, make_body(), request_id=None).json["id"] for _ in range(3)}
    assert len(made) == 3


@pytest.mark.parametrize("request_id", ["", "a b", "ü", "a\n", "x" * 129, "a\x00"])
def test_an_id_must_be_fit_for_paths_and_logs(client, path, make_body, request_id):
    reply = client(path, make_body(request_id=request_id))
    assert (reply.status, reply.error["param"]) == (400, "request_id")


@pytest.mark.anyio
async def test_an_id_in_use_is_refused_if_it_is_the_clients_own_choice(client, path, make_body):
    again = None

    async def pause(_stream):
        nonlocal again
        if again is None:
            again = "running"
            own = await client.run("POST", path, make_body(request_id="r1"))
            again = await client.run("POST", path, make_body(), request_id="r1")
            assert (own.status, own.error["param"]) == (400, "request_id")

    client.service.pause = pause
    first = await client.run("POST", path, make_body(), request_id="r1")
    assert (first.status, again.status) == (200, 200)
    assert again.json["id"].startswith(first.json["id"] + "-")


@pytest.mark.parametrize(
    ("fields", "headers", "seconds"),
    [
        ({}, {}, None),
        ({"timeout": 5}, {}, 5.0),
        ({"timeout": 5}, {"X-Request-Timeout": "2.5"}, 2.5),
        ({}, {"x-stainless-read-timeout": "600"}, 600.0),
        ({"timeout": 5}, {"x-stainless-read-timeout": "600"}, 5.0),
        ({}, {"x-stainless-read-timeout": "not-given"}, None),
        ({}, {"x-stainless-read-timeout": "-1"}, None),
        ({"stream": True}, {"x-stainless-read-timeout": "600"}, None),
        ({"stream": True, "timeout": 5}, {}, 5.0),
    ],
)
def test_the_least_timeout_counts(client, fields, headers, seconds):
    assert client("/v1/completions", {"prompt": "a", **fields}, headers=headers).status == 200
    assert client.service.timeouts == [seconds]


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "soon", ""])
def test_a_timeout_is_a_positive_number(client, path, make_body, value):
    reply = client(path, make_body(), headers={"X-Request-Timeout": value})
    assert (reply.status, reply.error["param"]) == (400, "x-request-timeout")
    assert client(path, make_body(timeout=-1)).error["param"] == "timeout"


# --- errors of requests that were let in ----------------------------------------------------------


def _fail_at(client, position, error):
    script = client.service.script
    client.service.script = lambda prompt, index, at: (
        error if at == position else script(prompt, index, at)
    )


@pytest.mark.parametrize("position", [0, 3])
def test_a_request_that_fails_says_so(client, path, make_body, position):
    _fail_at(client, position, "its logits hold a NaN")
    reply = client(path, make_body(n=2))
    assert (reply.status, reply.error["type"]) == (500, "InternalServerError")
    assert reply.error["message"] == "its logits hold a NaN"
    assert client.service.refused == []


def test_a_stream_that_fails_says_so_in_an_event(client, path, make_body):
    _fail_at(client, 3, "its logits hold a NaN")
    *chunks, last = client(path, make_body(stream=True)).events
    assert chunks
    assert last["error"]["message"] == "its logits hold a NaN"


def test_other_completions_of_a_request_that_fails_go_on(client):
    script = client.service.script
    client.service.script = lambda prompt, index, at: (
        "broken" if (index, at) == (0, 3) else script(prompt, index, at)
    )
    *chunks, last = client.chat(n=2, stream=True).events
    ends = {c["index"]: c["finish_reason"] for chunk in chunks for c in chunk["choices"]}
    assert ends == {0: "stop", 1: None}
    assert len([c for chunk in chunks for c in chunk["choices"] if c["index"] == 1]) > 4
    assert last["error"]["message"] == "broken"


def test_a_stream_that_fails_before_its_first_token_has_a_status(client, path, make_body):
    _fail_at(client, 0, "its logits hold a NaN")
    assert client(path, make_body(stream=True)).status == 500


@pytest.mark.anyio
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("phase", "status"), [(Phase.READY, 408), (Phase.DRAINING, 503)])
async def test_time_is_up(client, body, stream, phase, status):
    async def pause(stream):
        if stream.position == 3:
            client.service.status = Status(phase)
            client.service.cancel("r1", "time is up")
        await anyio.lowlevel.checkpoint()

    client.service.pause = pause
    reply = await client.run("POST", "/v1/chat/completions", body(stream=stream))
    assert reply.is_complete
    assert reply.status == (200 if stream else status)
    error = reply.events[-1]["error"] if stream else reply.error
    assert error["message"] == "time is up"
    assert client.service.admissions == {}


@pytest.mark.anyio
@pytest.mark.parametrize("error", [EngineDeadError("it is dead"), ZeroDivisionError("secret")])
async def test_an_error_in_the_middle_of_a_stream(client, path, make_body, error):
    async def pause(stream):
        if stream.position == 3:
            raise error
        await anyio.lowlevel.checkpoint()

    client.service.pause = pause
    kept = []

    async def send(message):
        kept.append(message)

    is_foreseen = isinstance(error, EngineDeadError)
    try:
        await client.run("POST", path, make_body(stream=True), send=send)
    except ZeroDivisionError:
        assert not is_foreseen
    body = b"".join(message.get("body", b"") for message in kept)
    assert b"secret" not in body
    assert body.endswith(b"data: [DONE]\n\n")
    assert b'data: {"error":{' in body
    assert not kept[-1]["more_body"]

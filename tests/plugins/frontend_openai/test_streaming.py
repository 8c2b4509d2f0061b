from __future__ import annotations

import json

import anyio
import pytest

from core.testing.tokenizers import EOS_ID
from plugins.frontend.openai.outcome import CANCELLED

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
USAGE = {"stream_options": {"include_usage": True}}


@pytest.fixture(params=[CHAT, COMPLETIONS])
def path(request):
    return request.param


@pytest.fixture
def make_body(path, body):
    def make(**fields):
        return body(**fields) if path == CHAT else {"prompt": "hello", "max_tokens": 8, **fields}

    return make


def _texts(chunks):
    texts = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            new = choice["delta"].get("content", "") if "delta" in choice else choice["text"]
            texts[choice["index"]] = texts.get(choice["index"], "") + new
    return texts


def _whole_texts(answer):
    return {
        choice["index"]: choice["message"]["content"] if "message" in choice else choice["text"]
        for choice in answer["choices"]
    }


def _script_text(client, text):
    ids = client.service.tokenizer.encode(text, add_special_tokens=False)
    client.service.script = lambda _prompt, index, position: [*ids[index:], EOS_ID][position]


# --- framing --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"n": 3},
        {"echo": True},
        {"logprobs": True, "top_logprobs": 2},
        {"return_token_ids": True},
        {"stop": ["an", "end"]},
        {"stream_options": {"continuous_usage_stats": True}},
    ],
)
def test_a_stream_adds_up_to_the_answer_in_one_piece(client, path, make_body, fields):
    if path == COMPLETIONS and "logprobs" in fields:
        fields = {"logprobs": 2}
    _script_text(client, 'Größe 😀 and "quotes",\n\ttabs \\ and\r\n\n lines \u2028 end')
    body = make_body(max_tokens=40, **fields)
    whole = client(path, body).json
    chunks = client(path, {**body, "stream": True}).events
    assert _texts(chunks) == _whole_texts(whole)
    ends = {
        choice["index"]: (choice["finish_reason"], choice["stop_reason"])
        for chunk in chunks
        for choice in chunk["choices"]
        if choice["finish_reason"]
    }
    assert ends == {
        choice["index"]: (choice["finish_reason"], choice["stop_reason"]) for choice in whole["choices"]
    }
    assert {chunk["id"] for chunk in chunks} == {whole["id"]}
    assert {chunk["model"] for chunk in chunks} == {whole["model"]}


def test_logprobs_and_ids_of_a_stream_add_up_too(client, path, make_body):
    logprobs = {"logprobs": True, "top_logprobs": 1} if path == CHAT else {"logprobs": 1}
    body = make_body(return_token_ids=True, prompt_logprobs=0, **logprobs)
    whole = client(path, body).json["choices"][0]
    chunks = [chunk["choices"][0] for chunk in client(path, {**body, "stream": True}).events]
    assert [i for chunk in chunks for i in chunk.get("token_ids", [])] == whole["token_ids"]
    parts = [chunk["logprobs"] for chunk in chunks if chunk["logprobs"]]
    for key, values in whole["logprobs"].items():
        assert [value for part in parts for value in part[key]] == values


def test_what_is_known_of_the_prompt_comes_first(client):
    fields = {"return_token_ids": True, "prompt_logprobs": 0, "stream": True}
    chat = client.chat(**fields).events
    plain = [chunk["choices"][0] for chunk in client.complete(**fields).events]
    for first, *others in (chat, plain):
        assert len(first["prompt_logprobs"]) == len(first["prompt_token_ids"])
        assert not any("prompt_logprobs" in other or "prompt_token_ids" in other for other in others)


def test_headers_keep_proxies_from_collecting_the_stream(client, path, make_body):
    headers = client(path, make_body(stream=True)).headers
    assert headers == {
        "content-type": "text/event-stream; charset=utf-8",
        "cache-control": "no-cache",
        "x-accel-buffering": "no",
    }


def test_the_role_comes_in_the_same_write_as_the_first_text(client):
    _script_text(client, "hello")
    reply = client.chat(stream=True)
    first, second = reply.pieces[0].decode().removesuffix("\n\n").split("\n\n")
    role = json.loads(first.removeprefix("data: "))["choices"][0]["delta"]
    text = json.loads(second.removeprefix("data: "))["choices"][0]["delta"]
    assert role == {"role": "assistant", "content": ""}
    assert list(text) == ["content"]
    assert text["content"]


def test_an_answer_without_text_still_has_a_role_and_an_end(client):
    client.service.script = lambda *_args: EOS_ID
    role, end = client.chat(stream=True).events
    assert role["choices"][0]["delta"]["role"] == "assistant"
    assert (end["choices"][0]["delta"], end["choices"][0]["finish_reason"]) == ({}, "stop")


def test_usage_comes_last_and_without_choices(client, path, make_body):
    body = make_body(n=2)
    *chunks, last = client(path, {**body, **USAGE, "stream": True}).events
    assert last["choices"] == []
    assert last["usage"] == client(path, body).json["usage"]
    assert not any("usage" in chunk for chunk in chunks)


def test_no_usage_unless_asked_for(client, path, make_body):
    for options in (None, {}, {"include_usage": False}, {"include_usage": None}):
        chunks = client(path, make_body(stream=True, stream_options=options)).events
        assert not any("usage" in chunk or not chunk["choices"] for chunk in chunks)


def test_usage_can_come_with_every_chunk(client, path, make_body):
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = client(path, make_body(stream=True, stream_options=options)).events
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks if "usage" in chunk]
    assert counts[-1] == 8
    assert counts == sorted(counts)
    assert len(counts) >= 8


def test_options_of_a_stream_are_passed_over_without_one(client, path, make_body):
    assert client(path, make_body(**USAGE)).status == 200


def test_warnings_come_in_the_first_chunk_only(client, path, make_body):
    first, *others = client(path, make_body(stream=True, n=2, foo=1)).events
    assert first["warnings"] == ["field 'foo' is not known and was ignored"]
    assert not any("warnings" in other for other in others)


def test_chunks_of_several_prompts_interleave(client):
    chunks = client.complete(["a", "b"], n=2, stream=True, max_tokens=6).events
    order = [chunk["choices"][0]["index"] for chunk in chunks if chunk["choices"]]
    assert set(order) == {0, 1, 2, 3}
    assert order.index(2) < len(order) - 1 - order[::-1].index(0)


def test_tokens_without_text_make_no_chunk(client):
    ids = client.service.tokenizer.encode("😀", add_special_tokens=False)
    assert len(ids) > 1
    client.service.script = lambda _prompt, _index, position: [*ids, EOS_ID][position]
    chunks = client.complete(stream=True).events
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["😀", ""]


# --- keeping alive --------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_comments_are_sent_while_nothing_comes(client, path, make_body):
    client.configure(ping_interval=0.005)
    has_seen_pings, num_pings = anyio.Event(), 0

    async def send(message):
        nonlocal num_pings
        if message.get("body") == b": ping\n\n":
            num_pings += 1
            if num_pings == 3:
                has_seen_pings.set()

    client.service.pause = lambda _stream: has_seen_pings.wait()
    reply = await client.run("POST", path, make_body(stream=True), send=send)
    assert num_pings >= 3
    assert reply.is_complete
    assert reply.events


@pytest.mark.anyio
async def test_no_comment_is_sent_into_an_answer_in_one_piece(client, path, make_body):
    client.configure(ping_interval=0.001)
    client.service.pause = lambda _stream: anyio.sleep(0.005)
    reply = await client.run("POST", path, make_body(max_tokens=3))
    assert reply.json["usage"]["completion_tokens"] == 3


@pytest.mark.anyio
@pytest.mark.parametrize("blocks_on", [b"data: ", b": ping"])
async def test_a_client_that_does_not_read_is_left(client, path, make_body, blocks_on):
    client.configure(ping_interval=0.01, write_timeout=0.02)
    if blocks_on == b": ping":
        client.service.pause = lambda _stream: anyio.sleep_forever()

    async def send(message):
        if message.get("body", b"").startswith(blocks_on):
            await anyio.sleep_forever()

    with anyio.fail_after(5):
        await client.run("POST", path, make_body(stream=True), send=send)
    assert not client.service.admissions
    assert client.service.journal.num_open == 0


@pytest.mark.anyio
async def test_events_are_never_sent_side_by_side(client):
    client.configure(ping_interval=0.001)
    num_sending = 0

    async def send(_message):
        nonlocal num_sending
        num_sending += 1
        assert num_sending == 1
        await anyio.sleep(0.002)
        num_sending -= 1

    body = {"prompt": ["a", "b", "c"], "n": 2, "stream": True, "max_tokens": 4}
    reply = await client.run("POST", COMPLETIONS, body, send=send)
    assert len(_texts(reply.events)) == 6


# --- leaving and cancelling -----------------------------------------------------------------------


@pytest.mark.anyio
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("position", [0, 1, 5])
async def test_a_client_that_leaves_ends_its_request(client, path, make_body, stream, position):
    leave = anyio.Event()

    async def pause(stream):
        if stream.position == position:
            assert len(client.service.admissions) == 1
            leave.set()
            await anyio.sleep_forever()

    client.service.pause = pause
    with anyio.fail_after(5):
        reply = await client.run("POST", path, make_body(stream=stream, n=2), leave=leave)
    assert client.service.admissions == {}
    assert client.service.journal.num_open == 0
    assert client.service.refused == []
    assert reply is None or not reply.is_complete


@pytest.mark.anyio
async def test_a_client_that_leaves_while_its_prompt_is_made(client, path, make_body):
    leave = anyio.Event()

    async def encode(*_args, **_kwargs):
        leave.set()
        await anyio.sleep_forever()

    client.service.encode = encode
    with anyio.fail_after(5):
        assert await client.run("POST", path, make_body(), leave=leave) is None
    assert client.service.admissions == {}


@pytest.mark.anyio
async def test_a_connection_that_breaks_while_writing_ends_the_request(client, path, make_body):
    async def send(message):
        if message["type"] == "http.response.body":
            raise OSError("connection reset")

    await client.run("POST", path, make_body(stream=True), send=send)
    assert client.service.admissions == {}


@pytest.mark.anyio
async def test_only_a_disconnect_means_that_the_client_has_left(client, path, make_body):
    messages = iter(
        [
            {"type": "http.request", "body": json.dumps(make_body()).encode(), "more_body": True},
            {"type": "http.request", "body": b" ", "more_body": False},
            {"type": "http.request", "body": b"", "more_body": False},
        ]
    )
    sent = []

    async def receive():
        message = next(messages, None)
        return message or await anyio.sleep_forever()

    async def send(message):
        sent.append(message)

    await client.app(client.scope("POST", path, {}, "r1"), receive, send)
    assert sent[0]["status"] == 200
    assert json.loads(sent[1]["body"])["usage"]["completion_tokens"] == 8


@pytest.mark.anyio
async def test_a_client_that_leaves_before_its_body_is_there(client, path):
    async def receive():
        return {"type": "http.disconnect"}

    async def send(_message):
        pytest.fail("nobody listens")

    await client.app(client.scope("POST", path, {}, "r1"), receive, send)
    assert client.service.admissions == {}


@pytest.mark.anyio
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prefix", ["", "chatcmpl-", "cmpl-"])
@pytest.mark.parametrize("own_id", ["r1", "cmpl-1"])
async def test_a_request_can_be_cancelled_from_elsewhere(client, path, stream, prefix, own_id):
    is_cancelled = False

    async def pause(stream):
        nonlocal is_cancelled
        if stream.position == 3 and not is_cancelled:
            is_cancelled = True
            reply = await client.run("POST", f"/v1/requests/{prefix}{own_id}/cancel")
            assert reply.json == {
                "id": f"{prefix}{own_id}",
                "object": "request.cancelled",
                "cancelled": True,
            }
        await anyio.lowlevel.checkpoint()

    client.service.pause = pause
    fields = {"prompt": "a", "messages": [{"role": "user", "content": "a"}], "max_tokens": 8}
    fields |= {"request_id": own_id, "stream": stream, **USAGE}
    reply = await client.run("POST", path, fields)
    last = reply.events[-2] if stream else reply.json
    usage = reply.events[-1]["usage"] if stream else last["usage"]
    assert last["choices"][0]["finish_reason"] == "stop"
    assert last["warnings"][-1] == CANCELLED
    assert usage["completion_tokens"] == 3


def test_what_is_not_open_cannot_be_cancelled(client):
    reply = client("/v1/requests/r1/cancel", b" ")
    assert (reply.status, reply.error["type"]) == (404, "NotFoundError")

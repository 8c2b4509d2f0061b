from __future__ import annotations

import asyncio
import contextlib
import itertools
import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.bench.client import MAX_ERROR, Address, EventReader, StreamClient
from core.bench.serving_report import StreamRecord
from core.errors import ConfigError

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def event(value):
    data = value if isinstance(value, str) else json.dumps(value)
    return f"data: {data}\n\n".encode()


def answer(*texts, usage=True):
    events = [event({"choices": [{"index": 0, "text": text}]}) for text in texts]
    if usage:
        numbers = {"prompt_tokens": 4, "completion_tokens": 2 * len(texts), "total_tokens": 0}
        events.append(event({"choices": [], "usage": numbers}))
    return b"".join([*events, event("[DONE]")])


def chunked(body):
    return b"%x\r\n%b\r\n" % (len(body), body)


# --- events ----------------------------------------------------------------------------------------

STREAM = b": ping\n\n" + answer("a", "", "ü\n\nb") + b"\n"


@given(st.lists(st.integers(0, len(STREAM)), max_size=12), st.booleans())
def test_events_are_the_same_in_whatever_pieces_they_come(cuts, is_crlf):
    stream = STREAM.replace(b"\n\n", b"\r\n\r\n") if is_crlf else STREAM
    record = StreamRecord(4)
    reader = EventReader(record, keep_text=True)
    places = [0, *sorted(cuts), len(stream)]
    for moment, (begin, end) in enumerate(itertools.pairwise(places)):
        reader.feed(stream[begin:end], float(moment))
    reader.finish()
    assert (record.text, record.output_len, record.input_len) == ("aü\n\nb", 6, 4)
    assert len(record.chunk_times) == 3
    assert record.chunk_times == sorted(record.chunk_times)
    assert reader.is_done
    assert not record.error


def test_an_event_counts_when_its_last_byte_has_come():
    record = StreamRecord(1)
    reader = EventReader(record)
    data = answer("a", "b")
    half = data.index(b"}]}") + 1
    reader.feed(data[:half], 1.0)
    reader.feed(data[half:], 2.0)
    assert record.chunk_times == [2.0, 2.0]


def test_what_a_chat_route_sends():
    record = StreamRecord(0)
    reader = EventReader(record, keep_text=True)
    first = {"choices": [{"delta": {"role": "assistant"}}]}
    second = {"choices": [{"delta": {"content": "hi"}, "finish_reason": None}], "usage": None}
    reader.feed(event(first) + event(second) + event("[DONE]"), 1.0)
    reader.finish()
    assert (record.text, record.output_len) == ("hi", 2)


def test_what_else_a_server_may_send():
    record = StreamRecord(3)
    reader = EventReader(record)
    reader.feed(event({"error": {"message": "out of memory"}}) + event("[DONE]"), 1.0)
    reader.finish()
    assert "out of memory" in record.error
    empty = StreamRecord(3)
    EventReader(empty).finish()
    assert "without any token" in empty.error
    with pytest.raises(msgspec.MsgspecError):
        EventReader(StreamRecord(3)).feed(event('{"choices": 3}'), 1.0)


# --- addresses -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://a:1", Address("a", 1, "", is_secure=False)),
        ("https://a.b/x/", Address("a.b", 443, "/x", is_secure=True)),
        ("http://[::1]:80", Address("::1", 80, "", is_secure=False)),
    ],
)
def test_addresses(url, expected):
    assert Address.parse(url) == expected
    assert Address("::1", 80, "", is_secure=False).authority == "[::1]:80"


@pytest.mark.parametrize("url", ["a:1", "ftp://a", "http://", "http://a:b", "http://[a"])
def test_what_is_no_address(url):
    with pytest.raises(ConfigError, match="--base-url"):
        Address.parse(url)


def test_headers_are_lines():
    address = Address.parse("http://a")
    with pytest.raises(ConfigError, match="one line"):
        StreamClient(address, "/v1", headers={"X": "a\r\nB: c"})


# --- connections -----------------------------------------------------------------------------------


class Peer:
    """A server that answers each request with the pieces that it was told, and counts connections."""

    def __init__(self, *answers):
        self.answers = list(answers)
        self.requests = []
        self.num_connections = 0
        self.tasks = []

    async def handle(self, reader, writer):
        self.num_connections += 1
        self.tasks.append(asyncio.current_task())
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
                self.requests.append((head, await reader.readexactly(length)))
                for piece in self.answers[len(self.requests) - 1]:
                    if piece is None:
                        await close(writer)
                        return
                    writer.write(piece)
                    await writer.drain()
                    await asyncio.sleep(0)
        await close(writer)


async def close(writer):
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


def exchange(peer, count=1, *, between=0.0):
    """Send requests to a peer, one after the other."""

    async def run():
        server = await asyncio.start_server(peer.handle, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        client = StreamClient(
            Address.parse(f"http://127.0.0.1:{port}/base"), "/v1/completions", headers={"X-A": "b"}
        )
        records = [StreamRecord(4) for _ in range(count)]
        for record in records:
            await client.stream(b"{}", record)
            await asyncio.sleep(between)
        client.close()
        server.close()
        await asyncio.gather(*peer.tasks)
        await server.wait_closed()
        return records

    return asyncio.run(run())


WHOLE = [HEAD, chunked(answer("a", "b")), b"0\r\n\r\n"]


def test_one_connection_carries_several_requests():
    peer = Peer(WHOLE, WHOLE, WHOLE)
    records = exchange(peer, 3)
    assert [(record.error, record.output_len) for record in records] == [("", 4)] * 3
    assert peer.num_connections == 1
    head, body = peer.requests[2]
    assert head.startswith(b"POST /base/v1/completions HTTP/1.1\r\nHost: 127.0.0.1:")
    assert b"\r\nX-A: b\r\n" in head
    assert body == b"{}"
    for record in records:
        assert 0 < record.start <= record.chunk_times[0] <= record.chunk_times[-1]


def test_an_answer_may_come_byte_by_byte():
    pieces = [bytes([byte]) for byte in b"".join(WHOLE)]
    [record] = exchange(Peer(pieces))
    assert (record.error, len(record.chunk_times)) == ("", 2)


def test_a_connection_that_the_server_gave_up_is_replaced():
    peer = Peer([*WHOLE, None], WHOLE)
    records = exchange(peer, 2, between=0.05)
    assert [record.error for record in records] == ["", ""]
    assert peer.num_connections == 2


def test_a_connection_that_the_server_gives_up_meanwhile_is_replaced():
    peer = Peer(WHOLE, [None], WHOLE)
    records = exchange(peer, 2)
    assert [record.error for record in records] == ["", ""]
    assert (peer.num_connections, len(peer.requests)) == (2, 3)


def test_a_new_connection_that_breaks_is_an_error():
    peer = Peer([None], WHOLE)
    broken, served = exchange(peer, 2)
    assert "closed the connection" in broken.error
    assert not served.error
    assert len(peer.requests) == 2


def test_a_connection_is_not_used_again_if_the_server_says_so():
    closing = HEAD.replace(b"Transfer", b"Connection: close\r\nTransfer")
    peer = Peer([closing, *WHOLE[1:]], WHOLE)
    assert [record.error for record in exchange(peer, 2)] == ["", ""]
    assert peer.num_connections == 2


def test_an_answer_that_ends_with_the_connection():
    head = b"HTTP/1.1 200 OK\r\n\r\n"
    [record] = exchange(Peer([head, answer("a"), None]))
    assert (record.error, record.output_len) == ("", 2)


def test_a_stream_that_breaks_off_is_an_error():
    peer = Peer([HEAD, chunked(answer("a").partition(b"data: [DONE]")[0]), None])
    [record] = exchange(peer)
    assert "closed the connection" in record.error
    assert len(peer.requests) == 1  # it has begun to answer: it is not asked again


@pytest.mark.parametrize("status", [400, 429, 503])
def test_a_refusal_is_an_error_with_its_text(status):
    body = b'{"error": {"message": "' + b"x" * 2000 + b'"}}'
    head = b"HTTP/1.1 %d No\r\nContent-Length: %d\r\n\r\n" % (status, len(body))
    peer = Peer([head, body], WHOLE)
    refused, served = exchange(peer, 2)
    assert refused.error.startswith(f'HTTP status {status}: {{"error"')
    assert len(refused.error) < MAX_ERROR + 50
    assert not served.error
    assert peer.num_connections == 1


@pytest.mark.parametrize("piece", [b"no HTTP\r\n\r\n", HEAD + chunked(event("{nonsense"))])
def test_what_cannot_be_read_is_an_error(piece):
    [record] = exchange(Peer([piece, None]))
    assert "cannot read" in record.error


def test_nobody_is_there():
    async def run():
        record = StreamRecord(1)
        await StreamClient(Address.parse("http://127.0.0.1:9"), "/x").stream(b"", record)
        return record

    assert "9" in asyncio.run(run()).error

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import anyio
import anyio.lowlevel
import psutil
import pytest
import uvicorn
from anyio import EndOfStream, connect_tcp
from anyio.abc import SocketAttribute
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Mount, Route
from structlog.testing import capture_logs

from core.errors import PluginError
from core.http_errors import ERROR_TYPES, error_body
from core.interfaces import Frontend, Server, missing_members
from core.pluginhost import PluginHost, Selected
from core.status import Phase, Status
from plugins.server import http as plugin
from plugins.server.http import HttpSettings, compare
from plugins.server.http.app import HttpServer
from plugins.server.http.connection import MAX_PIPELINED, Connection, Connections
from plugins.server.http.guard import (
    ApiKeyCheck,
    BodyLimit,
    RootPath,
    choose_request_id,
    is_host,
)
from plugins.server.http.health import judge_readiness
from plugins.server.http.listener import serve
from plugins.server.http.openapi import ANY_ROUTE, merge_openapi

pytestmark = pytest.mark.anyio

LIMITS = HttpSettings()
GET = b"GET %b HTTP/1.1\r\nHost: a\r\n%b\r\n"
CHUNKED = b"POST /count HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.fixture(
    params=[("asyncio", {"use_uvloop": False}), ("asyncio", {"use_uvloop": True})],
    ids=["asyncio", "uvloop"],
)
def anyio_backend(request):
    return request.param


def listen():
    sock = socket.create_server(("127.0.0.1", 0))
    sock.setblocking(False)
    return sock


@contextlib.asynccontextmanager
async def serving(app, limits=LIMITS, *, grace=5.0):
    """Serve an application, or a server of ours; yields its port and the event that stops it."""
    sock, stop = listen(), anyio.Event()
    port = sock.getsockname()[1]
    async with anyio.create_task_group() as group:
        if isinstance(app, HttpServer):
            group.start_soon(app.serve, sock, stop, grace)
        else:
            group.start_soon(lambda: serve(app, sock, limits, stop=stop, grace=grace))
        with anyio.fail_after(10):
            yield port, stop
            stop.set()


async def connect(port):
    return await connect_tcp("127.0.0.1", port)


async def read_all(stream):
    """Read until the server closes; a reset counts as the end."""
    data = b""
    with contextlib.suppress(EndOfStream, anyio.BrokenResourceError):
        while True:
            data += await stream.receive()
    return data


async def read_answer(stream):
    """Read one answer, framed by length or in chunks: status, headers, body."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += await stream.receive()
    head, _, body = data.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
    if "content-length" in headers:
        while len(body) < int(headers["content-length"]):
            body += await stream.receive()
    else:
        while not body.endswith(b"0\r\n\r\n"):
            body += await stream.receive()
    return int(first.split()[1]), headers, body


async def ask(port, raw):
    """Send bytes on a connection of their own and read one answer."""
    async with await connect(port) as stream:
        with contextlib.suppress(anyio.BrokenResourceError):  # refused before all of it was sent
            await stream.send(raw)
        return await read_answer(stream)


async def get(port, path="/", headers=b""):
    return await ask(port, GET % (path.encode(), headers))


def error_of(body):
    [(key, error)] = json.loads(body).items()
    assert key == "error"
    assert set(error) == {"message", "type", "param", "code"}
    return error


async def wait_for(condition):
    while not condition():
        await anyio.sleep(0.002)


# --- applications ----------------------------------------------------------------------------------


class Recorder:
    """An application that notes what it sees, and behaves as the path says."""

    def __init__(self):
        self.paths = []
        self.left = []
        self.num_sent = 0
        self.release = anyio.Event()
        self.headers = []

    async def __call__(self, scope, receive, send):
        self.paths.append(scope["path"])
        action = getattr(self, scope["path"].strip("/").split("/")[0], self.echo)
        await action(scope, receive, send)

    async def echo(self, scope, receive, send):
        await reply(send, scope["path"].encode("utf-8", "surrogateescape"))

    async def count(self, scope, receive, send):
        num_bytes, message = 0, {"more_body": True}
        while message.get("more_body"):
            message = await receive()
            if message["type"] == "http.disconnect":
                self.left.append(scope["path"])
                return
            num_bytes += len(message["body"])
        self.headers = scope["headers"]
        await reply(send, b"%d" % num_bytes)

    async def wait(self, scope, receive, send):
        """Answer when released, unless the client leaves before."""
        async with anyio.create_task_group() as group:
            group.start_soon(self.watch, scope, receive, group.cancel_scope)
            await self.release.wait()
            group.cancel_scope.cancel()
        if not self.left:
            await reply(send, b"released")

    async def watch(self, scope, receive, cancel_scope):
        while (await receive())["type"] != "http.disconnect":
            pass
        self.left.append(scope["path"])
        cancel_scope.cancel()

    async def flood(self, scope, receive, send):
        """Send until the client leaves."""
        await start(send)
        try:
            async with anyio.create_task_group() as group:
                group.start_soon(self.watch, scope, receive, group.cancel_scope)
                while not self.left:
                    await send({"type": "http.response.body", "body": b"x" * 65536, "more_body": True})
                    self.num_sent += 65536
                    await anyio.lowlevel.checkpoint()
                group.cancel_scope.cancel()
        finally:
            self.left.append("end")

    async def stubborn(self, scope, receive, send):
        """Go on whatever happens."""
        try:
            await anyio.sleep_forever()
        finally:
            self.left.append("cancelled")

    async def broken(self, scope, receive, send):
        await start(send)
        await send({"type": "http.response.body", "body": b"half", "more_body": True})
        raise RuntimeError("secret")

    async def unfinished(self, scope, receive, send):
        await start(send)
        await send({"type": "http.response.body", "body": b"half", "more_body": True})

    async def silent(self, scope, receive, send):
        pass

    async def parts(self, scope, receive, send):
        await start(send)
        for part in (b"one", b"", b"two"):
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b"three"})


async def start(send, *headers):
    await send({"type": "http.response.start", "status": 200, "headers": list(headers)})


async def reply(send, body):
    await start(send, (b"content-length", b"%d" % len(body)))
    await send({"type": "http.response.body", "body": body})


def make_server(*routes, keys=(), open_paths=(), limits=LIMITS, openapi=()):
    return HttpServer(list(routes), frozenset(open_paths), keys, limits, openapi)


def make_route(path, answer=None, methods=("GET",)):
    async def echo(request):
        body = await request.body()
        return PlainTextResponse(f"{request.state.request_id} {len(body)}")

    return Route(path, answer or echo, methods=list(methods))


# --- requests --------------------------------------------------------------------------------------


async def test_a_connection_carries_one_request_after_another():
    async with serving(Recorder()) as (port, _), await connect(port) as stream:
        for path in (b"/a", b"/b", b"/c%20d"):
            await stream.send(GET % (path, b""))
            status, headers, body = await read_answer(stream)
            assert (status, body) == (200, path.replace(b"%20", b" "))
            assert headers["date"].endswith("GMT")
            assert "server" not in headers


async def test_pipelined_requests_are_answered_in_order():
    app = Recorder()
    paths = [b"/%d" % i for i in range(MAX_PIPELINED)]
    async with serving(app) as (port, _), await connect(port) as stream:
        await stream.send(b"".join(GET % (path, b"") for path in paths))
        data = b""
        while data.count(b"HTTP/1.1 200") < len(paths) or not data.endswith(paths[-1]):
            data += await stream.receive()
    assert [part.rpartition(b"\n")[2] for part in data.split(b"HTTP/1.1 200")[1:]] == paths


async def test_more_pipelined_requests_than_any_client_sends_end_the_connection():
    app = Recorder()
    async with serving(app) as (port, _), await connect(port) as stream:
        await stream.send((GET % (b"/wait", b"")) * (MAX_PIPELINED + 1))
        assert await read_all(stream) == b""
        assert len(app.paths) <= 1


async def test_a_stream_is_sent_in_chunks():
    async with serving(Recorder()) as (port, _):
        status, headers, body = await get(port, "/parts")
    assert (status, headers["transfer-encoding"]) == (200, "chunked")
    assert body == b"3\r\none\r\n3\r\ntwo\r\n5\r\nthree\r\n0\r\n\r\n"


async def test_head_has_no_body():
    async with serving(Recorder()) as (port, _), await connect(port) as stream:
        for path in (b"/parts", b"/echo"):
            await stream.send(b"HEAD %b HTTP/1.1\r\nHost: a\r\n\r\n" % path)
        await stream.send(GET % (b"/end", b"Connection: close\r\n"))
        data = await read_all(stream)
    assert [part.partition(b"\r\n\r\n")[2] for part in data.split(b"HTTP/1.1 ")[1:]] == [
        b"",
        b"",
        b"/end",
    ]


@pytest.mark.parametrize("path", ["/broken", "/unfinished"])
async def test_an_answer_that_fails_midway_does_not_look_complete(path):
    with capture_logs() as lines:
        async with serving(Recorder()) as (port, _), await connect(port) as stream:
            await stream.send(GET % (path.encode(), b""))
            data = await read_all(stream)
    assert data.endswith(b"4\r\nhalf\r\n")
    assert [line["event"] for line in lines] == ["the application raised"] * (path == "/broken")


async def test_an_application_that_says_nothing_is_a_server_error():
    async with serving(Recorder()) as (port, _):
        status, _, body = await get(port, "/silent")
    assert (status, error_of(body)["type"]) == (500, "InternalServerError")


async def test_continue_is_not_said_after_a_refusal():
    async def read_body(request):
        await request.body()
        return PlainTextResponse("")

    server = make_server(Route("/a", read_body, methods=["POST"]))
    head = b"POST /a HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nTransfer-Encoding: chunked\r\n\r\n"
    with capture_logs() as lines:
        async with serving(server) as (port, _), await connect(port) as stream:
            await stream.send(head + b"no chunk\r\n")
            answer = await read_all(stream)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b"100 Continue" not in answer
    assert lines == []


async def test_continue_is_said_only_to_who_may_continue():
    expecting = b"POST /count HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: %d\r\n\r\n"
    limits = replace(LIMITS, max_body_bytes=10)
    server = make_server(make_route("/count", methods=["POST"]), limits=limits)
    async with serving(server) as (port, _):
        async with await connect(port) as stream:
            await stream.send(expecting % 3)
            assert (await stream.receive()).startswith(b"HTTP/1.1 100 ")
            await stream.send(b"abc")
            assert (await read_answer(stream))[0] == 200
        assert (await ask(port, expecting % 11))[0] == 413


@pytest.mark.parametrize("protocol", [b"h2c", b"websocket"])
async def test_an_offer_of_another_protocol_is_passed_over_and_the_body_is_kept(protocol):
    offer = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: %b\r\nHTTP2-Settings: AA\r\n" % protocol
    post = b"POST /count HTTP/1.1\r\nHost: a\r\n%bContent-Length: 3\r\n\r\n" % offer
    async with serving(Recorder()) as (port, _), await connect(port) as stream:
        await stream.send(post)
        await stream.send(b"abc")
        assert (await read_answer(stream))[::2] == (200, b"3")
        await stream.send((post + b"abc") * 2 + GET % (b"/end", b"Connection: close\r\n"))
        data = await read_all(stream)
    assert data.count(b"HTTP/1.1 200") == 3
    assert data.endswith(b"/end")


SMUGGLING = {
    "length and chunks": b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "two lengths": b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
    "negative length": b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: -3\r\n\r\n",
    "signed length": b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: +3\r\n\r\nabc",
    "huge length": b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 99999999999999999999\r\n\r\n",
    "unknown coding": b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "bad chunk": b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    "folded header": b"GET / HTTP/1.1\r\nHost: a\r\nX: a\r\n b\r\n\r\n",
    "bare line feeds": b"GET / HTTP/1.1\nHost: a\n\n",
    "space before colon": b"GET / HTTP/1.1\r\nHost : a\r\n\r\n",
    "NUL in target": b"GET /a\x00b HTTP/1.1\r\nHost: a\r\n\r\n",
    "NUL in header": b"GET / HTTP/1.1\r\nHost: a\r\nX: a\x00b\r\n\r\n",
    "bytes in target": b"GET /\xff HTTP/1.1\r\nHost: a\r\n\r\n",
    "no path": b"GET http://a HTTP/1.1\r\nHost: a\r\n\r\n",
    "relative target": b"GET v1 HTTP/1.1\r\nHost: a\r\n\r\n",
    "unknown method": b"FOO / HTTP/1.1\r\nHost: a\r\n\r\n",
    "CONNECT": b"CONNECT a:80 HTTP/1.1\r\nHost: a\r\n\r\n",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(40),
}


@pytest.mark.parametrize("raw", SMUGGLING.values(), ids=SMUGGLING)
async def test_what_could_be_read_in_two_ways_is_refused(raw):
    with capture_logs() as lines:
        async with serving(Recorder()) as (port, _):
            status, headers, body = await ask(port, raw)
    assert (status, headers["connection"]) == (400, "close")
    assert error_of(body)["type"] == "BadRequestError"
    assert lines == []


# --- limits of the listener ------------------------------------------------------------------------


LONG = b"a" * LIMITS.max_header_bytes
OVERSIZED = {
    "target": GET % (b"/" + LONG, b""),
    "header": GET % (b"/", b"X: " + LONG + b"\r\n"),
    "unfinished header": b"GET / HTTP/1.1\r\nHost: a\r\nX: " + LONG * 16,
    "name of a header": b"GET / HTTP/1.1\r\nHost: a\r\n" + LONG * 16,
    "number": GET % (b"/", b"X: 1\r\n" * LIMITS.max_headers),
    "trailer": CHUNKED + b"1\r\na\r\n0\r\nX: " + LONG * 16,
    "number of trailers": CHUNKED + b"1\r\na\r\n0\r\n" + b"X: 1\r\n" * LIMITS.max_headers,
    "chunk extension": CHUNKED + b"1;" + LONG * 16,
}


@pytest.mark.parametrize("raw", OVERSIZED.values(), ids=OVERSIZED)
async def test_too_much_head_is_refused(raw):
    async with serving(Recorder()) as (port, _):
        status, _, body = await ask(port, raw)
        assert status == 431
        assert "--set server.http.max_header" in error_of(body)["message"]


async def test_the_limits_of_a_head_are_exact():
    limits = replace(LIMITS, max_header_bytes=1000, max_headers=20)
    async with serving(Recorder(), limits) as (port, _):
        rest = 1000 - len(b"/Host: a\r\nX: \r\n")
        for excess, expected in ((0, 200), (1, 431)):
            assert (await get(port, "/", b"X: " + b"a" * (rest + excess) + b"\r\n"))[0] == expected
            assert (await get(port, "/", b"X: 1\r\n" * (19 + excess)))[0] == expected


async def test_a_head_counts_for_one_request_only():
    limits = replace(LIMITS, max_header_bytes=200)
    post = b"POST /count HTTP/1.1\r\nHost: a\r\nContent-Length: 150\r\n\r\n" + bytes(150)
    async with serving(Recorder(), limits) as (port, _), await connect(port) as stream:
        for _ in range(5):
            await stream.send(post)
            assert (await read_answer(stream))[::2] == (200, b"150")


async def test_an_endless_header_is_not_kept():
    async with serving(Recorder()) as (port, _), await connect(port) as stream:
        await stream.send(b"GET / HTTP/1.1\r\nX: ")
        with contextlib.suppress(anyio.BrokenResourceError):
            for _ in range(320):  # 20 MiB
                await stream.send(LONG)
        assert (await read_answer(stream))[0] == 431


async def test_trailers_are_dropped():
    app = Recorder()
    raw = CHUNKED + b"3\r\nabc\r\n0\r\nX-Api-Key: k\r\n\r\n"
    async with serving(app) as (port, _):
        assert (await ask(port, raw))[::2] == (200, b"3")
    assert [name for name, _ in app.headers] == [b"host", b"transfer-encoding"]


@pytest.mark.parametrize(
    ("sent", "status"),
    [(b"", None), (b"\r\n", None), (b"GET / HT", 408), (b"GET / HTTP/1.1\r\nX:", 408)],
)
async def test_a_slow_head_ends_the_connection(sent, status):
    limits = replace(LIMITS, header_timeout=0.05)
    async with serving(Recorder(), limits) as (port, _), await connect(port) as stream:
        if sent:
            await stream.send(sent)
        if status is None:
            assert await read_all(stream) == b""
        else:
            assert (await read_answer(stream))[0] == status


async def drip(stream, data):
    """Send a little now and then until the server has had enough."""
    with contextlib.suppress(anyio.BrokenResourceError, anyio.ClosedResourceError):
        while True:
            await stream.send(data)
            await anyio.sleep(0.01)


@pytest.mark.parametrize(
    ("first", "drop"),
    [(b"GET / HTTP/1.1\r\nX: ", b"a"), (b"\r\n", b"\r\n"), (GET % (b"/", b""), b"\r\n")],
)
async def test_dripping_does_not_prolong_a_head(first, drop):
    limits = replace(LIMITS, header_timeout=0.1, keep_alive=0.1)
    async with serving(Recorder(), limits) as (port, _), await connect(port) as stream:
        await stream.send(first)
        async with anyio.create_task_group() as group:
            group.start_soon(drip, stream, drop)
            with anyio.fail_after(5):
                await read_all(stream)
            group.cancel_scope.cancel()


async def test_a_body_that_nobody_wants_does_not_keep_the_connection():
    limits = replace(LIMITS, header_timeout=0.1, keep_alive=0.1)
    async with serving(Recorder(), limits) as (port, _), await connect(port) as stream:
        await stream.send(b"POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000\r\n\r\n")
        assert (await read_answer(stream))[0] == 200
        with anyio.fail_after(5):
            await drip(stream, b"a")


async def test_an_idle_connection_is_closed():
    limits = replace(LIMITS, keep_alive=0.05)
    async with serving(Recorder(), limits) as (port, _), await connect(port) as stream:
        await stream.send(GET % (b"/", b""))
        assert (await read_answer(stream))[0] == 200
        assert await read_all(stream) == b""


async def test_an_open_request_may_take_longer_than_all_timeouts():
    app = Recorder()
    limits = replace(LIMITS, keep_alive=0.05, header_timeout=0.05, send_timeout=0.05)
    async with serving(app, limits) as (port, _), await connect(port) as stream:
        await stream.send(GET % (b"/wait", b""))
        await anyio.sleep(0.2)
        app.release.set()
        assert (await read_answer(stream))[2] == b"released"


# --- clients that leave or read slowly -------------------------------------------------------------


@pytest.mark.parametrize("ending", ["close", "reset", "half-close"])
@pytest.mark.parametrize("path", ["/wait", "/count", "/flood"])
async def test_an_application_learns_that_its_client_is_gone(path, ending):
    app = Recorder()
    raw = GET % (path.encode(), b"Content-Length: 9\r\n" if path == "/count" else b"")
    async with serving(app) as (port, _):
        stream = await connect(port)
        await stream.send(raw)
        await wait_for(lambda: app.paths)
        if ending == "half-close":
            await stream.send_eof()
        elif ending == "reset":
            raw_socket = stream.extra(SocketAttribute.raw_socket)  # noqa: S610  not Django's
            raw_socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            await stream.aclose()
        else:
            await stream.aclose()
        await wait_for(lambda: app.left)
        await stream.aclose()
        assert (await get(port))[0] == 200


async def test_the_first_of_pipelined_requests_learns_it_too():
    app = Recorder()
    async with serving(app) as (port, _):
        async with await connect(port) as stream:
            await stream.send(GET % (b"/wait/1", b"") + GET % (b"/wait/2", b""))
            await wait_for(lambda: app.paths)
        await wait_for(lambda: app.left)
    assert app.left == app.paths == ["/wait/1"]


async def wait_until_blocked(app, port):
    """Wait until the buffers of the system are full; meanwhile, others are served."""
    num_sent = -1
    while app.num_sent != num_sent:
        num_sent = app.num_sent
        for _ in range(3):
            assert (await get(port))[0] == 200
        await anyio.sleep(0.05)
    return num_sent


async def test_a_blocked_send_ends_when_its_client_leaves():
    app = Recorder()
    async with serving(app) as (port, _), await connect(port) as stream:
        await stream.send(GET % (b"/flood", b""))
        await wait_for(lambda: app.num_sent)
        await wait_until_blocked(app, port)
        await stream.send_eof()
        await wait_for(lambda: "end" in app.left)


async def test_a_slow_reader_waits_and_nobody_else_does():
    app = Recorder()
    async with serving(app) as (port, _):
        async with await connect(port) as stream:
            await stream.send(GET % (b"/flood", b""))
            await wait_for(lambda: app.num_sent)
            num_sent = await wait_until_blocked(app, port)
            assert num_sent < 2**25
            received = 0
            while received <= num_sent:
                received += len(await stream.receive())
            await wait_for(lambda: app.num_sent > num_sent)
        await wait_for(lambda: app.left)


async def test_who_reads_nothing_is_cut_off():
    app = Recorder()
    limits = replace(LIMITS, send_timeout=0.1)
    async with serving(app, limits) as (port, _), await connect(port) as stream:
        await stream.send(GET % (b"/flood", b""))
        await wait_for(lambda: "end" in app.left)


# --- stopping --------------------------------------------------------------------------------------


async def test_stopping_finishes_what_is_open_and_closes_what_is_idle():
    app = Recorder()
    async with serving(app) as (port, stop):
        idle, fresh, half, busy = [await connect(port) for _ in range(4)]
        await idle.send(GET % (b"/", b""))
        await read_answer(idle)
        await half.send(b"GET / HT")
        await busy.send(GET % (b"/wait", b""))
        await wait_for(lambda: "/wait" in app.paths)
        stop.set()
        for stream in (idle, fresh, half):
            assert await read_all(stream) == b""
        with pytest.raises(OSError, match="connect"):
            await connect(port)
        app.release.set()
        data = await read_all(busy)
        assert data.endswith(b"released")
        assert b"connection: close" in data
        for stream in (idle, fresh, half, busy):
            await stream.aclose()


async def test_the_grace_of_stopping_ends():
    app = Recorder()
    begin = time.monotonic()
    async with (
        serving(app, grace=0.05) as (port, stop),
        await connect(port) as stream,
        await connect(port) as other,
    ):
        await stream.send(GET % (b"/wait", b""))
        await other.send(GET % (b"/stubborn", b""))
        await wait_for(lambda: len(app.paths) == 2)
        stop.set()
        assert await read_all(stream) == b""
        assert await read_all(other) == b""
    assert sorted(app.left) == ["/wait", "cancelled"]
    assert time.monotonic() - begin < 4


async def test_a_connection_that_comes_too_late_is_closed():
    connections = Connections()
    connections.is_stopping = True
    config = uvicorn.Config(Recorder(), interface="asgi3", ws="none", lifespan="off", log_config=None)
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Connection(config, connections, LIMITS), sock=listen())
    async with await connect(server.sockets[0].getsockname()[1]) as stream:
        with anyio.fail_after(5):
            assert await read_all(stream) == b""
    server.close()


async def test_a_stopped_listener_leaves_no_task_behind():
    app = Recorder()
    before = len(anyio.get_running_tasks())
    async with serving(app) as (port, _):
        for _ in range(20):
            async with await connect(port) as stream:
                await stream.send(GET % (b"/wait", b""))
                await wait_for(lambda: app.paths)
        await get(port)
    assert len(anyio.get_running_tasks()) == before


async def test_cancelling_stops_at_once():
    sock, app = listen(), Recorder()
    port = sock.getsockname()[1]
    async with anyio.create_task_group() as group:
        group.start_soon(lambda: serve(app, sock, LIMITS, stop=anyio.Event(), grace=60))
        stream = await connect(port)
        await stream.send(GET % (b"/wait", b""))
        await wait_for(lambda: app.paths)
        group.cancel_scope.cancel()
    assert app.left == ["/wait"]
    await stream.aclose()


async def test_two_listeners_share_a_process_with_its_signals_and_logs():
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    loggers = [logging.getLogger(), logging.getLogger("uvicorn.error")]
    log_state = [(logger.level, list(logger.handlers)) for logger in loggers]
    async with serving(Recorder()) as (one, stop), serving(Recorder()) as (two, _):
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
        assert (await get(one))[0] == (await get(two))[0] == 200
        stop.set()
        assert (await get(two))[0] == 200
    assert [(logger.level, list(logger.handlers)) for logger in loggers] == log_state


# --- guards ----------------------------------------------------------------------------------------


@given(st.binary(max_size=200))
def test_a_request_id_is_always_fit_for_a_log(sent):
    chosen = choose_request_id(sent)
    assert 0 < len(chosen) <= 128
    assert all("!" <= character <= "~" for character in chosen)
    is_fit = 0 < len(sent) <= 128 and all(0x21 <= byte <= 0x7E for byte in sent)
    assert (chosen.encode() == sent) == is_fit


def test_made_request_ids_differ():
    assert choose_request_id(b"") != choose_request_id(b"")


@given(
    st.binary(max_size=20),
    st.sampled_from([bytes([byte]) for byte in b'/?#@\\ \t\r\n\x00\x7f",<>^`{|}\x80\xff']),
)
def test_a_host_with_anything_else_in_it_is_none(text, character):
    assert not is_host(text + character)
    assert not is_host(character + text)


@pytest.mark.parametrize(
    "host", ["localhost:2242", "127.0.0.1", "[::1]:80", "a-b.example", "", "a_b:1"]
)
def test_hosts(host):
    assert is_host(host.encode())


async def seen_by(guard, headers=(), path="/v1", bodies=(b"",)):
    """Whether a guard lets a request through, and what of the body; else the status."""
    messages = [
        {"type": "http.request", "body": body, "more_body": i < len(bodies) - 1}
        for i, body in enumerate(bodies)
    ]

    async def receive():
        return messages.pop(0)

    seen = []

    async def app(scope, receive, send):
        message = {"more_body": True}
        while message["more_body"]:
            message = await receive()
            seen.append(message["body"])

    scope = {"type": "http", "path": path, "headers": list(headers), "method": "POST"}
    try:
        await guard(app)(scope, receive, None)
    except HTTPException as error:
        return error.status_code
    return seen


KEYS = st.text(st.characters(codec="utf-8", min_codepoint=0x21), min_size=1, max_size=12)


@given(st.lists(KEYS, min_size=1, max_size=4), KEYS, st.data())
def test_only_keys_open(keys, other, data):
    sent = data.draw(st.sampled_from([*keys, other]))
    headers = data.draw(
        st.sampled_from(
            [
                [(b"authorization", b"Bearer " + sent.encode())],
                [(b"authorization", b"bearer " + sent.encode())],
                [(b"x-api-key", sent.encode())],
                [(b"x-api-key", b"wrong key"), (b"authorization", b"Bearer " + sent.encode())],
            ]
        )
    )
    expected = [b""] if sent in keys else 401
    result = anyio.run(seen_by, lambda app: ApiKeyCheck(app, keys, frozenset({"/open"})), headers)
    assert result == expected


@pytest.mark.parametrize(
    ("headers", "path", "expected"),
    [
        ([], "/v1", 401),
        ([(b"authorization", b"k")], "/v1", 401),
        ([(b"authorization", b"Basic k")], "/v1", 401),
        ([(b"authorization", b"Bearer ")], "/v1", 401),
        ([(b"authorization", b"Bearer k ")], "/v1", [b""]),
        ([], "/open", [b""]),
        ([], "/open/", 401),
        ([], "//open", 401),
        ([], "/OPEN", 401),
        ([], "/v1/../open", 401),
        ([], "", 401),
    ],
)
async def test_keys_and_open_paths(headers, path, expected):
    def guard(app):
        return ApiKeyCheck(app, ["k"], frozenset({"/open"}))

    assert await seen_by(guard, headers, path) == expected


@given(st.lists(st.binary(max_size=8), min_size=1, max_size=8), st.integers(0, 40), st.booleans())
def test_a_body_passes_whole_or_not_at_all(bodies, limit, is_announced):
    num_bytes = sum(map(len, bodies))
    headers = [(b"content-length", b"%d" % num_bytes)] if is_announced else []
    result = anyio.run(seen_by, lambda app: BodyLimit(app, limit, 60.0), headers, "/", bodies)
    assert result == (bodies if num_bytes <= limit else 413)


@pytest.mark.parametrize(
    ("path", "expected"),
    [("/llm/v1", "/v1"), ("/v1", "/v1"), ("/llm", "/llm"), ("/llmv1", "/llmv1"), ("/llm//v1", "//v1")],
)
async def test_the_prefix_of_a_proxy_is_taken_away_once(path, expected):
    paths = []

    async def app(scope, receive, send):
        paths.append(scope["path"])

    await RootPath(app, "/llm")({"path": path}, None, None)
    assert paths == [expected]


# --- the server ------------------------------------------------------------------------------------


async def test_errors_have_one_shape_and_every_answer_the_id():
    async def fail(request):
        raise RuntimeError("secret in /etc/passwd")

    async def refuse(request):
        raise HTTPException(418, "no coffee", {"x-extra": "1"})

    server = make_server(make_route("/a"), make_route("/fail", fail), make_route("/tea", refuse))
    cases = {
        "/a": (200, None),
        "/b": (404, "NotFoundError"),
        "/a/": (404, "NotFoundError"),
        "/tea": (418, "I'm a Teapot"),
        "/fail": (500, "InternalServerError"),
    }
    with capture_logs() as lines:
        async with serving(server) as (port, _):
            for path, (expected, kind) in cases.items():
                status, headers, body = await get(
                    port, path, b"X-Request-Id: id-%b\r\n" % path.encode()
                )
                assert (status, headers["x-request-id"]) == (expected, f"id-{path}")
                assert kind is None or error_of(body)["type"] == kind
                assert b"secret" not in body
            status, headers, body = await ask(port, b"PUT /a HTTP/1.1\r\nHost: a\r\n\r\n")
    assert (status, set(headers["allow"].split(", "))) == (405, {"GET", "HEAD"})
    assert error_of(body)["type"] == "MethodNotAllowedError"
    [line] = lines
    assert (line["event"], line["request_id"], line["path"]) == ("request failed", "id-/fail", "/fail")


async def test_an_error_midway_is_logged_once_and_cuts_the_answer_off():
    async def fail(request):
        async def parts():
            yield b"half"
            raise RuntimeError("secret")

        return StreamingResponse(parts())

    server = make_server(make_route("/", fail))
    with capture_logs() as lines:
        async with serving(server) as (port, _), await connect(port) as stream:
            await stream.send(GET % (b"/", b""))
            assert (await read_all(stream)).endswith(b"\r\n4\r\nhalf\r\n")
    assert [line["event"] for line in lines] == ["request failed"]


async def test_ids_that_are_unfit_are_replaced():
    async with serving(make_server(make_route("/"))) as (port, _):
        for sent in (b"", b"a b", b"a" * 129, b"\xff", b"\xc3\xa9"):
            _, headers, body = await get(port, "/", b"X-Request-Id: %b\r\n" % sent)
            assert len(headers["x-request-id"]) == 32
            assert body.decode().split()[0] == headers["x-request-id"]


async def test_errors_in_groups_are_looked_into():
    async def grouped(request):
        async with anyio.create_task_group() as group:
            group.start_soon(request.body)

    async def left(request):
        raise ExceptionGroup("", [ClientDisconnect()])

    limits = replace(LIMITS, max_body_bytes=2)
    server = make_server(
        make_route("/grouped", grouped, ["POST"]), make_route("/left", left), limits=limits
    )
    with capture_logs() as lines:
        async with serving(server) as (port, _):
            chunks = b"3\r\nabc\r\n0\r\n\r\n"
            assert (await ask(port, CHUNKED.replace(b"count", b"grouped") + chunks))[0] == 413
            async with await connect(port) as stream:
                await stream.send(GET % (b"/left", b""))
                assert (await read_answer(stream))[0] == 500  # the listener's: nobody answered
    assert lines == []


async def test_a_client_that_leaves_within_its_body_is_no_error():
    entered, ended = [], []

    async def read(request):
        entered.append(1)
        try:
            await request.body()
        finally:
            ended.append(1)
        return PlainTextResponse("")

    with capture_logs() as lines:
        async with serving(make_server(make_route("/count", read, ["POST"]))) as (port, _):
            async with await connect(port) as stream:
                await stream.send(CHUNKED + b"3\r\nab")
                await wait_for(lambda: entered)
            await wait_for(lambda: ended)
    assert lines == []


async def test_bodies_are_limited():
    limits = replace(LIMITS, max_body_bytes=1000, body_timeout=0.5)
    server = make_server(make_route("/count", methods=["POST"]), limits=limits)
    post = b"POST /count HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n"
    async with serving(server) as (port, _):
        assert (await ask(port, post % 1000 + bytes(1000)))[0] == 200
        assert (await ask(port, CHUNKED + b"1\r\na\r\n" * 1000 + b"0\r\n\r\n"))[0] == 200
        assert (await ask(port, post % 1001))[0] == 413
        status, _, body = await ask(port, CHUNKED + b"1\r\na\r\n" * 1001)
        assert (status, error_of(body)["type"]) == (413, "ContentTooLargeError")
        status, _, body = await ask(port, post % 1000 + bytes(999))
        assert (status, error_of(body)["type"]) == (408, "RequestTimeoutError")


async def test_only_a_body_must_come_in_time():
    async def wait(request):
        body = await request.body()
        with anyio.move_on_after(0.2):
            while not await request.is_disconnected():
                await request.receive()
        return PlainTextResponse(body)

    limits = replace(LIMITS, body_timeout=0.05)
    async with serving(make_server(make_route("/wait", wait, ["POST"]), limits=limits)) as (port, _):
        raw = b"POST /wait HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabc"
        assert (await ask(port, raw))[::2] == (200, b"abc")


async def test_a_client_that_sends_on_can_still_read_why_it_is_refused():
    server = make_server(
        make_route("/count", methods=["POST"]), limits=replace(LIMITS, max_body_bytes=10)
    )
    async with serving(server) as (port, _), await connect(port) as stream:
        await stream.send(b"POST /count HTTP/1.1\r\nHost: a\r\nContent-Length: 10000000\r\n\r\n")
        await stream.send(bytes(10_000_000))  # all of it is taken
        assert (await read_answer(stream))[0] == 413
        await stream.send(GET % (b"/other", b""))
        assert (await read_answer(stream))[0] == 404


async def test_every_route_needs_a_key_but_the_open_ones():
    routes = [make_route(path, methods=["GET", "POST"]) for path in ("/v1/a", "/v1/{id:path}", "/open")]
    server = make_server(*routes, keys=["k1", "k2"], open_paths=["/open"])
    paths = [route.path.replace("{id:path}", "x/y") for route in server._router.routes]
    assert "/openapi.json" in paths
    tricks = [
        "//open",
        "/open/",
        "/v1/../open",
        "/v1/%2e%2e/open",
        "/open%2f",
        "/open;a",
        "/nowhere",
        "*",
    ]
    async with serving(server) as (port, _):
        for path in [*paths, *tricks]:
            status, headers, body = await get(port, path)
            if path == "/open":
                assert status == 200
            else:
                assert (status, headers["www-authenticate"]) == (401, "Bearer")
                assert error_of(body)["type"] == "AuthenticationError"
        for key in (b"k1", b"k2"):
            for header in (b"Authorization: Bearer %b\r\n", b"x-api-key: %b\r\n"):
                assert (await get(port, "/v1/a", header % key))[0] == 200
        for header in (b"Authorization: Bearer k", b"Authorization: k1", b"x-api-key: k3"):
            assert (await get(port, "/v1/a", header + b"\r\n"))[0] == 401
        for path in ("/%6fpen", "/open?x=/v1", "http://b/open"):  # other spellings of the open path
            assert (await get(port, path))[0] == 200
        for path in ("/%76%31/a", "http://b/v1/a", "http://b/v1/a?/open"):
            assert (await get(port, path))[0] == 401


@pytest.mark.parametrize(
    "head",
    [
        b"GET /v1 HTTP/1.1\r\nHost: a/open?x=\r\n\r\n",
        b"GET /v1 HTTP/1.1\r\nHost: a#\r\n\r\n",
        b"GET /v1 HTTP/1.1\r\nHost: u@a\r\n\r\n",
        b"GET /v1 HTTP/1.1\r\nHost: a\\b\r\n\r\n",
        b"GET /v1 HTTP/1.1\r\nHost: a b\r\n\r\n",
        b"GET /v1 HTTP/1.1\r\nHost: \xff\r\n\r\n",
        b"GET /v1 HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n",
        b"GET /v1 HTTP/1.1\r\n\r\n",
    ],
)
async def test_a_host_that_is_none_is_refused(head):
    async with serving(make_server(make_route("/v1"), keys=["k"])) as (port, _):
        assert (await ask(port, head))[0] == 400


async def test_http_1_0_needs_no_host():
    async with serving(make_server(make_route("/v1"))) as (port, _), await connect(port) as stream:
        await stream.send(b"GET /v1 HTTP/1.0\r\n\r\n")
        assert (await read_all(stream)).startswith(b"HTTP/1.1 200")


async def test_pages_of_other_origins_are_served_only_if_they_are_named():
    origin = b"Origin: http://page\r\n"
    preflight = (
        b"OPTIONS /v1 HTTP/1.1\r\nHost: a\r\n%bAccess-Control-Request-Method: POST\r\n\r\n" % origin
    )
    named = make_server(
        make_route("/v1"), keys=["k"], limits=replace(LIMITS, allowed_origins=("http://page",))
    )
    async with serving(named) as (port, _):
        status, headers, _ = await ask(port, preflight)
        assert (status, headers["access-control-allow-origin"]) == (200, "http://page")
        status, headers, _ = await get(port, "/v1", origin)
        assert (status, headers["access-control-allow-origin"]) == (401, "http://page")
    async with serving(make_server(make_route("/v1"))) as (port, _):
        assert (await ask(port, preflight))[0] == 405
        assert "access-control-allow-origin" not in (await get(port, "/v1", origin))[1]


async def test_only_http_is_served():
    server = make_server(make_route("/"))
    for kind in ("websocket", "lifespan"):
        with pytest.raises(NotImplementedError, match=kind):
            await server.app({"type": kind, "path": "/", "headers": []}, None, None)


async def test_a_streaming_route_ends_when_its_client_leaves():
    ended = []

    async def stream(request):
        async def parts():
            try:
                while True:
                    yield b"data: x\n\n"
                    await anyio.sleep(0.001)
            finally:
                ended.append(request.state.request_id)

        return StreamingResponse(parts(), media_type="text/event-stream")

    with capture_logs() as lines:
        async with serving(make_server(make_route("/s", stream))) as (port, _):
            async with await connect(port) as client:
                await client.send(GET % (b"/s", b"X-Request-Id: r1\r\n"))
                await client.receive()
            await wait_for(lambda: ended)
    assert (ended, lines) == (["r1"], [])


@pytest.mark.parametrize(
    ("routes", "open_paths", "match"),
    [
        ([make_route("/a"), make_route("/a", methods=["POST", "GET"])], (), "GET /a"),
        ([make_route("/openapi.json")], (), "openapi"),
        ([make_route("/a")], ["/b"], "'/b'"),
        ([make_route("/{a}")], ["/{a}"], "plain path"),
        ([Mount("/a", routes=[])], (), "Route"),
    ],
)
def test_routes_that_contradict_one_another_are_no_server(routes, open_paths, match):
    with pytest.raises(PluginError, match=match):
        make_server(*routes, open_paths=open_paths)


# --- any bytes at all ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fuzz_port():
    """A server in a thread of its own; its log must stay empty."""
    stops = []
    ports = []

    async def run():
        sock = listen()
        stops.append(anyio.Event())
        ports.append(sock.getsockname()[1])
        server = make_server(make_route("/a", methods=["GET", "POST"]), keys=["k"], open_paths=["/a"])
        async with anyio.create_task_group() as group:
            group.start_soon(server.serve, sock, stops[0], 1.0)
            group.start_soon(stay_reachable)

    async def stay_reachable():
        while not stops[0].is_set():
            await anyio.sleep(0.02)
            if is_over.is_set():
                stops[0].set()

    is_over = threading.Event()
    thread = threading.Thread(target=anyio.run, args=(run,))
    with capture_logs() as lines:
        thread.start()
        while not ports:
            time.sleep(0.01)
        yield ports[0]
        is_over.set()
        thread.join(10)
    assert not thread.is_alive()
    assert lines == []


SEED = (
    b"POST /a?b=c HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer k\r\nX-Request-Id: r\r\n"
    b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nabcde\r\n0\r\n\r\n"
)
SPLICES = st.tuples(
    st.integers(0, len(SEED)),
    st.integers(0, 12),
    st.one_of(
        st.binary(max_size=6),
        st.sampled_from(
            [
                *(b"\r\n", b"\n", b" ", b":", b"\x00", b"%00", b"%", b"//", b"HTTP/1.0"),
                *(b"Upgrade: h2c\r\n", b"Connection: upgrade\r\n", b"Expect: 100-continue\r\n"),
                *(b"Content-Length: 5\r\n", b"Host: b\r\n"),
            ]
        ),
    ),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(SPLICES, min_size=1, max_size=5), st.lists(st.integers(0, len(SEED)), max_size=3))
def test_no_bytes_are_an_error_of_the_server(fuzz_port, splices, cuts):
    raw = SEED
    for place, num_removed, inserted in splices:
        raw = raw[:place] + inserted + raw[place + num_removed :]
    with socket.create_connection(("127.0.0.1", fuzz_port), timeout=5) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        data = b""
        with contextlib.suppress(OSError):
            for begin, end in zip([0, *sorted(cuts)], [*sorted(cuts), len(raw)], strict=True):
                sock.sendall(raw[begin:end])
            sock.sendall(b"\r\n\r\n")
            sock.shutdown(socket.SHUT_WR)
            while part := sock.recv(65536):
                data += part
    for line in data.split(b"\r\n"):
        assert not line.startswith(b"HTTP/1.1 5"), data
    with socket.create_connection(("127.0.0.1", fuzz_port), timeout=5) as sock:
        sock.sendall(GET % (b"/a", b""))
        assert sock.recv(100).startswith(b"HTTP/1.1 200")


# --- health, openapi, plugin -----------------------------------------------------------------------


def make_service(phase=Phase.READY, *, error="", keys=(), limits=LIMITS):
    return SimpleNamespace(
        status=Status(phase, 1, 4, error),
        seconds_without_progress=0.0,
        num_open=3,
        settings={"server.http": limits},
        config=SimpleNamespace(api_key=keys),
    )


@pytest.mark.parametrize("phase", Phase)
async def test_health_in_every_phase(phase):
    service = make_service(phase, error="/secret/path")
    async with serving(HttpServer.of(service, [])) as (port, _):
        is_alive = phase not in (Phase.FAILED, Phase.STOPPED)
        for path in ("/health", "/livez", "/ping"):
            status, _, body = await get(port, path)
            assert status == (200 if is_alive else 503)
            assert body == b"{}" or error_of(body)["type"] == "ServiceUnavailableError"
        status, headers, body = await get(port, "/readyz")
        assert status == (200 if phase is Phase.READY else 503)
        assert ("retry-after" in headers) == (status == 503)
        answer = json.loads(body)
        assert (answer["phase"], answer["percent"]) == (phase, 25)
        assert b"secret" not in body
        assert json.loads((await get(port, "/load"))[2]) == {"server_load": 3}
        assert set(json.loads((await get(port, "/version"))[2])) == {"version"}


async def test_a_stalled_engine_is_not_ready():
    service = make_service()
    for seconds, is_ready in ((0, True), (120, True), (121, False)):
        service.seconds_without_progress = seconds
        assert (judge_readiness(service, 120.0).error == "") == is_ready


async def test_the_server_of_a_service_asks_for_its_keys():
    frontend = Frontend(routes=[make_route("/a"), make_route("/b")], open_paths=frozenset({"/b"}))
    server = HttpServer.of(make_service(keys=("k",)), [frontend])
    assert missing_members(server, Server) == []
    async with serving(server) as (port, _):
        for path in ("/health", "/livez", "/ping", "/readyz", "/b"):
            assert (await get(port, path))[0] == 200
        for path in ("/a", "/version", "/load", "/openapi.json"):
            assert (await get(port, path))[0] == 401
            assert (await get(port, path, b"x-api-key: k\r\n"))[0] == 200


async def test_the_description_covers_all_routes_and_answers():
    schema = {"type": "object"}
    fragment = {
        "paths": {"/a": {"get": {"responses": {"200": {}, "400": {"description": "mine"}}}}},
        "components": {"schemas": {"A": schema}, "headers": {"H": {}}},
    }
    frontend = Frontend(routes=[make_route("/a")], openapi=fragment)
    async with serving(HttpServer.of(make_service(keys=("k",)), [frontend])) as (port, _):
        document = json.loads((await get(port, "/openapi.json", b"x-api-key: k\r\n"))[2])
    assert set(document["paths"]) == {
        "/a",
        "/health",
        "/livez",
        "/ping",
        "/readyz",
        "/version",
        "/load",
    }
    assert document["components"]["schemas"]["A"] == schema
    assert document["components"]["headers"] == {"H": {}}
    assert document["security"] == [{"key": []}]
    for item in document["paths"].values():
        assert set(ANY_ROUTE) <= set(item["get"]["responses"])
    answers = document["paths"]["/a"]["get"]["responses"]
    assert answers["400"] == {"description": "mine"}
    reference = answers["413"]["content"]["application/json"]["schema"]["$ref"]
    assert reference.rpartition("/")[2] in document["components"]["schemas"]
    assert "413" not in fragment["paths"]["/a"]["get"]["responses"]


def test_descriptions_that_contradict_one_another_are_refused():
    for one, two in (
        ({"paths": {"/a": {"get": {}}}}, {"paths": {"/a": {"post": {}}}}),
        ({"components": {"schemas": {"A": {}}}}, {"components": {"schemas": {"A": {"type": "null"}}}}),
    ):
        with pytest.raises(PluginError, match="differently"):
            merge_openapi([one, two])
        assert merge_openapi([one, one])


def test_error_bodies():
    for status, kind in ERROR_TYPES.items():
        assert error_of(error_body(status, "m"))["type"] == kind
    error = error_of(error_body(502, "m", param="a.b", code="c"))
    assert error == {"message": "m", "type": "Bad Gateway", "param": "a.b", "code": "c"}
    assert error_of(error_body(400, "m", type="X"))["type"] == "X"


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({}, None),
        ({"root_path": "/a/b"}, None),
        ({"max_headers": 0}, "max_headers is 0"),
        ({"keep_alive": float("inf")}, "keep_alive is inf"),
        ({"header_timeout": float("nan")}, "header_timeout is nan"),
        ({"root_path": "a"}, "root_path is 'a'"),
        ({"root_path": "/"}, "root_path is '/'"),
    ],
)
def test_impossible_settings_are_objections(changes, match):
    plan = SimpleNamespace(settings={"server.http": replace(LIMITS, **changes)})
    objections = list(plugin.core_check_plan(plan))
    assert len(objections) == (match is not None)
    assert all(match in text and "--set server.http." in text for text in objections)


def test_it_is_a_plugin():
    host = PluginHost.start([Selected("server.http", "test")])
    assert host.register_settings() == {"server.http": HttpSettings}
    [entry] = plugin.core_register_servers()
    assert entry.name == "http"
    assert isinstance(entry.factory(make_service(), []), HttpServer)


async def test_the_comparison_counts_what_it_sends(monkeypatch):
    monkeypatch.setattr(compare, "NUM_CHUNKS", 5)
    monkeypatch.setattr(compare, "PING_SECONDS", 0.05)
    async with serving(compare.Steps()) as (port, _):
        for path in (b"/stream", b"/paced"):
            load = await compare._load(psutil.Process(), port, path, 3)
            assert (load.num, len(load.latencies)) == (15, 3)
        load = await compare._load(psutil.Process(), port, b"/ping", 3)
        assert load.num == len(load.latencies) >= 3
        assert 0 < load.latency(0.0) <= load.latency(1.0)


def test_importing_it_is_cheap():
    code = "import sys, plugins.server.http as p; print({'starlette', 'uvicorn', 'torch'} & set(sys.modules))"
    result = subprocess.run(  # noqa: S603  our own code
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "set()"

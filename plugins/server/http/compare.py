"""Measures this listener beside others: `python -m plugins.server.http.compare [SERVER …]`.

The server is alone on one core and the client on another, so two cores must be free.  Streams go on
as an engine lets them: a step wakes every stream, and each sends one chunk.  On a machine that others
use too, what can be compared is the CPU time of the server.
"""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Final

import anyio
import psutil
import uvicorn

from plugins.server.http import HttpSettings
from plugins.server.http.app import HttpServer
from plugins.server.http.listener import BACKLOG, serve

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, MutableMapping

    from starlette.types import Receive, Scope, Send

CHUNK: Final = (
    b'data: {"id":"cmpl-1","choices":[{"index":0,"text":" token","finish_reason":null}]}'.ljust(
        118, b" "
    )
    + (b"\n\n")
)
END: Final = b"0\r\n\r\n"
NUM_STREAMS: Final = 256
NUM_CHUNKS: Final = 300
STEP_SECONDS: Final = 0.02
"""Pause between the steps of paced streams."""
NUM_ROUNDS: Final = 3
PING_SECONDS: Final = 2.0
HEAD: Final = """\
| server | CPU µs per chunk, 20 ms steps | chunks/s, no pause | per CPU s | first byte p50 / p99, ms | `/ping` per CPU s |
|---|--:|--:|--:|--:|--:|"""


# --- the server's side -----------------------------------------------------------------------------


class Steps:
    """An application: `/ping`, and streams that go on together, `/paced` or as fast as they can."""

    def __init__(self) -> None:
        self._waiting: list[asyncio.Future[None]] = []

    async def __call__(self, scope: Scope, _receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["path"] == "/ping":
            await send(_start((b"content-length", b"2")))
            await send(_body(b"ok", more=False))
            return
        await send(_start((b"content-type", b"text/event-stream")))
        for _ in range(NUM_CHUNKS):
            await self._next_step(is_paced=scope["path"] == "/paced")
            await send(_body(CHUNK))
        await send(_body(b"", more=False))

    def _next_step(self, *, is_paced: bool) -> asyncio.Future[None]:
        loop = asyncio.get_running_loop()
        if not self._waiting:
            loop.call_later(STEP_SECONDS if is_paced else 0, self._step)
        self._waiting.append(loop.create_future())
        return self._waiting[-1]

    def _step(self) -> None:
        woken, self._waiting = self._waiting, []
        for future in woken:
            if not future.done():
                future.set_result(None)


def _start(*headers: tuple[bytes, bytes]) -> MutableMapping[str, Any]:
    return {"type": "http.response.start", "status": 200, "headers": list(headers)}


def _body(body: bytes, *, more: bool = True) -> MutableMapping[str, Any]:
    return {"type": "http.response.body", "body": body, "more_body": more}


async def _serve_listener(sock: socket.socket) -> None:
    await serve(Steps(), sock, HttpSettings(), stop=anyio.Event(), grace=1.0)


async def _serve_guarded(sock: socket.socket) -> None:
    server = HttpServer([], frozenset(), ["key"], HttpSettings())
    server._router = Steps()  # type: ignore[assignment]  # noqa: SLF001  behind all guards
    await server.serve(sock, anyio.Event(), 1.0)


async def _serve_uvicorn(sock: socket.socket, http: Any) -> None:
    config = uvicorn.Config(
        Steps(), http=http, ws="none", lifespan="off", log_config=None, access_log=False
    )
    await uvicorn.Server(config).serve([sock])


async def _serve_granian(sock: socket.socket) -> None:
    server = import_module("granian.server.embed").Server(
        Steps(), interface="asginl", http="1", websockets=False, log_enabled=False, backpressure=BACKLOG
    )
    holder = import_module("granian._granian").SocketHolder(sock.fileno(), False, BACKLOG)
    server._init_shared_socket = lambda: setattr(server, "_shd", holder)  # noqa: SLF001  no public way
    await server.serve()


SERVERS: Final[dict[str, Callable[[socket.socket], Coroutine[Any, Any, None]]]] = {
    "server.http": _serve_guarded,
    "its listener alone": _serve_listener,
    "uvicorn httptools": lambda sock: _serve_uvicorn(sock, "httptools"),
    "uvicorn h11": lambda sock: _serve_uvicorn(sock, "h11"),
    "granian": _serve_granian,
}


def _be_server(name: str, fd: int) -> None:
    sock = socket.socket(fileno=fd)
    sock.setblocking(False)
    anyio.run(SERVERS[name], sock, backend_options={"use_uvloop": True})


# --- the client's side -----------------------------------------------------------------------------


class _Client(asyncio.Protocol):
    """Reads one answer after another as long as `goes_on`; counts answers, bytes and latencies."""

    def __init__(self, path: bytes, end: bytes, goes_on: Callable[[], bool]) -> None:
        self._request = b"GET %b HTTP/1.1\r\nHost: a\r\nx-api-key: key\r\n\r\n" % path
        self._end = end
        self._goes_on = goes_on
        self._begin = 0.0
        self._is_waiting = False
        self.num_chunks = 0
        self.latencies: list[float] = []
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport
        self._tail = b""
        self._send()

    def _send(self) -> None:
        self._begin = time.perf_counter()
        self._is_waiting = True
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        if self._is_waiting:
            self.latencies.append(time.perf_counter() - self._begin)
            self._is_waiting = False
        data = self._tail + data
        self.num_chunks += data.count(b"data: ")
        self._tail = data[-len(END) :]
        if not data.endswith(self._end):
            return
        if self._goes_on():
            self._send()
        else:
            self._transport.close()
            self.done.set_result(None)


def _same(client: _Client) -> _Client:
    return client


@dataclass(frozen=True, slots=True)
class Load:
    """What one load did."""

    num: int
    wall_seconds: float
    cpu_seconds: float
    latencies: list[float]

    @property
    def per_second(self) -> float:
        """Chunks or answers per second."""
        return self.num / self.wall_seconds

    @property
    def per_cpu_second(self) -> float:
        """The same per second of the server's CPU time."""
        return self.num / max(self.cpu_seconds, 0.01)

    def latency(self, share: float) -> float:
        """Milliseconds until the first byte, of which `share` of the requests needed no more."""
        return 1e3 * sorted(self.latencies)[int(share * (len(self.latencies) - 1))]


async def _load(process: psutil.Process, port: int, path: bytes, num_clients: int) -> Load:
    is_stream = path != b"/ping"
    until = time.perf_counter() + PING_SECONDS
    loop = asyncio.get_running_loop()
    cpu, begin = sum(process.cpu_times()[:2]), time.perf_counter()
    clients = [
        _Client(
            path, END if is_stream else b"ok", lambda: not is_stream and time.perf_counter() < until
        )
        for _ in range(num_clients)
    ]
    for client in clients:
        await loop.create_connection(partial(_same, client), "127.0.0.1", port)
    await asyncio.gather(*(client.done for client in clients))
    latencies = [latency for client in clients for latency in client.latencies]
    num = sum(client.num_chunks for client in clients) if is_stream else len(latencies)
    return Load(num, time.perf_counter() - begin, sum(process.cpu_times()[:2]) - cpu, latencies)


async def _measure(process: psutil.Process, port: int) -> str:
    best = {}
    for path, num_clients in ((b"/paced", NUM_STREAMS), (b"/stream", NUM_STREAMS), (b"/ping", 64)):
        loads = [await _load(process, port, path, num_clients) for _ in range(NUM_ROUNDS)]
        best[path] = max(loads, key=lambda load: load.per_cpu_second)
    paced, stream, ping = best.values()
    cells = (
        f"{1e6 / paced.per_cpu_second:.1f}",
        f"{stream.per_second:,.0f}",
        f"{stream.per_cpu_second:,.0f}",
        f"{stream.latency(0.5):.0f} / {stream.latency(0.99):.0f}",
        f"{ping.per_cpu_second:,.0f}",
    )
    return " | ".join(cells)


def main() -> None:
    """Measure and print a row for each server."""
    cores = sorted(os.sched_getaffinity(0))
    names = sys.argv[1:] or [name for name in SERVERS if name != "granian" or find_spec("granian")]
    print(HEAD)  # noqa: T201
    for name in names:
        with socket.create_server(("127.0.0.1", 0), backlog=2048) as sock:
            sock.set_inheritable(True)
            command = [sys.executable, "-m", __spec__.name, "--serve", name, str(sock.fileno())]
            server = subprocess.Popen(command, pass_fds=[sock.fileno()])  # noqa: S603  this module
            try:
                process = psutil.Process(server.pid)
                process.cpu_affinity(cores[:1])
                os.sched_setaffinity(0, cores[1:2] or cores)
                row = anyio.run(
                    _measure, process, sock.getsockname()[1], backend_options={"use_uvloop": True}
                )
                print(f"| {name} | {row} |", flush=True)  # noqa: T201
            finally:
                server.kill()
                server.wait()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        _be_server(sys.argv[2], int(sys.argv[3]))
    else:
        main()

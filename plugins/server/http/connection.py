"""One connection: uvicorn's HTTP/1.1 protocol over llhttp, with the limits and times that it lacks.

Two rules hold whatever a client does.  The parser never keeps more than `max_header_bytes` (and
what one read brings) without telling of it, and a connection without an open request always has a
timer that ends it.
"""

from __future__ import annotations

import asyncio
import enum
import functools
import logging
from collections import deque
from email.utils import formatdate
from time import time
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import unquote

import httptools
import structlog
from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)
from uvicorn.server import ServerState

from core.http_errors import error_body

if TYPE_CHECKING:
    from collections.abc import Callable

    from uvicorn import Config
    from uvicorn._types import ASGI3Application

    from plugins.server.http import HttpSettings

MAX_PIPELINED: Final = 16
"""Most requests of one connection that may be open or wait for the one before them."""
LINGER_SECONDS: Final = 2.0
"""How long a refused client may go on sending, so that it reads the answer before a reset."""

log = structlog.get_logger(__name__)


class Connections(ServerState):
    """The open connections of one listener, and the tasks that answer on them."""

    def __init__(self) -> None:
        super().__init__()
        self.is_stopping = False
        self.all_closed = asyncio.Event()
        """Set whenever the last open connection closes."""


class _Phase(enum.Enum):
    """What the parser expects next."""

    START = enum.auto()
    HEAD = enum.auto()
    BODY = enum.auto()


class _RefusedError(Exception):
    """Unwinds the parser, which knows errors of its own only."""


class Exchange(RequestResponseCycle):
    """A request and its response.

    :param close: closes the connection.
    """

    def __init__(self, close: Callable[[], None], **request: Any) -> None:
        super().__init__(**request)
        self._close = close

    async def run_asgi(self, app: ASGI3Application) -> None:
        """Let the application answer; a response that it does not finish is cut off, not ended."""
        try:
            await app(self.scope, self.receive, self.send)
        except Exception:
            log.exception("the application raised", path=self.scope["path"])
        if self.response_complete or self.disconnected:
            return
        if self.response_started:
            self._close()
        else:
            await self.send_500_response()

    async def send_500_response(self) -> None:
        """Answer in place of the application."""
        body = error_body(500, "the server failed to answer this request")
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        await self.send({"type": "http.response.start", "status": 500, "headers": headers})
        await self.send({"type": "http.response.body", "body": body, "more_body": False})

    def leave(self) -> None:
        """Tell the application that its client is gone, or was refused: nothing more can be written."""
        self.disconnected = True
        self.waiting_for_100_continue = False
        self.message_event.set()


class Connection(HttpToolsProtocol):
    """What a client sends, as requests for an application.

    :param config: has the application.
    :param connections: where this one is entered while it is open.
    :param settings: limits and timeouts.
    """

    server_state: Connections

    def __init__(self, config: Config, connections: Connections, settings: HttpSettings) -> None:
        super().__init__(config, connections, {})
        self._settings = settings
        self.timeout_keep_alive = settings.keep_alive  # type: ignore[assignment]  # any number will do
        self._access_log = logging.getLogger("uvicorn.access")
        self._phase = _Phase.START
        self._exchanges: deque[Exchange] = deque()
        """Those that are not answered: the first one runs, the others wait."""
        self._num_head_bytes = 0
        self._num_headers = 0
        self._num_silent_bytes = 0
        """Bytes that the parser took since it last told of anything."""
        self._refusal = (400, "this is not a valid HTTP/1.1 request")
        self._is_refused = False
        self._timer: asyncio.TimerHandle | None = None
        self._send_timer: asyncio.TimerHandle | None = None
        self.parser = _make_parser(self)

    # --- transport ---

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the timer for the first request."""
        super().connection_made(transport)
        if self.server_state.is_stopping:
            self._close()
        self._ensure_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell the applications of all open requests."""
        for exchange in self._exchanges:
            exchange.leave()
        self._exchanges.clear()
        self.pipeline.clear()
        self._stop_timer()
        self.resume_writing()
        super().connection_lost(exc)
        self._unset_keepalive_if_required()
        if not self.connections:
            self.server_state.all_closed.set()

    def eof_received(self) -> None:
        """End open requests: whoever closes its side is gone, and half-closed looks the same."""
        if self._exchanges:
            self.transport.abort()

    def pause_writing(self) -> None:
        """Make `send` wait, but not for ever."""
        super().pause_writing()
        self._send_timer = self.loop.call_later(self._settings.send_timeout, self.transport.abort)

    def resume_writing(self) -> None:
        """Let `send` go on."""
        if self._send_timer is not None:
            self._send_timer.cancel()
            self._send_timer = None
        super().resume_writing()

    def data_received(self, data: bytes) -> None:
        """Parse what has come, and answer what cannot be parsed."""
        if self._is_refused:
            return
        self._unset_keepalive_if_required()
        self._num_silent_bytes += len(data)
        try:
            self._feed(data)
            if self._num_silent_bytes > self._settings.max_header_bytes:
                self._raise_too_long()
        except (httptools.HttpParserError, _RefusedError):
            self._refuse(*self._refusal)
        else:
            self._ensure_timer()

    def _feed(self, data: bytes) -> None:
        """Parse; where a client offers another protocol, go on as if it had not.

        The parser takes all that follows such an offer for the other protocol.  But the body of the
        request follows, and Java's HTTP client makes the offer with every first request.
        """
        while True:
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as upgrade:
                if self.parser.get_method() == b"CONNECT":
                    self._raise(400, "this server is no proxy")
                data = self._head_without_upgrade() + data[upgrade.args[0] :]
                self.parser = _make_parser(self)
            else:
                return

    def _head_without_upgrade(self) -> bytes:
        version = self.parser.get_http_version().encode()
        lines = [b"%b: %b\r\n" % header for header in self.headers if header[0] != b"upgrade"]
        start = b"%b %b HTTP/%b\r\n" % (self.parser.get_method(), self.url, version)
        return b"".join((start, *lines, b"\r\n"))

    # --- parser ---

    def on_message_begin(self) -> None:
        """Start to count the head of a request."""
        super().on_message_begin()
        self._phase = _Phase.HEAD
        self._num_head_bytes = self._num_headers = self._num_silent_bytes = 0
        self._stop_timer()

    def on_url(self, url: bytes) -> None:
        """Take a part of the target."""
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header.  Those that follow the body are dropped: nobody has checked them."""
        self._count(len(name) + len(value) + len(b": \r\n"))
        self._num_headers += 1
        limit = self._settings.max_headers
        if self._num_headers > limit:
            knob = "--set server.http.max_headers"
            self._raise(431, f"the request has more than {limit} headers, the limit of {knob}")
        if self._phase is _Phase.HEAD:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Start the application, or let the request wait for the one before it."""
        if self.parser.should_upgrade():
            return  # `_feed` starts over
        self._phase = _Phase.BODY
        self._stop_timer()
        if len(self._exchanges) >= MAX_PIPELINED:
            self._raise(400, f"more than {MAX_PIPELINED} requests were sent ahead of their answers")
        self._complete_scope()
        self.cycle = exchange = self._make_exchange()
        self._exchanges.append(exchange)
        if len(self._exchanges) == 1:
            self._start_asgi_task(exchange, self.app)
        else:
            self.flow.pause_reading()
            self.pipeline.appendleft((exchange, self.app))

    def _complete_scope(self) -> None:
        url = httptools.parse_url(self.url)
        if not url.path:
            self._raise(400, "the target of the request has no path")
        path = url.path.decode("ascii")
        self.scope["method"] = self.parser.get_method().decode("ascii")
        self.scope["http_version"] = self.parser.get_http_version()
        self.scope["path"] = unquote(path) if "%" in path else path
        self.scope["raw_path"] = url.path
        self.scope["query_string"] = url.query or b""

    def _make_exchange(self) -> Exchange:
        return Exchange(
            self._close,
            scope=self.scope,
            transport=self.transport,
            flow=self.flow,
            logger=self.logger,
            access_logger=self._access_log,
            access_log=False,
            default_headers=_date_headers(int(time())),
            message_event=asyncio.Event(),
            expect_100_continue=self.expect_100_continue,
            keep_alive=self.scope["http_version"] != "1.0" and self.parser.should_keep_alive(),
            on_response=self.on_response_complete,
        )

    def on_body(self, body: bytes) -> None:
        """Take a part of the body."""
        self._num_silent_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Wait for the next request."""
        if self.parser.should_upgrade():
            return
        super().on_message_complete()
        self._phase = _Phase.START

    def on_response_complete(self) -> None:
        """Go on with the request that waits, if any."""
        self._exchanges.popleft()
        super().on_response_complete()
        if self.transport.is_closing():
            self._close()

    # --- limits ---

    def _count(self, num_bytes: int) -> None:
        self._num_silent_bytes = 0
        self._num_head_bytes += num_bytes
        if self._num_head_bytes > self._settings.max_header_bytes:
            self._raise_too_long()

    def _raise_too_long(self) -> None:
        limit, knob = self._settings.max_header_bytes, "--set server.http.max_header_bytes"
        self._raise(431, f"request line and headers exceed {limit} bytes, the limit of {knob}")

    def _raise(self, status: int, message: str) -> None:
        self._refusal = status, message
        raise _RefusedError(message)

    def _refuse(self, status: int, message: str) -> None:
        """Answer in place of the application, if that is still possible, and read no further."""
        if self.transport.is_closing():
            return
        running = self._exchanges[0] if self._exchanges else None
        if len(self._exchanges) > 1 or (running is not None and running.response_started):
            self.transport.abort()
            return
        if running is not None:
            running.leave()
            self._exchanges.clear()
        self._is_refused = True
        self.transport.write(_make_refusal(status, message))
        self.transport.write_eof()
        self._start_timer(LINGER_SECONDS, self.transport.abort)

    def _ensure_timer(self) -> None:
        """Start the timer for a head, unless something else ends this connection in time."""
        has_timer = self._timer is not None or self.timeout_keep_alive_task is not None
        if not (has_timer or self._exchanges):
            self._start_timer(self._settings.header_timeout, self._time_out)

    def _time_out(self) -> None:
        seconds, knob = self._settings.header_timeout, "--set server.http.header_timeout"
        if self._phase is _Phase.HEAD:
            message = f"request line and headers took longer than {seconds} s, the limit of {knob}"
            self._refuse(408, message)
        else:
            self._close()

    def timeout_keep_alive_handler(self) -> None:
        """Close a connection on which no further request has come."""
        self._close()

    def _close(self) -> None:
        """Close once all is sent, which may take a slow reader only so long."""
        self.transport.close()
        self._start_timer(self._settings.send_timeout, self.transport.abort)

    def _start_timer(self, seconds: float, callback: Callable[[], None]) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(seconds, callback)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _make_parser(protocol: Connection) -> Any:
    parser = httptools.HttpRequestParser(protocol)
    # A client that says `Connection: close` and goes on sending still gets its answer.
    parser.set_dangerous_leniencies(lenient_data_after_close=True)
    return parser


def _make_refusal(status: int, message: str) -> bytes:
    body = error_body(status, message)
    [(_, date)] = _date_headers(int(time()))
    return (
        b"%bdate: %b\r\ncontent-type: application/json\r\ncontent-length: %d\r\n"
        b"connection: close\r\n\r\n%b" % (STATUS_LINE[status], date, len(body), body)
    )


@functools.lru_cache(maxsize=1)
def _date_headers(second: int) -> list[tuple[bytes, bytes]]:
    return [(b"date", formatdate(second, usegmt=True).encode())]

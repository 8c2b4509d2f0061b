"""Server-sent events: one response whose body comes in pieces."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

import anyio
import msgspec
from starlette.requests import ClientDisconnect

if TYPE_CHECKING:
    from starlette.types import Send

HEADERS: Final = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
DONE: Final = b"data: [DONE]\n\n"
PING: Final = b": ping\n\n"
HOLE: Final = "\0"
"""The text that a `Template` leaves open."""

encode: Final = msgspec.json.Encoder().encode


def event(data: bytes) -> bytes:
    """Frame one JSON text, which holds no line break."""
    return b"data: " + data + b"\n\n"


class Template:
    """An event of which only one text changes: all else is encoded once.

    :param chunk: holds `HOLE` in one place.
    """

    def __init__(self, chunk: msgspec.Struct) -> None:
        self._before, self._after = event(encode(chunk)).split(encode(HOLE))

    def fill(self, text: str) -> bytes:
        """Make the event of one text."""
        return b"".join((self._before, encode(text), self._after))


class EventStream:
    """Writes events to one client.  The response starts with the first of them.

    :param ping_interval: seconds of silence after which a comment is sent, so that no proxy takes
        the connection for dead.
    :param write_timeout: seconds that a client may take to make room for one write.
    """

    def __init__(self, send: Send, *, ping_interval: float, write_timeout: float) -> None:
        self.is_started = False
        """Whether a status has been sent, so that an error can only be told as an event."""
        self._send = send
        self._ping_interval = ping_interval
        self._write_timeout = write_timeout
        self._is_writing = False
        self._since = time.monotonic()  # when the last write began, or ended
        self._ended: anyio.Event | None = None  # set for those who wait for a write to end

    async def write(self, data: bytes, *, is_last: bool = False) -> None:
        """Send events, whole ones.

        :raises ClientDisconnect: nobody listens any more.
        """
        while self._is_writing:  # a lock would cost more than all else that is done for a token
            self._ended = self._ended or anyio.Event()
            await self._ended.wait()
        self._is_writing, self._since = True, time.monotonic()
        try:
            if not self.is_started:
                self.is_started = True
                await self._send({"type": "http.response.start", "status": 200, "headers": HEADERS})
            await self._send({"type": "http.response.body", "body": data, "more_body": not is_last})
        except OSError:
            raise ClientDisconnect from None
        finally:
            self._is_writing, self._since = False, time.monotonic()
            if self._ended is not None:
                self._ended.set()
                self._ended = None

    async def keep_alive(self) -> None:
        """Send a comment whenever nothing else is sent; return once a write has taken too long."""
        while True:
            limit = self._write_timeout if self._is_writing else self._ping_interval
            rest = self._since + limit - time.monotonic()
            if rest > 0:
                await anyio.sleep(rest)
            elif self._is_writing or not await self._ping():
                return

    async def _ping(self) -> bool:
        with anyio.move_on_after(self._write_timeout):
            await self.write(PING)
            return True
        return False

"""A client of many streams at once that costs so little that it measures the server and not itself.

A general HTTP client spends more time on a token than a server does.  This one speaks HTTP/1.1 over
`asyncio` transports: llhttp splits the messages, and of each event only the fields that are counted are
decoded.  A connection carries one request after another.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

import httptools
import msgspec

from core.errors import ConfigError, CytheraError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from core.bench.serving_report import StreamRecord

    Sink = Callable[[bytes, float], None]

MAX_ERROR: Final = 500
"""Characters of a server's error that are kept."""
DONE: Final = b"[DONE]"
DEFAULT_PORTS: Final = {"http": 80, "https": 443}


class ServerGoneError(CytheraError):
    """The server cannot be reached, or broke a connection off."""


# --- events ----------------------------------------------------------------------------------------


class _Delta(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


class EventReader:
    """Reads the events of one stream, in whatever pieces they come, into a record.

    :param keep_text: whether the record gets the text of the answer.
    """

    __slots__ = ("_decode", "_keep_text", "_record", "_rest", "_texts", "is_done")

    def __init__(self, record: StreamRecord, *, keep_text: bool = False) -> None:
        self.is_done = False
        """Whether the server has said that the stream is complete."""
        self._record = record
        self._keep_text = keep_text
        self._rest = b""
        self._texts: list[str] = []
        self._decode = msgspec.json.Decoder(_Event).decode

    def feed(self, data: bytes, now: float) -> None:
        """Take the next bytes, which came at the time `now`.

        :raises msgspec.MsgspecError: an event is not what the API promises.
        """
        lines = (self._rest + data).split(b"\n")
        self._rest = lines.pop()
        for line in lines:
            if line.startswith(b"data:"):
                self._take(line[5:].strip(), now)

    def finish(self) -> None:
        """Note what only the whole stream tells."""
        record = self._record
        record.text = "".join(self._texts)
        if not record.error and not record.chunk_times:
            record.error = "the server ended the stream without any token"
        if not record.output_len:
            record.output_len = len(record.chunk_times)  # a server that tells no usage

    def _take(self, payload: bytes, now: float) -> None:
        if payload == DONE:
            self.is_done = True
            return
        event = self._decode(payload)
        if event.error is not None:
            self._record.error = str(event.error)[:MAX_ERROR]
        if event.choices:
            self._record.chunk_times.append(now)
            if self._keep_text:
                self._texts.append(_text_of(event.choices[0]))
        if event.usage is not None:
            self._record.output_len = event.usage.completion_tokens
            self._record.input_len = event.usage.prompt_tokens or self._record.input_len


def _text_of(choice: _Choice) -> str:
    return (choice.delta.content if choice.delta is not None else choice.text) or ""


# --- connections -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server is."""

    host: str
    port: int
    path: str
    """Prefix of all routes, without a slash at its end."""
    is_secure: bool

    @classmethod
    def parse(cls, url: str) -> Address:
        """Read a base URL such as `http://127.0.0.1:2242`.

        :raises ConfigError: it is none.
        """
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise ConfigError(f"--base-url {url!r}: {error}") from error
        if parts.scheme not in DEFAULT_PORTS or not parts.hostname:
            raise ConfigError(f"--base-url {url!r} must be such as http://127.0.0.1:2242")
        port = DEFAULT_PORTS[parts.scheme] if port is None else port
        return cls(parts.hostname, port, parts.path.rstrip("/"), parts.scheme == "https")

    @property
    def authority(self) -> str:
        """Value of the `Host` header."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class _Connection(asyncio.Protocol):
    """One connection, which carries one exchange at a time."""

    def __init__(self) -> None:
        self.is_open = False
        self.is_reusable = False
        self.has_received = False
        """Whether anything came in the exchange."""
        self._transport: asyncio.Transport
        self._parser: Any = None
        self._sink: Sink
        self._answer: asyncio.Future[int]
        self._now = 0.0

    def exchange(self, message: bytes, sink: Sink) -> asyncio.Future[int]:
        """Send one request; the future becomes the status once the whole answer is there.

        :param sink: is given each piece of the body with the time at which it came.
        """
        self._parser = httptools.HttpResponseParser(self)
        self._sink = sink
        self._answer = asyncio.get_running_loop().create_future()
        self.is_reusable = self.has_received = False
        self._transport.write(message)
        return self._answer

    def close(self) -> None:
        """Break off."""
        self._transport.abort()

    # Called by the transport.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = transport  # type: ignore[assignment]  # of a stream
        self.is_open = True

    def data_received(self, data: bytes) -> None:
        """Note when it came, then parse."""
        self._now = time.perf_counter()
        self.has_received = True
        try:
            self._parser.feed_data(data)
        except Exception as error:  # noqa: BLE001  what a server sends must not end the run
            self._fail(f"cannot read what the server sent: {error.__context__ or error}")
            self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """End an exchange that is not complete."""
        self.is_open = False
        self._fail(f"the server closed the connection: {exc or 'early'}")

    def _fail(self, message: str) -> None:
        if self._parser is not None and not self._answer.done():
            self._answer.set_exception(ServerGoneError(message))

    # Called by the parser.

    def on_body(self, body: bytes) -> None:
        """Hand on a piece."""
        self._sink(body, self._now)

    def on_message_complete(self) -> None:
        """End the exchange."""
        self.is_reusable = self._parser.should_keep_alive()
        status = self._parser.get_status_code()
        if not self._answer.done() and status >= 200:
            self._answer.set_result(status)


class StreamClient:
    """Posts requests to one route and reads their streams.

    :param address: of the server.
    :param endpoint: the route, such as `/v1/completions`.
    :param headers: sent with each request.
    """

    def __init__(
        self,
        address: Address,
        endpoint: str,
        *,
        headers: Mapping[str, str] | None = None,
        keep_text: bool = False,
        is_insecure: bool = False,
    ) -> None:
        self._address = address
        self._keep_text = keep_text
        self._ssl = _make_ssl(is_insecure) if address.is_secure else None
        self._idle: list[_Connection] = []
        lines = [
            f"POST {address.path}{endpoint} HTTP/1.1",
            f"Host: {address.authority}",
            "Content-Type: application/json",
            *(f"{name}: {value}" for name, value in (headers or {}).items()),
        ]
        if any("\n" in line or "\r" in line for line in lines):
            raise ConfigError("--endpoint, --header and the API key must each be one line")
        self._head = "\r\n".join(lines).encode()

    async def stream(self, body: bytes, record: StreamRecord) -> None:
        """Send one request and fill its record; what goes wrong becomes its `error`."""
        message = b"%b\r\nContent-Length: %d\r\n\r\n%b" % (self._head, len(body), body)
        reader, errors = EventReader(record, keep_text=self._keep_text), bytearray()
        # The time to connect is the server's too: it is what its clients wait for.
        record.start = time.perf_counter()

        def sink(data: bytes, now: float) -> None:
            if len(errors) < MAX_ERROR and not record.chunk_times:
                errors.extend(data)
            reader.feed(data, now)

        try:
            status = await self._exchange(message, sink)
            if status != 200:
                text = bytes(errors[:MAX_ERROR]).decode(errors="replace").strip()
                record.error = f"HTTP status {status}: {text}"
        except (OSError, ServerGoneError) as error:
            if not reader.is_done:  # else only a connection ended that was to end anyway
                record.error = str(error) or type(error).__name__
        reader.finish()

    async def _exchange(self, message: bytes, sink: Sink) -> int:
        """Send a message and return the status, over an idle connection if there is one."""
        while self._idle:
            connection = self._idle.pop()
            if not connection.is_open:
                continue
            try:
                return await self._exchange_over(connection, message, sink)
            except ServerGoneError:
                if connection.has_received:
                    raise
                # The server had given up the idle connection before the message came.
        loop, address = asyncio.get_running_loop(), self._address
        _, connection = await loop.create_connection(
            _Connection, address.host, address.port, ssl=self._ssl
        )
        return await self._exchange_over(connection, message, sink)

    async def _exchange_over(self, connection: _Connection, message: bytes, sink: Sink) -> int:
        try:
            return await connection.exchange(message, sink)
        finally:
            if connection.is_open and connection.is_reusable:
                self._idle.append(connection)
            elif connection.is_open:
                connection.close()

    def close(self) -> None:
        """Close all connections."""
        while self._idle:
            self._idle.pop().close()


def _make_ssl(is_insecure: bool) -> ssl.SSLContext:
    context = ssl.create_default_context()
    if is_insecure:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context

"""The routes of the playground: the page, its assets, and the feed of its live view."""

from __future__ import annotations

import math
import time
from importlib import resources
from typing import TYPE_CHECKING, Final

import anyio
import msgspec
from starlette.responses import Response
from starlette.routing import Route

from core.errors import NotReadyError
from core.http_errors import error_body
from core.interfaces import Frontend
from core.status import Phase
from plugins.frontend.playground.feed import EVENT_TYPES, Feed

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.types import ASGIApp, Receive, Scope, Send

    from core.service import Service
    from plugins.frontend.playground import PlaygroundSettings

PAGE: Final = "index.html"
ASSETS: Final = {
    "style.css": "text/css",
    "app.js": "text/javascript",
    "client.js": "text/javascript",
    "live.js": "text/javascript",
}
PREFIX: Final = "/playground/"
HEADERS: Final = {
    "cache-control": "no-cache",
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "cross-origin-opener-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}
"""Nothing but the page's own files runs, nothing is fetched from elsewhere, and no text can become
markup: browsers with trusted types refuse `innerHTML` and its like outright."""
FEED_HEADERS: Final = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",
}
INTERVAL: Final = 0.2
"""Least seconds between two messages of a feed."""
PING_INTERVAL: Final = 15.0
"""Seconds of silence after which a comment tells proxies that the connection is in use."""


def make_frontend(service: Service, settings: PlaygroundSettings) -> Frontend:
    """Read the files of the page and build its routes."""
    routes = [_make_file_route("/", PAGE, "text/html")]
    routes += [_make_file_route(PREFIX + name, name, media) for name, media in ASSETS.items()]
    open_paths = frozenset(route.path for route in routes)
    service.want(*EVENT_TYPES)
    feeds = Feeds(service, settings.max_feeds)
    return Frontend(
        routes=[*routes, Route(PREFIX + "events", feeds.answer, methods=["GET"])],
        open_paths=open_paths,
    )


def _make_file_route(path: str, name: str, media_type: str) -> Route:
    content = resources.files(__package__).joinpath("static", name).read_bytes()

    async def answer(_request: Request) -> Response:
        return Response(content, headers=HEADERS, media_type=media_type)

    return Route(path, answer, methods=["GET"])


class Feeds:
    """Answers `GET /playground/events`; knows how many feeds are open.

    :param max_open: most feeds at a time.
    """

    def __init__(self, service: Service, max_open: int) -> None:
        self._service = service
        self._max_open = max_open
        self._num_open = 0

    async def answer(self, request: Request) -> ASGIApp:
        """Open a feed: server-sent events, each a `Message` as JSON, until the client leaves."""
        try:
            self._service.check_ready()
        except NotReadyError as error:
            return _refuse(503, str(error), error.retry_after)
        if self._num_open >= self._max_open:
            knob = "--set frontend.playground.max_feeds"
            return _refuse(429, f"{self._num_open} live views are open, the limit of {knob}", 10.0)
        if request.method == "HEAD":
            return Response(headers=FEED_HEADERS)
        return self._serve

    async def _serve(self, _scope: Scope, receive: Receive, send: Send) -> None:
        self._num_open += 1
        try:
            headers = [(name.encode(), value.encode()) for name, value in FEED_HEADERS.items()]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            async with anyio.create_task_group() as group:
                group.start_soon(_wait_for_disconnect, receive, group.cancel_scope)
                await self._send_feed(send)
                await send(_make_body(b"", more=False))
                group.cancel_scope.cancel()
        except* (OSError, NotReadyError):
            pass  # a server may say by refusing to send that the client has left; or the engine has
        finally:
            self._num_open -= 1

    async def _send_feed(self, send: Send) -> None:
        """Send one feed until the engine stops serving."""
        feed = Feed()
        async with self._service.watch(*EVENT_TYPES) as events, anyio.create_task_group() as group:
            group.start_soon(self._send_messages, feed, send, group.cancel_scope)
            async for batch in events:
                now = time.monotonic()
                for event in batch.events:
                    feed.add(event, now)

    async def _send_messages(self, feed: Feed, send: Send, scope: anyio.CancelScope) -> None:
        sent_at = time.monotonic()
        while self._service.status.phase is Phase.READY:
            now = time.monotonic()
            message = feed.message(
                now, num_running=self._service.num_running, num_waiting=self._service.num_waiting
            )
            if message is not None or now - sent_at >= PING_INTERVAL:
                await send(_make_body(_encode(message)))
                sent_at = now
            await anyio.sleep(INTERVAL)
        scope.cancel()


async def _wait_for_disconnect(receive: Receive, scope: anyio.CancelScope) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    scope.cancel()


def _encode(message: msgspec.Struct | None) -> bytes:
    return b": ping\n\n" if message is None else b"data: " + msgspec.json.encode(message) + b"\n\n"


def _make_body(body: bytes, *, more: bool = True) -> dict[str, object]:
    return {"type": "http.response.body", "body": body, "more_body": more}


def _refuse(status: int, text: str, retry_after: float) -> Response:
    headers = {"retry-after": str(max(1, math.ceil(retry_after)))}
    return Response(error_body(status, text), status, headers, "application/json")

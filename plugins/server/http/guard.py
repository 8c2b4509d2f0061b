"""What every request passes before it reaches a route, outermost first; one class each, pure ASGI.

A guard refuses by raising Starlette's `HTTPException`, which `ErrorAnswers` turns into a response.
All but that one are plain functions that return the awaitable of what they guard, because every
coroutine that a stream is nested in is resumed for every token.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import uuid
from http import HTTPStatus
from typing import TYPE_CHECKING, Final, NoReturn

import anyio
import structlog
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from core.http_errors import error_body

if TYPE_CHECKING:
    from collections.abc import Awaitable, Iterator, Sequence

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

REQUEST_ID: Final = re.compile(rb"[\x21-\x7e]{1,128}")
"""Ids that are taken from clients: visible ASCII, short enough for logs and events."""
HOST: Final = re.compile(rb"[A-Za-z0-9_.~!$&'()*+;=%:\[\]-]*")
"""What a name, an address and a port are made of (RFC 3986, 3.2.2), without the comma of lists."""

log = structlog.get_logger("server.http")


class RequestId:
    """Gives each request an id, the client's if it is fit for it, and tells it in the answer.

    It is at `scope["state"]["request_id"]`, which is `request.state.request_id` in a route.  Whether
    the answer has begun is at `scope["state"]["is_answered"]`.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Serve one request.

        :raises NotImplementedError: this is no HTTP request.
        """
        if scope["type"] != "http":
            raise NotImplementedError(f"ASGI type {scope['type']!r}: only http is served")
        request_id = choose_request_id(next(values_of(scope, b"x-request-id"), b""))
        state = scope.setdefault("state", {})
        state |= {"request_id": request_id, "is_answered": False}
        header = (b"x-request-id", request_id.encode("ascii"))

        def send_with_id(message: Message) -> Awaitable[None]:
            if message["type"] == "http.response.start":
                state["is_answered"] = True
                message = {**message, "headers": [*message.get("headers", ()), header]}
            return send(message)

        return self._app(scope, receive, send_with_id)


class RootPath:
    """Takes the prefix away under which a proxy offers this server, unless the proxy did so."""

    def __init__(self, app: ASGIApp, root_path: str) -> None:
        self._app = app
        self._prefix = root_path

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Serve one request."""
        path: str = scope["path"]
        if self._prefix and path.startswith(f"{self._prefix}/"):
            scope["path"] = path.removeprefix(self._prefix)
        return self._app(scope, receive, send)


class ErrorAnswers:
    """Turns what is raised inside into an answer: refusals as they are, anything else as a 500.

    What nobody foresaw is logged once with the id of the request, and its text stays inside.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        try:
            await self._app(scope, receive, send)
        except Exception as error:  # noqa: BLE001  the last resort
            response = _answer_error(error, scope)
            is_answered = scope["state"]["is_answered"]
            if response is not None and not is_answered:  # else the listener cuts the answer off
                await response(scope, receive, send)


class HostCheck:
    """Refuses requests whose `Host` is no host: nothing behind here need fear what is in it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Serve one request."""
        hosts = list(values_of(scope, b"host"))
        if len(hosts) > 1 or (not hosts and scope["http_version"] != "1.0"):
            _refuse(400, f"the request has {len(hosts)} Host headers, but must have one")
        if hosts and not is_host(hosts[0]):
            _refuse(400, "the Host header of the request names no host")
        return self._app(scope, receive, send)


class ApiKeyCheck:
    """Lets in who sends one of the keys, as `Authorization: Bearer KEY` or `x-api-key: KEY`.

    What needs no key is listed; every other path needs one, whether there is such a route or not.

    :param keys: none means that nobody needs a key.
    :param open_paths: compared with the very path that is routed, character for character.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str], open_paths: frozenset[str]) -> None:
        self._app = app
        self._digests = tuple(hashlib.sha256(key.encode()).digest() for key in keys)
        self._open_paths = open_paths

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Serve one request."""
        if self._digests and scope["path"] not in self._open_paths:
            sent = list(credentials_of(scope))
            if not any([self._is_known(key) for key in sent]):  # noqa: C419  all, in constant time
                self._refuse(has_key=bool(sent))
        return self._app(scope, receive, send)

    def _is_known(self, key: bytes) -> bool:
        digest = hashlib.sha256(key).digest()
        return any([hmac.compare_digest(digest, known) for known in self._digests])  # noqa: C419  so here

    def _refuse(self, *, has_key: bool) -> NoReturn:
        problem = "the API key is not known here" if has_key else "this server wants an API key"
        how = "send one as Authorization: Bearer KEY or x-api-key: KEY"
        _refuse(401, f"{problem}; {how}", {"www-authenticate": "Bearer"})


class BodyLimit:
    """Refuses bodies that are too large, announced or not, and clients that pause within one.

    :param max_bytes: largest body.
    :param timeout: seconds that the next part of a body may take.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, timeout: float) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._timeout = timeout

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Serve one request."""
        for length in values_of(scope, b"content-length"):
            self._check(int(length) if length.isdigit() else 0)  # the parser knows what is a length
        num_bytes = 0
        has_more = True

        async def receive_checked() -> Message:
            nonlocal num_bytes, has_more
            if not has_more:  # then this waits for the client to leave
                return await receive()
            message = await self._receive_in_time(receive)
            num_bytes += len(message.get("body", b""))
            has_more = message.get("more_body", False)
            self._check(num_bytes)
            return message

        return self._app(scope, receive_checked, send)

    def _check(self, num_bytes: int) -> None:
        if num_bytes > self._max_bytes:
            knob = "--set server.http.max_body_bytes"
            _refuse(413, f"the body exceeds {self._max_bytes} bytes, the limit of {knob}")

    async def _receive_in_time(self, receive: Receive) -> Message:
        try:
            with anyio.fail_after(self._timeout):
                return await receive()
        except TimeoutError:
            knob = "--set server.http.body_timeout"
            _refuse(408, f"no more of the body came for {self._timeout} s, the limit of {knob}")


# --- what the guards decide ------------------------------------------------------------------------


def choose_request_id(sent: bytes) -> str:
    """Take the id that the client sent if it is fit for logs, else make one.

    :param sent: value of `X-Request-Id`, empty for none.
    """
    return sent.decode("ascii") if REQUEST_ID.fullmatch(sent) else uuid.uuid4().hex


def is_host(value: bytes) -> bool:
    """Whether a `Host` header holds nothing but a name or an address, and a port."""
    return HOST.fullmatch(value) is not None


def credentials_of(scope: Scope) -> Iterator[bytes]:
    """Find every API key that a request sends, wherever clients put them."""
    for value in values_of(scope, b"authorization"):
        scheme, _, key = value.partition(b" ")
        if scheme.lower() == b"bearer":
            yield key.strip()
    yield from values_of(scope, b"x-api-key")


def values_of(scope: Scope, name: bytes) -> Iterator[bytes]:
    """Values of all headers of that name, given in lower case."""
    return (value for key, value in scope["headers"] if key == name)


def _refuse(status: int, message: str, headers: dict[str, str] | None = None) -> NoReturn:
    raise HTTPException(status, message, headers)


# --- answers to errors -----------------------------------------------------------------------------


def _answer_error(error: Exception, scope: Scope) -> Response | None:
    """Make the answer to an error; `None` if there is nobody to answer."""
    cause = _find_cause(error)
    if isinstance(cause, ClientDisconnect):
        return None
    if isinstance(cause, HTTPException):
        message = _explain(cause, scope)
        body = error_body(cause.status_code, message)
        return Response(body, cause.status_code, cause.headers, "application/json")
    log.error(
        "request failed",
        request_id=scope["state"]["request_id"],
        method=scope["method"],
        path=scope["path"],
        exc_info=error,
    )
    body = error_body(500, "the server failed to answer this request; its log says why")
    return Response(body, 500, media_type="application/json")


def _find_cause(error: Exception) -> Exception:
    """Look into groups of errors for one that explains them all."""
    while isinstance(error, ExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


def _explain(error: HTTPException, scope: Scope) -> str:
    """Say what is wrong, also for the errors of the router, which only say what they are called."""
    if error.status_code == HTTPStatus.NOT_FOUND and error.detail == HTTPStatus.NOT_FOUND.phrase:
        return f"there is nothing at {scope['path'][:200]!r}"
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        return f"{scope['method']} is not allowed at {scope['path'][:200]!r}"
    return error.detail

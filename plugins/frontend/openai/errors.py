"""Errors as clients see them: the one place that turns an exception into a status and a body."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from starlette.responses import Response

from core.errors import (
    CytheraError,
    DeadlineExceededError,
    EngineDeadError,
    ModelNotFoundError,
    NotReadyError,
    OverloadedError,
    RequestError,
    RequestTooLargeError,
)
from core.http_errors import error_body
from core.request import FinishReason
from core.status import Phase

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from starlette.requests import Request

    from core.outputs import RequestOutput
    from core.service import Service


class GenerationError(CytheraError):
    """The engine could not finish this request, though it goes on with others."""


class NoSuchRequestError(CytheraError):
    """No open request has that id."""


RULES: Final[tuple[tuple[type[CytheraError], int, str | None], ...]] = (
    (ModelNotFoundError, 404, "model_not_found"),
    (RequestTooLargeError, 400, "context_length_exceeded"),
    (RequestError, 400, None),
    (NoSuchRequestError, 404, None),
    (NotReadyError, 503, None),
    (OverloadedError, 429, None),
    (DeadlineExceededError, 408, None),
    (EngineDeadError, 500, None),
    (GenerationError, 500, None),
)
"""Status and code of each kind of error; the first that fits counts."""


@dataclass(frozen=True, slots=True)
class Failure:
    """An answer that is no success."""

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    def body(self) -> bytes:
        """Write it as JSON."""
        return error_body(self.status, self.message, param=self.param, code=self.code)

    def response(self) -> Response:
        """Make the response of it."""
        return Response(self.body(), self.status, self.headers, "application/json")


def describe(error: Exception) -> Failure | None:
    """Turn an exception into what the client is told.

    :return: `None` for an error that nobody foresaw, whose text is not for clients.
    """
    for kind, status, code in RULES:
        if isinstance(error, kind):
            param = error.field or None if isinstance(error, RequestError) else None
            return Failure(status, str(error), param, code, _headers(error))
    return None


def _headers(error: Exception) -> dict[str, str]:
    """Say whether and when to come back, in the words that clients read."""
    if isinstance(error, DeadlineExceededError):
        return {"x-should-retry": "false"}
    if isinstance(error, NotReadyError | OverloadedError):
        seconds = error.retry_after
        return {
            "retry-after": str(max(1, math.ceil(seconds))),
            "retry-after-ms": str(max(1, math.ceil(seconds * 1000))),
        }
    return {}


def raise_for_error(service: Service, output: RequestOutput) -> None:
    """Raise what ended a request, unless it ended well or on the wish of its client."""
    if not output.finished or not output.error:
        return
    if all(completion.finish_reason != FinishReason.ABORT for completion in output.outputs):
        raise GenerationError(output.error)
    if service.status.phase is Phase.DRAINING:  # cut off, and welcome to try another server
        raise NotReadyError(output.error)
    raise DeadlineExceededError(output.error)


@contextlib.contextmanager
def refusing(service: Service, request_id: str) -> Iterator[None]:
    """Report whatever turns a request away in this block, before it goes on to the client."""
    try:
        yield
    except Exception as error:
        service.refuse(request_id, error)
        raise


def answering(
    endpoint: Callable[[Request], Awaitable[Response]],
) -> Callable[[Request], Awaitable[Response]]:
    """Make an endpoint answer with the errors that clients are told of, instead of raising them."""

    async def answer(request: Request) -> Response:
        try:
            return await endpoint(request)
        except CytheraError as error:
            failure = describe(error)
            if failure is None:
                raise
            return failure.response()

    return answer

"""The body of every HTTP answer that is no success, in the shape that OpenAI's clients read.

Front ends and servers share it, so that a client sees one shape whoever turned its request away.
"""

from __future__ import annotations

import http
from typing import Final

import msgspec

ERROR_TYPES: Final = {
    400: "BadRequestError",
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    408: "RequestTimeoutError",
    409: "ConflictError",
    413: "ContentTooLargeError",
    422: "UnprocessableEntityError",
    429: "RateLimitError",
    431: "HeadersTooLargeError",
    500: "InternalServerError",
    501: "NotImplementedError",
    503: "ServiceUnavailableError",
}
"""Names of errors by status; others are called by the phrase that HTTP has for them."""


class ErrorDetail(msgspec.Struct, frozen=True):
    """What went wrong."""

    message: str
    type: str
    param: str | None = None
    """Dotted name of the field of the request that is wrong."""
    code: str | None = None
    """A word for programs to look at, where the status alone does not say enough."""


class ErrorAnswer(msgspec.Struct, frozen=True):
    """The body of an answer that is no success."""

    error: ErrorDetail


def error_body(
    status: int,
    message: str,
    *,
    param: str | None = None,
    type: str | None = None,  # noqa: A002  the field is called so
    code: str | None = None,
) -> bytes:
    """Write the JSON body of an error.

    :param status: HTTP status that the body goes with, 400 to 599.
    :param message: for people; must hold nothing about the inside of the server.
    :param param: dotted name of the field that is wrong.
    :param type: name of the error; by default the one of its status.
    :param code: a word for programs.
    :raises ValueError: HTTP knows no such status, and `type` is not given.
    """
    name = type or ERROR_TYPES.get(status) or http.HTTPStatus(status).phrase
    return msgspec.json.encode(ErrorAnswer(ErrorDetail(message, name, param, code)))

"""What the routes add to `/openapi.json`: every path, every status and the schemas of all bodies."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final

import msgspec

from core.http_errors import ErrorAnswer
from plugins.frontend.openai.types import (
    CancelAnswer,
    ChatAnswer,
    ChatChunk,
    ChatRequest,
    CompletionAnswer,
    CompletionRequest,
    DetokenizeAnswer,
    DetokenizeRequest,
    ModelCard,
    ModelList,
    TokenizeAnswer,
    TokenizeRequest,
    TokenizerInfo,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

Kind = type[msgspec.Struct]
REF: Final = "#/components/schemas/{name}"
GENERATING: Final = (400, 404, 408, 429, 500, 503)
"""Statuses of errors of the routes that generate."""
BY_SERVER: Final = (401, 413, 431, 500)
"""Statuses of errors of any route: whatever carries the routes may answer with them."""
RETRY_HEADERS: Final = {
    "retry-after": {"schema": {"type": "integer"}, "description": "Seconds to wait."},
    "retry-after-ms": {"schema": {"type": "integer"}, "description": "Milliseconds to wait."},
}


@dataclass(frozen=True, slots=True)
class Operation:
    """One route, as its documentation needs it."""

    method: str
    path: str
    summary: str
    answer: Kind
    body: Kind | None = None
    chunk: Kind | None = None
    """What the events of a stream hold, for a route that can stream."""
    errors: tuple[int, ...] = ()


OPERATIONS: Final = (
    Operation(
        "post",
        "/v1/chat/completions",
        "Continue a conversation.",
        ChatAnswer,
        ChatRequest,
        ChatChunk,
        GENERATING,
    ),
    Operation(
        "post",
        "/v1/completions",
        "Continue texts or token ids.",
        CompletionAnswer,
        CompletionRequest,
        CompletionAnswer,
        GENERATING,
    ),
    Operation("get", "/v1/models", "List the names that the model is served by.", ModelList),
    Operation("get", "/v1/models/{id}", "Describe the model.", ModelCard, errors=(404,)),
    Operation(
        "post",
        "/v1/requests/{id}/cancel",
        "End an open request; its client gets what there is.",
        CancelAnswer,
        errors=(404,),
    ),
    *(
        operation
        for prefix in ("", "/v1")
        for operation in (
            Operation(
                "post",
                f"{prefix}/tokenize",
                "Encode a text or a conversation, as the generating routes do.",
                TokenizeAnswer,
                TokenizeRequest,
                errors=(400, 404, 503),
            ),
            Operation(
                "post",
                f"{prefix}/detokenize",
                "Decode token ids.",
                DetokenizeAnswer,
                DetokenizeRequest,
                errors=(400, 404, 503),
            ),
            Operation(
                "get",
                f"{prefix}/tokenizer_info",
                "Describe the tokenizer.",
                TokenizerInfo,
                errors=(400, 503),
            ),
        )
    ),
)


@cache
def make_openapi() -> dict[str, Any]:
    """Make the fragment; do not change it."""
    kinds: list[Kind] = [ErrorAnswer, *_kinds()]
    refs, schemas = msgspec.json.schema_components(kinds, ref_template=REF)
    ref_of = dict(zip(kinds, refs, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for operation in OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method] = _describe(operation, ref_of)
    return {"paths": paths, "components": {"schemas": schemas}}


def _kinds() -> Iterable[Kind]:
    kinds = [(each.answer, each.body, each.chunk) for each in OPERATIONS]
    return dict.fromkeys(kind for row in kinds for kind in row if kind is not None)


def _describe(operation: Operation, ref_of: dict[Kind, Any]) -> dict[str, Any]:
    content = {"application/json": {"schema": ref_of[operation.answer]}}
    if operation.chunk is not None:
        text = "Events `data: …`, each one a chunk of this schema, the last one `data: [DONE]`."
        content["text/event-stream"] = {
            "schema": {"type": "string", "description": text, "x-event": ref_of[operation.chunk]}
        }
    responses: dict[str, Any] = {"200": {"description": "Success.", "content": content}}
    for status in sorted({*operation.errors, *BY_SERVER}):
        responses[str(status)] = _describe_error(status, ref_of[ErrorAnswer])
    described: dict[str, Any] = {
        "operationId": f"{operation.method}{operation.path.replace('/', '_').translate(_BRACES)}",
        "summary": operation.summary,
        "responses": responses,
    }
    if "{id}" in operation.path:
        described["parameters"] = [
            {"name": "id", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        ]
    if operation.body is not None:
        described["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": ref_of[operation.body]}},
        }
    return described


_BRACES: Final = str.maketrans("", "", "{}")


def _describe_error(status: int, ref: Any) -> dict[str, Any]:
    described = {
        "description": HTTPStatus(status).phrase,
        "content": {"application/json": {"schema": ref}},
    }
    return described | {"headers": RETRY_HEADERS} if status in (429, 503) else described

"""Routes about the server itself, for orchestrators and balancers; they answer in every phase."""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Final

import msgspec
from starlette.responses import Response
from starlette.routing import Route

from core.http_errors import error_body
from core.interfaces import Frontend
from core.status import Phase

if TYPE_CHECKING:
    from starlette.requests import Request

    from core.service import Service

DEAD: Final = frozenset({Phase.FAILED, Phase.STOPPED})
RETRY_AFTER: Final = {"retry-after": "2"}


class Readiness(msgspec.Struct, frozen=True):
    """The body of `/readyz`."""

    phase: Phase
    percent: int
    """How much of the phase is done."""
    error: str = ""
    """Why the server is not ready, where the phase does not say it."""


class Version(msgspec.Struct, frozen=True):
    """The body of `/version`."""

    version: str


class Load(msgspec.Struct, frozen=True):
    """The body of `/load`."""

    server_load: int
    """Requests that were let in and have not ended."""


def make_health(service: Service, stall_timeout: float) -> Frontend:
    """Make the routes; those that orchestrators ask need no key.

    :param stall_timeout: seconds without a step, while there is work, after which it is not ready.
    """

    async def answer_alive(_request: Request) -> Response:
        if service.status.phase in DEAD:
            body = error_body(503, f"the engine has {service.status.phase}")
            return Response(body, 503, RETRY_AFTER, "application/json")
        return _make_response({})

    async def answer_ready(_request: Request) -> Response:
        readiness = judge_readiness(service, stall_timeout)
        is_ready = readiness.phase is Phase.READY and not readiness.error
        return _make_response(readiness, 200 if is_ready else 503)

    async def answer_version(_request: Request) -> Response:
        return _make_response(Version(version("cythera")))

    async def answer_load(_request: Request) -> Response:
        return _make_response(Load(service.num_open))

    alive = [Route(path, answer_alive) for path in ("/health", "/livez", "/ping")]
    ready = Route("/readyz", answer_ready)
    return Frontend(
        routes=[*alive, ready, Route("/version", answer_version), Route("/load", answer_load)],
        open_paths=frozenset(route.path for route in (*alive, ready)),
        openapi=_document(),
    )


def judge_readiness(service: Service, stall_timeout: float) -> Readiness:
    """Say whether requests should come here now.

    A failure is told by its phase alone: its text may name paths, and `/readyz` needs no key.
    """
    status = service.status
    error = ""
    if status.phase is Phase.READY and service.seconds_without_progress > stall_timeout:
        error = (
            f"no step has ended for {service.seconds_without_progress:.0f} s, although there is work"
        )
    elif status.phase is Phase.FAILED:
        error = "the engine has failed; the log says why"
    return Readiness(status.phase, status.percent, error)


def _make_response(value: Any, status: int = 200) -> Response:
    headers = {"cache-control": "no-store"} | (RETRY_AFTER if status != 200 else {})
    return Response(msgspec.json.encode(value), status, headers, "application/json")


def _document() -> dict[str, Any]:
    schemas, components = msgspec.json.schema_components(
        (Readiness, Version, Load, dict), ref_template="#/components/schemas/{name}"
    )
    readiness, version_, load, nothing = (
        {"application/json": {"schema": schema}} for schema in schemas
    )
    alive = {
        "200": {"description": "The server is alive.", "content": nothing},
        "503": {"description": "The engine has failed."},
    }
    ready = {
        "200": {"description": "Requests are taken.", "content": readiness},
        "503": {"description": "Requests are not taken now.", "content": readiness},
    }
    return {
        "paths": {
            "/health": _describe("Say whether the server is alive.", alive),
            "/livez": _describe("Say whether the server is alive.", alive),
            "/ping": _describe("Say whether the server is alive.", alive),
            "/readyz": _describe("Say whether requests are taken, and how far the start is.", ready),
            "/version": _describe(
                "Tell the version.", {"200": {"description": "The version.", "content": version_}}
            ),
            "/load": _describe(
                "Tell the load.", {"200": {"description": "The load.", "content": load}}
            ),
        },
        "components": {"schemas": components},
    }


def _describe(summary: str, responses: dict[str, Any]) -> dict[str, Any]:
    return {"get": {"summary": summary, "responses": responses}}

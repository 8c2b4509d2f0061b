"""The server: all routes of all front ends behind the guards, on one listener."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, Any, Self

import msgspec
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.routing import Route, Router

from core.errors import PluginError
from plugins.server.http import NAME
from plugins.server.http.guard import (
    ApiKeyCheck,
    BodyLimit,
    ErrorAnswers,
    HostCheck,
    RequestId,
    RootPath,
)
from plugins.server.http.health import make_health
from plugins.server.http.listener import serve
from plugins.server.http.openapi import merge_openapi

if TYPE_CHECKING:
    import socket
    from collections.abc import Awaitable, Iterable, Mapping, Sequence

    import anyio
    from starlette.requests import Request
    from starlette.routing import BaseRoute
    from starlette.types import ASGIApp, Receive, Scope, Send

    from core.interfaces import Frontend
    from core.service import Service
    from plugins.server.http import HttpSettings


class HttpServer:
    """Offers routes over HTTP/1.1.

    :param routes: of Starlette; two for the same path and method are an error.
    :param open_paths: paths of routes that need no key, without parameters.
    :param api_keys: keys of which clients need one; none: nobody needs one.
    :param openapi: what `/openapi.json` is put together from.
    :raises PluginError: routes, open paths or descriptions contradict one another.
    """

    def __init__(
        self,
        routes: Sequence[BaseRoute],
        open_paths: frozenset[str],
        api_keys: Sequence[str],
        settings: HttpSettings,
        openapi: Iterable[Mapping[str, Any]] = (),
    ) -> None:
        document = merge_openapi(openapi, root_path=settings.root_path, has_keys=bool(api_keys))
        routes = [*routes, _make_json_route("/openapi.json", document)]
        _check_routes(routes, open_paths)
        self._settings = settings
        self._router = Router(routes, redirect_slashes=False)
        self.app = _guard(self._route, open_paths, api_keys, settings)
        """The whole of it as an ASGI application."""

    @classmethod
    def of(cls, service: Service, frontends: Sequence[Frontend]) -> Self:
        """Make the server of a service: its front ends, and the routes about its health.

        :raises PluginError: what the front ends bring cannot be served together.
        """
        settings: HttpSettings = service.settings[NAME]
        parts = [make_health(service, settings.stall_timeout), *frontends]
        return cls(
            list(chain.from_iterable(part.routes for part in parts)),
            frozenset(chain.from_iterable(part.open_paths for part in parts)),
            service.config.api_key,
            settings,
            [part.openapi for part in parts],
        )

    async def serve(self, sock: socket.socket, stop: anyio.Event, grace: float, /) -> None:
        """Serve until `stop` is set, then accept nothing new and finish what is open.

        :param sock: bound and listening; closed at the end.
        :param grace: seconds that open requests get after `stop`; then they are cut off.
        """
        await serve(self.app, sock, self._settings, stop=stop, grace=grace)

    def _route(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        scope["app"] = self  # makes the router raise where it would answer with plain text
        return self._router(scope, receive, send)


def _guard(
    app: ASGIApp, open_paths: frozenset[str], api_keys: Sequence[str], settings: HttpSettings
) -> ASGIApp:
    """Put the guards around the routes, from the inside to the outside.

    Browsers ask for permission without a key and must be able to read refusals, so CORS is outside
    of whatever refuses.
    """
    app = BodyLimit(app, settings.max_body_bytes, settings.body_timeout)
    app = ApiKeyCheck(app, api_keys, open_paths)
    app = HostCheck(app)
    app = ErrorAnswers(app)
    if settings.allowed_origins:
        app = CORSMiddleware(
            app,
            allow_origins=settings.allowed_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after", "retry-after-ms"],
        )
    return RequestId(RootPath(app, settings.root_path))


def _make_json_route(path: str, value: Any) -> Route:
    body = msgspec.json.encode(value)

    async def answer(_request: Request) -> Response:
        return Response(body, media_type="application/json")

    return Route(path, answer)


def _check_routes(routes: Sequence[BaseRoute], open_paths: frozenset[str]) -> None:
    """Refuse what would be routed or guarded otherwise than its front end believes."""
    known: set[tuple[str, str]] = set()
    for route in routes:
        if not isinstance(route, Route):
            raise PluginError(f"{route!r} is no Route of Starlette, and nothing else is served")
        keys = {(method, route.path) for method in route.methods or ("any method",)}
        for method, path in sorted(keys & known):
            raise PluginError(
                f"two front ends offer {method} {path}; take one away with no:frontend.NAME"
            )
        known |= keys
    paths = {path for _, path in known}
    for path in sorted(open_paths):
        if path not in paths or "{" in path:
            raise PluginError(f"{path!r} is to need no API key, but is not the plain path of a route")

"""Carries the front ends over HTTP/1.1: one listener, and what guards all routes alike."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Final

from core import hookimpl
from core.registry import ServerEntry

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from core.interfaces import Frontend, Server
    from core.plan import Plan
    from core.service import Service

core_api = "1.0"

NAME: Final = "server.http"


@dataclass(frozen=True, slots=True)
class HttpSettings:
    """The table `[plugins."server.http"]`."""

    max_body_bytes: int = 2**25
    """Largest body of a request; more is answered with 413."""
    max_header_bytes: int = 2**16
    """Largest request line and headers together; more is answered with 431."""
    max_headers: int = 100
    """Most headers of a request; more are answered with 431."""
    header_timeout: float = 30.0
    """Seconds that a client may take to send the request line and headers."""
    body_timeout: float = 30.0
    """Seconds that a client may pause within a body."""
    send_timeout: float = 60.0
    """Seconds that a client may read nothing of an answer before it is cut off."""
    keep_alive: float = 5.0
    """Seconds that an idle connection is kept for the next request."""
    stall_timeout: float = 120.0
    """Seconds without a step, while there is work, after which `/readyz` answers 503."""
    allowed_origins: tuple[str, ...] = ()
    """Origins whose pages may use the API from a browser, or `*` for all; unset: none."""
    root_path: str = ""
    """Prefix under which a proxy offers this server, such as `/llm`; it may strip it or not."""


def make_server(service: Service, frontends: Sequence[Frontend]) -> Server:
    """Make the server; imports what serves HTTP only now."""
    from plugins.server.http.app import HttpServer  # noqa: PLC0415  a plugin is cheap until it is used

    return HttpServer.of(service, frontends)


# --- hooks -----------------------------------------------------------------------------------------


@hookimpl
def core_register_settings() -> type:
    """Contribute limits, timeouts and origins."""
    return HttpSettings


@hookimpl
def core_register_servers() -> list[ServerEntry]:
    """Contribute the server `http`."""
    return [ServerEntry(name="http", factory=make_server, summary="HTTP/1.1, behind limits and keys")]


@hookimpl
def core_check_plan(plan: Plan) -> Iterator[str]:
    """Object to limits and times that are none, and to a prefix that is no path."""
    settings: HttpSettings = plan.settings[NAME]
    for field in fields(settings):
        value = getattr(settings, field.name)
        if isinstance(value, int | float) and not 0 < value < math.inf:
            yield (
                f"{field.name} is {value}, but must be more than 0; "
                f"--set {NAME}.{field.name}={field.default}"
            )
    root_path = settings.root_path
    if root_path and (not root_path.startswith("/") or root_path.endswith("/")):
        yield (
            f"root_path is {root_path!r}, but must start with a slash and end without one; "
            f"--set {NAME}.root_path=/llm"
        )

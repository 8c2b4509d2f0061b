"""A page to try the model in a browser: chat, raw completion, and what the engine is doing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from core import hookimpl
from core.registry import FrontendEntry

if TYPE_CHECKING:
    from core.interfaces import Frontend
    from core.service import Service

core_api = "1.0"

NAME: Final = "frontend.playground"


@dataclass(frozen=True, slots=True)
class PlaygroundSettings:
    """The table `[plugins."frontend.playground"]`."""

    max_feeds: int = 32
    """Most live views that are served at a time; others are answered with 429."""


def make_frontend(service: Service) -> Frontend:
    """Build the routes of the page."""
    from plugins.frontend.playground.page import make_frontend as make  # noqa: PLC0415  needs starlette

    return make(service, service.settings[NAME])


# --- hooks -----------------------------------------------------------------------------------------


@hookimpl
def core_register_settings() -> type:
    """Contribute `max_feeds`."""
    return PlaygroundSettings


@hookimpl
def core_register_frontends() -> list[FrontendEntry]:
    """Contribute the page at `/`."""
    return [
        FrontendEntry(
            name="playground",
            factory=make_frontend,
            summary="A page at / to chat, see token probabilities and watch the engine.",
        )
    ]

"""The OpenAI API: chat and plain completions, models, and the tokenizer for clients without one."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Final

from core import hookimpl
from core.registry import FrontendEntry

if TYPE_CHECKING:
    from collections.abc import Iterator

    from core.interfaces import Frontend
    from core.plan import Plan
    from core.service import Service

core_api = "1.0"

NAME: Final = "frontend.openai"


@dataclass(frozen=True, slots=True)
class OpenAISettings:
    """The table `[plugins."frontend.openai"]`."""

    ping_interval: float = 15.0
    """Seconds without a token after which a stream sends a comment, so that no proxy ends it."""
    write_timeout: float = 60.0
    """Seconds that a client may take to read on before its stream is ended."""


def make_frontend(service: Service) -> Frontend:
    """Make the front end; imports what serves HTTP only now."""
    from plugins.frontend.openai import routes  # noqa: PLC0415  a plugin is cheap until it is used

    return routes.make_frontend(service, service.settings[NAME])


# --- hooks -----------------------------------------------------------------------------------------


@hookimpl
def core_register_settings() -> type:
    """Contribute `ping_interval` and `write_timeout`."""
    return OpenAISettings


@hookimpl
def core_register_frontends() -> list[FrontendEntry]:
    """Contribute the front end `openai`."""
    return [
        FrontendEntry(
            name="openai", factory=make_frontend, summary="the OpenAI API under /v1, and /tokenize"
        )
    ]


@hookimpl
def core_check_plan(plan: Plan) -> Iterator[str]:
    """Object to settings that are no length of time."""
    settings: OpenAISettings = plan.settings[NAME]
    for field in fields(settings):
        value = getattr(settings, field.name)
        if not 0 < value < math.inf:
            yield f"{field.name} is {value} s, but must be more than 0; --set {NAME}.{field.name}=15"

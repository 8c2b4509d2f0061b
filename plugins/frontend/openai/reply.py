"""Responses in one piece."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
from starlette.responses import Response

if TYPE_CHECKING:
    from msgspec import Struct


def reply(answer: Struct) -> Response:
    """Make the response of an answer that is a success."""
    return Response(msgspec.json.encode(answer), media_type="application/json")

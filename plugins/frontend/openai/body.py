"""Bodies: from bytes that anybody may have sent to a typed request."""

from __future__ import annotations

import re
from typing import Final, TypeVar

import msgspec

from core.errors import InvalidRequestError

MAX_CONTAINERS: Final = 2**20
"""Lists and objects in one body.  Each takes some 60 bytes of memory for two in the body, so that the
server's limit on bytes alone would let a small body become a large heap."""

T = TypeVar("T", bound=msgspec.Struct)
Extras = dict[str, msgspec.Raw]
"""Fields that the type does not have, not decoded yet."""

_PLACE: Final = re.compile(r"(.*) - at (?:`key` in )?`\$\.?(.*)`", re.DOTALL)
_MISSING: Final = re.compile(r"Object missing required field `(\w+)`(?: - at `\$\.?(.*)`)?")
_shallow: Final = msgspec.json.Decoder(dict[str, msgspec.Raw])


def decode_body(body: bytes, kind: type[T]) -> tuple[T, Extras]:
    """Read a JSON object.

    :return: the request, and the fields that it does not know.
    :raises InvalidRequestError: the body is no JSON, or a field has the wrong type; names it.
    """
    num_containers = body.count(b"[") + body.count(b"{")
    if num_containers > MAX_CONTAINERS:
        raise InvalidRequestError(
            f"body: {num_containers} lists and objects, but at most {MAX_CONTAINERS} are read"
        )
    try:
        fields = _shallow.decode(body)
        request = msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise _refuse_type(str(error)) from None
    except UnicodeDecodeError as error:
        raise InvalidRequestError(f"body: not UTF-8 at byte {error.start}") from None
    except msgspec.DecodeError as error:
        raise InvalidRequestError(f"body: {error}") from None
    except RecursionError:
        raise InvalidRequestError("body: JSON is nested too deeply") from None
    known = kind.__struct_fields__
    return request, {name: raw for name, raw in fields.items() if name not in known}


def _refuse_type(message: str) -> InvalidRequestError:
    """Name the field at fault as the client wrote it, without JSON-path decoration."""
    missing = _MISSING.fullmatch(message)
    if missing is not None:
        field = f"{missing[2]}.{missing[1]}" if missing[2] else missing[1]
        return InvalidRequestError(f"{field}: is required", field=field)
    place = _PLACE.fullmatch(message)
    if place is None:
        return InvalidRequestError(f"body: {message}")
    return InvalidRequestError(f"{place[2]}: {place[1]}", field=place[2])

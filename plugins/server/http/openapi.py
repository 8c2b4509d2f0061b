"""`/openapi.json`: what the front ends say of their routes, put together with what any route may answer."""

from __future__ import annotations

import copy
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Final

import msgspec

from core.errors import PluginError
from core.http_errors import ErrorAnswer

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

ANY_ROUTE: Final = {
    "400": "The request is malformed.",
    "401": "An API key is missing or not known.",
    "408": "The body came too slowly.",
    "413": "The body is too large.",
    "431": "The headers are too large.",
    "500": "The server failed.",
}
"""What the server answers in place of any route."""
REF: Final = "#/components/schemas/{name}"


def merge_openapi(
    fragments: Iterable[Mapping[str, Any]], *, root_path: str = "", has_keys: bool = False
) -> dict[str, Any]:
    """Put fragments together to one document.

    :param fragments: each with `paths` and `components` of OpenAPI 3.1.
    :param root_path: prefix under which clients see the paths.
    :param has_keys: whether clients need an API key.
    :raises PluginError: two fragments describe the same path, or a component differently.
    """
    [error], schemas = msgspec.json.schema_components((ErrorAnswer,), ref_template=REF)
    paths: dict[str, Any] = {}
    components: dict[str, dict[str, Any]] = {"schemas": schemas}
    for fragment in fragments:
        for path, item in fragment.get("paths", {}).items():
            _put(paths, path, copy.deepcopy(item), "path")
        for kind, entries in fragment.get("components", {}).items():
            for name, entry in entries.items():
                _put(components.setdefault(kind, {}), name, entry, f"component {kind}")
    for item in paths.values():
        for operation in item.values():
            _add_answers(operation, error)
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "cythera", "version": version("cythera")},
        "servers": [{"url": root_path or "/"}],
        "paths": paths,
        "components": components,
    }
    if has_keys:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]
    return document


def _put(target: dict[str, Any], name: str, value: Any, what: str) -> None:
    if target.setdefault(name, value) != value:
        raise PluginError(f"two front ends describe the {what} {name!r} of the API differently")


def _add_answers(operation: dict[str, Any], error: dict[str, Any]) -> None:
    content = {"application/json": {"schema": error}}
    responses = operation.setdefault("responses", {})
    for status, description in ANY_ROUTE.items():
        responses.setdefault(status, {"description": description, "content": content})

"""The command line: `python -m core`, or `cythera`.

The flags that set up an engine are read off the fields of `EngineConfig`; this file names none of
them.  Commands import what they need when they run, so that `plugins list` loads no plugin and no
torch.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, get_args, get_origin

from cyclopts import App, CycloptsError, Group, Parameter

import core
from core.config import (
    ENV_PREFIX,
    GROUPS,
    EngineConfig,
    flag_origin,
    load_config,
    parse_assignments,
)
from core.errors import ConfigError, CytheraError, PluginConflictError
from core.hookspecs import API_VERSION
from core.log import configure_logging

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo
    from rich.console import Console

MAX_ERROR_LINES: Final = 10
EXIT_USAGE: Final = 2
EXIT_PLUGIN: Final = 3
EXIT_INTERRUPTED: Final = 130
EXIT_BROKEN_PIPE: Final = 141
TRACEBACK: Final = f"{ENV_PREFIX}TRACEBACK"
PIPE_WIDTH: Final = 200
"""Columns of a table that is not written to a terminal."""


# --- flags of the engine ---------------------------------------------------------------------------

_groups = {name: Group(name, sort_key=index) for index, name in enumerate(GROUPS, start=1)}
_output = Group("Output", sort_key=len(GROUPS) + 1)


def _make_flag(name: str, field: FieldInfo) -> tuple[str, Any, Any]:
    """Describe one flag.  Values stay text: `EngineConfig` alone decides what is legal."""
    extra = field.json_schema_extra
    assert isinstance(extra, dict)  # noqa: S101  `core.config._field` wrote it
    flag = "--" + name.replace("_", "-")
    kind = _kind_of(field)
    default = field.default
    parameter = Parameter(
        name=[flag, str(extra["short"])] if extra["short"] else flag,
        help=field.description,
        group=_groups[str(extra["group"])],
        negative=None if kind is bool else (),
        metavar=None if kind is bool else _metavar(name, field),
        show_default=(lambda _: default if kind is not bool else _on_off(default))
        if default not in (None, ())
        else False,
        allow_leading_hyphen=kind is str,
    )
    return name, Annotated[kind | None, parameter], dataclasses.field(default=None)

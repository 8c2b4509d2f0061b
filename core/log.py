"""Logging: structlog for us, and the standard library's loggers of others through the same door.

Call `configure_logging` once in every process.  Nothing is cached: loggers made before, and those
of modules imported later, follow the newest call.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import TYPE_CHECKING, Final, TextIO, cast

import structlog

if TYPE_CHECKING:
    from structlog.typing import Processor, WrappedLogger

QUIET_TORCH: Final = {"TORCH_CPP_LOG_LEVEL": "ERROR"}
"""For the environment of processes that join others: torch warns of every address without a name."""
LIBRARY_LEVEL: Final = logging.WARNING
"""Least severe messages of libraries that are shown, unless ours are shown even less."""


def configure_logging(level: str = "info", format: str = "auto", stream: TextIO | None = None) -> None:  # noqa: A002  the setting is called so
    """Send everything that is logged in this process to one stream.

    :param level: least severe of our messages that is shown: `debug` … `critical`.
    :param format: `pretty` for people, `json` for one object a line; `auto` is pretty on a terminal.
    :param stream: `None` means standard error, wherever it points to when a line is written.
    """
    if stream is None:
        stream = cast("TextIO", _StandardError())
    number = logging.getLevelNamesMapping()[level.upper()]
    is_pretty = stream.isatty() if format == "auto" else format == "pretty"
    shared = _shared_processors(is_pretty=is_pretty)
    renderer = _make_pretty_renderer(stream) if is_pretty else structlog.processors.JSONRenderer()
    structlog.configure(
        processors=[*shared, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=_LoggerFactory(stream),
        cache_logger_on_first_use=False,  # cached loggers cannot be pickled and outlive their stream
    )
    _route_libraries(stream, max(number, LIBRARY_LEVEL), shared, renderer)


def configure_for_library(level: str, format: str) -> None:  # noqa: A002  the setting is called so
    """Send our messages to standard error, unless the program around us has set up structlog itself."""
    if structlog.is_configured():
        return
    configure_logging(level, format)
    _remove_library_handlers()


class _StandardError:
    """Whatever `sys.stderr` is at the moment: it may be replaced, and the old one closed."""

    def write(self, text: str) -> int:
        return sys.stderr.write(text)

    def flush(self) -> None:
        sys.stderr.flush()

    def isatty(self) -> bool:
        return sys.stderr.isatty()


class _NamedLogger(structlog.WriteLogger):
    """Writes whole lines, and knows the module it speaks for."""

    def __init__(self, stream: TextIO, name: str) -> None:
        super().__init__(stream)
        self.name = name


class _LoggerFactory:
    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __call__(self, *args: object) -> WrappedLogger:
        return _NamedLogger(self._stream, str(args[0]) if args else "")


class _LibraryHandler(logging.StreamHandler[TextIO]):
    """The one handler of ours among those that others may have added."""


def _route_libraries(stream: TextIO, level: int, shared: list[Processor], renderer: Processor) -> None:
    handler = _LibraryHandler(stream)
    handler.setLevel(level)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    _remove_library_handlers()
    logging.getLogger().addHandler(handler)


def _remove_library_handlers() -> None:
    root = logging.getLogger()
    for old in [h for h in root.handlers if isinstance(h, _LibraryHandler)]:
        root.removeHandler(old)


def _shared_processors(*, is_pretty: bool) -> list[Processor]:
    time_format = "%m-%d %H:%M:%S" if is_pretty else "iso"
    processors: list[Processor] = [
        structlog.stdlib.add_logger_name,
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt=time_format, utc=not is_pretty),
        structlog.processors.StackInfoRenderer(),
    ]
    if not is_pretty:  # the pretty renderer formats exceptions itself
        processors.append(structlog.processors.format_exc_info)
    return processors


def _make_pretty_renderer(stream: TextIO) -> Processor:
    has_colors = stream.isatty() and not os.environ.get("NO_COLOR")
    return structlog.dev.ConsoleRenderer(
        colors=has_colors and os.environ.get("TERM") != "dumb",
        # The default would show local variables, and with them what clients sent.
        exception_formatter=structlog.dev.plain_traceback,
        repr_native_str=True,  # a value from outside must not be able to start a line of its own
    )

"""Appends the engine's events to a file, one JSON object a line.

A subscriber runs on a thread of its own behind a bounded queue, so a slow disk cannot hold up a step:
when the queue is full the oldest batches are dropped.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from core import hookimpl
from core.events import EVENT_TYPES, EventBatch, Subscription

if TYPE_CHECKING:
    from collections.abc import Iterable

    from core.plan import Plan

core_api = "1.0"


@dataclass(frozen=True, slots=True)
class JsonlSettings:
    """The table `[plugins."py:jsonl_events"]`."""

    path: str = "events.jsonl"
    """Appended to; its folder has to be there."""
    events: tuple[str, ...] = (
        "EngineStarted",
        "RequestFinished",
        "RequestRefused",
        "StepFailed",
        "EngineStopping",
    )
    """Names of classes in `core.events`.  `StepCompleted` comes once a step and holds what was drawn."""


class JsonlWriter:
    """Appends batches of events to a file; runs on the subscriber's thread.

    The file is opened for each batch: nothing is left to be written or closed however the process
    ends, and a file that was moved away is begun anew.

    :param path: tried at once, so that a file that cannot be written stops the start.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._encoder = msgspec.json.Encoder()
        path.open("ab").close()

    def __call__(self, batch: EventBatch, /) -> None:
        """Append a line for each event."""
        lines = [{"time": batch.time, **msgspec.to_builtins(event)} for event in batch.events]
        with self._path.open("ab") as file:
            file.write(self._encoder.encode_lines(lines))


def _settings(plan: Plan) -> JsonlSettings:
    """Find our settings by their type: their name is the one that the user chose the plugin by."""
    return next(item for item in plan.settings.values() if isinstance(item, JsonlSettings))


# --- hooks -----------------------------------------------------------------------------------------


@hookimpl
def core_register_settings() -> type:
    """Contribute `path` and `events`."""
    return JsonlSettings


@hookimpl
def core_check_plan(plan: Plan) -> Iterable[str]:
    """Object to a folder that is not there, and to events that nobody has heard of."""
    settings = _settings(plan)
    folder = Path(settings.path).absolute().parent
    if not folder.is_dir():
        yield f"path is {settings.path}, but there is no folder {folder}"
    for name in settings.events:
        if name not in EVENT_TYPES:
            yield f"events names {name!r}, but known are {', '.join(EVENT_TYPES)}"


@hookimpl
def core_subscribe(plan: Plan) -> Iterable[Subscription]:
    """Subscribe to what is to be written; no types at all would mean all of them."""
    settings = _settings(plan)
    types = tuple(EVENT_TYPES[name] for name in settings.events)
    return [Subscription("jsonl_events", JsonlWriter(Path(settings.path)), types)] if types else []

"""Writes what the engine does to the log: a line of statistics now and then, and every failure."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import structlog

from core import hookimpl
from core.events import (
    EngineStarted,
    EngineStopping,
    FirstToken,
    RequestFinished,
    RequestPreempted,
    RequestRefused,
    RequestScheduled,
    StepCompleted,
    StepFailed,
    SubscriberDropped,
    Subscription,
    WorkerLost,
)
from core.request import FinishReason

if TYPE_CHECKING:
    from collections.abc import Iterator

    from core.config import EngineConfig
    from core.events import Event, EventBatch
    from core.plan import Plan

core_api = "1.0"

NAME: Final = "observe.log"
LINES: Final[dict[type[Event], tuple[int, str]]] = {
    EngineStarted: (logging.INFO, "engine started"),
    EngineStopping: (logging.INFO, "engine stopping"),
    RequestRefused: (logging.WARNING, "request refused"),
    StepFailed: (logging.ERROR, "step failed"),
    SubscriberDropped: (logging.ERROR, "event subscriber switched off"),
    WorkerLost: (logging.ERROR, "worker lost"),
}
"""What is written whatever the settings say."""
MAX_TIMED: Final = 2**16
"""Most requests whose times are kept; more only come together if their ends were lost."""

log = structlog.get_logger(NAME)


@dataclass(frozen=True, slots=True)
class LogSettings:
    """The table `[plugins."observe.log"]`."""

    interval: float = 10.0
    """Least seconds between two lines of statistics, which come while requests run; 0 for none."""
    requests: bool = False
    """Write a line for every request that ends or is preempted; failures are always written."""


class Statistics:
    """What has happened since the last line of statistics.

    Speeds are per second of busy time: steps that overlap count once, and idle time does not count.
    """

    def __init__(self) -> None:
        self.begin = math.inf
        """When the first step was submitted, in seconds since the epoch."""
        self.busy = 0.0
        self.num_prompt_tokens = 0
        self.num_output_tokens = 0
        self.num_finished = 0
        self.num_preemptions = 0
        self._busy_until = -math.inf
        self._last: StepCompleted | None = None

    def add_step(self, step: StepCompleted, time: float) -> None:
        """Count a step whose result was applied at `time`."""
        submitted = time - step.duration
        self.begin = min(self.begin, submitted)
        self.busy += max(0.0, time - max(submitted, self._busy_until))
        self._busy_until = max(self._busy_until, time)
        self.num_prompt_tokens += step.num_tokens - step.num_decodes
        self.num_output_tokens += len(step.tokens)
        self._last = step

    def summary(self) -> dict[str, float]:
        """Fields of the line; empty if there was no step."""
        if self._last is None:
            return {}
        seconds = max(self.busy, 1e-6)
        return {
            "prompt_tokens_per_s": round(self.num_prompt_tokens / seconds, 1),
            "output_tokens_per_s": round(self.num_output_tokens / seconds, 1),
            "running": self._last.num_running,
            "waiting": self._last.num_waiting,
            "kv_usage": round(self._last.kv_usage, 3),
            "finished": self.num_finished,
            "preemptions": self.num_preemptions,
        }


class Timings:
    """What the line of a request says about its speed, beyond what the event of its end holds."""

    def __init__(self) -> None:
        self._open: dict[str, dict[str, float]] = {}

    def note(self, request_id: str, name: str, seconds: float) -> None:
        """Keep when something happened to a request for the first time, counted from its arrival."""
        self._open.setdefault(request_id, {}).setdefault(name, seconds)
        if len(self._open) > MAX_TIMED:
            del self._open[next(iter(self._open))]

    def end(self, event: RequestFinished) -> dict[str, float]:
        """Return the fields for a request that has ended, and forget it.

        `tokens_per_s` is the speed behind the first token: what a reader of the stream sees.
        """
        times = self._open.pop(event.request_id, {})
        seconds = event.duration - times.get("time_to_first_token", math.inf)
        if event.num_output > 1 and seconds > 0:
            times["tokens_per_s"] = round((event.num_output - 1) / seconds, 1)
        return {name: round(value, 3) for name, value in times.items()}


class LogSubscriber:
    """Turns batches of events into lines; runs on the subscriber's thread."""

    def __init__(self, settings: LogSettings) -> None:
        self._settings = settings
        self._statistics = Statistics()
        self._timings = Timings()

    def __call__(self, batch: EventBatch, /) -> None:
        """Write what the batch is worth."""
        for event in batch.events:
            self._take(event, batch.time)
        interval = self._settings.interval
        if interval and batch.time - self._statistics.begin >= interval:
            self._report()

    def _take(self, event: Event, time: float) -> None:
        match event:
            case StepCompleted():
                self._statistics.add_step(event, time)
            case RequestScheduled():
                self._timings.note(event.request_id, "queue_time", event.queue_time)
            case FirstToken():
                self._timings.note(event.request_id, "time_to_first_token", event.latency)
            case RequestFinished():
                self._take_finished(event)
            case RequestPreempted():
                self._statistics.num_preemptions += 1
                if self._settings.requests:
                    log.info("request preempted", **_fields(event))
            case _:
                if isinstance(event, EngineStopping):
                    self._report()
                level, line = LINES[type(event)]
                log.log(level, line, **_fields(event))

    def _take_finished(self, event: RequestFinished) -> None:
        self._statistics.num_finished += 1
        fields = _fields(event) | self._timings.end(event)
        if event.reason == FinishReason.ERROR:
            log.error("request failed", **fields)
        elif self._settings.requests:
            log.info("request finished", **fields)

    def _report(self) -> None:
        summary = self._statistics.summary()
        if summary:
            log.info("statistics", **summary)
        self._statistics = Statistics()


def _fields(event: Event) -> dict[str, Any]:
    """All fields that say something, with durations to the millisecond."""
    pairs = ((name, getattr(event, name)) for name in event.__struct_fields__)
    return {
        name: round(value, 3) if isinstance(value, float) else value
        for name, value in pairs
        if value != ""
    }


def combine(settings: LogSettings, config: EngineConfig) -> LogSettings:
    """Add what the flags `--enable-log-requests` and `--disable-log-stats` say."""
    return LogSettings(
        interval=0.0 if config.disable_log_stats else settings.interval,
        requests=settings.requests or config.enable_log_requests,
    )


# --- hooks -----------------------------------------------------------------------------------------


@hookimpl
def core_register_settings() -> type:
    """Contribute `interval` and `requests`."""
    return LogSettings


@hookimpl
def core_check_plan(plan: Plan) -> Iterator[str]:
    """Object to an interval that is no length of time."""
    interval = plan.settings[NAME].interval
    if not 0 <= interval < math.inf:
        yield f"interval is {interval} s, but must be 0 (no statistics) or more; --set {NAME}.interval=10"


@hookimpl
def core_subscribe(plan: Plan) -> list[Subscription]:
    """Subscribe to no more than the settings need: an unwanted event is never built."""
    settings = combine(plan.settings[NAME], plan.config)
    types: list[type[Event]] = [*LINES, RequestFinished]
    if settings.interval:
        types.append(StepCompleted)
    if settings.interval or settings.requests:
        types.append(RequestPreempted)
    if settings.requests:
        types += [RequestScheduled, FirstToken]
    return [Subscription(NAME, LogSubscriber(settings), tuple(types))]

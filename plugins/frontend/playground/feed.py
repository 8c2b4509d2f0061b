"""What the live view shows: events folded into a few numbers and the most recent requests.

Pure bookkeeping without I/O or clock.  Whatever the engine does in between, a message holds at most
`NUM_RECENT` requests, so a page costs the same whether the engine serves ten requests or a million.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec

from core.events import (
    RequestFinished,
    RequestPreempted,
    RequestQueued,
    RequestRefused,
    RequestScheduled,
    StepCompleted,
)

if TYPE_CHECKING:
    from core.events import Event

EVENT_TYPES: Final = (
    RequestQueued,
    RequestScheduled,
    RequestPreempted,
    RequestFinished,
    RequestRefused,
    StepCompleted,
)
"""What `Feed.add` understands."""
NUM_RECENT: Final = 48
"""Requests that a feed remembers; the oldest that has ended makes room for a new one."""
OPEN_STATES: Final = frozenset({"queued", "running", "preempted"})
WINDOW: Final = 2.0
"""Seconds over which tokens per second are taken: less makes slow models flicker."""
MAX_TEXT: Final = 200
"""Characters of ids and errors that are shown; clients choose ids, and may choose long ones."""


class RequestView(msgspec.Struct):
    """One request as the page lists it."""

    number: int
    """Consecutive from 0 in a feed.  Ids do not serve: a client may use one again."""
    id: str
    state: str = "queued"
    """queued, running, preempted, refused, or the `FinishReason`: stop, length, abort, error."""
    num_prompt: int | None = None
    """`None` if the feed began after the request was queued, and has not seen its end."""
    num_cached: int = 0
    num_output: int = 0
    queue_time: float | None = None
    duration: float | None = None
    error: str = ""


class Message(msgspec.Struct, frozen=True):
    """The numbers as they are, and the requests that have changed since the message before."""

    num_running: int
    num_waiting: int
    kv_usage: float
    """0 to 1."""
    output_rate: float
    """Generated tokens per second."""
    prompt_rate: float
    """Prompt positions computed per second."""
    num_finished: int
    """Since the feed began, as the two below."""
    num_preempted: int
    num_refused: int
    requests: list[RequestView]


class _Step(NamedTuple):
    time: float
    num_output: int
    num_prompt: int


class Feed:
    """Folds events into messages."""

    def __init__(self) -> None:
        self._kv_usage = 0.0
        self._num_finished = 0
        self._num_preempted = 0
        self._num_refused = 0
        self._num_seen = 0
        self._steps: deque[_Step] = deque()
        self._recent: dict[int, RequestView] = {}
        self._open: dict[str, RequestView] = {}
        self._changed: dict[int, RequestView] = {}
        self._last: Message | None = None

    def add(self, event: Event, now: float) -> None:
        """Take one event; others than `EVENT_TYPES` change nothing.

        :param now: seconds of the clock that `message` is called with; never less than before.
        """
        match event:
            case StepCompleted():
                self._add_step(event, now)
            case RequestQueued():
                self._begin(event.request_id).num_prompt = event.num_prompt
            case RequestScheduled():
                view = self._touch(event.request_id)
                view.state = "running"
                view.num_cached = event.num_cached
                view.queue_time = event.queue_time
            case RequestPreempted():
                self._num_preempted += 1
                self._touch(event.request_id).state = "preempted"
            case RequestFinished():
                self._finish(event)
            case RequestRefused():
                self._num_refused += 1
                view = self._remember(event.request_id)
                view.state = "refused"
                view.error = event.error[:MAX_TEXT]

    def message(self, now: float, *, num_running: int, num_waiting: int) -> Message | None:
        """Make the next message; `None` if it would say what the one before has said.

        :param num_running: sequences that have a row now.  Steps tell as much, but after the last
            one requests can still be aborted.
        :param num_waiting: sequences that wait for one.
        """
        self._forget_steps(now)
        message = Message(
            num_running=num_running,
            num_waiting=num_waiting,
            kv_usage=self._kv_usage if num_running else 0.0,
            output_rate=sum(step.num_output for step in self._steps) / WINDOW,
            prompt_rate=sum(step.num_prompt for step in self._steps) / WINDOW,
            num_finished=self._num_finished,
            num_preempted=self._num_preempted,
            num_refused=self._num_refused,
            requests=[msgspec.structs.replace(view) for view in self._changed.values()],
        )
        if not self._changed and message == self._last:
            return None
        self._changed.clear()
        self._last = msgspec.structs.replace(message, requests=[])
        return message

    def _add_step(self, event: StepCompleted, now: float) -> None:
        self._kv_usage = event.kv_usage
        self._steps.append(_Step(now, len(event.tokens), event.num_tokens - event.num_decodes))
        self._forget_steps(now)
        for request_id in event.request_ids:
            view = self._open.get(request_id)
            if view is not None:
                view.num_output += 1
                self._changed[view.number] = view

    def _forget_steps(self, now: float) -> None:
        while self._steps and self._steps[0].time <= now - WINDOW:
            self._steps.popleft()

    def _finish(self, event: RequestFinished) -> None:
        self._num_finished += 1
        view = self._touch(event.request_id)
        view.state = event.reason
        view.num_prompt = event.num_prompt
        view.num_cached = event.num_cached
        view.num_output = event.num_output
        view.duration = event.duration
        view.error = event.error[:MAX_TEXT]
        del self._open[event.request_id]

    def _touch(self, request_id: str) -> RequestView:
        """Find an open request; one that the feed does not know, or forgot, begins here."""
        view = self._open.get(request_id)
        if view is None:
            return self._begin(request_id)
        self._changed[view.number] = view
        return view

    def _begin(self, request_id: str) -> RequestView:
        view = self._remember(request_id)
        self._open[request_id] = view
        return view

    def _remember(self, request_id: str) -> RequestView:
        """List a request, which need not be open: one is refused for having the id of another."""
        if len(self._recent) >= NUM_RECENT:
            self._forget_one()
        view = RequestView(self._num_seen, request_id[:MAX_TEXT])
        self._num_seen += 1
        self._recent[view.number] = self._changed[view.number] = view
        return view

    def _forget_one(self) -> None:
        views = self._recent.values()
        victim = next((view for view in views if view.state not in OPEN_STATES), None)
        if victim is None:
            victim = next(iter(views))
            self._open = {key: view for key, view in self._open.items() if view is not victim}
        del self._recent[victim.number]
        self._changed.pop(victim.number, None)

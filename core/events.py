"""Events: immutable facts about what the engine has done, and the bus that carries them.

The engine appends events to a list during a step and publishes them once per step as one
`EventBatch`.  Subscribers observe; they cannot veto and cannot slow a step down: each has a bounded
queue of its own, drained by a thread of its own.  Without subscribers the list is never built.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Final, Literal, Protocol, get_args

import msgspec
import structlog

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

log = structlog.get_logger(__name__)


class Event(msgspec.Struct, frozen=True, tag=True):
    """Base of all events; a subclass is named after what has happened."""


class EngineStarted(Event, frozen=True):
    """The engine is loaded and steps can run."""

    num_kv_blocks: int
    block_size: int


class EngineStopping(Event, frozen=True):
    """The engine will run no further step."""

    reason: str


class RequestQueued(Event, frozen=True):
    """A legal request reached the scheduler."""

    request_id: str
    num_prompt: int


class RequestScheduled(Event, frozen=True):
    """A waiting request got a row: for the first time, or again after a preemption."""

    request_id: str
    num_cached: int
    """Prompt tokens that the prefix cache already held."""
    queue_time: float
    """Seconds since the request arrived."""


class FirstToken(Event, frozen=True):
    """The first generated token of a request came back."""

    request_id: str
    latency: float
    """Seconds since the request arrived."""


class RequestPreempted(Event, frozen=True):
    """A running request gave its blocks back and waits again."""

    request_id: str
    num_computed: int
    """Positions that have to be computed again, unless the prefix cache keeps them."""


class RequestFinished(Event, frozen=True):
    """A request ended.  The only terminal event: each queued request gets exactly one."""

    request_id: str
    reason: str
    """A `FinishReason`: stop, length, abort or error."""
    num_prompt: int
    num_output: int
    num_cached: int
    num_preemptions: int
    duration: float
    """Seconds since the request arrived."""
    error: str = ""


class RequestRefused(Event, frozen=True):
    """A request was turned away at the door and was never queued."""

    request_id: str
    error: str


class StepCompleted(Event, frozen=True):
    """The result of one step was applied.  `request_ids` and `tokens` run in parallel."""

    step: int
    num_tokens: int
    """Positions computed."""
    num_decodes: int
    num_running: int
    num_waiting: int
    kv_usage: float
    """Share of the KV pool that running requests hold, 0 to 1."""
    duration: float
    """Seconds from submitting the step to applying its result."""
    request_ids: list[str]
    tokens: list[int]


class StepFailed(Event, frozen=True):
    """A step raised; every request that it scheduled ended with an error."""

    step: int
    error: str
    num_requests: int


class BlocksEvicted(Event, frozen=True):
    """Cached blocks were reused for something else."""

    block_ids: list[int]


class WorkerLost(Event, frozen=True):
    """A rank died or stopped answering."""

    rank: int
    reason: str


class SubscriberDropped(Event, frozen=True):
    """A subscriber failed too often and was switched off."""

    subscriber: str
    error: str


AnyEvent = (
    EngineStarted
    | EngineStopping
    | RequestQueued
    | RequestScheduled
    | FirstToken
    | RequestPreempted
    | RequestFinished
    | RequestRefused
    | StepCompleted
    | StepFailed
    | BlocksEvicted
    | WorkerLost
    | SubscriberDropped
)
"""Every event, for decoding."""
EVENT_TYPES: Final[dict[str, type[Event]]] = {kind.__name__: kind for kind in get_args(AnyEvent)}

SCHEDULER_EVENTS: Final = (
    RequestQueued,
    RequestScheduled,
    FirstToken,
    RequestPreempted,
    RequestFinished,
)
"""What a scheduler reports, if anybody wants to know."""


class EventBatch(msgspec.Struct, frozen=True):
    """All events of one step."""

    seq: int
    """Consecutive from 0: a gap tells a subscriber that its queue overflowed."""
    step: int
    time: float
    """Seconds since the epoch."""
    events: list[Event]


class EventHandler(Protocol):
    """What a subscriber runs, on the subscriber's own thread."""

    def __call__(self, batch: EventBatch, /) -> None:
        """Take one batch that holds at least one event of the subscribed types."""


QueuePolicy = Literal["drop_oldest", "block"]
MAX_FAILURES: Final = 3


class Subscription(msgspec.Struct, frozen=True):
    """What `core_subscribe` returns: who wants which events, and what happens when it is slow."""

    name: str
    handler: EventHandler
    types: tuple[type[Event], ...] = ()
    """Empty means all."""
    policy: QueuePolicy = "drop_oldest"
    """`block` makes the engine wait for a slow subscriber: for tests."""
    capacity: int = 1024
    """Batches that may wait in its queue."""


class _Subscriber:
    """One subscription's queue and thread."""

    def __init__(self, subscription: Subscription, bus: EventBus) -> None:
        self.subscription = subscription
        self.num_dropped = 0
        self.num_failures = 0
        self.is_active = True
        self._bus = bus
        self._queue: deque[EventBatch] = deque()
        self._changed = threading.Condition()
        self._is_closing = False
        self._is_busy = False
        self._thread = threading.Thread(
            target=self._drain, name=f"events:{subscription.name}", daemon=True
        )
        self._thread.start()

    def put(self, batch: EventBatch) -> None:
        wanted = self.subscription.types
        if wanted:
            events = [event for event in batch.events if isinstance(event, wanted)]
            if not events:
                return
            batch = EventBatch(batch.seq, batch.step, batch.time, events)
        with self._changed:
            if len(self._queue) >= self.subscription.capacity:
                if self.subscription.policy == "block":
                    self._changed.wait_for(self._has_room)
                else:
                    self._queue.popleft()
                    self.num_dropped += 1
            self._queue.append(batch)
            self._changed.notify_all()

    def flush(self, timeout: float) -> bool:
        with self._changed:
            return self._changed.wait_for(
                lambda: not self.is_active or (not self._queue and not self._is_busy), timeout
            )

    def close(self, timeout: float) -> None:
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        self._thread.join(timeout)

    def _has_room(self) -> bool:
        return not self.is_active or len(self._queue) < self.subscription.capacity

    def _drain(self) -> None:
        while self.is_active:
            with self._changed:
                self._is_busy = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._queue or self._is_closing)
                if not self._queue:
                    return
                batch = self._queue.popleft()
                self._is_busy = True
            self._handle(batch)
        with self._changed:
            self._queue.clear()
            self._changed.notify_all()

    def _handle(self, batch: EventBatch) -> None:
        name = self.subscription.name
        try:
            self.subscription.handler(batch)
        except Exception as error:
            self.num_failures += 1
            log.exception("event subscriber failed", subscriber=name, failures=self.num_failures)
            if self.num_failures >= MAX_FAILURES:
                self.is_active = False
                self._bus.note(SubscriberDropped(name, f"{type(error).__name__}: {error}"))


class EventBus:
    """Hands every batch to every subscriber's queue; never calls a handler itself."""

    def __init__(self, subscriptions: Iterable[Subscription] = ()) -> None:
        self._subscribers = [_Subscriber(subscription, self) for subscription in subscriptions]
        self._notes: deque[Event] = deque()  # from subscriber threads, published with the next step
        self._taps: dict[Callable[[EventBatch], None], tuple[type[Event], ...]] = {}
        self._seq = 0
        self.is_active = bool(self._subscribers)
        """Whether anybody listens: when not, the engine builds no events."""

    def tap(
        self, handler: Callable[[EventBatch], None], types: tuple[type[Event], ...]
    ) -> Callable[[], None]:
        """Have `handler` called by `publish` itself, on its thread: it must be quick and not fail.

        :return: ends it.
        """
        self._taps[handler] = types
        self.is_active = True
        return lambda: self._remove_tap(handler)

    def _remove_tap(self, handler: Callable[[EventBatch], None]) -> None:
        self._taps.pop(handler, None)
        self.is_active = bool(self._subscribers or self._taps)

    def publish(self, events: Sequence[Event], step: int, at: float | None = None) -> None:
        """Queue one batch for every subscriber; drops nothing silently (see `dropped`).

        :param at: when it happened, in seconds since the epoch; by default now.
        """
        if not self.is_active:
            return
        batch_events = list(events)
        while self._notes:
            batch_events.append(self._notes.popleft())
        if not batch_events:
            return
        batch = EventBatch(self._seq, step, time.time() if at is None else at, batch_events)
        self._seq += 1
        for subscriber in self._subscribers:
            if subscriber.is_active:
                subscriber.put(batch)
        for handler, types in tuple(self._taps.items()):
            wanted = [event for event in batch_events if isinstance(event, types)]
            if wanted:
                handler(EventBatch(batch.seq, step, batch.time, wanted))

    def wants(self, *types: type[Event]) -> bool:
        """Whether anybody subscribed to one of these types: what nobody wants is not built."""
        return any(
            not subscriber.subscription.types
            or any(issubclass(kind, subscriber.subscription.types) for kind in types)
            for subscriber in self._subscribers
        )

    def wanted_types(self) -> list[type[Event]]:
        """All types that `wants` is true of."""
        return [kind for kind in EVENT_TYPES.values() if self.wants(kind)]

    def note(self, event: Event) -> None:
        """Add an event, from any thread; it travels with the next batch."""
        if self.is_active:
            self._notes.append(event)

    def dropped(self) -> dict[str, int]:
        """Batches lost to full queues, by subscriber."""
        return {s.subscription.name: s.num_dropped for s in self._subscribers}

    def flush(self, timeout: float = 5.0) -> bool:
        """Wait until every queue is empty and its handler has returned; whether it got there."""
        return all(subscriber.flush(timeout) for subscriber in self._subscribers)

    def close(self, timeout: float = 5.0) -> None:
        """Let the queues drain, then end the threads."""
        for subscriber in self._subscribers:
            subscriber.close(timeout)
        self.is_active = False

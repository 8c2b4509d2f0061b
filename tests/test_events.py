"""The event bus: order, filters, overflow, failing subscribers."""

from __future__ import annotations

import threading
import time

import msgspec
import pytest

from core.events import (
    MAX_FAILURES,
    Event,
    EventBatch,
    EventBus,
    RequestFinished,
    RequestPreempted,
    RequestQueued,
    SubscriberDropped,
    Subscription,
    WorkerLost,
)


class Recorder:
    def __init__(self) -> None:
        self.batches: list[EventBatch] = []

    def __call__(self, batch: EventBatch) -> None:
        self.batches.append(batch)

    @property
    def events(self) -> list[Event]:
        return [event for batch in self.batches for event in batch.events]


class Gate(Recorder):
    """Holds its thread until it is opened."""

    def __init__(self) -> None:
        super().__init__()
        self.entered = threading.Event()
        self.opened = threading.Event()

    def __call__(self, batch: EventBatch) -> None:
        self.entered.set()
        assert self.opened.wait(5)
        super().__call__(batch)


def queued(name: str) -> RequestQueued:
    return RequestQueued(name, 1)


def test_batches_arrive_in_order_with_consecutive_numbers() -> None:
    recorder = Recorder()
    bus = EventBus([Subscription("r", recorder)])
    for step in range(50):
        bus.publish([queued(str(step))], step)
    assert bus.flush()
    assert [b.seq for b in recorder.batches] == list(range(50))
    assert [b.step for b in recorder.batches] == list(range(50))
    assert recorder.events == [queued(str(step)) for step in range(50)]
    assert abs(recorder.batches[-1].time - time.time()) < 60
    bus.close()


def test_a_subscriber_gets_only_the_types_it_wants() -> None:
    wanted, everything = Recorder(), Recorder()
    bus = EventBus([Subscription("w", wanted, (RequestPreempted,)), Subscription("e", everything)])
    bus.publish([queued("a"), RequestPreempted("a", 3)], 0)
    bus.publish([queued("b")], 1)
    bus.flush()
    assert wanted.events == [RequestPreempted("a", 3)]
    assert len(everything.events) == 3
    assert bus.wants(RequestFinished)
    bus.close()


def test_what_nobody_wants_need_not_be_built() -> None:
    bus = EventBus([Subscription("w", Recorder(), (WorkerLost,))])
    assert bus.wants(WorkerLost)
    assert bus.wants(RequestQueued, WorkerLost)
    assert not bus.wants(RequestQueued)
    bus.close()


def test_without_subscribers_nothing_happens() -> None:
    bus = EventBus()
    assert not bus.is_active
    assert not bus.wants(RequestQueued)
    bus.note(queued("a"))
    bus.publish([queued("b")], 0)
    assert bus.flush()
    bus.close()


def test_full_queue_drops_the_oldest_and_counts_it() -> None:
    gate = Gate()
    bus = EventBus([Subscription("slow", gate, capacity=2)])
    bus.publish([queued("first")], 0)
    assert gate.entered.wait(5)
    for step in range(1, 6):
        bus.publish([queued(str(step))], step)
    assert not bus.flush(timeout=0.01)
    gate.opened.set()
    assert bus.flush()
    assert [e.request_id for e in gate.events] == ["first", "4", "5"]  # type: ignore[attr-defined]
    assert bus.dropped() == {"slow": 3}
    assert gate.batches[-1].seq - gate.batches[0].seq > len(gate.batches) - 1, "the gap shows"
    bus.close()


def test_block_policy_waits_for_room() -> None:
    gate = Gate()
    bus = EventBus([Subscription("slow", gate, policy="block", capacity=1)])
    bus.publish([queued("0")], 0)
    assert gate.entered.wait(5)
    bus.publish([queued("1")], 1)
    threading.Timer(0.05, gate.opened.set).start()
    before = time.monotonic()
    bus.publish([queued("2")], 2)
    assert time.monotonic() - before > 0.01
    bus.flush()
    assert [e.request_id for e in gate.events] == ["0", "1", "2"]  # type: ignore[attr-defined]
    assert bus.dropped() == {"slow": 0}
    bus.close()


def test_failing_subscriber_is_switched_off_and_the_others_are_told() -> None:
    recorder = Recorder()

    def broken(batch: EventBatch) -> None:
        raise ValueError("no good")

    bus = EventBus([Subscription("broken", broken, policy="block"), Subscription("fine", recorder)])
    for step in range(MAX_FAILURES + 2):
        bus.publish([queued(str(step))], step)
        bus.flush()
    dropped = [e for e in recorder.events if isinstance(e, SubscriberDropped)]
    assert dropped == [SubscriberDropped("broken", "ValueError: no good")]
    assert len(recorder.events) == MAX_FAILURES + 3
    assert bus.flush(timeout=1)
    bus.close()


def test_queue_of_a_subscriber_that_was_switched_off_is_emptied() -> None:
    gate = Gate()

    def broken(batch: EventBatch) -> None:
        gate(batch)
        raise ValueError("no good")

    bus = EventBus([Subscription("broken", broken)])
    bus.publish([queued("first")], 0)
    assert gate.entered.wait(5)
    for step in range(1, 8):
        bus.publish([queued(str(step))], step)
    gate.opened.set()
    assert bus.flush()
    assert len(gate.batches) == MAX_FAILURES
    bus.close()


def test_close_lets_the_queue_drain_first() -> None:
    recorder = Recorder()
    bus = EventBus([Subscription("r", recorder)])
    for step in range(20):
        bus.publish([queued(str(step))], step)
    bus.close()
    assert len(recorder.events) == 20
    bus.publish([queued("late")], 99)
    assert len(recorder.events) == 20


def test_events_are_immutable_and_travel_as_messages() -> None:
    event = RequestPreempted("a", 3)
    with pytest.raises(AttributeError):
        event.num_computed = 4  # type: ignore[misc]
    wire = msgspec.msgpack.encode(event)
    assert msgspec.msgpack.decode(wire, type=RequestPreempted | RequestQueued) == event

from __future__ import annotations

import json
from types import SimpleNamespace

import jsonl_events as plugin
import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from core.events import (
    EVENT_TYPES,
    AnyEvent,
    EngineStarted,
    EngineStopping,
    EventBatch,
    EventBus,
    FirstToken,
    StepCompleted,
)
from core.testing import PluginConformance
from core.testing.events import SubscriberConformance, events_of


class TestPlugin(PluginConformance):
    module = "jsonl_events"


class TestSubscriber(SubscriberConformance):
    module = "jsonl_events"
    settings = settings(SubscriberConformance.settings, max_examples=20)

    @pytest.fixture(autouse=True)
    def path(self, tmp_path):
        bound = plugin.JsonlSettings(path=str(tmp_path / "x"), events=tuple(EVENT_TYPES))
        self.plugin_settings = {"any.name": bound}


@pytest.fixture
def subscribe(tmp_path):
    """Subscribe as an engine does, with some settings; the path is free to choose."""

    def make(path=tmp_path / "events.jsonl", **settings):
        bound = plugin.JsonlSettings(path=str(path), **settings)
        return plugin.core_subscribe(SimpleNamespace(settings={"any.name": bound}))

    return make


def read(tmp_path):
    return [json.loads(line) for line in (tmp_path / "events.jsonl").read_bytes().splitlines()]


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(batch=st.lists(st.one_of(map(events_of, EVENT_TYPES.values())), min_size=1, max_size=8))
def test_every_event_can_be_read_back(batch, subscribe, tmp_path):
    (tmp_path / "events.jsonl").unlink(missing_ok=True)
    [subscription] = subscribe(events=tuple(EVENT_TYPES))
    subscription.handler(EventBatch(7, 3, 1.5, batch))
    found = read(tmp_path)
    assert [line.pop("time") for line in found] == [1.5] * len(batch)
    assert msgspec.convert(found, list[AnyEvent]) == batch


def publish(subscriptions, *batches):
    bus = EventBus(subscriptions)
    for batch in batches:
        bus.publish(batch, step=0)
    bus.close()


def test_writes_what_was_asked_for_and_nothing_else(subscribe, tmp_path):
    subscriptions = subscribe(events=("FirstToken",))
    publish(
        subscriptions,
        [EngineStarted(1, 16), FirstToken("a", 0.5)],
        [EngineStarted(1, 16)],
        [EngineStopping("shutdown")],
    )
    [line] = read(tmp_path)
    assert line["type"] == "FirstToken"
    assert line["request_id"] == "a"


def test_what_was_drawn_is_written_only_on_demand():
    assert StepCompleted.__name__ not in plugin.JsonlSettings().events


def test_an_older_file_is_continued(subscribe, tmp_path):
    for _ in range(2):
        publish(subscribe(), [EngineStarted(4, 16)], [EngineStopping("shutdown")])
    assert [line["type"] for line in read(tmp_path)] == ["EngineStarted", "EngineStopping"] * 2


def test_each_batch_is_in_the_file_before_the_next_one_comes(subscribe, tmp_path):
    [subscription] = subscribe()
    subscription.handler(EventBatch(0, 0, 0.0, [EngineStarted(4, 16)]))
    assert len(read(tmp_path)) == 1


def test_a_file_that_was_moved_away_is_begun_anew(subscribe, tmp_path):
    [subscription] = subscribe()
    subscription.handler(EventBatch(0, 0, 0.0, [EngineStarted(4, 16)]))
    (tmp_path / "events.jsonl").rename(tmp_path / "events.old")
    subscription.handler(EventBatch(1, 0, 0.0, [EngineStopping("shutdown")]))
    assert [line["type"] for line in read(tmp_path)] == ["EngineStopping"]


def test_no_events_are_none(subscribe):
    assert subscribe(events=()) == []


def test_a_file_that_cannot_be_written_stops_the_start(subscribe, tmp_path):
    with pytest.raises(IsADirectoryError):
        subscribe(path=tmp_path)


def test_objects_to_unknown_events_and_to_folders_that_are_not_there(tmp_path):
    bound = plugin.JsonlSettings(path=str(tmp_path / "no" / "x"), events=("FirstTokn", "FirstToken"))
    folder, event = plugin.core_check_plan(SimpleNamespace(settings={"any.name": bound}))
    assert str(tmp_path / "no") in folder
    assert "'FirstTokn'" in event


def test_no_field_of_an_event_is_called_as_those_that_come_on_top():
    names = {name for kind in EVENT_TYPES.values() for name in kind.__struct_fields__}
    assert names.isdisjoint({"time", "type"})

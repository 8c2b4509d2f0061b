"""The kit for subscribers catches the mistakes that are made in them."""

from __future__ import annotations

import threading

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from core.events import (
    EVENT_TYPES,
    EngineStarted,
    Event,
    RequestFinished,
    StepCompleted,
    StepFailed,
    Subscription,
)
from core.testing.events import SubscriberConformance, events_of
from core.testing.plugin import PluginSite

TAKEN = "test_every_event_is_taken"
ORDER = "test_any_order_of_events_is_taken"
GAPS = "test_gaps_and_clocks_are_no_matter"
INTACT = "test_events_stay_as_they_are"
COMPLETE = "test_subscriptions_are_complete"
BUS = "test_the_bus_can_run_it"
TWO = "test_subscribers_of_two_engines_are_two"


class Sink:
    def __init__(self, bug=""):
        self.bug, self.seen, self.open, self.last = bug, 0, set(), 0.0

    def __call__(self, batch):
        if self.bug == "knows no gaps" and batch.seq != self.seen:
            raise ValueError("a batch is missing")
        if self.bug == "wants the main thread" and threading.current_thread().name != "MainThread":
            raise RuntimeError("another thread")
        if self.bug == "trusts the clock" and batch.time < self.last:
            raise ValueError("time goes backwards")
        self.last = batch.time
        self.seen += 1
        for event in batch.events:
            self.take(event)

    def take(self, event):
        match event:
            case StepFailed() if self.bug == "forgets a type":
                raise KeyError(type(event))
            case RequestFinished() if self.bug == "divides by duration":
                _ = event.num_output / event.duration
            case RequestFinished() if self.bug == "counts on the start":
                self.open.remove(event.request_id)
            case StepCompleted() if self.bug == "takes the first token":
                _ = event.tokens[0]
            case StepCompleted() if self.bug == "sorts in place":
                event.tokens.append(0)
            case _:
                return


SHARED = Sink()


class Buggy(SubscriberConformance):
    __test__ = False
    settings = settings(
        SubscriberConformance.settings,
        phases=[Phase.generate],
        derandomize=True,
        database=None,
        report_multiple_bugs=False,
    )

    def __init__(self, bug="", **changes):
        self.bug, self.changes = bug, changes

    def make_subscriptions(self):
        sink = SHARED if self.bug == "is one for all" else Sink(self.bug)
        return [Subscription(**{"name": "sink", "handler": sink} | self.changes)]


@pytest.mark.parametrize(
    ("bug", "law", "message"),
    [
        ("forgets a type", TAKEN, "raises KeyError.* at StepFailed"),
        ("divides by duration", TAKEN, "ZeroDivisionError"),
        ("counts on the start", TAKEN, "KeyError"),
        ("counts on the start", ORDER, "KeyError"),
        ("takes the first token", ORDER, "IndexError"),
        ("knows no gaps", GAPS, "a batch is missing"),
        ("trusts the clock", GAPS, "time goes backwards"),
        ("sorts in place", INTACT, "changes the events"),
        ("wants the main thread", BUS, "raises RuntimeError.* on its own thread"),
        ("is one for all", TWO, "one handler for two engines"),
    ],
)
def test_planted_bug_is_caught(bug, law, message):
    with pytest.raises(AssertionError, match=message):
        getattr(Buggy(bug), law)()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": ""}, "no name"),
        ({"handler": None}, "is no handler"),
        ({"policy": "drop_newest"}, "policy 'drop_newest'"),
        ({"capacity": 0}, "capacity 0"),
        ({"types": (int,)}, "are no events"),
    ],
)
def test_an_incomplete_subscription_is_caught(changes, message):
    with pytest.raises(AssertionError, match=message):
        getattr(Buggy(**changes), COMPLETE)()


def test_two_of_one_name_are_caught():
    kit = Buggy()
    kit.make_subscriptions = lambda: [Subscription("x", Sink()), Subscription("x", Sink())]
    with pytest.raises(AssertionError, match="two subscriptions have one name"):
        getattr(kit, COMPLETE)()


@pytest.mark.parametrize("law", [TAKEN, ORDER, GAPS, INTACT, COMPLETE, BUS, TWO])
def test_a_right_subscriber_passes(law):
    getattr(Buggy(), law)()


def test_only_wanted_types_are_delivered():
    kit, seen = Buggy(types=(EngineStarted, StepFailed)), set()
    kit.check(lambda _, batches: seen.update(type(e) for events in batches for e in events))
    assert seen == {EngineStarted, StepFailed}


def test_subscriptions_of_a_module_are_made_with_its_settings(tmp_path):
    with PluginSite(tmp_path / "site") as site:
        source = """
        from core.events import Subscription
        def core_subscribe(plan):
            yield Subscription(plan.settings["x"] + plan.config.model, print)
        """
        kit = SubscriberConformance()
        kit.module, kit.plugin_settings = site.module("acme_sink", source), {"x": "to "}
        assert [subscription.name for subscription in kit.make_subscriptions()] == ["to tiny"]


def test_kit_without_a_module_says_what_is_missing():
    with pytest.raises(NotImplementedError, match="module"):
        SubscriberConformance().make_subscriptions()


@given(st.data())
@settings(max_examples=30, deadline=None)
def test_every_type_can_be_generated(data):
    for kind in EVENT_TYPES.values():
        event = data.draw(events_of(kind))
        assert isinstance(event, kind)
        assert isinstance(event, Event)

"""Conformance of subscribers: what everything that `core_subscribe` returns must stand.

Subclass `SubscriberConformance` in a test module and name the plugin's module::

    class TestAcmeSink(SubscriberConformance):
        module = "acme.events"
        plugin_settings = {"observe.acme": AcmeSettings(path=...)}

A subscriber's queue may overflow, so any event may come without those that belong before it.  It is
fed events of all types that it wants, with any values, in any order, alone and together.
"""

from __future__ import annotations

import importlib
import typing
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar, Final

import msgspec
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from core.config import EngineConfig
from core.events import EVENT_TYPES, Event, EventBatch, EventBus, Subscription
from core.request import FinishReason

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

POLICIES: Final = ("drop_oldest", "block")
_VALUES: Final[dict[Any, st.SearchStrategy[Any]]] = {
    str: st.text(max_size=12),
    int: st.sampled_from([0, 1, 2**40]) | st.integers(0, 5000),
    float: st.sampled_from([0.0, 1e-9, 1e9]) | st.floats(0.0, 1e4),
    bool: st.booleans(),
}
_REASONS: Final = st.sampled_from([str(reason) for reason in FinishReason])


def events_of(kind: type[Event]) -> st.SearchStrategy[Event]:
    """Generate events of one type; numbers are not negative, ids are often the same."""
    fields = {item.name: _value_of(item.type) for item in msgspec.structs.fields(kind)}
    if "request_id" in fields:
        fields["request_id"] = st.sampled_from(["a", "b", "c"]) | st.text(max_size=8)
    if "reason" in fields and "request_id" in fields:
        fields["reason"] = _REASONS
    return st.builds(kind, **fields)


def _value_of(annotation: Any) -> st.SearchStrategy[Any]:
    """Choose values of a field by its type."""
    if annotation in _VALUES:
        return _VALUES[annotation]
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is list:
        return st.lists(_value_of(arguments[0]), max_size=4)
    if origin is dict:
        return st.dictionaries(*map(_value_of, arguments), max_size=3)
    return st.from_type(annotation)


class SubscriberConformance:
    """The tests; subclass it and set `module`, or override `make_subscriptions`."""

    module: ClassVar[str] = ""
    """Import path of a plugin with `core_subscribe`."""
    plugin_settings: ClassVar[Mapping[str, Any]] = {}
    """Bound settings by plugin name: what `plan.settings` holds."""
    settings: ClassVar[hypothesis_settings] = hypothesis_settings(
        max_examples=60, deadline=None, suppress_health_check=list(HealthCheck)
    )

    # --- what subclasses may change ----------------------------------------------------------------

    def make_subscriptions(self) -> list[Subscription]:
        """Let the plugin subscribe, to an engine of its own."""
        if not self.module:
            raise NotImplementedError(f"{type(self).__name__} sets no module and no make_subscriptions")
        plugin: Any = importlib.import_module(self.module)
        return list(plugin.core_subscribe(self.make_plan()))

    def make_plan(self) -> Any:
        """Make what the hook is given: of the plan only what subscribers have a use for."""
        return SimpleNamespace(
            config=EngineConfig(model="tiny"), settings=dict(self.plugin_settings), model_path="tiny"
        )

    # --- machinery -----------------------------------------------------------------------------------

    def wanted(self, subscription: Subscription) -> list[type[Event]]:
        """List the types of events that a subscription gets."""
        kinds = subscription.types or (Event,)
        return [kind for kind in EVENT_TYPES.values() if issubclass(kind, kinds)]

    def check(self, law: Callable[[Subscription, Sequence[Sequence[Event]]], None]) -> None:
        """Try a law on each subscription, fresh each time, with generated batches of events."""
        for index, usual in enumerate(self.make_subscriptions()):
            kinds = [events_of(kind) for kind in self.wanted(usual)]
            self._try_batches(index, st.lists(st.one_of(kinds), min_size=1, max_size=6), law)

    def _try_batches(
        self,
        index: int,
        batch: st.SearchStrategy[list[Event]],
        law: Callable[[Subscription, Sequence[Sequence[Event]]], None],
    ) -> None:
        @self.settings
        @given(batches=st.lists(batch, max_size=6))
        def attempt(batches: list[list[Event]]) -> None:
            law(self.make_subscriptions()[index], batches)

        attempt()

    # --- the laws ----------------------------------------------------------------------------------

    def test_subscriptions_are_complete(self) -> None:
        """Each has a name of its own, a handler, known types and room for a batch."""
        subscriptions = self.make_subscriptions()
        names = [subscription.name for subscription in subscriptions]
        assert all(names), f"a subscription has no name: {names}"
        assert len(set(names)) == len(names), f"two subscriptions have one name: {names}"
        for subscription in subscriptions:
            what = f"subscription {subscription.name!r}"
            assert callable(subscription.handler), f"{what}: {subscription.handler!r} is no handler"
            assert subscription.policy in POLICIES, f"{what}: policy {subscription.policy!r}"
            assert subscription.capacity >= 1, f"{what}: capacity {subscription.capacity}"
            unknown = [kind for kind in subscription.types if not self._is_known(kind)]
            assert not unknown, f"{what}: {unknown} are no events, and never come"

    def _is_known(self, kind: object) -> bool:
        return isinstance(kind, type) and issubclass(kind, Event)

    def test_every_event_is_taken(self) -> None:
        """One event of each wanted type, alone, in a subscriber that has seen nothing else."""
        for index, usual in enumerate(self.make_subscriptions()):
            for kind in self.wanted(usual):
                self._try_type(index, kind)

    def _try_type(self, index: int, kind: type[Event]) -> None:
        @hypothesis_settings(self.settings, max_examples=min(10, self.settings.max_examples))
        @given(event=events_of(kind))
        def attempt(event: Event) -> None:
            deliver(self.make_subscriptions()[index], [[event]])

        attempt()

    def test_any_order_of_events_is_taken(self) -> None:
        """Queues overflow: no event can count on another one before it."""
        self.check(deliver)

    def test_gaps_and_clocks_are_no_matter(self) -> None:
        """Numbers of batches jump where some were lost, and a clock may be set back."""

        def law(subscription: Subscription, batches: Sequence[Sequence[Event]]) -> None:
            deliver(subscription, batches, step=17, at=1e9, clock=-60.0)

        self.check(law)

    def test_events_stay_as_they_are(self) -> None:
        """Others get the same objects."""

        def law(subscription: Subscription, batches: Sequence[Sequence[Event]]) -> None:
            before = msgspec.json.encode(batches)
            deliver(subscription, batches)
            assert msgspec.json.encode(batches) == before, (
                f"subscription {subscription.name!r} changes the events that it gets"
            )

        self.check(law)

    def test_subscribers_of_two_engines_are_two(self) -> None:
        """Each engine of a process has its own."""
        for first, second in zip(self.make_subscriptions(), self.make_subscriptions(), strict=True):
            assert first.handler is not second.handler, (
                f"subscription {first.name!r} has one handler for two engines"
            )

    def test_the_bus_can_run_it(self) -> None:
        """On a thread of its own, to the end of the engine."""
        errors: list[str] = []
        subscriptions = [_watch(s, errors) for s in self.make_subscriptions()]
        bus = EventBus(subscriptions)
        for step, kind in enumerate(EVENT_TYPES.values()):
            bus.publish([_example(kind)], step)
        is_done = bus.flush(30.0)
        bus.close(30.0)
        assert is_done, "a handler does not return"
        assert not errors, "; ".join(errors)


def _watch(subscription: Subscription, errors: list[str]) -> Subscription:
    """Note what a handler raises on the thread of the bus."""

    def handle(batch: EventBatch, /) -> None:
        try:
            subscription.handler(batch)
        except Exception as error:  # noqa: BLE001  told at the end
            errors.append(f"subscription {subscription.name!r} raises {error!r} on its own thread")

    return msgspec.structs.replace(subscription, handler=handle, policy="block")


def deliver(
    subscription: Subscription,
    batches: Sequence[Sequence[Event]],
    *,
    step: int = 1,
    at: float = 1_700_000_000.0,
    clock: float = 0.25,
) -> None:
    """Give batches to a handler as the bus does, on this thread.

    :param step: by which numbers of batches and steps grow.
    :param at: time of the first, in seconds since the epoch.
    :param clock: seconds from one to the next.
    """
    for index, events in enumerate(batches):
        batch = EventBatch(index * step, index * step, at + index * clock, list(events))
        try:
            subscription.handler(batch)
        except Exception as error:
            kinds = ", ".join(type(event).__name__ for event in events)
            raise AssertionError(
                f"subscription {subscription.name!r} raises {error!r} at {kinds}: {events}"
            ) from error


def _example(kind: type[Event]) -> Event:
    """Make a simple event of a type."""
    values = {str: "a", int: 1, float: 0.5, bool: True}
    fields: dict[str, Any] = {}
    for item in msgspec.structs.fields(kind):
        origin = typing.get_origin(item.type)
        fields[item.name] = values[item.type] if origin is None else origin()
    if "reason" in fields:
        fields["reason"] = str(FinishReason.STOP)
    return kind(**fields)

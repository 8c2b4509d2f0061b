from __future__ import annotations

from types import SimpleNamespace

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from core.events import (
    BlocksEvicted,
    EngineStarted,
    EngineStopping,
    EventBatch,
    EventBus,
    FirstToken,
    RequestFinished,
    RequestPreempted,
    RequestQueued,
    RequestRefused,
    RequestScheduled,
    StepCompleted,
    StepFailed,
    SubscriberDropped,
    WorkerLost,
)
from core.pluginhost import PluginHost, Selected
from plugins.observe import log as plugin


def make_plan(*, enable_log_requests=False, disable_log_stats=False, **settings):
    flags = {"enable_log_requests": enable_log_requests, "disable_log_stats": disable_log_stats}
    return SimpleNamespace(
        settings={"observe.log": plugin.LogSettings(**settings)}, config=SimpleNamespace(**flags)
    )


def test_flags_stand_for_settings():
    def types(**settings):
        [subscription] = plugin.core_subscribe(make_plan(**settings))
        return subscription.types

    assert types(enable_log_requests=True) == types(requests=True) != types()
    assert types(disable_log_stats=True) == types(interval=0.0) != types()


def finished(reason="stop", error=""):
    return RequestFinished("r1", reason, 5, 3, 0, 0, 1.23456, error)


def step(number=1, *, prompt=0, decodes=1, running=1, waiting=0, usage=0.5, duration=0.5):
    tokens = [7] * decodes
    ids = ["r"] * decodes
    total = prompt + decodes
    return StepCompleted(number, total, decodes, running, waiting, usage, duration, ids, tokens)


@pytest.fixture(autouse=True)
def _every_level():
    """Forget what an engine of another test in this process has set."""
    structlog.reset_defaults()


def lines_of(batches, **settings):
    """Feed (time, events) to a fresh subscriber and return what it logs."""
    [subscription] = plugin.core_subscribe(make_plan(**settings))
    with capture_logs() as lines:
        for seq, (time, events) in enumerate(batches):
            wanted = [event for event in events if isinstance(event, subscription.types)]
            if wanted:
                subscription.handler(EventBatch(seq, seq, time, wanted))
    return lines


ALWAYS = [
    (EngineStarted(10, 16), "info", "engine started"),
    (EngineStopping("shutdown"), "info", "engine stopping"),
    (RequestRefused("r1", "too long"), "warning", "request refused"),
    (finished("error", "boom"), "error", "request failed"),
    (StepFailed(3, "boom", 2), "error", "step failed"),
    (WorkerLost(1, "silent"), "error", "worker lost"),
    (SubscriberDropped("x", "boom"), "error", "event subscriber switched off"),
]
NEVER = [RequestQueued("r1", 5), BlocksEvicted([1])]


@pytest.mark.parametrize("has_requests", [False, True])
@pytest.mark.parametrize("interval", [0.0, 10.0])
@pytest.mark.parametrize(("event", "level", "text"), ALWAYS)
def test_failures_and_the_engines_life_are_always_written(event, level, text, interval, has_requests):
    [line] = lines_of([(0.0, [event])], interval=interval, requests=has_requests)
    assert (line["log_level"], line["event"]) == (level, text)
    for name in event.__struct_fields__:
        value = getattr(event, name)
        assert line.get(name, "") == (round(value, 3) if isinstance(value, float) else value)


def test_requests_get_lines_only_when_asked_for():
    batches = [(0.0, [RequestPreempted("r1", 4), finished(), finished("abort"), finished("length")])]
    assert lines_of(batches) == []
    assert lines_of(batches, interval=0) == []
    lines = lines_of(batches, requests=True)
    assert [line["event"] for line in lines] == ["request preempted", *["request finished"] * 3]
    assert {line["log_level"] for line in lines} == {"info"}
    assert lines[1]["duration"] == 1.235
    assert "error" not in lines[1]


def request(name, output, *, queue=0.25, first=0.5, duration=1.5, reason="stop"):
    return [
        RequestScheduled(name, 2, queue),
        FirstToken(name, first),
        RequestPreempted(name, 6),
        RequestScheduled(name, 4, 1.25),
        RequestFinished(name, reason, 5, output, 2, 1, duration),
    ]


@pytest.mark.parametrize("reason", ["stop", "length", "abort", "error"])
def test_the_line_of_a_request_says_how_fast_it_was(reason):
    events = request("r1", 11, reason=reason)
    *_, line = lines_of([(1.0, events[:3]), (2.0, events[3:])], requests=True)
    assert line == {
        "event": "request failed" if reason == "error" else "request finished",
        "log_level": "error" if reason == "error" else "info",
        "request_id": "r1",
        "reason": reason,
        "num_prompt": 5,
        "num_output": 11,
        "num_cached": 2,
        "num_preemptions": 1,
        "duration": 1.5,
        "queue_time": 0.25,
        "time_to_first_token": 0.5,
        "tokens_per_s": 10.0,
    }


def test_a_request_without_a_second_token_has_no_speed():
    for events in (request("r1", 1, duration=0.5), request("r1", 1), request("r1", 2, duration=0.5)):
        *_, line = lines_of([(1.0, events)], requests=True)
        assert "tokens_per_s" not in line
        assert line["time_to_first_token"] == 0.5
    [line] = lines_of([(1.0, [RequestFinished("r1", "abort", 5, 0, 0, 0, 1.0)])], requests=True)
    assert not {"queue_time", "time_to_first_token", "tokens_per_s"} & line.keys()


def test_times_of_an_id_that_comes_again_are_new():
    again = [RequestFinished("r1", "abort", 5, 0, 0, 0, 1.0)]
    *_, line = lines_of([(1.0, request("r1", 11)), (2.0, again)], requests=True)
    assert "queue_time" not in line


def test_ends_that_are_lost_leave_no_more_behind_than_a_limit(monkeypatch):
    monkeypatch.setattr(plugin, "MAX_TIMED", 100)
    timings = plugin.Timings()
    for number in range(1000):
        timings.note(f"r{number}", "queue_time", float(number))
    assert len(timings._open) == 100
    assert timings.end(RequestFinished("r999", "stop", 1, 1, 0, 0, 1.0)) == {"queue_time": 999.0}
    assert timings.end(RequestFinished("r0", "stop", 1, 1, 0, 0, 1.0)) == {}


def test_nothing_else_is_even_subscribed_to():
    for interval in (0.0, 10.0):
        for has_requests in (False, True):
            [subscription] = plugin.core_subscribe(make_plan(interval=interval, requests=has_requests))
            assert not {type(event) for event in NEVER} & set(subscription.types)
            assert (StepCompleted in subscription.types) == (interval > 0)
            assert (RequestPreempted in subscription.types) == (interval > 0 or has_requests)
            assert (RequestScheduled in subscription.types) == has_requests
            assert (FirstToken in subscription.types) == has_requests


def test_statistics_come_at_most_every_interval():
    times = [100 + 0.5 * i for i in range(1, 61)]  # steps of 0.5 s from 100 to 130
    lines = lines_of([(time, [step()]) for time in times], interval=10)
    assert [line["event"] for line in lines] == ["statistics"] * 3
    for line in lines:
        assert line["output_tokens_per_s"] == 2.0
        assert line["prompt_tokens_per_s"] == 0.0


def test_statistics_count():
    batches = [
        (1.0, [step(prompt=30, decodes=2, duration=1.0)]),
        (
            2.0,
            [finished(), RequestPreempted("r2", 4), step(decodes=4, running=3, waiting=2, usage=0.25)],
        ),
        (2.0, [EngineStopping("shutdown")]),
    ]
    line, last = lines_of(batches)
    assert last["event"] == "engine stopping"
    assert line == {
        "event": "statistics",
        "log_level": "info",
        "prompt_tokens_per_s": 20.0,  # 30 in the 1.5 s in which a step was under way
        "output_tokens_per_s": 4.0,
        "running": 3,
        "waiting": 2,
        "kv_usage": 0.25,
        "finished": 1,
        "preemptions": 1,
    }


def test_an_idle_engine_writes_nothing_and_idle_time_slows_nothing_down():
    batches = [(1.0, [step(duration=1.0)]), (3600.0, [step(duration=1.0)])]
    [line] = lines_of(batches, interval=10)
    assert line["output_tokens_per_s"] == 1.0
    assert lines_of([(0.0, [EngineStarted(1, 1)]), (99.0, [EngineStopping("x")])])[-1]["event"] == (
        "engine stopping"
    )


def test_a_line_starts_afresh_after_the_one_before():
    batches = [(20.0, [finished(), step(duration=15.0)]), (40.0, [step(decodes=0, duration=15.0)])]
    first, second = lines_of(batches, interval=10)
    assert (first["finished"], second["finished"]) == (1, 0)
    assert second["output_tokens_per_s"] == 0.0


SPANS = st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), min_size=1, max_size=30)


@given(SPANS, st.integers(0, 9), st.integers(0, 99))
def test_no_token_is_lost_and_busy_time_is_the_union_of_the_steps(gaps, decodes, prompt):
    statistics = plugin.Statistics()
    begin = end = 1000  # steps are submitted in order, and their results are applied in order
    busy = set()
    for begin_gap, end_gap in gaps:
        begin += begin_gap
        end = max(begin, end + end_gap)
        busy |= set(range(begin, end))
        statistics.add_step(step(decodes=decodes, prompt=prompt, duration=end - begin), end)
    assert statistics.busy == len(busy)
    assert statistics.num_output_tokens == decodes * len(gaps)
    assert statistics.num_prompt_tokens == prompt * len(gaps)
    assert statistics.begin == 1000 + gaps[0][0]


@pytest.mark.parametrize(
    ("interval", "is_fine"), [(0, True), (0.5, True), (-1, False), (float("inf"), False)]
)
def test_an_impossible_interval_is_an_objection(interval, is_fine):
    objections = list(plugin.core_check_plan(make_plan(interval=interval)))
    assert (objections == []) == is_fine
    assert all("--set observe.log.interval" in objection for objection in objections)


def test_it_is_a_plugin_of_the_bus():
    host = PluginHost.start([Selected("observe.log", "test")])
    assert host.register_settings() == {"observe.log": plugin.LogSettings}
    with capture_logs() as lines:
        bus = EventBus(host.subscribe(make_plan()))
        bus.publish([RequestQueued("r1", 5), finished("error", "boom")], step=1)
        assert bus.flush()
        bus.close()
    assert [line["event"] for line in lines] == ["request failed"]

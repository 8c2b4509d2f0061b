"""Metrics against an oracle that keeps every value, the text formats read back, and the dashboard."""

from __future__ import annotations

import json
import math
import random
import re
import threading
from collections import Counter, defaultdict, deque
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.openmetrics.parser import text_string_to_metric_families as read_openmetrics
from prometheus_client.parser import text_string_to_metric_families as read_text
from starlette.applications import Starlette

from core.blocks import BlockPool
from core.engine import EngineCore
from core.events import (
    EVENT_TYPES,
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
    Subscription,
    WorkerLost,
)
from core.kv_cache import PagedKVCache
from core.messages import Finish, Submit
from core.request import FinishReason, SamplingParams
from core.scheduler import TokenBudgetScheduler
from core.status import Phase, Status
from core.testing import PluginConformance
from core.testing.plugin import watch_import
from core.testing.scheduler import SimulatedDevice
from plugins.observe import prometheus as plugin
from plugins.observe.prometheus import dashboard
from plugins.observe.prometheus.catalogue import CATALOGUE, OTHER
from plugins.observe.prometheus.exposition import make_registry, render
from plugins.observe.prometheus.metrics import Histogram, Metrics

FOLDER = Path(plugin.__file__).parent
HISTOGRAMS = {metric.name: metric for metric in CATALOGUE if metric.kind == "histogram"}
TICK = 1 / 64  # sums of such times are exact


class FakeService:
    def __init__(self, **settings):
        self.model_names = ("org/model", "alias")
        self.status = Status(Phase.READY)
        self.num_open = 0
        self.settings = {plugin.NAME: plugin.PrometheusSettings(**settings)}
        self.subscriptions = []

    def subscribe(self, subscription):
        self.subscriptions.append(subscription)


def feed(metrics, *events, seq=0, time=0.0):
    metrics(EventBatch(seq, 0, time, list(events)))


def step(ids=(), *, number=0, running=1, waiting=0, tokens=1, usage=0.5, duration=TICK):
    ids = list(ids)
    return StepCompleted(
        number, tokens, len(ids), running, waiting, usage, duration, ids, [7] * len(ids)
    )


def number_of(metrics, name, *labels):
    return metrics.snapshot().numbers[name][labels]


def count_of(metrics, name):
    return sum(metrics.snapshot().histograms[name].counts)


def scrape(metrics, *, accept="", service=None, vllm_names=True):
    """Read back what a scraper gets: (name, labels) to value, without the process's own."""
    registry = make_registry(metrics, service or FakeService(), vllm_names=vllm_names)
    body, content_type = render(registry, accept)
    read = read_openmetrics if "openmetrics" in content_type else read_text
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in read(body.decode())
        for sample in family.samples
        if ":" in sample.name
    }


# --- histograms -------------------------------------------------------------------------------------


@given(
    st.lists(st.integers(-5, 30).map(float), unique=True, min_size=1, max_size=6).map(sorted),
    st.lists(st.tuples(st.integers(-6, 31), st.integers(1, 4)), max_size=20),
)
def test_a_histogram_counts_what_is_at_most_its_bounds(bounds, values):
    histogram = Histogram(bounds)
    for value, count in values:
        histogram.add(value, count)
    flat = [value for value, count in values for _ in range(count)]
    for index, bound in enumerate((*bounds, math.inf)):
        assert sum(histogram.counts[: index + 1]) == sum(value <= bound for value in flat)
    assert histogram.total == sum(flat)


def test_bounds_ascend_and_are_finite():
    for metric in CATALOGUE:
        assert (metric.kind == "histogram") == bool(metric.bounds)
        assert list(metric.bounds) == sorted(set(metric.bounds))
        assert all(0 < bound < math.inf for bound in metric.bounds)
    assert len({metric.name for metric in CATALOGUE}) == len(CATALOGUE)


def test_buckets_are_those_that_dashboards_know():
    first = HISTOGRAMS["time_to_first_token_seconds"].bounds
    assert (len(first), first[0], first[-1]) == (22, 0.001, 2560.0)
    token = [b for b in HISTOGRAMS["inter_token_latency_seconds"].bounds if b >= 0.01]
    assert (len(token), token[-1]) == (19, 80.0)
    whole = HISTOGRAMS["e2e_request_latency_seconds"].bounds
    assert (len(whole), whole[0], whole[-1]) == (21, 0.3, 7680.0)
    lengths = HISTOGRAMS["request_prompt_tokens"].bounds
    assert lengths[:6] == (1, 2, 5, 10, 20, 50)
    assert HISTOGRAMS["iteration_tokens_total"].bounds == (1, *(2**power for power in range(3, 15)))


# --- events, against an oracle ----------------------------------------------------------------------


class World:
    """An engine that plays dice, and writes down every single value while it does.

    Batches are ordered as `core.engine` orders them: what happened before the step, first tokens, ends,
    and the step itself last.
    """

    def __init__(self, rng):
        self.rng = rng
        self.values = defaultdict(list)  # of each histogram
        self.counts = Counter()
        self.reasons = Counter()
        self.waiting, self.running = [], []
        self.now = 1000.0
        self.names = [f"r{number}" for number in range(8)]  # few, so that ids come back

    def pick(self, sequences):
        return self.rng.choice(sequences) if sequences else None

    def queue(self):
        used = {sequence.name for sequence in self.waiting + self.running}
        name = self.pick([name for name in self.names if name not in used])
        if name is None:
            return []
        prompt = self.rng.randint(1, 3000)
        new = SimpleNamespace(
            name=name, prompt=prompt, start=self.now, cached=None, queued=None, token_times=[]
        )
        self.waiting.append(new)
        return [RequestQueued(name, prompt)]

    def schedule(self):
        sequence = self.pick(self.waiting)
        if sequence is None:
            return []
        self.waiting.remove(sequence)
        self.running.append(sequence)
        cached = self.rng.randrange(sequence.prompt)
        if sequence.queued is None:
            sequence.cached, sequence.queued = cached, self.now - sequence.start
            self.values["request_queue_time_seconds"].append(sequence.queued)
            self.counts["prefix_cache_queries"] += sequence.prompt
            self.counts["prefix_cache_hits"] += cached
        return [RequestScheduled(sequence.name, cached, self.now - sequence.start)]

    def preempt(self):
        sequence = self.pick(self.running)
        if sequence is None:
            return []
        self.running.remove(sequence)
        self.waiting.append(sequence)
        self.counts["num_preemptions"] += 1
        return [RequestPreempted(sequence.name, 1)]

    def abort(self):
        sequence = self.pick(self.waiting + self.running)
        return [] if sequence is None else [self.end(sequence, FinishReason.ABORT)]

    def other(self):
        kind = self.rng.randrange(4)
        if kind == 0:
            self.counts["requests_refused"] += 1
            return [RequestRefused("x", "no")]
        if kind == 1:
            blocks = [1] * self.rng.randint(1, 5)
            self.counts["kv_blocks_evicted"] += len(blocks)
            return [BlocksEvicted(blocks)]
        if kind == 2:
            self.counts["subscribers_dropped"] += 1
            return [SubscriberDropped("x", "no")]
        return [WorkerLost(0, "no")]

    def end(self, sequence, reason):
        for group in (self.waiting, self.running):
            if sequence in group:
                group.remove(sequence)
        times, duration = sequence.token_times, self.now - sequence.start
        self.reasons[str(reason)] += 1
        if reason in (FinishReason.STOP, FinishReason.LENGTH):
            self.values["e2e_request_latency_seconds"].append(duration)
            self.values["request_prompt_tokens"].append(sequence.prompt)
            self.values["request_generation_tokens"].append(len(times))
            self.values["request_decode_time_seconds"].append(self.now - times[0])
            if len(times) > 1:
                mean = (self.now - times[0]) / (len(times) - 1)
                self.values["request_time_per_output_token_seconds"].append(mean)
        return RequestFinished(sequence.name, str(reason), sequence.prompt, len(times), 0, 0, duration)

    def token(self, sequence):
        """Give it a token; return the event of its first one."""
        times = sequence.token_times
        self.counts["generation_tokens"] += 1
        times.append(self.now)
        if len(times) > 1:
            self.values["inter_token_latency_seconds"].append(times[-1] - times[-2])
            return []
        latency = self.now - sequence.start
        self.values["time_to_first_token_seconds"].append(latency)
        self.values["request_prefill_time_seconds"].append(latency - sequence.queued)
        self.counts["prompt_tokens"] += sequence.prompt
        self.counts["prompt_tokens_cached"] += sequence.cached
        return [FirstToken(sequence.name, latency)]

    def batch(self):
        """Return the events of one step, or of none."""
        self.now += self.rng.randint(1, 200) * TICK
        events = []
        for _ in range(self.rng.randint(0, 5)):
            actions = (self.queue, self.queue, self.schedule, self.schedule)
            events += self.rng.choice((*actions, self.preempt, self.abort, self.other))()
        fate = self.rng.random()
        if fate < 0.1:
            return events
        if fate < 0.2:
            self.counts["step_failures"] += 1
            events += [self.end(sequence, FinishReason.ERROR) for sequence in list(self.running)]
            return [*events, StepFailed(0, "boom", 1)]
        return [*events, *self.step()]

    def step(self):
        lucky = [sequence for sequence in self.running if self.rng.random() < 0.8]
        firsts = [event for sequence in lucky for event in self.token(sequence)]
        ending = [sequence for sequence in lucky if self.rng.random() < 0.2]
        ends = [self.end(s, self.rng.choice(("stop", "length", "error"))) for s in ending]
        duration, tokens = self.rng.randint(1, 99) * TICK, self.rng.randint(0, 20000)
        self.counts["steps"] += 1
        self.values["step_duration_seconds"].append(duration)
        self.values["iteration_tokens_total"].append(tokens)
        completed = step(
            [sequence.name for sequence in lucky],
            running=len(self.running),
            waiting=len(self.waiting),
            tokens=tokens,
            duration=duration,
            usage=0.25 if self.running else 0.0,
        )
        return [*firsts, *ends, completed]


def check_against(world, metrics):
    snapshot = metrics.snapshot()
    for name, metric in HISTOGRAMS.items():
        values, histogram = world.values[name], snapshot.histograms[name]
        bounds = (*metric.bounds, math.inf)
        expected = [sum(value <= bound for value in values) for bound in bounds]
        assert [sum(histogram.counts[: i + 1]) for i in range(len(bounds))] == expected, name
        assert histogram.total == pytest.approx(sum(values)), name
    counters = {m.name for m in CATALOGUE if m.kind == "counter" and not m.labels}
    assert set(world.counts) <= counters
    for name in counters:
        assert snapshot.numbers[name] == {(): world.counts[name]}, name
    reasons = snapshot.numbers["request_success"]
    assert {reason: count for (reason,), count in reasons.items() if count} == world.reasons


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 40))
def test_every_number_is_what_an_oracle_that_keeps_all_values_says(seed, num_batches):
    world, metrics = World(random.Random(seed)), Metrics()
    for seq in range(num_batches):
        events = world.batch()
        feed(metrics, *events, seq=seq, time=world.now)
        assert len(metrics._open) == len(world.waiting) + len(world.running)
        if any(isinstance(event, StepCompleted) for event in events) or not metrics._open:
            assert number_of(metrics, "num_requests_running") == len(world.running)
            assert number_of(metrics, "num_requests_waiting") == len(world.waiting)
            assert number_of(metrics, "kv_cache_usage_perc") == (0.25 if world.running else 0.0)
    check_against(world, metrics)


# --- the real engine --------------------------------------------------------------------------------


class Device:
    """An executor around the kit's simulated device."""

    def __init__(self, max_in_flight, broken):
        self.max_in_flight, self._broken = max_in_flight, broken
        self._device = SimulatedDevice(2, 4, 16)
        self._results = deque()

    def submit(self, plan):
        self._results.append((plan.step, self._device.run(plan)))

    def collect(self):
        number, result = self._results.popleft()
        if number in self._broken:
            raise RuntimeError("broken")
        return result

    def close(self):
        pass


def make_engine(metrics, batches, max_in_flight, broken):
    kv_cache = PagedKVCache(BlockPool(13), 2, b"t", enable_prefix_caching=True)
    return EngineCore(
        scheduler=TokenBudgetScheduler(kv_cache, max_num_seqs=4, max_num_batched_tokens=16),
        kv_cache=kv_cache,
        executor=Device(max_in_flight, broken),
        bus=EventBus([Subscription("metrics", metrics, policy="block")]),
        outbox=batches.append,
    )


@pytest.mark.parametrize("broken", [(), (5, 20)])
@pytest.mark.parametrize("max_in_flight", [1, 2])
def test_a_real_engine_and_its_metrics_agree(max_in_flight, broken):
    rng = random.Random(max_in_flight)
    metrics, batches = Metrics(), []
    engine = make_engine(metrics, batches, max_in_flight, broken)
    pending = [
        Submit(f"r{i}", [rng.randrange(4)] * rng.randint(1, 9), SamplingParams(), n, [], i)
        for i, n in enumerate(rng.choices(range(1, 9), k=60))
    ]
    submitted = 0
    while pending or engine.has_work:
        for _ in range(rng.randint(0, 2)):
            if pending:
                engine.send(pending.pop())
                submitted += 1
        if rng.random() < 0.1:
            engine.send(Finish(f"r{rng.randrange(60)}"))
        engine.step()
        assert engine.bus.flush()
        assert len(metrics._open) == engine.scheduler.num_running + engine.scheduler.num_waiting
    engine.step()
    engine.close()
    tokens = Counter(name for batch in batches for name in batch.request_ids)
    ended = Counter(str(end.reason) for batch in batches for end in batch.ended)
    assert submitted == sum(ended.values()) == 60
    assert engine.scheduler.num_preemptions > 0
    reasons = metrics.snapshot().numbers["request_success"]
    assert {reason: count for (reason,), count in reasons.items() if count} == ended
    assert number_of(metrics, "generation_tokens") == tokens.total()
    assert number_of(metrics, "num_preemptions") == engine.scheduler.num_preemptions
    assert number_of(metrics, "step_failures") == len(broken)
    assert number_of(metrics, "event_batches_dropped") == 0
    assert number_of(metrics, "num_requests_running") == 0
    assert number_of(metrics, "kv_cache_usage_perc") == 0
    assert number_of(metrics, "cache_config_info", "2", "12") == 1
    assert count_of(metrics, "time_to_first_token_seconds") == len(tokens)
    assert count_of(metrics, "inter_token_latency_seconds") == tokens.total() - len(tokens)
    assert count_of(metrics, "e2e_request_latency_seconds") == ended["length"]
    assert count_of(metrics, "request_queue_time_seconds") >= len(tokens)
    assert 0 < number_of(metrics, "prefix_cache_hits") < number_of(metrics, "prefix_cache_queries")


def test_the_last_ones_aborted_leave_an_idle_engine_behind():
    metrics = Metrics()
    feed(metrics, RequestQueued("a", 5), RequestScheduled("a", 0, 0.1), step(["a"]))
    assert number_of(metrics, "num_requests_running") == 1
    feed(metrics, RequestFinished("a", "abort", 5, 1, 0, 0, 1.0), seq=1)
    assert number_of(metrics, "num_requests_running") == 0
    assert number_of(metrics, "kv_cache_usage_perc") == 0


# --- losses and limits ------------------------------------------------------------------------------


def test_lost_batches_are_counted_by_the_gap():
    metrics = Metrics()
    for seq in (7, 8, 11, 12, 20):
        feed(metrics, step(number=seq), seq=seq)
    assert number_of(metrics, "event_batches_dropped") == 2 + 7


def test_ends_that_are_lost_leave_nothing_behind_for_long():
    metrics = Metrics()
    for number in range(500):
        feed(metrics, RequestQueued(f"r{number}", 1), step(running=3, waiting=1), seq=number)
        assert len(metrics._open) <= 4
    feed(metrics, step(running=0, waiting=0), seq=500)
    assert len(metrics._open) == 0


def test_sequences_that_began_unseen_are_counted_as_far_as_possible():
    metrics = Metrics()
    feed(metrics, RequestScheduled("a", 1, 0.5), FirstToken("a", 1.0), step(["a"]), time=1.0)
    feed(metrics, RequestFinished("a", "stop", 5, 2, 0, 0, 2.0), step(["a"]), seq=1, time=2.0)
    assert number_of(metrics, "generation_tokens") == 2
    assert number_of(metrics, "request_success", "stop") == 1
    assert count_of(metrics, "e2e_request_latency_seconds") == 1
    assert count_of(metrics, "time_to_first_token_seconds") == 1
    for unknown in ("inter_token_latency_seconds", "request_decode_time_seconds"):
        assert count_of(metrics, unknown) == 0


def test_a_clock_that_is_set_back_takes_nothing_from_the_sum():
    metrics = Metrics()
    feed(metrics, RequestQueued("a", 5), step(["a"]), time=100.0)
    feed(metrics, step(["a"]), seq=1, time=50.0)
    assert metrics.snapshot().histograms["inter_token_latency_seconds"].total == 0.0
    assert count_of(metrics, "inter_token_latency_seconds") == 1


def test_no_client_adds_series():
    metrics = Metrics()
    feed(metrics, EngineStarted(10, 16), RequestFinished("a", "reason", 1, 1, 0, 0, 1.0))
    series = set(scrape(metrics))
    rng = random.Random(1)
    for seq in range(5000):
        name, text = f"{rng.random()}\n\0", str(rng.random())
        feed(
            metrics,
            RequestQueued(name, rng.randrange(10**9)),
            RequestRefused(name, text),
            RequestFinished(name, text, 1, 1, 0, 0, rng.expovariate(1e-3), text),
            StepFailed(seq, text, 1),
            SubscriberDropped(text, text),
            EngineStopping(text),
            seq=seq,
        )
    assert set(scrape(metrics)) == series
    assert number_of(metrics, "request_success", OTHER) == 5001
    assert len(series) < 1000


def test_every_type_of_event_can_be_taken():
    assert len(EVENT_TYPES) == 13  # a new one may be worth a metric
    metrics = Metrics()
    before = metrics.snapshot()
    feed(metrics, WorkerLost(0, "x"), EngineStopping("x"))
    assert metrics.snapshot().numbers == before.numbers


# --- what scrapers get ------------------------------------------------------------------------------


def lived_in(seed=3):
    world, metrics = World(random.Random(seed)), Metrics()
    feed(metrics, EngineStarted(10, 16))
    for seq in range(1, 200):
        feed(metrics, *world.batch(), seq=seq, time=world.now)
    return metrics


def test_text_says_what_was_counted():
    metrics = lived_in()
    series = scrape(metrics, vllm_names=False)
    snapshot = metrics.snapshot()
    label = ("model_name", "org/model")
    seen = 0
    for metric in CATALOGUE:
        name = f"cythera:{metric.name}"
        if metric.kind == "histogram":
            histogram = snapshot.histograms[metric.name]
            running = 0
            for bound, count in zip((*metric.bounds, math.inf), histogram.counts, strict=True):
                running += count
                le = [
                    value
                    for (other, labels), value in series.items()
                    if other == f"{name}_bucket" and float(dict(labels)["le"]) == bound
                ]
                assert le == [running]
            assert series[f"{name}_sum", frozenset([label])] == histogram.total
            assert series[f"{name}_count", frozenset([label])] == running
            seen += len(histogram.counts) + 2
        elif metric.name not in ("phase", "requests_open"):
            suffix = "_total" if metric.kind == "counter" else ""
            for values, number in snapshot.numbers[metric.name].items():
                labels = frozenset([label, *zip(metric.labels, values, strict=True)])
                assert series[name + suffix, labels] == number
                seen += 1
    assert len(series) == seen + len(Phase) + 1


def test_both_formats_say_the_same():
    metrics = lived_in()
    text, openmetrics = scrape(metrics), scrape(metrics, accept="application/openmetrics-text")
    assert text == openmetrics
    assert any(name.startswith("cythera:") for name, _ in openmetrics)


def test_names_of_vllm_are_the_same_series():
    series = scrape(lived_in())
    ours = {key: value for key, value in series.items() if key[0].startswith("cythera:")}
    theirs = {key: value for key, value in series.items() if key[0].startswith("vllm:")}
    shared = {f"cythera:{metric.name}" for metric in CATALOGUE if metric.is_vllm}
    renamed = {
        (name.replace("vllm:", "cythera:"), labels - {("engine", "0")}): value
        for (name, labels), value in theirs.items()
    }
    stem = re.compile(r"_(total|bucket|sum|count)$")
    assert renamed == {
        key: value for key, value in ours.items() if key[0] in shared or stem.sub("", key[0]) in shared
    }
    assert all(("engine", "0") in labels for _, labels in theirs)
    assert scrape(lived_in(), vllm_names=False) == ours


def test_gateways_find_what_they_look_for():
    names = {name for name, _ in scrape(lived_in())}
    assert {
        "vllm:num_requests_waiting",
        "vllm:num_requests_running",
        "vllm:kv_cache_usage_perc",
        "vllm:cache_config_info",
        "vllm:time_to_first_token_seconds_bucket",
        "vllm:inter_token_latency_seconds_bucket",
        "vllm:generation_tokens_total",
        "vllm:request_success_total",
        "vllm:iteration_tokens_total_bucket",
    } <= names


def test_phase_and_open_requests_are_those_of_the_moment():
    metrics, service = Metrics(), FakeService()
    for number, phase in enumerate(Phase):
        service.status, service.num_open = Status(phase), number
        series = scrape(metrics, service=service, vllm_names=False)
        phases = {
            dict(labels)["phase"]: value
            for (name, labels), value in series.items()
            if name == "cythera:phase"
        }
        assert phases == {str(other): float(other is phase) for other in Phase}
        assert series["cythera:requests_open", frozenset([("model_name", "org/model")])] == number


def test_a_name_with_odd_characters_stays_a_label():
    service = FakeService()
    service.model_names = ('a"b\\c\nd {é}',)
    for accept in ("", "application/openmetrics-text"):
        series = scrape(Metrics(), service=service, accept=accept)
        assert all(dict(labels)["model_name"] == 'a"b\\c\nd {é}' for _, labels in series)


def test_a_scrape_sees_no_half_of_a_batch():
    """One thread counts, three scrape: whatever they see, the numbers fit together."""
    metrics = Metrics()
    registry = make_registry(metrics, FakeService(), vllm_names=True)
    done, problems = threading.Event(), []

    def look():
        scrapes = 0
        while not done.is_set() or not scrapes:
            scrapes += 1
            body, _ = render(registry, "")
            found = {s.name: s.value for f in read_text(body.decode()) for s in f.samples}
            steps = found["cythera:steps_total"]
            expected = {
                "cythera:generation_tokens_total": 3 * steps,
                "cythera:step_duration_seconds_count": steps,
                "cythera:iteration_tokens_total_sum": 5 * steps,
                "cythera:inter_token_latency_seconds_count": max(0, 3 * steps - 3),
                "vllm:generation_tokens_total": 3 * steps,
            }
            problems.extend((k, found[k], v) for k, v in expected.items() if found[k] != v)

    threads = [threading.Thread(target=look) for _ in range(3)]
    for thread in threads:
        thread.start()
    feed(metrics, *(RequestQueued(name, 5) for name in "abc"))
    for seq in range(1, 3000):
        feed(metrics, step("abc", running=3, tokens=5), seq=seq, time=seq * TICK)
    done.set()
    for thread in threads:
        thread.join()
    assert problems == []


# --- the route --------------------------------------------------------------------------------------


def make_client(service):
    [entry] = plugin.core_register_frontends()
    frontend = entry.factory(service)
    app = Starlette(routes=list(frontend.routes))
    transport = httpx.ASGITransport(app)
    return frontend, httpx.AsyncClient(transport=transport, base_url="http://test")


@pytest.mark.anyio
async def test_the_route_answers_before_the_engine_is_there_and_afterwards():
    service = FakeService()
    service.status = Status(Phase.LOADING, 1, 2)
    _, client = make_client(service)
    async with client:
        early = await client.get("/metrics")
        assert early.status_code == 200
        assert 'phase="loading"} 1.0' in early.text
        assert "cache_config_info{" not in early.text
        [subscription] = service.subscriptions
        assert subscription.types == ()
        bus = EventBus(service.subscriptions)
        bus.publish([EngineStarted(10, 16)], 0)
        bus.publish([RequestRefused("a", "no")], 0)
        assert bus.flush()
        bus.close()
        late = (await client.get("/metrics")).text
    assert (
        'cythera:cache_config_info{block_size="16",model_name="org/model",num_gpu_blocks="10"}' in late
    )
    assert 'cythera:requests_refused_total{model_name="org/model"} 1.0' in late
    assert "process_resident_memory_bytes " in late
    assert "python_gc_collections_total{" in late
    assert "vllm:" not in late


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        (None, "text/plain; version=0.0.4; charset=utf-8"),
        ("text/plain;version=x;escaping=y", "text/plain; version=0.0.4; charset=utf-8"),
        (
            "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5,*/*;q=0.1",
            "application/openmetrics-text; version=1.0.0; charset=utf-8",
        ),
        (
            "application/openmetrics-text; version=a.b\x7f",
            "application/openmetrics-text; version=1.0.0; charset=utf-8",
        ),
    ],
)
async def test_the_format_is_the_one_that_is_asked_for(accept, expected):
    _, client = make_client(FakeService())
    async with client:
        headers = {} if accept is None else {"accept": accept}
        answer = await client.get("/metrics", headers=headers)
    assert answer.headers["content-type"] == expected
    assert answer.text.endswith("# EOF\n") == ("openmetrics" in expected)


@pytest.mark.parametrize("is_open", [True, False])
def test_settings_decide_whether_the_path_needs_a_key(is_open):
    frontend, _ = make_client(FakeService(open=is_open))
    assert frontend.open_paths == (frozenset({"/metrics"}) if is_open else frozenset())
    assert set(frontend.openapi["paths"]) == {"/metrics"}
    assert plugin.PrometheusSettings().open


@pytest.mark.anyio
async def test_two_services_share_nothing():
    first, second = FakeService(), FakeService(vllm_names=True)
    _, client = make_client(first)
    _, other = make_client(second)
    first.subscriptions[0].handler(EventBatch(0, 0, 0.0, [RequestRefused("a", "no")]))
    async with client, other:
        assert 'refused_total{model_name="org/model"} 1.0' in (await client.get("/metrics")).text
        answer = (await other.get("/metrics")).text
    assert 'refused_total{model_name="org/model"} 0.0' in answer
    assert "vllm:num_requests_running{" in answer


# --- papers -----------------------------------------------------------------------------------------

EXPRESSIONS = [
    target["expr"] for panel in dashboard.make_dashboard()["panels"] for target in panel["targets"]
]


def unknown_names(expression, known):
    names = re.findall(r"[a-z_]+:[a-z_0-9]+|process_[a-z_]+", expression)
    assert names, expression
    return set(names) - known


@pytest.fixture(scope="module")
def known_names():
    body, _ = render(make_registry(lived_in(), FakeService(), vllm_names=False), "")
    return {sample.name for family in read_text(body.decode()) for sample in family.samples}


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_the_dashboard_asks_for_series_that_exist(expression, known_names):
    assert not unknown_names(expression, known_names)
    assert expression.count("(") == expression.count(")")


@pytest.mark.parametrize(
    "expression",
    [
        "sum(rate(cythera:generation_tokens{}[1m]))",
        "cythera:time_to_first_token_seconds",
        "cythera:request_queue_time_seconds_bucket / cythera:nothing",
        "process_nothing",
    ],
)
def test_a_wrong_name_in_a_dashboard_would_be_found(expression, known_names):
    assert unknown_names(expression, known_names)


def test_the_dashboard_groups_by_labels_that_exist():
    labels = {"le", "instance", "job", "model_name"}
    labels |= {label for metric in CATALOGUE for label in metric.labels}
    for expression in EXPRESSIONS:
        for group in re.findall(r"(?:by|on) \(([^)]*)\)", expression):
            assert set(group.split(", ")) <= labels


def test_the_dashboard_that_is_shipped_is_the_one_that_is_made():
    shipped = (FOLDER / "grafana.json").read_text(encoding="utf-8")
    assert shipped == dashboard.dump(), "run python -m plugins.observe.prometheus.dashboard"
    panels = json.loads(shipped)["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    places = [panel["gridPos"] for panel in panels]
    cells = [
        (x, y)
        for place in places
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(cells)) == len(cells), "panels overlap"
    assert max(x for x, _ in cells) < dashboard.WIDTH


def test_the_readme_lists_every_metric():
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    rows = [
        [cell.strip().replace("`", "") for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("| `")
    ]
    assert rows == [
        [
            metric.name + ("_total" if metric.kind == "counter" else ""),
            metric.kind,
            ", ".join(metric.labels),
            "yes" if metric.is_vllm else "",
            metric.help,
        ]
        for metric in CATALOGUE
    ]
    for name, value in vars_of(plugin.PrometheusSettings()).items():
        assert f"{name} = {str(value).lower()}" in text


def vars_of(instance):
    return {name: getattr(instance, name) for name in instance.__dataclass_fields__}


class TestPlugin(PluginConformance):
    module = "plugins.observe.prometheus"


def test_listing_needs_no_library():
    modules = set(watch_import("plugins.observe.prometheus")["modules"])
    assert not modules & {"prometheus_client", "starlette"}

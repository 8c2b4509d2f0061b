"""Turns events into numbers: counters, gauges and histograms, with one lock around them all.

The numbers are plain, because the latencies of a step with hundreds of sequences have to cost
microseconds.  How they are named and told to Prometheus is the matter of `exposition`.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from core.events import (
    BlocksEvicted,
    EngineStarted,
    Event,
    FirstToken,
    RequestFinished,
    RequestPreempted,
    RequestQueued,
    RequestRefused,
    RequestScheduled,
    StepCompleted,
    StepFailed,
    SubscriberDropped,
)
from plugins.observe.prometheus.catalogue import CATALOGUE, COMPLETED, OTHER

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from core.events import EventBatch

Labels = tuple[str, ...]
Numbers = dict[Labels, float]
"""The value of each series of a gauge or counter, by its labels."""

COUNTED: Final[dict[type[Event], str]] = {
    RequestPreempted: "num_preemptions",
    RequestRefused: "requests_refused",
    StepFailed: "step_failures",
    SubscriberDropped: "subscribers_dropped",
}
"""Events of which nothing but their number is of interest."""


class Histogram:
    """Counts values by bucket.

    :param bounds: upper bounds of the buckets, ascending and inclusive; one more bucket takes the rest.
    """

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.total = 0.0
        """Sum of the values."""

    def add(self, value: float, count: int = 1) -> None:
        """Count a value, or `count` equal ones."""
        self.counts[bisect_left(self.bounds, value)] += count
        self.total += value * count

    def copy(self) -> Histogram:
        """Copy what is counted now."""
        copy = Histogram(self.bounds)
        copy.counts, copy.total = self.counts.copy(), self.total
        return copy


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All numbers at one moment, between two batches."""

    numbers: Mapping[str, Numbers]
    """Of gauges and counters, by the name of the metric."""
    histograms: Mapping[str, Histogram]


@dataclass(slots=True)
class _Sequence:
    """What has to be remembered of a sequence until it ends."""

    num_prompt: int
    num_cached: int = 0
    queue_time: float | None = None
    """Seconds from its arrival to its first row."""
    first_token: float | None = None
    """Seconds from its arrival to its first token."""
    last_token: float | None = None
    """When its latest token came, in seconds since the epoch."""


class Metrics:
    """The subscriber: call it with batches on one thread, take snapshots on any other."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._numbers: dict[str, Numbers] = {
            metric.name: dict.fromkeys(
                [(value,) for value in metric.values] if metric.labels else [()], 0.0
            )
            for metric in CATALOGUE
            if metric.kind != "histogram"
        }
        self._histograms = {
            metric.name: Histogram(metric.bounds) for metric in CATALOGUE if metric.kind == "histogram"
        }
        self._open: dict[str, _Sequence] = {}
        self._next_seq: int | None = None

    def __call__(self, batch: EventBatch, /) -> None:
        """Count what the batch tells."""
        with self._lock:
            self._note_gap(batch.seq)
            ended: dict[str, _Sequence] = {}
            step: StepCompleted | None = None
            for event in batch.events:
                if isinstance(event, StepCompleted):
                    step = event
                    self._take_step(event, batch.time, ended)
                else:
                    self._take(event, ended)
            self._settle(step)

    def snapshot(self) -> Snapshot:
        """Copy all numbers, none of them in the middle of a batch."""
        with self._lock:
            return Snapshot(
                {name: numbers.copy() for name, numbers in self._numbers.items()},
                {name: histogram.copy() for name, histogram in self._histograms.items()},
            )

    def _take(self, event: Event, ended: dict[str, _Sequence]) -> None:
        match event:
            case RequestQueued():
                self._open[event.request_id] = _Sequence(event.num_prompt)
            case RequestScheduled():
                self._take_scheduled(event)
            case FirstToken():
                self._take_first_token(event)
            case RequestFinished():
                self._take_finished(event, ended)
            case BlocksEvicted():
                self._count("kv_blocks_evicted", len(event.block_ids))
            case EngineStarted():
                size = str(event.block_size), str(event.num_kv_blocks)
                self._numbers["cache_config_info"] = {size: 1.0}
            case _:  # the end of the engine and the loss of a worker show in the phase
                if type(event) in COUNTED:
                    self._count(COUNTED[type(event)])

    def _take_scheduled(self, event: RequestScheduled) -> None:
        sequence = self._open.get(event.request_id)
        if sequence is None or sequence.queue_time is not None:  # it was preempted, and is back
            return
        sequence.queue_time = event.queue_time
        sequence.num_cached = event.num_cached
        self._count("prefix_cache_queries", sequence.num_prompt)
        self._count("prefix_cache_hits", event.num_cached)
        self._observe("request_queue_time_seconds", event.queue_time)

    def _take_first_token(self, event: FirstToken) -> None:
        self._observe("time_to_first_token_seconds", event.latency)
        sequence = self._open.get(event.request_id)
        if sequence is None:
            return
        sequence.first_token = event.latency
        self._count("prompt_tokens", sequence.num_prompt)
        self._count("prompt_tokens_cached", sequence.num_cached)
        if sequence.queue_time is not None:
            self._observe("request_prefill_time_seconds", event.latency - sequence.queue_time)

    def _take_finished(self, event: RequestFinished, ended: dict[str, _Sequence]) -> None:
        sequence = self._open.pop(event.request_id, None)
        if sequence is not None:
            ended[event.request_id] = sequence
        reasons = self._numbers["request_success"]
        reason = (event.reason,) if (event.reason,) in reasons else (OTHER,)
        reasons[reason] = reasons.get(reason, 0.0) + 1
        if event.reason not in COMPLETED:
            return
        self._observe("e2e_request_latency_seconds", event.duration)
        self._observe("request_prompt_tokens", event.num_prompt)
        self._observe("request_generation_tokens", event.num_output)
        if sequence is not None and sequence.first_token is not None:
            seconds = event.duration - sequence.first_token
            self._observe("request_decode_time_seconds", seconds)
            if event.num_output > 1:
                per_token = seconds / (event.num_output - 1)
                self._observe("request_time_per_output_token_seconds", per_token)

    def _take_step(self, step: StepCompleted, time: float, ended: Mapping[str, _Sequence]) -> None:
        self._count("steps")
        self._count("generation_tokens", len(step.tokens))
        self._observe("iteration_tokens_total", step.num_tokens)
        self._observe("step_duration_seconds", step.duration)
        self._take_tokens(step.request_ids, time, ended)
        self._set_load(step.num_running, step.num_waiting, step.kv_usage)

    def _take_tokens(
        self, request_ids: Sequence[str], time: float, ended: Mapping[str, _Sequence]
    ) -> None:
        """Note that these sequences got a token.

        Nearly all of them got the one before in the same step, so there are few different latencies,
        and each is looked up in the buckets once.

        :param ended: those that this very step ended.
        """
        find = self._open.get
        previous = []
        for request_id in request_ids:
            sequence = find(request_id) or ended.get(request_id)
            if sequence is not None:
                previous.append(sequence.last_token)
                sequence.last_token = time
        for before, count in Counter(previous).items():
            if before is not None:
                self._observe("inter_token_latency_seconds", max(0.0, time - before), count)

    def _settle(self, step: StepCompleted | None) -> None:
        """Bring what is remembered in line with what the engine has."""
        if step is None:
            if not self._open:  # the last ones were aborted, and no step tells so
                self._set_load(0, 0, 0.0)
        elif len(self._open) > step.num_running + step.num_waiting:  # an end was in a lost batch
            self._open.clear()

    def _set_load(self, num_running: int, num_waiting: int, kv_usage: float) -> None:
        self._set("num_requests_running", num_running)
        self._set("num_requests_waiting", num_waiting)
        self._set("kv_cache_usage_perc", kv_usage)

    def _note_gap(self, seq: int) -> None:
        if self._next_seq is not None and seq > self._next_seq:
            self._count("event_batches_dropped", seq - self._next_seq)
        self._next_seq = seq + 1

    def _count(self, name: str, count: float = 1) -> None:
        self._numbers[name][()] += count

    def _set(self, name: str, value: float) -> None:
        self._numbers[name][()] = value

    def _observe(self, name: str, value: float, count: int = 1) -> None:
        self._histograms[name].add(value, count)

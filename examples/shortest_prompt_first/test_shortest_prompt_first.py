from __future__ import annotations

import math

import shortest_prompt_first as plugin
from hypothesis import given, settings
from hypothesis import strategies as st

from core.blocks import BlockPool
from core.kv_cache import PagedKVCache
from core.request import Request, SamplingParams
from core.scheduler import TokenBudgetScheduler
from core.testing import PluginConformance, SchedulerConformance
from core.testing.scheduler import SimulatedDevice

MAX_PROMPT = 200


def make_scheduler(kv_cache, *, tokens_per_place=4, **settings):
    rank = plugin.ShortestPromptRank(tokens_per_place)
    return TokenBudgetScheduler(kv_cache, rank=rank, **settings)


class TestPlugin(PluginConformance):
    module = "shortest_prompt_first"


class TestScheduler(SchedulerConformance):
    max_examples = 20

    def make_scheduler(self, kv_cache, **settings):
        return make_scheduler(kv_cache, **settings)


class Engine:
    """One request at a time, so that the order of starting is the order of ending."""

    def __init__(self, tokens_per_place, policy="fcfs"):
        pool = PagedKVCache(BlockPool(33), 8, b"test", enable_prefix_caching=False)
        limits = {"max_num_seqs": 1, "max_num_batched_tokens": MAX_PROMPT}
        self.scheduler = make_scheduler(
            pool, tokens_per_place=tokens_per_place, policy=policy, **limits
        )
        self.device = SimulatedDevice(8, 1, MAX_PROMPT)
        self.order = []

    def add(self, number, length, priority=0):
        request = Request(str(number), [1] * length, SamplingParams(), max_tokens=1, priority=priority)
        self.scheduler.add(request)

    def step(self):
        outputs = self.scheduler.apply(self.device.run(self.scheduler.plan()))
        self.order += [int(request.request_id) for request in outputs.finished]

    def drain(self):
        while self.scheduler.has_work:
            self.step()
        return self.order


def order_of(lengths, tokens_per_place, **settings):
    engine = Engine(tokens_per_place, **settings)
    for number, length in enumerate(lengths):
        engine.add(number, length)
    return engine.drain()


def test_short_prompts_go_first():
    assert order_of([90, 50, 10], tokens_per_place=1) == [2, 1, 0]


def test_a_prompt_that_is_hardly_shorter_waits_for_its_turn():
    assert order_of([100, 90, 10], tokens_per_place=30) == [2, 0, 1]


def test_priorities_come_before_lengths():
    engine = Engine(tokens_per_place=1, policy="priority")
    engine.add(0, 10, priority=1)
    engine.add(1, 100, priority=0)
    assert engine.drain() == [1, 0]


arrivals = st.lists(st.integers(1, MAX_PROMPT), min_size=1, max_size=60)


@settings(max_examples=50, deadline=None)
@given(lengths=arrivals, tokens_per_place=st.integers(1, 64), burst=st.integers(1, 8))
def test_nobody_is_overtaken_more_often_than_promised(lengths, tokens_per_place, burst):
    """Requests keep arriving in bursts, several for each one that is served."""
    engine = Engine(tokens_per_place)
    for number, length in enumerate(lengths):
        engine.add(number, length)
        if number % burst == 0:
            engine.step()
    order = engine.drain()
    assert sorted(order) == list(range(len(lengths)))
    for place, number in enumerate(order):
        num_overtaking = sum(other > number for other in order[:place])
        assert num_overtaking < max(1, math.ceil(lengths[number] / tokens_per_place))

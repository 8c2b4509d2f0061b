"""An engine whose devices are lost goes on, and a request that costs them again and again does not."""

from __future__ import annotations

from collections import deque

import pytest

from core.blocks import BlockPool
from core.engine import EngineCore
from core.errors import DeviceLostError
from core.events import EventBus
from core.kv_cache import PagedKVCache
from core.messages import Submit
from core.request import FinishReason, SamplingParams
from core.scheduler import TokenBudgetScheduler
from core.step import StepResult


class Device:
    """Is lost whenever a row of a poisonous request reaches a position."""

    def __init__(self, max_in_flight, at=8):
        self.max_in_flight = max_in_flight
        self.at = at
        self.num_recoveries = 0
        self.rows, self.in_flight = {}, deque()

    def submit(self, plan):
        self.rows |= {entry.row: entry.request_id for entry in plan.added}
        self.in_flight.append((plan, dict(self.rows)))

    def collect(self):
        plan, rows = self.in_flight.popleft()
        for row, start in zip(plan.rows, plan.starts, strict=True):
            if rows[row].startswith("poison") and start >= self.at:
                raise DeviceLostError("rank 1 died\nits stack:\nsecrets", rank=1)
        return StepResult(plan.step, [5 if samples else -1 for samples in plan.samples])

    def recover(self):
        self.num_recoveries += 1
        self.in_flight.clear()

    def load(self, _report, /):
        pass

    def kv_capacity(self):
        return 60

    def allocate(self, _num_blocks, /):
        pass

    def close(self):
        pass


@pytest.mark.parametrize("max_in_flight", [1, 2])
def test_a_request_that_costs_devices_late_in_its_life_is_ended(max_in_flight):
    device, batches = Device(max_in_flight), []
    cache = PagedKVCache(BlockPool(60), 4, b"", enable_prefix_caching=True)
    core = EngineCore(
        scheduler=TokenBudgetScheduler(cache, max_num_seqs=4, max_num_batched_tokens=4),
        kv_cache=cache,
        executor=device,
        bus=EventBus([]),
        outbox=batches.append,
    )

    def submit(name, max_tokens):
        params = SamplingParams(max_tokens=max_tokens)
        core.send(Submit(name, [1, 2, 3, len(name)], params, max_tokens, [], 0))

    submit("bystander", 4)  # over before the poison takes effect
    submit("poison", 20)
    for _ in range(200):
        if not core.step():
            break
    ended = {end.request_id: end for batch in batches for end in batch.ended}
    assert device.num_recoveries == 2
    assert ended["poison"].reason is FinishReason.ERROR
    assert ended["poison"].error == "rank 1 died"  # clients are told no stacks
    assert ended["bystander"].reason is FinishReason.LENGTH
    submit("poison", 3)  # of that name, but it never gets that far
    while core.step():
        pass
    assert device.num_recoveries == 2
    cache.check_integrity([])

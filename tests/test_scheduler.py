"""The scheduler passes its kit, and the kit catches planted bugs."""

from __future__ import annotations

from typing import Any

import pytest

from core.blocks import BlockPool
from core.errors import IntegrityError, InvalidRequestError, RequestTooLargeError
from core.events import FirstToken, RequestFinished, RequestPreempted, RequestQueued, RequestScheduled
from core.kv_cache import PagedKVCache
from core.request import FinishReason, Request, SamplingParams
from core.scheduler import TokenBudgetScheduler
from core.step import BAD_LOGITS, StepPlan, StepResult, TokenLogprobs
from core.testing.scheduler import SchedulerConformance, SimulatedDevice


class TestTokenBudgetScheduler(SchedulerConformance):
    def make_scheduler(self, kv_cache: Any, **settings: Any) -> TokenBudgetScheduler:
        return TokenBudgetScheduler(kv_cache, **settings)


class TestMicroBatches(SchedulerConformance):
    """The same with steps for the stages of a pipeline."""

    def make_scheduler(self, kv_cache: Any, **settings: Any) -> TokenBudgetScheduler:
        return TokenBudgetScheduler(kv_cache, num_micro_batches=3, **settings)

    def test_running_decodes_advance_in_every_step(self) -> None:
        """All stages are busy: of as many steps as there are stages each decode is in exactly one."""
        scheduler, device = self._make(num_blocks=64, max_num_seqs=8, budget=16)
        decoding = [self._request(f"d{i}", [1, 2], 30) for i in range(7)]
        for request in decoding:
            scheduler.add(request)
        self._step(scheduler, device)
        in_flight = [device.run(plan) for _ in range(3) if (plan := scheduler.plan())]
        assert [len(result.tokens) for result in in_flight] == [3, 3, 1]
        assert scheduler.plan() is None
        for _ in range(20):
            before = [r.num_output for r in decoding]
            for _ in range(3):
                scheduler.apply(in_flight.pop(0))
                plan = scheduler.plan()
                assert plan is not None
                in_flight.append(device.run(plan))
            assert [r.num_output - b for r, b in zip(decoding, before, strict=True)] == [1] * 7

    def test_long_prompt_gets_through_beside_decodes(self) -> None:
        """Chunks of one prompt follow one another through the stages without waiting."""
        scheduler, device = self._make(num_blocks=64, max_num_seqs=4, budget=8)
        long = self._request("long", [1] * 24, 1)
        scheduler.add(long)
        in_flight = [device.run(plan) for _ in range(3) if (plan := scheduler.plan())]
        assert len(in_flight) == 3
        for result in in_flight:
            scheduler.apply(result)
        assert long.is_finished


# --- planted bugs ---


class IgnoresBudget(TokenBudgetScheduler):
    def plan(self) -> StepPlan | None:
        self._max_chunk = 10**6
        plan = super().plan()
        self._max_tokens = 10**6
        return plan


class ForgetsRecompute(TokenBudgetScheduler):
    """A preempted request goes on where it was, though its blocks are gone."""

    def _preempt(self, request: Request) -> None:
        computed = request.num_computed
        super()._preempt(request)
        request.num_cached = computed

    def _reserve_all(self, request: Request) -> bool:
        ok = super()._reserve_all(request)
        if ok and request.num_preemptions:
            request.num_computed = min(request.num_cached, request.num_tokens - 1)
        return ok


class LosesTokenOfPreempted(TokenBudgetScheduler):
    """The token in flight at a preemption is dropped."""

    def _preempt(self, request: Request) -> None:
        super()._preempt(request)
        request.num_inflight = 0


class LeaksOnAbort(TokenBudgetScheduler):
    def finish(self, request_id: str, reason: FinishReason, /) -> Request | None:
        request = self._requests.get(request_id)
        if request is not None:
            request.block_ids = list(request.block_ids)
            table, request.block_ids = request.block_ids, []
            super().finish(request_id, reason)
            del table
        return request


class ServesNewestFirst(TokenBudgetScheduler):
    def _key(self, request: Request) -> tuple[int, int]:
        return (0, -request.arrival)


class StarvesDecodes(TokenBudgetScheduler):
    """A prompt takes the whole budget before any decode is served."""

    def _plan_running(self, plan: Any, step: Any) -> int:
        long = [r for r in self._running if r.num_tokens - r.num_computed > 1]
        if not long:
            return super()._plan_running(plan, step)
        everybody, self._running = self._running, long
        spare = super()._plan_running(plan, step)
        self._running = everybody
        return min(spare, 0)


class ReportsEndTwice(TokenBudgetScheduler):
    def _settle(self, outputs: Any) -> None:
        super()._settle(outputs)
        super()._settle(outputs)


class SharesRows(TokenBudgetScheduler):
    def _start(self, plan: StepPlan, request: Request) -> None:
        super()._start(plan, request)
        self._free_rows.insert(0, request.row)


@pytest.mark.parametrize(
    "broken",
    [
        IgnoresBudget,
        ForgetsRecompute,
        LosesTokenOfPreempted,
        LeaksOnAbort,
        ServesNewestFirst,
        StarvesDecodes,
        ReportsEndTwice,
        SharesRows,
    ],
)
def test_kit_catches_planted_bugs(broken: type[TokenBudgetScheduler]) -> None:
    class Kit(SchedulerConformance):
        max_examples = 300

        def make_scheduler(self, kv_cache: Any, **settings: Any) -> TokenBudgetScheduler:
            return broken(kv_cache, **settings)

    kit = Kit()
    tests = [getattr(kit, name) for name in dir(kit) if name.startswith("test_")]
    tests.sort(key=lambda test: test.__name__ == "test_state_machine")  # the cheap ones first
    with pytest.raises(Exception):  # noqa: B017, PT012  any failure of any test of the kit will do
        for test in tests:
            test()


# --- examples ---


def make(
    num_blocks: int = 16, block_size: int = 4, max_num_seqs: int = 4, budget: int = 16, **more: Any
) -> tuple[TokenBudgetScheduler, SimulatedDevice]:
    kv_cache = PagedKVCache(BlockPool(num_blocks + 1), block_size, b"t", enable_prefix_caching=True)
    scheduler = TokenBudgetScheduler(
        kv_cache, max_num_seqs=max_num_seqs, max_num_batched_tokens=budget, **more
    )
    return scheduler, SimulatedDevice(block_size, max_num_seqs, budget)


def request(name: str = "r", prompt: int = 3, max_tokens: int = 4, **more: Any) -> Request:
    return Request(name, list(range(1, prompt + 1)), SamplingParams(), max_tokens=max_tokens, **more)


def test_request_that_can_never_fit_is_refused_with_both_numbers_and_both_knobs() -> None:
    scheduler, _ = make(num_blocks=2)
    with pytest.raises(RequestTooLargeError) as caught:
        scheduler.add(request(prompt=6, max_tokens=4))
    for part in ("9 KV positions", "8;", "--num-kv-blocks", "--gpu-memory-utilization"):
        assert part in str(caught.value)
    assert not scheduler.has_work
    scheduler.add(request(prompt=6, max_tokens=3))


def test_id_in_use_is_refused() -> None:
    scheduler, _ = make()
    scheduler.add(request("a"))
    with pytest.raises(InvalidRequestError, match="'a' is in use"):
        scheduler.add(request("a"))
    assert scheduler.num_waiting == 1


def test_result_of_another_step_is_refused() -> None:
    scheduler, device = make()
    scheduler.add(request())
    plan = scheduler.plan()
    assert plan is not None
    result = device.run(plan)
    with pytest.raises(IntegrityError, match="step 7"):
        scheduler.apply(StepResult(7, result.tokens))


def test_token_in_flight_counts_before_it_comes_back() -> None:
    scheduler, device = make()
    scheduler.add(request(prompt=3, max_tokens=3))
    results = []
    for _ in range(3):
        plan = scheduler.plan()
        assert plan is not None
        results.append(device.run(plan))
    assert scheduler.plan() is None, "three tokens are all that may be drawn"
    finished = [scheduler.apply(result).finished for result in results]
    assert [len(f) for f in finished] == [0, 0, 1]


def test_logprobs_travel_to_their_request() -> None:
    scheduler, device = make()
    scheduler.add(request("a"))
    scheduler.add(request("b"))
    plan = scheduler.plan()
    assert plan is not None
    result = device.run(plan)
    result.logprobs = {1: TokenLogprobs(result.tokens[1], -0.5, 1, [], [])}
    outputs = scheduler.apply(result)
    assert list(outputs.logprobs) == ["b"]


def test_bad_logits_end_one_request_only() -> None:
    scheduler, device = make()
    scheduler.add(request("a"))
    scheduler.add(request("b"))
    plan = scheduler.plan()
    assert plan is not None
    result = device.run(plan)
    result.tokens[0] = BAD_LOGITS
    outputs = scheduler.apply(result)
    assert list(outputs.errors) == ["a"]
    assert [r.request_id for r in outputs.finished] == ["a"]
    assert scheduler.num_running == 1


def test_priority_preempts_a_worse_running_request() -> None:
    scheduler, device = make(max_num_seqs=1, policy="priority")
    scheduler.add(request("worse", max_tokens=8, priority=5))
    device_order = []
    plan = scheduler.plan()
    assert plan is not None
    scheduler.apply(device.run(plan))
    scheduler.add(request("better", max_tokens=2, priority=1))
    while scheduler.has_work:
        plan = scheduler.plan()
        assert plan is not None
        device_order += [r.request_id for r in scheduler.apply(device.run(plan)).finished]
    assert device_order == ["better", "worse"]
    assert scheduler.num_preemptions == 1


def test_events_of_a_life_with_preemption() -> None:
    now = iter(range(1000))
    scheduler, device = make(
        num_blocks=3, block_size=2, record_events=True, clock=lambda: float(next(now))
    )
    scheduler.add(request("old", prompt=2, max_tokens=4))
    scheduler.add(request("new", prompt=2, max_tokens=3))
    events = []
    while scheduler.has_work:
        plan = scheduler.plan()
        assert plan is not None
        scheduler.apply(device.run(plan))
        events += scheduler.drain_events()
    kinds = [type(e) for e in events if e.request_id == "new"]
    assert kinds[:3] == [RequestQueued, RequestScheduled, FirstToken]
    assert RequestPreempted in kinds
    assert kinds.count(RequestFinished) == 1
    assert kinds[-1] is RequestFinished
    finished = next(e for e in events if isinstance(e, RequestFinished) and e.request_id == "new")
    assert (finished.num_prompt, finished.num_output, finished.reason) == (2, 3, "length")
    assert finished.num_preemptions >= 1


def test_repr_of_a_request_tells_its_state() -> None:
    assert repr(request("x")) == "Request('x', WAITING, tokens=3+0, computed=0, row=-1)"

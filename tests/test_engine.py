"""The engine's loop over a simulated device: outputs, failures, stalls, events, threads."""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any

import pytest

from core.blocks import BlockPool
from core.engine import EngineCore
from core.events import (
    EngineStarted,
    EngineStopping,
    Event,
    EventBatch,
    EventBus,
    RequestFinished,
    RequestRefused,
    StepCompleted,
    StepFailed,
    Subscription,
)
from core.kv_cache import PagedKVCache
from core.messages import Finish, OutputBatch, Submit
from core.request import FinishReason, Request, SamplingParams
from core.scheduler import TokenBudgetScheduler
from core.testing.scheduler import SimulatedDevice, solo_tokens

if TYPE_CHECKING:
    from collections.abc import Callable

    from core.step import StepPlan, StepResult

BLOCK_SIZE, MAX_SEQS, BUDGET = 2, 4, 16


class SimulatedExecutor:
    """An executor around the simulated device; the steps in `broken` raise."""

    def __init__(self, max_in_flight: int = 1, broken: tuple[int, ...] = ()) -> None:
        self.max_in_flight = max_in_flight
        self.broken = set(broken)
        self.device = SimulatedDevice(BLOCK_SIZE, MAX_SEQS, BUDGET)
        self.num_closed = 0
        self._in_flight: deque[StepResult | Exception] = deque()

    def load(self, _report: Callable[[int, int], None]) -> None:
        pass

    def kv_capacity(self) -> int:
        return 1

    def allocate(self, num_blocks: int) -> None:
        pass

    def submit(self, plan: StepPlan) -> None:
        if plan.step in self.broken:
            self.device.run(plan)
            self._in_flight.append(RuntimeError(f"step {plan.step} is broken"))
        else:
            self._in_flight.append(self.device.run(plan))

    def collect(self) -> StepResult:
        result = self._in_flight.popleft()
        if isinstance(result, Exception):
            raise result
        return result

    def close(self) -> None:
        self.num_closed += 1


class Fixture:
    def __init__(
        self, executor: SimulatedExecutor, *, listen: bool = True, num_blocks: int = 32
    ) -> None:
        self.executor = executor
        self.batches: list[OutputBatch] = []
        self.events: list[Event] = []
        self.stops: list[str] = []
        bus = EventBus([Subscription("test", self._listen, policy="block")] if listen else [])
        self.pool = BlockPool(num_blocks + 1)
        kv_cache = PagedKVCache(self.pool, BLOCK_SIZE, b"t", enable_prefix_caching=True)
        self.engine = EngineCore(
            scheduler=TokenBudgetScheduler(
                kv_cache, max_num_seqs=MAX_SEQS, max_num_batched_tokens=BUDGET
            ),
            kv_cache=kv_cache,
            executor=executor,
            bus=bus,
            outbox=self.batches.append,
            on_stop=lambda _engine, reason: self.stops.append(reason),
        )

    def _listen(self, batch: EventBatch) -> None:
        self.events.extend(batch.events)

    def drain(self) -> None:
        while self.engine.step():
            pass

    def tokens(self, request_id: str) -> list[int]:
        return [
            token
            for batch in self.batches
            for name, token in zip(batch.request_ids, batch.tokens, strict=True)
            if name == request_id
        ]

    def ends(self) -> dict[str, FinishReason]:
        ended = [entry for batch in self.batches for entry in batch.ended]
        assert len({e.request_id for e in ended}) == len(ended), "a request ended twice"
        return {entry.request_id: entry.reason for entry in ended}

    def seen(self, kind: type[Event]) -> list[Any]:
        self.engine.bus.flush()
        return [event for event in self.events if isinstance(event, kind)]


def submit(name: str, prompt: list[int], max_tokens: int = 4) -> Submit:
    return Submit(name, prompt, SamplingParams(), max_tokens, [], 0, arrival_time=time.monotonic())


def expected(command: Submit) -> list[int]:
    return solo_tokens(
        Request(
            command.request_id,
            command.prompt_token_ids,
            command.params,
            max_tokens=command.max_tokens,
        )
    )


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_every_request_gets_its_tokens_and_one_end(depth: int) -> None:
    world = Fixture(SimulatedExecutor(depth), num_blocks=8)
    commands = [submit(f"r{i}", [i % 3, 1, 2], 3 + i) for i in range(7)]
    for command in commands:
        world.engine.send(command)
    world.drain()
    assert {c.request_id: world.tokens(c.request_id) for c in commands} == {
        c.request_id: expected(c) for c in commands
    }
    assert world.ends() == {c.request_id: FinishReason.LENGTH for c in commands}
    assert len(world.seen(RequestFinished)) == 7
    assert world.engine.kv_cache.stats().num_used == 0
    world.engine.close()


def test_abort_takes_effect_before_the_next_step() -> None:
    world = Fixture(SimulatedExecutor())
    world.engine.send(submit("a", [1, 2], 30))
    world.engine.step()
    world.engine.send(Finish("a"))
    assert world.engine.has_work
    assert not world.engine.step()
    assert world.engine.kv_cache.stats().num_used == 0
    assert world.ends() == {"a": FinishReason.ABORT}
    world.engine.send(Finish("a"))
    world.engine.send(Finish("nobody"))
    world.drain()
    assert world.ends() == {"a": FinishReason.ABORT}
    world.engine.close()


def test_refused_request_ends_with_an_error_and_others_go_on() -> None:
    world = Fixture(SimulatedExecutor(), num_blocks=4)
    good = submit("good", [1, 2], 4)
    world.engine.send(submit("big", [1] * 20, 4))
    world.engine.send(good)
    world.drain()
    assert world.ends() == {"big": FinishReason.ERROR, "good": FinishReason.LENGTH}
    error = next(e.error for b in world.batches for e in b.ended if e.request_id == "big")
    assert "--num-kv-blocks" in error
    assert [(e.request_id, e.error) for e in world.seen(RequestRefused)] == [("big", error)]
    assert [e.request_id for e in world.seen(RequestFinished)] == ["good"]
    assert world.tokens("good") == expected(good)
    world.engine.close()


@pytest.mark.parametrize("depth", [1, 2])
def test_failed_step_ends_its_requests_and_the_engine_goes_on(depth: int) -> None:
    world = Fixture(SimulatedExecutor(depth, broken=(2,)))
    for name in ("a", "b"):
        world.engine.send(submit(name, [1, 2], 9))
    world.drain()
    assert world.ends() == {"a": FinishReason.ERROR, "b": FinishReason.ERROR}
    assert all("step 2 is broken" in e.error for b in world.batches for e in b.ended)
    failed = world.seen(StepFailed)
    assert [(f.step, f.num_requests) for f in failed] == [(2, 2)]
    after = submit("after", [1, 2], 9)
    world.engine.send(after)
    world.drain()
    assert world.tokens("after") == expected(after)
    assert len(world.seen(RequestFinished)) == 3
    world.engine.kv_cache.check_integrity([])
    world.engine.close()


def test_stall_is_broken_with_an_error_instead_of_a_hang() -> None:
    world = Fixture(SimulatedExecutor(), num_blocks=4)
    stolen = world.pool.allocate(4)
    world.engine.send(submit("a", [1, 2], 4))
    world.drain()
    assert world.ends() == {"a": FinishReason.ERROR}
    assert stolen
    world.engine.close()


def test_leaked_block_is_reported_when_idle_and_is_not_fatal() -> None:
    world = Fixture(SimulatedExecutor())
    world.engine.send(submit("a", [1, 2], 4))
    world.engine.step()
    world.pool.allocate(1)
    world.drain()
    assert world.engine.num_integrity_errors == 1
    assert world.ends() == {"a": FinishReason.LENGTH}
    world.engine.close()


def test_events_tell_steps_with_their_tokens() -> None:
    world = Fixture(SimulatedExecutor())
    command = submit("a", [1, 2, 0], 3)
    world.engine.send(command)
    world.drain()
    steps = world.seen(StepCompleted)
    assert [(s.num_tokens, s.num_decodes) for s in steps] == [(3, 0), (1, 1), (1, 1)]
    assert [s.tokens for s in steps] == [[token] for token in expected(command)]
    assert all(s.request_ids == ["a"] for s in steps)
    assert len(world.seen(EngineStarted)) == 1
    world.engine.close()
    world.engine.close()
    assert len(world.seen(EngineStopping)) == 1
    assert world.stops == ["shutdown"]
    assert world.executor.num_closed == 1


def test_nothing_is_recorded_without_listeners() -> None:
    world = Fixture(SimulatedExecutor(), listen=False)
    world.engine.send(submit("a", [1, 2], 3))
    world.drain()
    assert not world.engine.scheduler.record_events
    assert world.engine.scheduler.drain_events() == []
    world.engine.close()


def test_run_blocks_while_idle_and_stops_on_demand() -> None:
    world = Fixture(SimulatedExecutor())
    thread = threading.Thread(target=world.engine.run)
    thread.start()
    busy = time.process_time()
    time.sleep(0.2)
    assert time.process_time() - busy < 0.1, "an idle engine must not spin"
    command = submit("a", [1, 2], 5)
    world.engine.send(command)
    deadline = time.monotonic() + 5
    while "a" not in world.ends() and time.monotonic() < deadline:
        time.sleep(0.005)
    assert world.tokens("a") == expected(command)
    world.engine.send(submit("b", [1, 2], 40))
    world.engine.stop()
    thread.join(5)
    assert not thread.is_alive()
    assert world.ends().get("b") in {FinishReason.ABORT, FinishReason.LENGTH}


def test_broken_scheduler_ends_the_loop_and_says_why() -> None:
    world = Fixture(SimulatedExecutor())

    def explode() -> StepPlan | None:
        raise ZeroDivisionError("a bug in a scheduler")

    world.engine.scheduler.plan = explode  # type: ignore[method-assign]
    world.engine.send(submit("a", [1, 2], 5))
    with pytest.raises(ZeroDivisionError):
        world.engine.run()
    assert world.stops == ["ZeroDivisionError: a bug in a scheduler"]
    assert world.ends() == {"a": FinishReason.ERROR}
    assert "a bug in a scheduler" in world.batches[-1].ended[0].error

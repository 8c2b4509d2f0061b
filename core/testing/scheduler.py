"""The conformance kit for schedulers: a simulated device that notices every wrong plan.

`SimulatedDevice` executes plans on plain lists.  It stores in every KV slot the whole token prefix
that a model would have seen there, and refuses a step that reads a slot holding anything else.  So a
plan that reuses a block too early, shares a wrong prefix, skips a position or confuses two rows is
caught by what it reads, whatever the scheduler's own books say.
"""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from core.blocks import BlockPool
from core.errors import RequestTooLargeError
from core.kv_cache import PagedKVCache
from core.request import FinishReason, Request, SamplingParams
from core.step import BAD_LOGITS, NO_TOKEN, StepPlan, StepResult

if TYPE_CHECKING:
    from core.interfaces import KVCache, Scheduler

VOCAB_SIZE = 7
EOS = 0


def next_token(prefix: tuple[int, ...]) -> int:
    """Draw the token after a prefix, as a deterministic model would."""
    digest = hashlib.sha256(bytes(prefix)).digest()
    return digest[0] % VOCAB_SIZE


def solo_tokens(request: Request) -> list[int]:
    """Generate what a request must produce, whatever shares its batch."""
    tokens = list(request.token_ids[: request.num_prompt])
    output: list[int] = []
    while len(output) < request.max_tokens:
        token = next_token(tuple(tokens))
        tokens.append(token)
        output.append(token)
        if token in request.stop_ids:
            break
    return output


@dataclass(slots=True)
class _Row:
    tokens: list[int]
    block_ids: list[int] = field(default_factory=list)


class SimulatedDevice:
    """Executes plans in order of submission and returns their results."""

    def __init__(self, block_size: int, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        self.block_size = block_size
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.rows: dict[int, _Row] = {}
        self.slots: dict[int, tuple[int, ...]] = {}
        self.bad_rows: set[str] = set()
        """Ids of requests whose next logits shall be NaN."""
        self._names: dict[int, str] = {}

    def run(self, plan: StepPlan) -> StepResult:
        """Execute one step.

        :raises AssertionError: the plan breaks the contract of `StepPlan`.
        """
        self._check_shape(plan)
        for entry in plan.added:
            self.rows[entry.row] = _Row(list(entry.token_ids))
            self._names[entry.row] = entry.request_id
        for append in plan.appended:
            table = self.rows[append.row].block_ids
            assert append.start == len(table), "block tables are append-only"
            assert 0 not in append.block_ids, "the null block holds no tokens"
            table.extend(append.block_ids)
        tokens = [self._run_row(plan, index, row) for index, row in enumerate(plan.rows)]
        return StepResult(plan.step, tokens)

    def _check_shape(self, plan: StepPlan) -> None:
        count = len(plan.rows)
        assert count == len(plan.starts) == len(plan.counts) == len(plan.samples)
        assert len(set(plan.rows)) == count, "a row is scheduled twice"
        assert all(0 <= row < self.max_num_seqs for row in plan.rows)
        assert all(c > 0 for c in plan.counts)
        assert sum(plan.counts) <= self.max_num_batched_tokens, "the step is over its token budget"
        decodes = [c == 1 and s for c, s in zip(plan.counts, plan.samples, strict=True)]
        assert all(decodes[: plan.num_decodes]), "decodes come first"

    def _run_row(self, plan: StepPlan, index: int, row_number: int) -> int:
        row = self.rows[row_number]
        start, count = plan.starts[index], plan.counts[index]
        end = start + count
        assert end <= len(row.tokens), "a position is computed before its token is known"
        assert end <= len(row.block_ids) * self.block_size, "the block table is too short"
        for position in range(start):
            assert self.slots.get(self._slot(row, position)) == tuple(row.tokens[: position + 1]), (
                f"row {row_number} reads position {position}, which holds something else"
            )
        for position in range(start, end):
            self.slots[self._slot(row, position)] = tuple(row.tokens[: position + 1])
        if not plan.samples[index]:
            return NO_TOKEN
        assert end == len(row.tokens), "sampled before the end of the known tokens"
        if self._names[row_number] in self.bad_rows:
            row.tokens.append(0)
            return BAD_LOGITS
        row.tokens.append(next_token(tuple(row.tokens)))
        return row.tokens[-1]

    def _slot(self, row: _Row, position: int) -> int:
        return row.block_ids[position // self.block_size] * self.block_size + position % self.block_size


class SchedulerMachine(RuleBasedStateMachine):
    """Random requests, aborts, overlapped steps and failures over a tiny pool."""

    conformance: SchedulerConformance

    @initialize(
        block_size=st.sampled_from([1, 2, 4]),
        num_blocks=st.integers(1, 8),
        max_num_seqs=st.integers(1, 4),
        extra_tokens=st.integers(0, 8),
        depth=st.integers(1, 3),
        policy=st.sampled_from(["fcfs", "priority"]),
        threshold=st.sampled_from([0, 1, 3]),
        caching=st.booleans(),
    )
    def start(  # noqa: PLR0917  hypothesis passes them by name
        self,
        block_size: int,
        num_blocks: int,
        max_num_seqs: int,
        extra_tokens: int,
        depth: int,
        policy: str,
        threshold: int,
        caching: bool,
    ) -> None:
        """Make a scheduler over a fresh pool."""
        self.kv_cache = PagedKVCache(
            BlockPool(num_blocks + 1), block_size, b"test", enable_prefix_caching=caching
        )
        budget = max_num_seqs + extra_tokens
        self.scheduler = self.conformance.make_scheduler(
            self.kv_cache,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget,
            policy=policy,
            long_prefill_threshold=threshold,
        )
        self.scheduler.record_events = True
        self.device = SimulatedDevice(block_size, max_num_seqs, budget)
        self.depth = depth
        self.capacity = num_blocks * block_size
        self.in_flight: list[StepResult] = []
        self.open: dict[str, Request] = {}
        self.expected: dict[str, list[int]] = {}
        self.told: dict[str, list[int]] = {}
        self.num_terminal: dict[str, int] = {}
        self.count = 0

    @rule(
        prompt=st.lists(st.integers(0, 2), min_size=1, max_size=12),
        max_tokens=st.integers(1, 12),
        priority=st.integers(0, 2),
        stops=st.booleans(),
        salt=st.sampled_from(["", "a"]),
    )
    def add(self, prompt: list[int], max_tokens: int, priority: int, stops: bool, salt: str) -> None:
        """Add a request; one that can never fit must be refused, every other accepted."""
        self.count += 1
        request = Request(
            f"r{self.count}",
            prompt,
            SamplingParams(),
            max_tokens=max_tokens,
            stop_ids=frozenset({EOS}) if stops else frozenset(),
            priority=priority,
            cache_salt=salt,
        )
        fits = len(prompt) + max_tokens - 1 <= self.capacity
        try:
            self.scheduler.add(request)
        except RequestTooLargeError:
            assert not fits, "a request that fits was refused"
            return
        assert fits, "a request that can never fit was accepted"
        self.open[request.request_id] = request
        self.expected[request.request_id] = solo_tokens(request)
        self.told[request.request_id] = []

    @rule()
    def submit(self) -> None:
        """Plan and launch a step, if the pipeline has room."""
        if len(self.in_flight) < self.depth:
            plan = self.scheduler.plan()
            if plan is not None:
                self.in_flight.append(self.device.run(plan))

    @precondition(lambda self: self.in_flight)
    @rule()
    def collect(self) -> None:
        """Apply the oldest result."""
        outputs = self.scheduler.apply(self.in_flight.pop(0))
        for request, token in zip(outputs.requests, outputs.tokens, strict=True):
            self.told[request.request_id].append(token)
        for request in outputs.finished:
            self._check_finished(request, outputs.errors)

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        """End a random open request from outside, twice."""
        request_id = data.draw(st.sampled_from(sorted(self.open)))
        request = self.scheduler.finish(request_id, FinishReason.ABORT)
        assert request is self.open.pop(request_id)
        assert not request.block_ids, "blocks are held after the end"
        assert self.scheduler.finish(request_id, FinishReason.ABORT) is None

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def poison(self, data: st.DataObject) -> None:
        """Make the next logits of a request NaN."""
        self.device.bad_rows.add(data.draw(st.sampled_from(sorted(self.open))))

    @precondition(lambda self: self.in_flight)
    @rule()
    def fail(self) -> None:
        """Lose every step in flight: their requests end, the others go on."""
        self.in_flight.clear()
        outputs = self.scheduler.fail("broken")
        self.kv_cache.reset()
        for request in outputs.finished:
            assert outputs.errors[request.request_id] == "broken"
            del self.open[request.request_id]

    @rule()
    def run_dry(self) -> None:
        """Step until nothing is left: everything must end in a bounded number of steps."""
        limit = 200 + 40 * sum(r.num_positions for r in self.open.values())
        for _ in range(limit):
            self.submit()
            if self.in_flight:
                self.collect()
            elif not self.scheduler.has_work:
                break
            else:
                raise AssertionError("there is work, nothing in flight, and no plan")
        assert not self.open, f"no progress: {self.open}"
        assert self.kv_cache.stats().num_used == 0, "blocks leaked"

    def _check_finished(self, request: Request, errors: dict[str, str]) -> None:
        request_id = request.request_id
        del self.open[request_id]
        if request_id in errors:
            assert request_id in self.device.bad_rows, errors
            return
        expected = self.expected[request_id]
        assert self.told[request_id] == expected == request.output_token_ids
        wanted = FinishReason.STOP if expected[-1] in request.stop_ids else FinishReason.LENGTH
        assert request.finish_reason is wanted

    @invariant()
    def books_balance(self) -> None:
        """Every block is free, cached or in a table; counts agree; one terminal event each."""
        if not hasattr(self, "scheduler"):
            return
        open_requests = list(self.scheduler.open_requests())
        self.kv_cache.check_integrity(open_requests)
        assert {r.request_id for r in open_requests} == set(self.open)
        assert self.scheduler.num_running + self.scheduler.num_waiting == len(self.open)
        assert self.scheduler.has_work == bool(self.open)
        rows = [r.row for r in open_requests if r.row >= 0]
        assert len(rows) == len(set(rows)) == self.scheduler.num_running
        for event in self.scheduler.drain_events():
            if type(event).__name__ == "RequestFinished":
                name: str = getattr(event, "request_id")  # noqa: B009  the base type has no such field
                self.num_terminal[name] = self.num_terminal.get(name, 0) + 1
        ended = set(self.told) - set(self.open)
        assert self.num_terminal == dict.fromkeys(ended, 1), "one terminal event for each request"


class SchedulerConformance:
    """Subclass, return your scheduler from `make_scheduler`, and let pytest collect the tests."""

    max_examples = 60

    def make_scheduler(
        self,
        kv_cache: KVCache,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        policy: str,
        long_prefill_threshold: int,
    ) -> Scheduler:
        """Make the scheduler under test."""
        raise TypeError("a subclass of SchedulerConformance must define make_scheduler")

    def test_state_machine(self) -> None:
        """Random operations against the simulated device."""
        conformance = self

        class Machine(SchedulerMachine):
            pass

        Machine.conformance = conformance
        run_state_machine_as_test(
            Machine,
            settings=settings(
                max_examples=self.max_examples,
                stateful_step_count=40,
                deadline=None,
                suppress_health_check=list(HealthCheck),
            ),
        )

    def test_running_decodes_advance_in_every_step(self) -> None:
        """A long prompt must not hold up requests that are already generating."""
        scheduler, device = self._make(num_blocks=64, max_num_seqs=4, budget=8)
        decoding = [self._request(f"d{i}", [1, 2], 30) for i in range(3)]
        for request in decoding:
            scheduler.add(request)
        self._step(scheduler, device)
        scheduler.add(self._request("long", [1] * 60, 1))
        for _ in range(10):
            before = [r.num_output for r in decoding]
            self._step(scheduler, device)
            assert [r.num_output - b for r, b in zip(decoding, before, strict=True)] == [1, 1, 1]

    def test_long_prompt_gets_through_beside_decodes(self) -> None:
        """Decodes must not starve a long prompt either."""
        scheduler, device = self._make(num_blocks=64, max_num_seqs=4, budget=8)
        for index in range(3):
            scheduler.add(self._request(f"d{index}", [1, 2], 40))
        self._step(scheduler, device)
        long = self._request("long", [1] * 60, 1)
        scheduler.add(long)
        for _ in range(12):  # 60 tokens at 5 per step
            self._step(scheduler, device)
        assert long.is_finished

    def test_priority_runs_lower_numbers_first(self) -> None:
        """Under the priority policy a better request overtakes those that wait."""
        scheduler, device = self._make(num_blocks=64, max_num_seqs=1, budget=64, policy="priority")
        order = []
        for name, priority in (("a", 5), ("b", 3), ("c", 4)):
            request = self._request(name, [1, 2, 3], 1)
            request.priority = priority
            scheduler.add(request)
        while scheduler.has_work:
            order += [r.request_id for r in self._step(scheduler, device).finished]
        assert order == ["b", "c", "a"]

    def test_first_come_first_served_ignores_priority(self) -> None:
        """Under the default policy the order of arrival decides."""
        scheduler, device = self._make(num_blocks=64, max_num_seqs=1, budget=64)
        order = []
        for name, priority in (("a", 5), ("b", 3)):
            request = self._request(name, [1, 2, 3], 1)
            request.priority = priority
            scheduler.add(request)
        while scheduler.has_work:
            order += [r.request_id for r in self._step(scheduler, device).finished]
        assert order == ["a", "b"]

    def test_newest_is_preempted(self) -> None:
        """When blocks run out the newest running request gives way, and still ends right."""
        scheduler, device = self._make(num_blocks=4, max_num_seqs=2, budget=16, block_size=2)
        old, new = self._request("old", [1, 2], 6), self._request("new", [2, 1], 6)
        expected = {r.request_id: solo_tokens(r) for r in (old, new)}
        scheduler.add(old)
        scheduler.add(new)
        while scheduler.has_work:
            self._step(scheduler, device)
        assert old.num_preemptions == 0
        assert new.num_preemptions >= 1
        assert {r.request_id: r.output_token_ids for r in (old, new)} == expected

    def test_overlapped_steps_under_preemption(self) -> None:
        """Tokens in flight when their request is preempted are neither lost nor drawn twice."""
        for num_blocks, block_size, depth in itertools.product((3, 4, 6), (1, 2), (2, 3)):
            scheduler, device = self._make(
                num_blocks=num_blocks, max_num_seqs=3, budget=12, block_size=block_size
            )
            max_tokens = num_blocks * block_size - 1
            requests = [self._request(f"r{i}", [1 + i % 2, 2], max_tokens) for i in range(5)]
            for request in requests:
                scheduler.add(request)
            self._run_overlapped(scheduler, device, depth)
            assert [r.output_token_ids for r in requests] == [solo_tokens(r) for r in requests]

    def _run_overlapped(self, scheduler: Scheduler, device: SimulatedDevice, depth: int) -> None:
        in_flight: list[StepResult] = []
        while scheduler.has_work or in_flight:
            plan = scheduler.plan() if len(in_flight) < depth else None
            if plan is not None:
                in_flight.append(device.run(plan))
            else:
                scheduler.apply(in_flight.pop(0))

    def _make(
        self,
        *,
        num_blocks: int,
        max_num_seqs: int,
        budget: int,
        block_size: int = 4,
        policy: str = "fcfs",
    ) -> tuple[Scheduler, SimulatedDevice]:
        kv_cache = PagedKVCache(
            BlockPool(num_blocks + 1), block_size, b"test", enable_prefix_caching=False
        )
        scheduler = self.make_scheduler(
            kv_cache,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget,
            policy=policy,
            long_prefill_threshold=0,
        )
        return scheduler, SimulatedDevice(block_size, max_num_seqs, budget)

    def _request(self, name: str, prompt: list[int], max_tokens: int) -> Request:
        return Request(name, prompt, SamplingParams(), max_tokens=max_tokens)

    def _step(self, scheduler: Scheduler, device: SimulatedDevice) -> Any:
        plan = scheduler.plan()
        assert plan is not None, "there is work but no plan"
        return scheduler.apply(device.run(plan))

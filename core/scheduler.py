"""The token-budget scheduler.

There is no prefill phase and no decode phase.  Every request has tokens that are known and
positions that are computed, and each step lets some requests catch up within a budget of tokens.
Chunked prefill, prefix-cache hits and preemption by recompute are all that one rule.

Order is by (priority, rank, arrival); under the `fcfs` policy all priorities count as equal, and so do
all ranks unless somebody ranks requests.  Running requests are served best first and each is granted
at least one token before anybody gets more, so a long prompt never holds up decodes.  When blocks run
out the last running request in that order gives up its own; it keeps its place and is recomputed later.
"""

from __future__ import annotations

import heapq
import time
from bisect import insort
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from core.errors import IntegrityError, InvalidRequestError, RequestTooLargeError
from core.events import (
    Event,
    FirstToken,
    RequestFinished,
    RequestPreempted,
    RequestQueued,
    RequestScheduled,
)
from core.interfaces import StepOutputs
from core.request import FinishReason, Request, RequestStatus
from core.step import BAD_LOGITS, BlockAppend, RowEntry, StepPlan, StepResult

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from core.interfaces import KVCache


@dataclass(slots=True)
class _InFlight:
    """The requests of a step whose result has not come back; the lists run in parallel."""

    step: int
    requests: list[Request] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    """Positions computed once the step is done."""
    epochs: list[int] = field(default_factory=list)
    """`num_preemptions` when planned: another value means that those positions are gone."""
    num_departures: int = 0
    """Of the scheduler when planned: the same value later means that all of them still run."""


_Key = tuple[int, float, int]
"""Priority, rank and arrival: no two requests have the same."""


def _rank_equally(_request: Request) -> float:
    return 0.0


class TokenBudgetScheduler:
    """Fulfils `core.interfaces.Scheduler`.

    :param max_num_seqs: rows of the batch.
    :param max_num_batched_tokens: tokens of one step; at least `max_num_seqs`.
    :param policy: `fcfs` or `priority`.
    :param long_prefill_threshold: most tokens of one prompt in one step; 0 for no limit of its own.
    :param num_micro_batches: steps that are on their way at the same time through the stages of a
        pipeline.  Each then takes its part of the running requests, and a request whose token is
        still being drawn waits for a later one.
    :param rank: orders requests of equal priority, lowest first; asked again whenever one has to wait,
        so it must always give the same number.
    :param clock: monotonic seconds.
    """

    def __init__(
        self,
        kv_cache: KVCache,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        policy: str = "fcfs",
        long_prefill_threshold: int = 0,
        num_micro_batches: int = 1,
        record_events: bool = False,
        rank: Callable[[Request], float] = _rank_equally,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.record_events = record_events
        self.num_preemptions = 0
        self._kv_cache = kv_cache
        self._block_size = kv_cache.block_size
        self._max_tokens = max_num_batched_tokens
        self._max_chunk = long_prefill_threshold or max_num_batched_tokens
        self._num_micro_batches = num_micro_batches
        self._by_priority = policy == "priority"
        self._rank = rank
        self._clock = clock
        self._requests: dict[str, Request] = {}
        self._waiting: list[tuple[_Key, Request]] = []  # a heap; ended ones are skipped
        self._running: list[Request] = []  # best first
        self._free_rows = list(range(max_num_seqs - 1, -1, -1))
        self._in_flight: deque[_InFlight] = deque()
        self._events: list[Event] = []
        self._num_steps = 0
        self._num_arrivals = 0
        self._num_departures = 0  # rows given back, by an end or a preemption
        # The best waiting request did not fit; nothing changes that until somebody gives back
        # blocks or a row, so admission is not tried again before.
        self._is_stuck = False

    # --- requests in and out ---

    def add(self, request: Request, /) -> None:
        """Queue a legal request.

        :raises InvalidRequestError: its id is in use.
        :raises RequestTooLargeError: it could never fit into the pool.
        """
        if request.request_id in self._requests:
            raise InvalidRequestError(
                f"request_id: {request.request_id!r} is in use by another open request",
                field="request_id",
            )
        if not self._kv_cache.can_ever_fit(request.num_positions):
            raise RequestTooLargeError(
                f"request {request.request_id!r} needs {request.num_positions} KV positions, but the whole "
                f"pool has {self._kv_cache.num_blocks * self._block_size}; lower max_tokens, or start the "
                f"engine with a larger --num-kv-blocks or --gpu-memory-utilization",
                field="max_tokens",
            )
        request.arrival = self._num_arrivals
        self._num_arrivals += 1
        self._requests[request.request_id] = request
        self._wait(request)
        if self.record_events:
            self._events.append(RequestQueued(request.request_id, request.num_prompt))

    def finish(self, request_id: str, reason: FinishReason, /) -> Request | None:
        """End a request from outside at any moment; its blocks are free when this returns.

        :return: the request, or `None` if there is none of that id (any more).
        """
        request = self._requests.get(request_id)
        if request is None:
            return None
        if request.status is RequestStatus.RUNNING:
            self._running.remove(request)
        self._end(request, reason)
        return request

    def open_requests(self) -> Iterable[Request]:
        """All requests that have not ended."""
        return self._requests.values()

    @property
    def has_work(self) -> bool:
        """Whether any request waits or runs."""
        return bool(self._requests)

    @property
    def num_running(self) -> int:
        """Requests that hold a row."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Requests that hold none."""
        return len(self._requests) - len(self._running)

    def drain_events(self) -> list[Event]:
        """Return and forget the events since the last call."""
        events, self._events = self._events, []
        return events

    # --- planning ---

    def plan(self) -> StepPlan | None:
        """Choose the next step, or `None` if nothing can be computed now."""
        plan = StepPlan(self._num_steps, [], [], [], [], [], [])
        step = _InFlight(self._num_steps)
        self._yield_to_priority()
        spare = self._plan_running(plan, step)
        if self._waiting and not self._is_stuck:
            self._admit(plan, step, spare)
        if not plan.rows:
            return None
        self._num_steps += 1
        step.num_departures = self._num_departures
        self._in_flight.append(step)
        return plan

    def _plan_running(self, plan: StepPlan, step: _InFlight) -> int:
        """Plan the requests that hold a row; return the tokens left over.

        Decodes are written out inline: this loop is most of what a step costs on the host.
        """
        block_size = self._block_size
        running = self._running if self._num_micro_batches == 1 else self._next_micro_batch()
        spare = self._max_tokens - len(running)
        decodes = step.requests
        chunks: list[tuple[Request, int]] = []
        for request in running:  # shrinks behind us when somebody is preempted
            start = request.num_computed
            if not request.is_decoding:
                count = min(request.num_tokens - start, spare + 1, self._max_chunk)
                spare -= count - 1
                chunks.append((request, count))
                continue
            if start >= request.num_positions:  # its last token is on its way
                spare += 1
                continue
            if (
                start % block_size == 0
                and start >= len(request.block_ids) * block_size
                and not self._grow(plan, request, start + 1, running)
            ):
                break
            decodes.append(request)
            request.num_computed = start + 1
            request.num_inflight += 1
        step.ends = [request.num_computed for request in decodes]
        step.epochs = [request.num_preemptions for request in decodes]
        plan.rows = [request.row for request in decodes]
        plan.starts = [end - 1 for end in step.ends]
        plan.num_decodes = len(decodes)
        plan.counts = [1] * len(decodes)
        plan.samples = [True] * len(decodes)
        for request, count in chunks:  # none was preempted since: victims come from the other end
            self._schedule(plan, step, request, count)
        return spare

    def _next_micro_batch(self) -> list[Request]:
        """Take an even part of the running requests, of those whose tokens are all known."""
        limit = -(-len(self._running) // self._num_micro_batches)
        return [request for request in self._running if not request.num_inflight][:limit]

    def _grow(self, plan: StepPlan, request: Request, num_tokens: int, running: list[Request]) -> bool:
        """Reserve positions, preempting from the worst end; whether `request` survived that.

        :param running: what the caller still goes through; who is preempted leaves it too.
        """
        num_blocks = len(request.block_ids)
        while not self._kv_cache.reserve(request, num_tokens):
            victim = self._running[-1]
            self._preempt(victim)
            if victim is request:
                return False
            if running[-1] is victim:
                running.pop()
        plan.appended.append(BlockAppend(request.row, num_blocks, request.block_ids[num_blocks:]))
        return True

    def _schedule(self, plan: StepPlan, step: _InFlight, request: Request, count: int) -> None:
        start = request.num_computed
        end = start + count
        is_caught_up = end == request.num_tokens
        plan.rows.append(request.row)
        plan.starts.append(start)
        plan.counts.append(count)
        plan.samples.append(is_caught_up)
        step.requests.append(request)
        step.ends.append(end)
        step.epochs.append(request.num_preemptions)
        request.num_computed = end
        request.num_inflight += is_caught_up
        request.is_decoding = is_caught_up

    def _admit(self, plan: StepPlan, step: _InFlight, spare: int) -> None:
        """Give rows to waiting requests, best first, while tokens, rows and blocks last."""
        while spare > 0:
            request = self._best_waiting()
            if request is None or request.num_inflight:  # its last token must come back first
                return
            if not self._free_rows or not self._reserve_all(request):
                self._is_stuck = True
                return
            heapq.heappop(self._waiting)
            self._start(plan, request)
            count = min(request.num_tokens - request.num_computed, spare, self._max_chunk)
            spare -= count
            self._schedule(plan, step, request, count)

    def _reserve_all(self, request: Request) -> bool:
        """Take the blocks of all known tokens at once, so that a prompt once begun gets through."""
        cached = self._kv_cache.lookup(request)
        if not self._kv_cache.reserve(request, request.num_tokens):
            self._kv_cache.free(request)
            return False
        request.num_computed = request.num_confirmed = cached
        if not request.num_preemptions:
            request.num_cached = cached
        return True

    def _start(self, plan: StepPlan, request: Request) -> None:
        request.row = self._free_rows.pop()
        request.status = RequestStatus.RUNNING
        insort(self._running, request, key=self._key)
        plan.added.append(
            RowEntry(
                request.row,
                request.request_id,
                request.token_ids.copy(),
                request.num_prompt,
                request.params,
                request.seed,
                sorted(request.stop_ids),
                request.num_cached,
            )
        )
        plan.appended.append(BlockAppend(request.row, 0, request.block_ids.copy()))
        if self.record_events:
            waited = self._clock() - request.arrival_time
            self._events.append(RequestScheduled(request.request_id, request.num_computed, waited))

    def _best_waiting(self) -> Request | None:
        while self._waiting:
            request = self._waiting[0][1]
            if not request.is_finished:
                return request
            heapq.heappop(self._waiting)
        return None

    def _yield_to_priority(self) -> None:
        """Preempt the worst running request when a strictly better one was found not to fit."""
        if not (self._by_priority and self._is_stuck and self._running):
            return
        best = self._best_waiting()
        if best is not None and best.priority < self._running[-1].priority:
            self._preempt(self._running[-1])

    def _preempt(self, request: Request) -> None:
        self._running.remove(request)
        if self.record_events:
            self._events.append(RequestPreempted(request.request_id, request.num_computed))
        request.num_preemptions += 1
        self.num_preemptions += 1
        request.num_computed = request.num_confirmed = 0
        request.is_decoding = False
        request.status = RequestStatus.WAITING
        self._give_back(request)
        self._wait(request)

    def _wait(self, request: Request) -> None:
        key = self._key(request)
        if not self._waiting or key < self._waiting[0][0]:
            self._is_stuck = False  # the one that did not fit is no longer the next
        heapq.heappush(self._waiting, (key, request))

    def _key(self, request: Request) -> _Key:
        priority = request.priority if self._by_priority else 0
        return (priority, self._rank(request), request.arrival)

    # --- results ---

    def apply(self, result: StepResult, /) -> StepOutputs:
        """Take in the result of the oldest plan not yet applied.

        :raises IntegrityError: the result belongs to another step.
        """
        step = self._take_oldest(result)
        if step.num_departures == self._num_departures and min(result.tokens) >= 0:
            outputs = self._apply_whole(step, result)
        else:
            outputs = self._apply_rows(step, result)
        if result.logprobs or result.prompt_logprobs:
            self._attach_logprobs(outputs, step, result)
        self._settle(outputs)
        return outputs

    def _apply_whole(self, step: _InFlight, result: StepResult) -> StepOutputs:
        """Apply a step of which every row drew a token and still runs: the steady state.

        With `_plan_running` this loop is what a step costs on the host.
        """
        outputs = StepOutputs(step.requests, result.tokens)
        block_size, commit = self._block_size, self._kv_cache.commit
        for request, token, end in zip(step.requests, result.tokens, step.ends, strict=True):
            num_new = end - request.num_confirmed
            request.num_confirmed = end
            if num_new > 1 or end % block_size == 0:
                commit(request)
            request.num_inflight -= 1
            request.token_ids.append(token)
            if token in request.stop_ids or end >= request.num_positions:
                self._conclude(outputs, request, token)
        return outputs

    def _apply_rows(self, step: _InFlight, result: StepResult) -> StepOutputs:
        """Apply any step: rows may have ended, been preempted, or drawn nothing."""
        outputs = StepOutputs()
        for request, token, end, epoch in zip(
            step.requests, result.tokens, step.ends, step.epochs, strict=True
        ):
            if request.is_finished:
                continue
            if epoch == request.num_preemptions:
                request.num_confirmed = end
                self._kv_cache.commit(request)
            if token >= 0:
                request.num_inflight -= 1
                request.token_ids.append(token)
                outputs.requests.append(request)
                outputs.tokens.append(token)
                if token in request.stop_ids or end >= request.num_positions:
                    self._conclude(outputs, request, token)
            elif token == BAD_LOGITS:
                self._conclude(outputs, request, token)
        return outputs

    def _take_oldest(self, result: StepResult) -> _InFlight:
        step = self._in_flight.popleft()
        if step.step != result.step or len(step.requests) != len(result.tokens):
            raise IntegrityError(
                f"result of step {result.step} with {len(result.tokens)} rows does not answer "
                f"step {step.step} with {len(step.requests)} rows"
            )
        return step

    def _settle(self, outputs: StepOutputs) -> None:
        if outputs.finished:
            self._running = [r for r in self._running if r.status is RequestStatus.RUNNING]
        if self.record_events:
            self._note_first_tokens(outputs.requests)
            for request in outputs.finished:
                error = outputs.errors.get(request.request_id, "")
                self._events.append(self._finished_event(request, error))

    def _conclude(self, outputs: StepOutputs, request: Request, token: int) -> None:
        if token == BAD_LOGITS:
            outputs.errors[request.request_id] = "the model computed logits that are not numbers"
            self._end_in_step(outputs, request, FinishReason.ERROR)
        elif token in request.stop_ids:
            request.stop_reason = token
            self._end_in_step(outputs, request, FinishReason.STOP)
        else:
            self._end_in_step(outputs, request, FinishReason.LENGTH)

    def fail(self, error: str, /) -> StepOutputs:
        """End every request that the steps in flight scheduled, and forget those steps."""
        outputs = StepOutputs()
        for step in self._in_flight:
            for request in step.requests:
                if not request.is_finished:
                    outputs.errors[request.request_id] = error
                    self._end_in_step(outputs, request, FinishReason.ERROR)
        self._in_flight.clear()
        self._settle(outputs)
        return outputs

    def restart(self) -> None:
        """Forget the steps in flight and recompute every running request: the KV cache was lost."""
        self._in_flight.clear()
        for request in self._requests.values():
            request.num_inflight = 0
        for request in self._running.copy():
            self._preempt(request)

    def _end_in_step(self, outputs: StepOutputs, request: Request, reason: FinishReason) -> None:
        """End a request but leave it in `_running`, which the caller filters once."""
        outputs.finished.append(request)
        self._close(request, reason)

    def _end(self, request: Request, reason: FinishReason) -> None:
        self._close(request, reason)
        if self.record_events:
            self._events.append(self._finished_event(request, ""))

    def _close(self, request: Request, reason: FinishReason) -> None:
        request.status = RequestStatus.FINISHED
        request.finish_reason = reason
        del self._requests[request.request_id]
        self._give_back(request)
        if self._waiting and self._waiting[0][1] is request:
            self._is_stuck = False

    def _give_back(self, request: Request) -> None:
        self._kv_cache.free(request)
        if request.row >= 0:
            self._free_rows.append(request.row)
            request.row = -1
            self._num_departures += 1
            self._is_stuck = False

    def _attach_logprobs(self, outputs: StepOutputs, step: _InFlight, result: StepResult) -> None:
        for index, logprobs in result.logprobs.items():
            outputs.logprobs[step.requests[index].request_id] = logprobs
        for index, entries in result.prompt_logprobs.items():
            outputs.prompt_logprobs[step.requests[index].request_id] = entries

    # --- events ---

    def _note_first_tokens(self, requests: list[Request]) -> None:
        for request in requests:
            if len(request.token_ids) == request.num_prompt + 1:
                latency = self._clock() - request.arrival_time
                self._events.append(FirstToken(request.request_id, latency))

    def _finished_event(self, request: Request, error: str) -> RequestFinished:
        return RequestFinished(
            request.request_id,
            str(request.finish_reason),
            request.num_prompt,
            request.num_output,
            request.num_cached,
            request.num_preemptions,
            self._clock() - request.arrival_time,
            error,
        )

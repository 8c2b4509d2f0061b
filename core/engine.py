"""The engine's loop: commands come in, steps run, outputs and events go out.

`EngineCore` knows no text, no HTTP and no plugin: scheduler, KV cache and executor were built by
assembly.  It runs in the calling thread (`step`), or in a thread or process of its own (`run`).
"""

from __future__ import annotations

import queue
import time
from collections import deque
from typing import TYPE_CHECKING, Final

import structlog

from core.errors import DeviceLostError, IntegrityError, RequestError
from core.events import (
    SCHEDULER_EVENTS,
    BlocksEvicted,
    EngineStarted,
    EngineStopping,
    Event,
    RequestRefused,
    StepCompleted,
    StepFailed,
    WorkerLost,
)
from core.interfaces import SupportsIdleWork, SupportsRecovery
from core.messages import Command, Ended, Finish, OutputBatch, Submit
from core.request import FinishReason, Request

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from core.events import EventBus
    from core.interfaces import Executor, KVCache, Scheduler, StepOutputs
    from core.link import RelayBus
    from core.step import StepPlan, StepResult

log = structlog.get_logger(__name__)

SHUTDOWN: Final = "shutdown"
MAX_LOSSES: Final = 3
"""Losses of devices without a completed step between them, after which the engine gives up."""
_WAKE: Final = None  # put into the inbox to end a blocking wait


class EngineCore:
    """One engine.

    :param outbox: receives one `OutputBatch` per step that had something to tell, on the thread
        that runs the loop.
    :param on_stop: called once, after the last step, with the reason.
    """

    def __init__(
        self,
        *,
        scheduler: Scheduler,
        kv_cache: KVCache,
        executor: Executor,
        bus: EventBus | RelayBus,
        outbox: Callable[[OutputBatch], None],
        on_stop: Callable[[EngineCore, str], None] = lambda _engine, _reason: None,
    ) -> None:
        self.scheduler = scheduler
        self.kv_cache = kv_cache
        self.executor = executor
        self.bus = bus
        self.num_integrity_errors = 0
        self._wants_steps = bus.wants(StepCompleted)
        self._outbox = outbox
        self._on_stop = on_stop
        self._inbox: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._submitted: deque[tuple[StepPlan, float]] = deque()
        self._is_stopping = False
        self._is_stopped = False
        self._was_idle = True
        self._next_check = 0.0
        self._num_completed = 0
        self._num_losses = 0  # of devices since a step came back
        self._request_ids: dict[int, str] = {}  # who was the last to enter each row
        self._suspects: set[Request] = set()  # were in flight when devices were lost
        scheduler.record_events = bus.wants(*SCHEDULER_EVENTS)
        kv_cache.record_events = bus.wants(BlocksEvicted)
        if bus.is_active:
            bus.publish([EngineStarted(kv_cache.num_blocks, kv_cache.block_size)], step=0)

    # --- called from any thread ---

    def send(self, command: Command) -> None:
        """Queue a command; it takes effect before the next step is planned."""
        self._inbox.put(command)

    def stop(self) -> None:
        """Make `run` return after the step in progress; open requests end as aborted."""
        self._is_stopping = True
        self._inbox.put(_WAKE)

    # --- called from the thread of the loop ---

    @property
    def has_work(self) -> bool:
        """Whether a step may have something to do."""
        return bool(self._submitted) or self.scheduler.has_work or not self._inbox.empty()

    def run(self) -> None:
        """Step until `stop` is called; block, without spinning, while there is nothing to do."""
        reason = SHUTDOWN
        try:
            while not self._is_stopping:
                if not self.step():
                    self._wait()
        except BaseException as error:
            reason = f"{type(error).__name__}: {error}"
            raise
        finally:
            self.close(reason)

    def prepare(self) -> None:
        """Let the executor prepare itself to the end, which `run` does when there is nothing to do."""
        if isinstance(self.executor, SupportsIdleWork):
            while self.executor.work_idle():
                pass

    def _wait(self) -> None:
        """Let the executor prepare itself, and block once it has nothing left to do."""
        executor = self.executor
        while isinstance(executor, SupportsIdleWork) and self._inbox.empty():
            if not executor.work_idle():
                break
        command = self._inbox.get()
        if command is not _WAKE:
            self._take(command)

    def step(self) -> bool:
        """Take in commands, launch what can be launched, and apply the oldest result.

        :return: whether anything was done; `False` means that only a new command can change that.
        """
        self._drain_inbox()
        while len(self._submitted) < self.executor.max_in_flight:
            plan = self.scheduler.plan()
            if plan is None:
                break
            self._submitted.append((plan, time.monotonic()))
            for entry in plan.added:
                self._request_ids[entry.row] = entry.request_id
            self.executor.submit(plan)
        if self._submitted:
            self._collect()
            self._was_idle = False
            return True
        if self.scheduler.has_work:
            self._break_stall()
            return True
        if not self._was_idle:
            self._was_idle = True
            if time.monotonic() >= self._next_check:
                self._check_integrity()
        self._publish([])
        return False

    def close(self, reason: str = SHUTDOWN) -> None:
        """End every open request, tell the subscribers, and give the devices back."""
        if self._is_stopped:
            return
        self._is_stopped = True
        self._drain_inbox()
        is_planned = reason == SHUTDOWN
        for request in list(self.scheduler.open_requests()):
            if is_planned:
                self._finish(request.request_id, FinishReason.ABORT)
            else:
                self._finish(request.request_id, FinishReason.ERROR, f"the engine stopped: {reason}")
        self._publish([EngineStopping(reason)])
        self._on_stop(self, reason)
        self.executor.close()
        self.bus.close()

    # --- commands ---

    def _drain_inbox(self) -> None:
        while True:
            try:
                command = self._inbox.get_nowait()
            except queue.Empty:
                return
            if command is not _WAKE:
                self._take(command)

    def _take(self, command: Command) -> None:
        if isinstance(command, Finish):
            self._finish(command.request_id, command.reason)
            return
        try:
            self.scheduler.add(_make_request(command))
        except RequestError as error:
            self.bus.note(RequestRefused(command.request_id, str(error)))
            ended = Ended(command.request_id, FinishReason.ERROR, error=str(error))
            self._outbox(OutputBatch(ended=[ended]))

    def _finish(self, request_id: str, reason: FinishReason, error: str = "") -> None:
        request = self.scheduler.finish(request_id, reason)
        if request is not None:
            self._outbox(OutputBatch(ended=[Ended(request_id, reason, error=error)]))

    def _break_stall(self) -> None:
        """End requests that no step can advance: a scheduler or KV cache has lost blocks."""
        message = "the scheduler has requests but plans no step; the KV pool may have lost blocks"
        log.error(message, waiting=self.scheduler.num_waiting, kv=self.kv_cache.stats())
        for request in list(self.scheduler.open_requests()):
            self._finish(request.request_id, FinishReason.ERROR, message)

    # --- results ---

    def _collect(self) -> None:
        plan, submitted_at = self._submitted.popleft()
        try:
            result = self.executor.collect()
        except DeviceLostError as error:
            self._recover(plan, error)
            return
        except Exception as error:  # noqa: BLE001  whatever a step raises must not end the engine
            self._fail(plan, error)
            return
        outputs = self.scheduler.apply(result)
        self._emit(plan, outputs)
        if self._wants_steps:
            self._publish([self._step_completed(plan, result, outputs, submitted_at)])
        elif self.bus.is_active:
            self._publish([])
        self._num_completed += 1
        self._num_losses = 0

    def _recover(self, plan: StepPlan, error: DeviceLostError) -> None:
        """Get lost devices back and compute again what they held: no client notices but by the time.

        The requests of a step that has cost the devices twice are ended, and so is a request in whose
        steps they were lost twice: one of them may be the cause.

        :raises DeviceLostError: it happens again and again.
        """
        log.error("devices lost", step=plan.step, rank=error.rank, reason=str(error))
        self.bus.note(WorkerLost(error.rank, str(error)))
        self._num_losses += 1
        if self._num_losses > MAX_LOSSES or not isinstance(self.executor, SupportsRecovery):
            raise error
        message = str(error).partition("\n")[0]  # clients need no stacks
        if self._num_losses > 1:
            self._emit(plan, self.scheduler.fail(message))
        self._end_suspects([plan, *(later for later, _ in self._submitted)], message)
        self._submitted.clear()
        self.scheduler.restart()
        self.kv_cache.reset()
        self._publish([])
        self.executor.recover()

    def _end_suspects(self, plans: Sequence[StepPlan], message: str) -> None:
        """End the requests of lost steps whose steps were lost before, and remember the others."""
        in_flight = {self._request_ids.get(row) for plan in plans for row in plan.rows}
        still_open = set(self.scheduler.open_requests())
        seen = {request for request in still_open if request.request_id in in_flight}
        for request in seen & self._suspects:
            self._finish(request.request_id, FinishReason.ERROR, message)
        self._suspects = (self._suspects | seen) & still_open

    def _fail(self, plan: StepPlan, error: Exception) -> None:
        """End the requests of all steps in flight; the rest goes on.

        Later steps in flight read what the failed one should have written, and any of them may
        have left blocks half written, so cached prefixes are forgotten too.
        """
        log.error("step failed", step=plan.step, rows=len(plan.rows), exc_info=error)
        while self._submitted:
            self._submitted.popleft()
            try:
                self.executor.collect()
            except Exception:
                log.exception("step failed behind another one")
        message = f"{type(error).__name__}: {error}"
        outputs = self.scheduler.fail(message)
        self.kv_cache.reset()
        self._emit(plan, outputs)
        self._publish([StepFailed(plan.step, message, len(outputs.finished))])

    def _emit(self, plan: StepPlan, outputs: StepOutputs) -> None:
        batch = OutputBatch(
            [request.request_id for request in outputs.requests],
            outputs.tokens,
            [_ended(request, outputs) for request in outputs.finished],
            {entry.request_id: entry.num_cached for entry in plan.added},
            outputs.logprobs,
            outputs.prompt_logprobs,
        )
        if batch.request_ids or batch.ended or batch.cached or batch.prompt_logprobs:
            self._outbox(batch)

    # --- events ---

    def _publish(self, events: list[Event]) -> None:
        if not self.bus.is_active:
            return
        evicted = self.kv_cache.drain_events()
        self.bus.publish([*self.scheduler.drain_events(), *evicted, *events], self._num_completed)

    def _step_completed(
        self, plan: StepPlan, result: StepResult, outputs: StepOutputs, submitted_at: float
    ) -> StepCompleted:
        return StepCompleted(
            result.step,
            plan.num_tokens,
            plan.num_decodes,
            self.scheduler.num_running,
            self.scheduler.num_waiting,
            self.kv_cache.stats().usage,
            time.monotonic() - submitted_at,
            [request.request_id for request in outputs.requests],
            outputs.tokens,
        )

    def _check_integrity(self) -> None:
        """Check the pool when the engine goes idle; a leak is reported, never fatal.

        A large pool takes milliseconds, which requests that come one by one should not wait for: so
        that a check never takes more than a hundredth of the time.
        """
        began = time.monotonic()
        try:
            self.kv_cache.check_integrity(self.scheduler.open_requests())
        except IntegrityError:
            self.num_integrity_errors += 1
            log.exception("the KV pool is inconsistent", errors=self.num_integrity_errors)
        ended = time.monotonic()
        self._next_check = ended + 100 * (ended - began)


def _make_request(command: Submit) -> Request:
    return Request(
        command.request_id,
        command.prompt_token_ids,
        command.params,
        max_tokens=command.max_tokens,
        stop_ids=frozenset(command.stop_ids),
        seed=command.seed,
        priority=command.priority,
        arrival_time=command.arrival_time,
        cache_salt=command.cache_salt,
    )


def _ended(request: Request, outputs: StepOutputs) -> Ended:
    reason = request.finish_reason or FinishReason.ERROR
    error = outputs.errors.get(request.request_id, "")
    return Ended(request.request_id, reason, request.stop_reason, error)

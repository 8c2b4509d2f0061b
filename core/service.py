"""What front ends see: one model, its state, and a way to have requests answered.

The service owns the limits that protect everybody from each: it refuses what cannot be served now,
bounds the queue, and ends what takes too long.  It knows no HTTP.
"""

from __future__ import annotations

import heapq
import itertools
import math
import time
from collections import deque
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final, Self

import anyio
from anyio import to_thread

from core.assemble import DEFAULT_PLUGINS, SERVE_PLUGINS, start_plugins
from core.async_engine import Engine
from core.budget import BudgetExceededError, run_with_budget
from core.errors import (
    InvalidRequestError,
    ModelNotFoundError,
    NotReadyError,
    OverloadedError,
    first_cause,
)
from core.events import Event, EventBatch, RequestRefused, Subscription
from core.interfaces import Frontend, Server, missing_members
from core.outputs import OutputKind
from core.process import EngineProcess
from core.status import Phase, Report, Status, report_nothing

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence
    from types import TracebackType

    from core.assemble import ActivePlugins
    from core.async_engine import OutputStream
    from core.config import EngineConfig
    from core.plan import Plan
    from core.process import EngineLink
    from core.request import RequestLimits, SamplingParams
    from core.tokenizer import Tokenizer

MAX_SEQUENCES: Final = 128
"""Most sequences, prompts times completions, that one request may bring."""
SHORT_TEXT: Final = 8192
"""Characters up to which tokenizing is not worth a thread."""
RETRY_SECONDS: Final = (1.0, 60.0)
"""Least and most that clients are told to wait."""
NUM_RENDERERS: Final = 2


class Service:
    """One served model.

    :param config: its settings.
    :param link: where the engine runs; by default in a process of its own.
    :param report: hears of every change of the status.
    """

    def __init__(
        self,
        config: EngineConfig,
        link: EngineLink | None = None,
        *,
        report: Report = report_nothing,
    ) -> None:
        self.config = config
        self.status = Status()
        self.model_names = config.served_model_name or (config.model,)
        self.created = int(time.time())
        self.active: ActivePlugins = start_plugins(config, (*DEFAULT_PLUGINS, *SERVE_PLUGINS))
        self.settings: Mapping[str, Any] = self.active.settings
        self._report = report
        self._engine = Engine.over(
            config,
            link or EngineProcess(),
            self.active,
            report=self._take_status,
        )
        self._admissions: dict[str, Admission] = {}
        self._deadlines = _Deadlines(self)
        self._backlog = _Backlog()
        self._stop = anyio.Event()
        self._is_idle = anyio.Event()
        self._renderers = anyio.CapacityLimiter(NUM_RENDERERS)

    # --- life ---

    def make_frontends(self) -> list[Frontend]:
        """Build every front end of the active plugins."""
        return [entry.descriptor.factory(self) for entry in self.active.registry.all("frontend")]

    def make_server(self, frontends: Sequence[Frontend]) -> Server:
        """Build the server that the configuration names.

        :raises PluginError: it does not exist, or is none.
        """
        registered = self.active.registry.get("server", self.config.server)
        server: Server = registered.descriptor.factory(self, frontends)
        if problems := missing_members(server, Server):
            raise TypeError(f"server {self.config.server} ({registered.plugin}): {'; '.join(problems)}")
        return server

    async def run(self) -> None:
        """Start the engine and serve until `stop` is called.

        :raises CytheraError: the engine cannot start, or has died.
        """
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._cancel_on_stop, tasks.cancel_scope)
                async with self._engine as engine:
                    tasks.start_soon(self._deadlines.enforce)
                    await engine.wait_ended()
                    self._stop.set()
        except BaseExceptionGroup as group:
            error = first_cause(group)
            self._take_status(Status(Phase.FAILED, error=str(error)))
            raise error from None
        if self._engine.failure is not None:
            self._take_status(Status(Phase.FAILED, error=str(self._engine.failure)))
            raise self._engine.failure
        self._take_status(Status(Phase.STOPPED))

    async def _cancel_on_stop(self, scope: anyio.CancelScope) -> None:
        await self._stop.wait()
        scope.cancel()

    async def drain(self, grace: float) -> None:
        """Take no new request, and wait until the open ones have ended.

        :param grace: seconds after which those still open are ended.
        """
        if self.status.phase in (Phase.FAILED, Phase.STOPPED):
            return
        self._take_status(Status(Phase.DRAINING))
        if self._admissions:
            with anyio.move_on_after(grace):
                await self._is_idle.wait()
        for request_id in list(self._admissions):
            self.cancel(request_id, "the server is shutting down")

    def stop(self) -> None:
        """Let `run` return."""
        self._stop.set()

    def _take_status(self, status: Status) -> None:
        self.status = status
        self._report(status)

    # --- what is served ---

    @property
    def plan(self) -> Plan | None:
        """The plan, once it has been made."""
        assembly = getattr(self._engine, "assembly", None)
        return None if assembly is None else assembly.plan

    @property
    def limits(self) -> RequestLimits:
        """The caps on requests.

        :raises NotReadyError: the engine is not loaded.
        """
        return self._loaded().journal.limits

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer, if it has one.

        :raises NotReadyError: the engine is not loaded.
        """
        return self._loaded().tokenizer

    @property
    def sampling_defaults(self) -> Mapping[str, Any]:
        """Fields of `SamplingParams` that the checkpoint recommends.

        :raises NotReadyError: the engine is not loaded.
        """
        return self._loaded().sampling_defaults

    @property
    def num_open(self) -> int:
        """Requests that were let in and have not ended."""
        return len(self._admissions)

    @property
    def num_waiting(self) -> int:
        """Sequences that have not had a row yet."""
        return self._engine.journal.num_waiting if self._is_loaded else 0

    @property
    def num_running(self) -> int:
        """Sequences that have had a row and have not ended."""
        return self._engine.journal.num_open_sequences - self.num_waiting if self._is_loaded else 0

    @property
    def seconds_without_progress(self) -> float:
        """How long the engine has been silent although there is work; 0 if there is none."""
        if not self._is_loaded or not self._engine.journal.num_open_sequences:
            return 0.0
        return time.monotonic() - max(self._engine.last_message_time, self._engine.last_submit_time)

    @property
    def _is_loaded(self) -> bool:
        return hasattr(self._engine, "journal")

    def _loaded(self) -> Engine:
        if not self._is_loaded:
            self.check_ready()
        return self._engine

    def check_ready(self) -> None:
        """Raise unless requests can be taken now.

        :raises NotReadyError: the engine is loading, draining or gone.
        """
        phase = self.status.phase
        if phase is Phase.READY:
            return
        if phase is Phase.DRAINING or phase in (Phase.STOPPED, Phase.FAILED):
            raise NotReadyError(f"the server is {phase} and takes no new requests", retry_after=5.0)
        progress = f", {self.status.percent} %" if self.status.total else ""
        raise NotReadyError(f"the model is not ready yet: {phase}{progress}", retry_after=2.0)

    def check_model(self, name: str) -> None:
        """Raise unless `name` is served here.

        :raises ModelNotFoundError: it is not.
        """
        if name not in self.model_names:
            known = ", ".join(map(repr, self.model_names))
            raise ModelNotFoundError(
                f"model: {name[:200]!r} is not served here, but {known} is", field="model"
            )

    # --- requests ---

    def admit(
        self, request_id: str, *, num_sequences: int = 1, timeout: float | None = None
    ) -> Admission:
        """Let a request in, or refuse it, before any work is done for it.

        :param num_sequences: prompts times completions that it will bring.
        :param timeout: seconds that it may take in all; `None` takes `--request-timeout`.
        :raises NotReadyError: nothing is served now.
        :raises OverloadedError: the queue is full.
        :raises InvalidRequestError: too many sequences, or the id is that of an open request.
        """
        self.check_ready()
        if num_sequences > MAX_SEQUENCES:
            raise InvalidRequestError(
                f"n: prompts times n is {num_sequences}, but at most {MAX_SEQUENCES} sequences may come "
                f"with one request",
                field="n",
            )
        if request_id in self._admissions:
            raise InvalidRequestError(
                f"request_id: {request_id!r} is in use by another open request", field="request_id"
            )
        self._check_queue(num_sequences)
        admission = Admission(self, request_id, num_sequences)
        limit = self.config.request_timeout
        seconds = min(timeout or math.inf, limit or math.inf)
        if seconds < math.inf:
            self._deadlines.add(admission, seconds, "request_timeout")
        if self.config.queue_timeout is not None:
            self._deadlines.add(admission, self.config.queue_timeout, "queue_timeout")
        self._admissions[request_id] = admission
        return admission

    def cancel(self, request_id: str, error: str = "") -> bool:
        """End an open request; each of its streams gets a last output with finish reason `abort`.

        :param error: goes into these outputs.
        :return: whether there was such a request.
        """
        admission = self._admissions.get(request_id)
        if admission is None:
            return False
        admission.cancel(error)
        return True

    def refuse(self, request_id: str, error: Exception) -> None:
        """Publish that a request was turned away."""
        if hasattr(self._engine, "bus"):
            self._engine.bus.publish([RequestRefused(request_id, str(error))], 0)

    def _check_queue(self, num_sequences: int) -> None:
        journal, limit = self._engine.journal, self.config.max_num_queued_reqs
        promised = sum(admission.num_promised for admission in self._admissions.values())
        waiting = journal.num_waiting + promised
        if waiting and waiting + num_sequences > limit:
            raise OverloadedError(
                f"{waiting} sequences wait already, and at most {limit} may (--max-num-queued-reqs)",
                retry_after=self._backlog.seconds(journal.num_waiting_tokens),
            )

    def _check_queued_tokens(self, num_tokens: int) -> None:
        journal, limit = self._engine.journal, self.config.max_num_queued_tokens
        waiting = journal.num_waiting_tokens
        self._backlog.note(journal.num_started_tokens)
        if waiting and waiting + num_tokens > limit:
            raise OverloadedError(
                f"prompts of {waiting} tokens wait already, and with {num_tokens} more they would be "
                f"over {limit} (--max-num-queued-tokens)",
                retry_after=self._backlog.seconds(waiting),
            )

    def _dismiss(self, admission: Admission) -> None:
        self._admissions.pop(admission.request_id, None)
        self._deadlines.remove(admission)
        if not self._admissions:
            self._is_idle.set()
            self._is_idle = anyio.Event()

    # --- text ---

    async def encode(
        self, text: str, *, add_special_tokens: bool = True, parse_special: bool = False
    ) -> list[int]:
        """Turn text into token ids; long text off the event loop.

        :param parse_special: see `Tokenizer.encode`.
        :raises InvalidRequestError: there is no tokenizer, or it is no Unicode text.
        """
        tokenizer = self.need_tokenizer("prompt")

        def encode() -> list[int]:
            return tokenizer.encode(text, add_special_tokens, parse_special=parse_special)

        return encode() if len(text) <= SHORT_TEXT else await to_thread.run_sync(encode)

    async def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Turn token ids into text.

        :raises InvalidRequestError: there is no tokenizer, or an id is out of range.
        """
        tokenizer, size = self.need_tokenizer("tokens"), self.limits.vocab_size
        for index, token_id in enumerate(token_ids):
            if not 0 <= token_id < size:
                raise InvalidRequestError(
                    f"tokens[{index}]: {token_id} is not in the vocabulary of {size}", field="tokens"
                )
        if len(token_ids) <= SHORT_TEXT:
            return tokenizer.decode(token_ids, skip_special_tokens)
        return await to_thread.run_sync(tokenizer.decode, token_ids, skip_special_tokens)

    async def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Any] | None = None,
        documents: Sequence[Any] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """Render a conversation with the model's template, in a sandbox, off the event loop.

        :raises InvalidRequestError: the template refuses the conversation or takes too long.
        """
        tokenizer = self.need_tokenizer("messages")
        kwargs = dict(chat_template_kwargs or {})
        tokenizer.check_template_variables(kwargs)
        given = {"tools": tools, "documents": documents}
        kwargs |= {name: value for name, value in given.items() if value is not None}
        if continue_final_message:
            kwargs["continue_final_message"] = True

        def render() -> str:
            return tokenizer.render_chat(messages, add_generation_prompt, **kwargs)

        budget = self.config.chat_template_timeout
        try:
            return await run_with_budget(render, budget, self._renderers)
        except BudgetExceededError as error:
            raise InvalidRequestError(
                f"messages: rendering them with the chat template {error} (--chat-template-timeout)",
                field="messages",
            ) from None

    def need_tokenizer(self, field: str) -> Tokenizer:
        """Return the model's tokenizer.

        :param field: what cannot be served without one.
        :raises InvalidRequestError: the model has none.
        :raises NotReadyError: the engine is not loaded.
        """
        tokenizer = self.tokenizer
        if tokenizer is None:
            raise InvalidRequestError(
                f"{field}: text needs a tokenizer, but this model has none; send token ids", field=field
            )
        return tokenizer

    # --- events ---

    def subscribe(self, subscription: Subscription) -> None:
        """Subscribe to the engine's events: for the factories of front ends.

        :raises EngineDeadError: the engine is loaded already and builds no further kinds of events.
        """
        self._engine.subscribe(subscription)

    def want(self, *types: type[Event]) -> None:
        """Have the engine build events of these types, for `watch`: for the factories of front ends.

        :raises EngineDeadError: as `subscribe`.
        """
        self._engine.want(*types)

    @asynccontextmanager
    async def watch(self, *types: type[Event]) -> AsyncIterator[EventStream]:
        """Watch events as they happen; a slow watcher misses the oldest.

        Types that nobody had asked for with `want` or `subscribe` never come.
        """
        self.check_ready()
        stream = EventStream()
        remove = self._engine.bus.tap(stream.put, types)
        try:
            yield stream
        finally:
            remove()


class EventStream:
    """Batches of events, as an async iterator that never ends by itself."""

    def __init__(self, capacity: int = 256) -> None:
        self._batches: deque[EventBatch] = deque(maxlen=capacity)
        self._changed = anyio.Event()

    def put(self, batch: EventBatch) -> None:
        """Add a batch; from the event loop."""
        self._batches.append(batch)
        self._changed.set()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> EventBatch:
        while not self._batches:
            self._changed = anyio.Event()
            await self._changed.wait()
        return self._batches.popleft()


class Admission:
    """A request that was let in.  Leaving its `with` block ends whatever of it is still open."""

    def __init__(self, service: Service, request_id: str, num_sequences: int) -> None:
        self.request_id = request_id
        self.num_promised = num_sequences
        """Sequences that it may still bring."""
        self._service = service
        self._open: list[str] = []
        self._error: str | None = None

    def generate(
        self,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        prompt_text: str | None = None,
        kind: OutputKind = OutputKind.DELTA,
        priority: int = 0,
        cache_salt: str = "",
    ) -> OutputStream:
        """Submit one prompt at once; several of one request go on side by side.

        :param prompt_text: what the ids were made from, for the outputs.
        :return: its outputs; those that were not read in time are joined.
        :raises RequestError: it is refused.
        :raises OverloadedError: its prompt would make the queue too long.
        """
        engine = self._service._engine  # noqa: SLF001  one unit
        self._service._check_queued_tokens(len(prompt_token_ids) * params.n)  # noqa: SLF001
        prompt_id = f"{self.request_id}#{len(self._open)}" if self._open else self.request_id
        stream = engine.submit(
            prompt_id,
            prompt_token_ids,
            params,
            kind=kind,
            priority=priority,
            cache_salt=cache_salt,
            text=prompt_text,
        )
        self._open.append(prompt_id)
        self.num_promised = max(0, self.num_promised - params.n)
        if self._error is not None:  # it was ended while its prompt was made
            engine.cancel(prompt_id, self._error)
        return stream

    def cancel(self, error: str = "") -> None:
        """End all streams, each with a last output whose finish reason is `abort`."""
        self._error = self._error or error
        for prompt_id in self._open:
            self._service._engine.cancel(prompt_id, error)  # noqa: SLF001

    @property
    def is_waiting(self) -> bool:
        """Whether nothing of it has had a row yet."""
        journal = self._service._engine.journal  # noqa: SLF001
        return all(journal.is_waiting(prompt_id) for prompt_id in self._open)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for prompt_id in self._open:
            self._service._engine.abort(prompt_id)  # noqa: SLF001
        self._service._dismiss(self)  # noqa: SLF001


class _Deadlines:
    """Ends admissions whose time is up."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._heap: list[tuple[float, int, Admission, str, float]] = []
        self._live: set[Admission] = set()
        self._ticks = itertools.count()  # breaks ties, since admissions have no order
        self._changed = anyio.Event()

    def add(self, admission: Admission, seconds: float, knob: str) -> None:
        due = time.monotonic() + seconds
        heapq.heappush(self._heap, (due, next(self._ticks), admission, knob, seconds))
        self._live.add(admission)
        self._changed.set()

    def remove(self, admission: Admission) -> None:
        self._live.discard(admission)
        if len(self._heap) > 2 * len(self._live) + 64:
            self._heap = [entry for entry in self._heap if entry[2] in self._live]
            heapq.heapify(self._heap)

    async def enforce(self) -> None:
        while True:
            self._changed = anyio.Event()
            now = time.monotonic()
            while self._heap and self._heap[0][0] <= now:
                _, _, admission, knob, seconds = heapq.heappop(self._heap)
                self._expire(admission, knob, seconds)
            rest = self._heap[0][0] - now if self._heap else math.inf
            with anyio.move_on_after(rest):
                await self._changed.wait()

    def _expire(self, admission: Admission, knob: str, seconds: float) -> None:
        if admission not in self._live or (knob == "queue_timeout" and not admission.is_waiting):
            return
        what = "in the queue" if knob == "queue_timeout" else "in all"
        self._service.cancel(
            admission.request_id,
            f"the request may take {seconds:g} s {what} ({knob}), and they are over",
        )


class _Backlog:
    """How fast the queue moves, for telling clients when to come back."""

    def __init__(self) -> None:
        self._marks: deque[tuple[float, int]] = deque(maxlen=32)

    def note(self, num_started_tokens: int) -> None:
        now = time.monotonic()
        if not self._marks or now - self._marks[-1][0] > 1.0:
            self._marks.append((now, num_started_tokens))

    def seconds(self, num_waiting_tokens: int) -> float:
        low, high = RETRY_SECONDS
        if len(self._marks) < 2:
            return low
        (t0, n0), (t1, n1) = self._marks[0], self._marks[-1]
        rate = (n1 - n0) / (t1 - t0)
        return high if rate <= 0 else min(high, max(low, num_waiting_tokens / rate))

"""The async API: one engine, many streams.

The engine runs elsewhere, in a thread or in a process (`core.process`), and never waits for anybody:
what it gives is handed to the event loop, where each request has a stream of its own.  A stream makes
its next output when it is read, of all that has come since, so a slow reader costs nobody anything.
"""

from __future__ import annotations

import itertools
import threading
import time
from typing import TYPE_CHECKING, Any, Self

import anyio
from anyio import from_thread, to_thread
from anyio.lowlevel import current_token

from core.assemble import DEFAULT_PLUGINS, ActivePlugins, resolve
from core.config import ENGINE_SECRETS, load_config
from core.errors import CytheraError, EngineDeadError, EngineStartError
from core.events import Event, EventBus, Subscription
from core.link import Failed, Published, Ready, Start, Stop
from core.llm import load_sampling_defaults, make_journal
from core.log import configure_for_library
from core.messages import OutputBatch
from core.outputs import OutputKind, RequestOutput
from core.process import EngineThread
from core.request import SamplingParams
from core.status import Phase, Report, Status, report_nothing

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from types import TracebackType

    from core.assemble import Assembly
    from core.config import EngineConfig
    from core.engine import EngineCore
    from core.journal import Journal, OpenRequest
    from core.link import FromEngine
    from core.messages import Command
    from core.process import EngineLink
    from core.tokenizer import Tokenizer


class Engine:
    """An engine whose requests are async iterators.  Use it as an async context manager.

    >>> async with Engine("path/to/checkpoint") as engine:  # doctest: +SKIP
    ...     async for output in engine.generate("Hello", SamplingParams(max_tokens=8)):
    ...         print(output.outputs[0].text)

    :param model: a checkpoint folder, or the id of one on the hub.
    :param plugins: what `--plugins` takes.
    :param settings: any setting of `EngineConfig`.
    """

    def __init__(self, model: str, *, plugins: Sequence[str] = (), **settings: Any) -> None:
        config = load_config({"model": str(model), "plugins": tuple(plugins), **settings})
        configure_for_library(config.log_level, config.log_format)
        self._set_up(config, EngineThread(), report_nothing, None)

    @classmethod
    def over(
        cls,
        config: EngineConfig,
        link: EngineLink,
        active: ActivePlugins,
        *,
        report: Report = report_nothing,
    ) -> Self:
        """Make an engine that runs behind a link.

        :param active: the plugins of this process; those of the engine's are started alike.
        :param report: hears of every phase, and of the progress in it.
        """
        engine = cls.__new__(cls)
        engine._set_up(config, link, report, active)  # noqa: SLF001  of this class
        return engine

    def _set_up(
        self,
        config: EngineConfig,
        link: EngineLink,
        report: Report,
        active: ActivePlugins | None,
    ) -> None:
        self.config = config
        self.bus: EventBus
        self.assembly: Assembly
        self.journal: Journal
        self.sampling_defaults: dict[str, Any]
        self._link_thread: threading.Thread | None = None
        self.last_message_time = time.monotonic()
        """When the engine last gave a sign of life."""
        self._link = link
        self._report = report
        self._active = active
        self.last_submit_time = time.monotonic()
        self._subscriptions: list[Subscription] = []
        self._wanted: set[type[Event]] = set()
        self._streams: dict[str, OutputStream] = {}
        self._ids = itertools.count()
        self._is_known = anyio.Event()  # whether it is ready, or has failed
        self._ended = anyio.Event()
        self._ready: Ready | None = None
        self._failure: Failed | None = None

    # --- life ---

    async def __aenter__(self) -> Self:
        try:
            await self._start()
        except BaseException as error:
            await self.__aexit__(type(error), error, error.__traceback__)
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._link_thread is None:  # it could not be started: nothing else was
            return
        self._link.send(Stop())
        with anyio.CancelScope(shield=True):
            await self._ended.wait()
            # One that came back from the event loop while Python shuts down would abort the process.
            await to_thread.run_sync(self._link_thread.join)
            if hasattr(self, "bus"):
                await to_thread.run_sync(self.bus.close)

    async def _start(self) -> None:
        # A task without a task group: one would have to be left in the order in which it was entered.
        thread = threading.Thread(
            target=from_thread.run,
            args=(self._run_link,),
            kwargs={"token": current_token()},
            name="engine-link",
            daemon=True,
        )
        thread.start()
        self._link_thread = thread
        defaults = DEFAULT_PLUGINS if self._active is None else self._active.defaults
        config = self.config.to_dict(secrets=ENGINE_SECRETS)
        self._link.start(Start(config, self.config.origins, list(defaults)))
        self.assembly = await to_thread.run_sync(self._resolve, abandon_on_cancel=True)
        host, plan = self.assembly.host, self.assembly.plan
        self.bus = EventBus([*host.subscribe(plan), *self._subscriptions])
        wanted = self._wanted.union(self.bus.wanted_types())
        self._link.attach(self.assembly, [kind.__name__ for kind in wanted])
        await self._is_known.wait()
        if self._ready is None:
            raise self._explain_failure()
        if self._ready.plan_digest != plan.digest():
            raise EngineStartError(
                "the engine's process has made another plan than the one that serves clients; is a "
                "plugin's declaration different from process to process?"
            )
        self.journal = await to_thread.run_sync(make_journal, self.assembly, self._ready.num_kv_blocks)
        self.sampling_defaults = load_sampling_defaults(self.assembly)
        self._report(Status(Phase.READY))

    def _resolve(self) -> Assembly:
        return resolve(self.config, self._active)

    def _explain_failure(self) -> BaseException:
        own = getattr(self._link, "error", None)
        if isinstance(own, CytheraError):
            return own
        failed = self._failure or Failed("the engine stopped before it was ready")
        error = EngineStartError(failed.error, exit_code=failed.exit_code, trace=failed.trace)
        error.__cause__ = own
        return error

    async def _run_link(self) -> None:
        try:
            await self._link.run(self._deliver)
        finally:
            self._is_known.set()
            self._ended.set()
            for stream in self._streams.values():
                stream.close()
            self._streams.clear()

    def subscribe(self, subscription: Subscription) -> None:
        """Subscribe to events before the engine is started.

        :raises EngineDeadError: it is too late.
        """
        self._check_not_started()
        self._subscriptions.append(subscription)

    def want(self, *types: type[Event]) -> None:
        """Have events of these types built, for `bus.tap`.

        :raises EngineDeadError: it is too late.
        """
        self._check_not_started()
        self._wanted.update(types)

    def _check_not_started(self) -> None:
        if hasattr(self, "bus"):
            raise EngineDeadError("the engine has been told which events to build: subscribe earlier")

    async def wait_ended(self) -> None:
        """Return when the engine has ended, whatever ended it; see `failure`."""
        await self._ended.wait()

    @property
    def failure(self) -> BaseException | None:
        """What ended the engine, unless it was told to stop."""
        return None if self._failure is None else self._explain_failure()

    @property
    def core(self) -> EngineCore:
        """The engine itself, when it runs in this process; for tests and tools."""
        if not isinstance(self._link, EngineThread):
            raise CytheraError("the engine runs in another process")
        return self._link.core

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer; `None` if its folder holds none."""
        return self.journal.tokenizer

    # --- requests ---

    def submit(
        self,
        request_id: str,
        prompt: str | Sequence[int],
        params: SamplingParams,
        *,
        kind: OutputKind = OutputKind.CUMULATIVE,
        priority: int = 0,
        cache_salt: str = "",
        text: str | None = None,
    ) -> OutputStream:
        """Submit one request at once.

        :param text: what a prompt of token ids was made from, for the outputs.
        :return: its outputs; whoever takes no interest in them any more calls `abort`.
        :raises RequestError: it is refused.
        :raises EngineDeadError: the engine has ended.
        """
        self._check_alive()
        commands = self.journal.submit(
            request_id, prompt, params, kind=kind, priority=priority, cache_salt=cache_salt, text=text
        )
        self.last_submit_time = time.monotonic()
        stream = self._streams[request_id] = OutputStream(self)
        self._send(commands)
        return stream

    async def generate(
        self,
        prompt: str | Sequence[int],
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        kind: OutputKind = OutputKind.CUMULATIVE,
        priority: int = 0,
        cache_salt: str = "",
    ) -> AsyncIterator[RequestOutput]:
        """Stream one request; leaving the iterator early aborts it.

        :raises RequestError: it is refused.
        :raises EngineDeadError: the engine has ended.
        """
        request_id = f"request-{next(self._ids)}" if request_id is None else request_id
        params = sampling_params or SamplingParams(**self.sampling_defaults)
        stream = self.submit(
            request_id, prompt, params, kind=kind, priority=priority, cache_salt=cache_salt
        )
        try:
            async for output in stream:
                yield output
        finally:
            self.abort(request_id)

    def abort(self, request_id: str) -> None:
        """End a request; its stream ends without a further output.  Harmless for unknown ids."""
        self._send(self.journal.abort(request_id))
        stream = self._streams.pop(request_id, None)
        if stream is not None:
            stream.close()

    def cancel(self, request_id: str, error: str = "") -> None:
        """Have a request end with a last output of its own, whose finish reason is `abort`.

        :param error: goes into that output.
        """
        self._send(self.journal.cancel(request_id, error))

    def _send(self, commands: Sequence[Command]) -> None:
        for command in commands:
            self._link.send(command)

    def _check_alive(self) -> None:
        if self._ended.is_set():
            raise EngineDeadError(
                "the engine has stopped, so this request cannot be served"
            ) from self.failure

    # --- from the link ---

    def _deliver(self, messages: list[FromEngine]) -> None:
        self.last_message_time = time.monotonic()
        for message in messages:
            match message:
                case OutputBatch():
                    self._take(message)
                case Published():
                    self.bus.publish(message.events, message.step, message.time)
                case Status():
                    self._report(message)
                case Ready():
                    self._ready = message
                    self._is_known.set()
                case Failed():
                    self._failure = message

    def _take(self, batch: OutputBatch) -> None:
        requests, commands = self.journal.take(batch)
        self._send(commands)
        for request in requests:
            stream = self._streams.get(request.request_id)
            if stream is not None:
                stream.announce(request)
                if request.output.finished:
                    del self._streams[request.request_id]


class OutputStream:
    """The outputs of one request, as an async iterator.

    Each is made when it is read, of all that is new: a slow reader gets fewer and larger ones.
    """

    __slots__ = ("_changed", "_engine", "_is_closed", "_unread")

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._unread: OpenRequest | None = None
        self._changed: anyio.Event | None = None
        self._is_closed = False

    def announce(self, request: OpenRequest) -> None:
        """Tell that there is something to read; when it has finished, the stream ends after that."""
        self._unread = request
        self._is_closed = request.output.finished
        self._wake()

    def close(self) -> None:
        """End the stream, after what is unread."""
        self._is_closed = True
        self._wake()

    def _wake(self) -> None:
        if self._changed is not None:
            self._changed.set()
            self._changed = None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> RequestOutput:
        while self._unread is None:
            if self._is_closed:
                self._engine._check_alive()  # noqa: SLF001  one unit
                raise StopAsyncIteration
            self._changed = anyio.Event()
            await self._changed.wait()
        request, self._unread = self._unread, None
        return request.read()

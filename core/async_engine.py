"""The async API: one engine, many streams.

The engine's loop runs in a worker thread and never waits for anybody: a second worker hands its
outputs to the event loop, where each request has a stream of its own.  A slow reader only lets its
own stream grow, which `max_tokens` bounds.
"""

from __future__ import annotations

import itertools
import math
import queue
import threading
from typing import TYPE_CHECKING, Any, Self

import anyio
from anyio import from_thread, to_thread
from anyio.lowlevel import current_token

from core.assemble import build_engine, resolve
from core.config import load_config
from core.errors import EngineDeadError
from core.llm import load_sampling_defaults, make_journal
from core.outputs import OutputKind, RequestOutput
from core.request import SamplingParams

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from types import TracebackType

    from anyio.streams.memory import MemoryObjectSendStream

    from core.messages import OutputBatch
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
        self._config = load_config({"model": str(model), "plugins": tuple(plugins), **settings})
        self._batches: queue.SimpleQueue[OutputBatch | None] = queue.SimpleQueue()
        self._streams: dict[str, MemoryObjectSendStream[RequestOutput]] = {}
        self._ids = itertools.count()
        self._error: BaseException | None = None
        self._is_closed = False

    async def __aenter__(self) -> Self:
        self.assembly = await to_thread.run_sync(resolve, self._config)
        self.core = await to_thread.run_sync(build_engine, self.assembly, self._batches.put)
        self.journal = await to_thread.run_sync(
            make_journal, self.assembly, self.core.kv_cache.num_blocks
        )
        self._defaults = load_sampling_defaults(self.assembly)
        self._loop = current_token()
        self._threads = [
            threading.Thread(target=target, name=f"engine:{target.__name__}", daemon=True)
            for target in (self._run_core, self._pump)
        ]
        for thread in self._threads:
            thread.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._is_closed = True
        self.core.stop()
        with anyio.CancelScope(shield=True):
            for thread in self._threads:
                await to_thread.run_sync(thread.join)

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer; `None` if its folder holds none."""
        return self.journal.tokenizer

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
        :raises EngineDeadError: the engine's loop has ended.
        """
        self._check_alive()
        request_id = f"request-{next(self._ids)}" if request_id is None else request_id
        params = sampling_params or SamplingParams(**self._defaults)
        commands = self.journal.submit(
            request_id, prompt, params, kind=kind, priority=priority, cache_salt=cache_salt
        )
        send, receive = anyio.create_memory_object_stream[RequestOutput](math.inf)
        self._streams[request_id] = send
        for command in commands:
            self.core.send(command)
        try:
            async with receive:
                async for output in receive:
                    yield output
                    if output.finished:
                        return
            self._check_alive()
        finally:
            await self.abort(request_id)

    async def abort(self, request_id: str) -> None:
        """End a request; its stream ends without a further output.  Harmless for unknown ids."""
        for command in self.journal.abort(request_id):
            self.core.send(command)
        stream = self._streams.pop(request_id, None)
        if stream is not None:
            stream.close()

    def _check_alive(self) -> None:
        if self._error is not None or self._is_closed:
            raise EngineDeadError(
                "the engine has stopped, so this request cannot be served"
            ) from self._error

    def _run_core(self) -> None:
        try:
            self.core.run()
        except BaseException as error:  # noqa: BLE001  every stream must hear of it, whatever it is
            self._error = error
        finally:
            self._batches.put(None)

    def _pump(self) -> None:
        """Carry batches to the event loop, as many at a time as have gathered."""
        while True:
            gathered = [self._batches.get()]
            while not self._batches.empty():
                gathered.append(self._batches.get_nowait())
            batches = [batch for batch in gathered if batch is not None]
            is_last = len(batches) < len(gathered)
            try:
                from_thread.run_sync(self._deliver, batches, is_last, token=self._loop)
            except anyio.RunFinishedError:  # the event loop ended before the engine was closed
                return
            if is_last:
                return

    def _deliver(self, batches: list[OutputBatch], is_last: bool) -> None:
        for batch in batches:
            outputs, commands = self.journal.take(batch)
            for command in commands:
                self.core.send(command)
            for output in outputs:
                self._tell(output)
        if is_last:
            for stream in self._streams.values():
                stream.close()
            self._streams.clear()

    def _tell(self, output: RequestOutput) -> None:
        stream = self._streams.get(output.request_id)
        if stream is None:
            return
        try:
            stream.send_nowait(output)
        except (anyio.BrokenResourceError, anyio.ClosedResourceError):
            self._streams.pop(output.request_id, None)
            return
        if output.finished:
            stream.close()
            del self._streams[output.request_id]

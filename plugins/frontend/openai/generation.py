"""The way of one request through a generating route: read, admit, encode, generate, answer.

What differs between chat and plain completions is behind `Job`.
"""

from __future__ import annotations

import secrets
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Protocol

import anyio
import structlog
from starlette.requests import ClientDisconnect, Request

from core.errors import InvalidRequestError
from core.outputs import OutputKind
from plugins.frontend.openai.errors import Failure, describe, raise_for_error, refusing
from plugins.frontend.openai.params import check_request_id, find_timeout
from plugins.frontend.openai.reply import reply
from plugins.frontend.openai.sse import DONE, EventStream, event
from plugins.frontend.openai.tasks import run_all, run_until_first, wait_for_disconnect

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    import msgspec
    from starlette.responses import Response
    from starlette.types import Receive, Scope, Send

    from core.outputs import RequestOutput
    from core.request import SamplingParams
    from core.service import Admission, Service
    from plugins.frontend.openai import OpenAISettings
    from plugins.frontend.openai.prompts import Prompt
    from plugins.frontend.openai.types import GenerationRequest

log = structlog.get_logger("frontend.openai")


@dataclass(frozen=True, slots=True)
class Head:
    """What every part of one answer repeats."""

    id: str
    created: int
    model: str
    system_fingerprint: str | None


class ChunkWriter(Protocol):
    """Turns the outputs of one request into events."""

    def write(self, prompt: int, output: RequestOutput, /) -> bytes:
        """Return the events of one output, which belongs to the prompt of that number; may be none."""

    def end(self) -> bytes:
        """Return the events that follow the last output, without `[DONE]`."""


class Job(Protocol):
    """One request whose types are right: what its API makes of it."""

    @property
    def id_prefix(self) -> str:
        """What the ids of its answers begin with."""

    @property
    def request(self) -> GenerationRequest:
        """What the client sent."""

    @property
    def params(self) -> SamplingParams:
        """How tokens are chosen."""

    @property
    def num_prompts(self) -> int:
        """Prompts, each with `params.n` completions."""

    async def encode(self) -> list[Prompt]:
        """Make the prompts."""

    def answer(
        self, head: Head, prompts: Sequence[Prompt], outputs: Sequence[RequestOutput], /
    ) -> msgspec.Struct:
        """Make the response from the last output of each prompt."""

    def chunks(self, head: Head, prompts: Sequence[Prompt], /) -> ChunkWriter:
        """Begin a stream."""


class GenerationEndpoint:
    """A route that generates, as an ASGI app.

    It is no function from request to response, because the place in the engine's queue has to be
    given up in every case: after the last byte, or as soon as the client leaves.

    :param make_job: reads the body of a request.
    """

    def __init__(
        self, service: Service, settings: OpenAISettings, make_job: Callable[[Service, bytes], Job]
    ) -> None:
        self.service = service
        self.settings = settings
        self.make_job = make_job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        with suppress(ClientDisconnect):
            await _Exchange(self, scope, receive, send).run()

    @cached_property
    def fingerprint(self) -> str | None:
        """Name all that was decided about the engine; first asked for when it is ready."""
        plan = self.service.plan
        return None if plan is None else f"fp_{plan.digest()[:12]}"


class _Exchange:
    """One request and its response."""

    def __init__(
        self, endpoint: GenerationEndpoint, scope: Scope, receive: Receive, send: Send
    ) -> None:
        self._endpoint = endpoint
        self._service = endpoint.service
        self._settings = endpoint.settings
        self._http = Request(scope, receive)
        self._scope, self._receive, self._send = scope, receive, send
        self._events = EventStream(
            send,
            ping_interval=self._settings.ping_interval,
            write_timeout=self._settings.write_timeout,
        )

    async def run(self) -> None:
        """Serve it; leave as soon as the client does."""
        body = await self._http.body()
        try:
            await run_until_first(
                partial(self._serve, body), partial(wait_for_disconnect, self._receive)
            )
        except ClientDisconnect:
            raise
        except Exception as error:
            failure = describe(error)
            await self._tell(failure or Failure(500, "internal error"), is_foreseen=failure is not None)
            if failure is None:
                raise

    async def _serve(self, body: bytes) -> None:
        request_id = get_request_id(self._scope)
        with ExitStack() as stack:
            with refusing(self._service, request_id):
                job = self._endpoint.make_job(self._service, body)
                admission = stack.enter_context(self._admit(job, request_id))
                prompts = await job.encode()
                streams = [self._generate(admission, job, prompt) for prompt in prompts]
            head = Head(
                f"{job.id_prefix}{admission.request_id}",
                int(time.time()),
                job.request.model or self._service.model_names[0],
                self._endpoint.fingerprint,
            )
            if job.request.stream:
                chunks = job.chunks(head, prompts)
                await run_until_first(
                    partial(self._stream, streams, chunks), partial(self._watch, head.id)
                )
            else:
                answer = job.answer(head, prompts, [await self._last(stream) for stream in streams])
                await self._respond(reply(answer))

    # --- in ---

    def _admit(self, job: Job, request_id: str) -> Admission:
        """Take a place in the queue.

        Proxies repeat the id of a request that they try again, or give several requests one id, so an
        id that comes from a header is only a beginning.
        """
        own_id = job.request.request_id
        admit = partial(
            self._service.admit,
            num_sequences=max(1, job.num_prompts * job.params.n),
            timeout=find_timeout(job.request, self._http.headers),
        )
        if own_id is not None:
            return admit(check_request_id(own_id))
        try:
            return admit(request_id)
        except InvalidRequestError as error:
            if error.field != "request_id":
                raise
            return admit(f"{request_id}-{secrets.token_hex(4)}")

    def _generate(self, admission: Admission, job: Job, prompt: Prompt) -> AsyncIterator[RequestOutput]:
        request = job.request
        return admission.generate(
            prompt.token_ids,
            job.params,
            prompt_text=prompt.text,
            kind=OutputKind.DELTA if request.stream else OutputKind.FINAL_ONLY,
            priority=request.priority or 0,
            cache_salt=request.cache_salt or "",
        )

    # --- out ---

    async def _last(self, stream: AsyncIterator[RequestOutput]) -> RequestOutput:
        """Wait for the last output of a stream."""
        last = None
        async for output in stream:
            last = output
        if last is None:
            raise RuntimeError("a stream ended without an output")
        raise_for_error(self._service, last)
        return last

    async def _respond(self, response: Response) -> None:
        await response(self._scope, self._receive, self._send)

    async def _stream(
        self, streams: Sequence[AsyncIterator[RequestOutput]], chunks: ChunkWriter
    ) -> None:
        await run_all(*[partial(self._pump, i, stream, chunks) for i, stream in enumerate(streams)])
        await self._events.write(chunks.end() + DONE, is_last=True)

    async def _pump(
        self, prompt: int, stream: AsyncIterator[RequestOutput], chunks: ChunkWriter
    ) -> None:
        async for output in stream:
            raise_for_error(self._service, output)
            data = chunks.write(prompt, output)
            if data:
                await self._events.write(data)

    async def _watch(self, answer_id: str) -> None:
        await self._events.keep_alive()
        log.warning(
            "stream ended: its client does not read",
            id=answer_id,
            write_timeout=self._settings.write_timeout,
        )

    async def _tell(self, failure: Failure, *, is_foreseen: bool) -> None:
        """Send an error; one that nobody foresaw is left to the server as long as it can answer."""
        if self._events.is_started:
            with anyio.move_on_after(self._settings.write_timeout):
                await self._events.write(event(failure.body()) + DONE, is_last=True)
        elif is_foreseen:
            await self._respond(failure.response())


def get_request_id(scope: Scope) -> str:
    """Return the id that the server gave the request, or a new one without such a server."""
    known: str | None = scope.get("state", {}).get("request_id")
    return known or secrets.token_hex(16)

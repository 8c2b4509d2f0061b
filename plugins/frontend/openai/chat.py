"""`POST /v1/chat/completions`: conversations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from msgspec import UNSET, UnsetType

from core.errors import InvalidRequestError
from plugins.frontend.openai.body import decode_body
from plugins.frontend.openai.extras import check_extras
from plugins.frontend.openai.logprobs import TokenSpelling, chat_logprobs, prompt_logprobs
from plugins.frontend.openai.outcome import UsageCounter, end_warnings, finish_reason
from plugins.frontend.openai.params import make_params
from plugins.frontend.openai.prompts import encode_conversation
from plugins.frontend.openai.sse import HOLE, Template, encode, event
from plugins.frontend.openai.types import (
    ChatAnswer,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    ChatRequest,
    PromptLogprobs,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from core.outputs import CompletionOutput, RequestOutput
    from core.service import Service
    from plugins.frontend.openai.generation import Head
    from plugins.frontend.openai.prompts import Prompt

TOOLS_AS_TEXT = "field 'tools' was shown to the model, but calls of tools come back as text"


class ChatJob:
    """One request for chat completions.

    :raises RequestError: it is refused.
    :raises NotReadyError: the engine is not ready.
    """

    id_prefix = "chatcmpl-"
    num_prompts = 1

    def __init__(self, service: Service, body: bytes) -> None:
        self.request, extras = decode_body(body, ChatRequest)
        request = self.request
        self.warnings = check_extras(extras)
        if request.tools:
            self.warnings.append(TOOLS_AS_TEXT)
        if request.model is not None:
            service.check_model(request.model)
        self.max_tokens = request.max_completion_tokens
        if self.max_tokens is None:
            self.max_tokens = request.max_tokens
        self.params = make_params(
            request,
            service.sampling_defaults,
            max_tokens=self.max_tokens,
            logprobs=_num_logprobs(request),
            prompt_logprobs=request.prompt_logprobs,
        )
        self._service = service
        self.spelling = TokenSpelling(service.tokenizer, bool(request.return_tokens_as_token_ids))

    async def encode(self) -> list[Prompt]:
        """Render and encode the conversation."""
        prompt = await encode_conversation(self._service, self.request)
        max_model_len = self._service.limits.max_model_len
        return [prompt.cut(self.request.truncate_prompt_tokens, max_model_len, self.max_tokens)]

    def answer(
        self, head: Head, _prompts: Sequence[Prompt], outputs: Sequence[RequestOutput]
    ) -> ChatAnswer:
        """Make the response."""
        (output,) = outputs
        usage = UsageCounter([len(output.prompt_token_ids)])
        usage.add(0, output)
        return ChatAnswer(
            id=head.id,
            object="chat.completion",
            created=head.created,
            model=head.model,
            system_fingerprint=head.system_fingerprint,
            choices=[self._choice(completion) for completion in output.outputs],
            usage=usage.usage(),
            warnings=[*self.warnings, *end_warnings(output.outputs)] or UNSET,
            **self.prompt_fields(output),
        )

    def chunks(self, head: Head, prompts: Sequence[Prompt]) -> ChatChunks:
        """Begin a stream."""
        return ChatChunks(self, head, prompts[0])

    @property
    def echo(self) -> str:
        """What the answer begins with: the message that it continues, if that is wanted."""
        last = self.request.messages[-1]
        content = last.get("content")
        is_wanted = self.request.echo and last.get("role") == "assistant"
        return content if is_wanted and isinstance(content, str) else ""

    def logprobs(self, completion: CompletionOutput) -> ChatLogprobs | None:
        """Shape log-probabilities; `None` unless they were asked for."""
        if completion.logprobs is None:
            return None
        return chat_logprobs(completion.logprobs, self.request.top_logprobs or 0, self.spelling)

    def token_ids(self, completion: CompletionOutput) -> list[int] | UnsetType:
        """Return the ids of a completion, if they were asked for."""
        return completion.token_ids if self.request.return_token_ids else UNSET

    def prompt_fields(self, output: RequestOutput) -> dict[str, Any]:
        """Return what was asked for about the prompt."""
        ids: list[int] | UnsetType = UNSET
        if self.request.return_token_ids:
            ids = output.prompt_token_ids
        logprobs: PromptLogprobs | UnsetType = UNSET
        if output.prompt_logprobs is not None:
            logprobs = prompt_logprobs(output.prompt_logprobs)
        return {"prompt_token_ids": ids, "prompt_logprobs": logprobs}

    def _choice(self, completion: CompletionOutput) -> ChatChoice:
        return ChatChoice(
            index=completion.index,
            message=ChatMessage("assistant", self.echo + completion.text),
            logprobs=self.logprobs(completion),
            finish_reason=finish_reason(completion) or "stop",
            stop_reason=completion.stop_reason,
            token_ids=self.token_ids(completion),
        )


def _num_logprobs(request: ChatRequest) -> int | None:
    if request.logprobs:
        return request.top_logprobs or 0
    if request.top_logprobs:
        raise InvalidRequestError(
            f"top_logprobs: {request.top_logprobs} needs logprobs to be true", field="top_logprobs"
        )
    return None


class ChatChunks:
    """Writes the chunks of one stream.

    The role is told together with the first text, so that the first chunk comes when the first
    token does.
    """

    def __init__(self, job: ChatJob, head: Head, prompt: Prompt) -> None:
        self._job = job
        self._head = head
        self._usage = UsageCounter([len(prompt.token_ids)])
        options = job.request.stream_options
        self._has_usage_chunk = options is not None and bool(options.include_usage)
        self._has_usage = options is not None and bool(options.continuous_usage_stats)
        self._has_details = (
            self._has_usage or job.params.logprobs is not None or bool(job.request.return_token_ids)
        )
        self._templates: dict[int, Template] = {}

    def write(self, _prompt: int, output: RequestOutput) -> bytes:
        """Return the events of one output."""
        self._usage.add(0, output)
        return b"".join([self._events(output, completion) for completion in output.outputs])

    def end(self) -> bytes:
        """Return the event of the usage, if it was asked for."""
        if not self._has_usage_chunk:
            return b""
        return event(encode(self._chunk([], usage=self._usage.usage())))

    def _events(self, output: RequestOutput, completion: CompletionOutput) -> bytes:
        is_plain = completion.finish_reason is None and not self._has_details
        if is_plain and not completion.text:
            return b""
        template = self._templates.get(completion.index)
        first = b""
        if template is None:
            first = self._first(output, completion.index)
            template = self._templates[completion.index]
        if is_plain:
            return first + template.fill(completion.text)
        return first + self._detailed(completion)

    def _first(self, output: RequestOutput, index: int) -> bytes:
        """Write the role, what is known of the prompt and, in the first of all chunks, warnings."""
        warnings = UNSET if self._templates else self._job.warnings or UNSET
        hole = ChatChunkChoice(index=index, delta=ChatDelta(content=HOLE))
        self._templates[index] = Template(self._chunk([hole]))
        delta = ChatDelta(role="assistant", content=self._job.echo)
        choice = ChatChunkChoice(index=index, delta=delta)
        fields = self._job.prompt_fields(output)
        return event(encode(self._chunk([choice], warnings=warnings, **fields)))

    def _detailed(self, completion: CompletionOutput) -> bytes:
        is_end = completion.finish_reason is not None
        choice = ChatChunkChoice(
            index=completion.index,
            delta=ChatDelta(content=UNSET if is_end and not completion.text else completion.text),
            logprobs=self._job.logprobs(completion) if completion.token_ids else None,
            finish_reason=finish_reason(completion),
            stop_reason=completion.stop_reason if is_end else UNSET,
            token_ids=self._job.token_ids(completion),
        )
        usage = self._usage.usage() if self._has_usage else UNSET
        warnings = end_warnings([completion]) or UNSET
        return event(encode(self._chunk([choice], usage=usage, warnings=warnings)))

    def _chunk(self, choices: list[ChatChunkChoice], **fields: Any) -> ChatChunk:
        return ChatChunk(
            id=self._head.id,
            object="chat.completion.chunk",
            created=self._head.created,
            model=self._head.model,
            system_fingerprint=self._head.system_fingerprint,
            choices=choices,
            **fields,
        )

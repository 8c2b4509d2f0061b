"""`POST /v1/completions`: texts and token ids, as they are."""

from __future__ import annotations

import reprlib
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from msgspec import UNSET

from core.errors import InvalidRequestError
from core.outputs import CompletionOutput
from core.request import FinishReason
from core.service import MAX_SEQUENCES
from plugins.frontend.openai.body import decode_body
from plugins.frontend.openai.extras import check_extras
from plugins.frontend.openai.logprobs import (
    CompletionLogprobsWriter,
    TokenSpelling,
    join_logprobs,
    prompt_logprobs,
)
from plugins.frontend.openai.outcome import UsageCounter, end_warnings, finish_reason
from plugins.frontend.openai.params import make_params
from plugins.frontend.openai.prompts import Prompt, decode_prompt, encode_text
from plugins.frontend.openai.sse import HOLE, Template, encode, event
from plugins.frontend.openai.types import CompletionAnswer, CompletionChoice, CompletionRequest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from core.outputs import RequestOutput
    from core.service import Service
    from plugins.frontend.openai.generation import Head
    from plugins.frontend.openai.types import CompletionLogprobs

DEFAULT_MAX_TOKENS: Final = 16


class CompletionJob:
    """One request for plain completions.

    :raises RequestError: it is refused.
    :raises NotReadyError: the engine is not ready.
    """

    id_prefix = "cmpl-"

    def __init__(self, service: Service, body: bytes) -> None:
        self.request, extras = decode_body(body, CompletionRequest)
        request = self.request
        self.warnings = check_extras(extras)
        if request.model is not None:
            service.check_model(request.model)
        self._prompts = _split_prompts(request.prompt)
        self.num_prompts = len(self._prompts)
        _check_num_sequences(self.num_prompts, request.n or 1)
        self.shows_prompt_only = bool(request.echo) and request.max_tokens == 0
        self._service = service
        self.params = make_params(
            request,
            service.sampling_defaults,
            max_tokens=self._max_tokens(),
            logprobs=request.logprobs,
            prompt_logprobs=self._num_prompt_logprobs(),
        )
        self.spelling = TokenSpelling(service.tokenizer, bool(request.return_tokens_as_token_ids))
        self.hidden_ids: frozenset[int] = frozenset()
        if service.tokenizer is not None and self.params.skip_special_tokens:
            self.hidden_ids = service.tokenizer.special_ids

    def _max_tokens(self) -> int:
        if self.request.max_tokens is None:
            return DEFAULT_MAX_TOKENS
        # An engine computes a prompt in order to draw a token: the one that is not shown.
        return 1 if self.shows_prompt_only else self.request.max_tokens

    def _num_prompt_logprobs(self) -> int | None:
        """Count the alternatives; an echoed prompt has them like everything else in the text."""
        echoed = self.request.logprobs if self.request.echo else None
        wanted = [num for num in (echoed, self.request.prompt_logprobs) if num is not None]
        return max(wanted, default=None)

    async def encode(self) -> list[Prompt]:
        """Encode the texts among the prompts; write the others as text if they are to be echoed."""
        request, service = self.request, self._service
        add_special_tokens = request.add_special_tokens is not False
        max_model_len = service.limits.max_model_len
        prompts = []
        for given in self._prompts:
            prompt = (
                await encode_text(service, given, add_special_tokens=add_special_tokens)
                if isinstance(given, str)
                else Prompt(given)
            )
            prompt = prompt.cut(request.truncate_prompt_tokens, max_model_len, self.params.max_tokens)
            if request.echo and prompt.text is None:
                prompt = replace(prompt, text=await decode_prompt(service, prompt.token_ids))
            prompts.append(prompt)
        return prompts

    def answer(
        self, head: Head, prompts: Sequence[Prompt], outputs: Sequence[RequestOutput]
    ) -> CompletionAnswer:
        """Make the response."""
        usage = UsageCounter(len(prompt.token_ids) for prompt in prompts)
        choices, warnings = [], list(self.warnings)
        for number, (prompt, given) in enumerate(zip(prompts, outputs, strict=True)):
            output = self.visible(given)
            usage.add(number, output)
            warnings += end_warnings(output.outputs)
            for completion in output.outputs:
                writer = ChoiceWriter(self, number * self.params.n + completion.index, prompt)
                choices.append(writer.write(output, completion))
        return CompletionAnswer(
            id=head.id,
            object="text_completion",
            created=head.created,
            model=head.model,
            system_fingerprint=head.system_fingerprint,
            choices=choices,
            usage=usage.usage(),
            warnings=list(dict.fromkeys(warnings)) or UNSET,
        )

    def chunks(self, head: Head, prompts: Sequence[Prompt]) -> CompletionChunks:
        """Begin a stream."""
        return CompletionChunks(self, head, prompts)

    def visible(self, output: RequestOutput) -> RequestOutput:
        """Return the output without the token that nobody asked for."""
        if not self.shows_prompt_only:
            return output
        return output.snapshot([_without_tokens(each) for each in output.outputs])


def _split_prompts(prompt: str | list[str | int | list[int]]) -> list[str | list[int]]:
    """Tell one prompt from several.

    :raises InvalidRequestError: there is none, or they are not all of one kind.
    """
    if isinstance(prompt, str):
        return [prompt]
    texts = [item for item in prompt if isinstance(item, str)]
    ids = [item for item in prompt if isinstance(item, int)]
    lists = [item for item in prompt if isinstance(item, list)]
    if not prompt or len(prompt) not in (len(texts), len(ids), len(lists)):
        raise InvalidRequestError(
            "prompt: must be a text, a list of texts, a list of token ids or a list of such lists, and "
            "hold at least one",
            field="prompt",
        )
    return [ids] if ids else [*texts, *lists]


def _check_num_sequences(num_prompts: int, n: int) -> None:
    if num_prompts * n > MAX_SEQUENCES:
        raise InvalidRequestError(
            f"prompt: {num_prompts} prompts with n={reprlib.repr(n)} make too many completions, since "
            f"one request may ask for at most {MAX_SEQUENCES}; send several requests",
            field="prompt" if num_prompts > 1 else "n",
        )


def _without_tokens(completion: CompletionOutput) -> CompletionOutput:
    reason = completion.finish_reason
    return CompletionOutput(
        completion.index,
        logprobs=None if completion.logprobs is None else [],
        finish_reason=FinishReason.LENGTH if reason == FinishReason.STOP else reason,
    )


class ChoiceWriter:
    """Shapes one completion of one prompt, at once or piece by piece.

    :param index: among all choices of the answer.
    """

    def __init__(self, job: CompletionJob, index: int, prompt: Prompt) -> None:
        self.is_begun = False
        self._job = job
        self._index = index
        self._prompt = prompt
        self._logprobs = CompletionLogprobsWriter(job.spelling, job.hidden_ids)

    def write(self, output: RequestOutput, completion: CompletionOutput) -> CompletionChoice:
        """Shape the first or only piece, which also tells of the prompt, or a later one."""
        request = self._job.request
        begins, self.is_begun = not self.is_begun, True
        echo = (self._prompt.text or "") if begins and request.echo else ""
        prompt: dict[str, Any] = {}
        if begins and request.return_token_ids:
            prompt["prompt_token_ids"] = output.prompt_token_ids
        if begins and request.prompt_logprobs is not None and output.prompt_logprobs is not None:
            prompt["prompt_logprobs"] = prompt_logprobs(output.prompt_logprobs)
        return CompletionChoice(
            index=self._index,
            text=echo + completion.text,
            logprobs=self._shape(output, completion, begins=begins),
            finish_reason=finish_reason(completion),
            stop_reason=completion.stop_reason if completion.finish_reason else UNSET,
            token_ids=completion.token_ids if request.return_token_ids else UNSET,
            **prompt,
        )

    def _shape(
        self, output: RequestOutput, completion: CompletionOutput, *, begins: bool
    ) -> CompletionLogprobs | None:
        if completion.logprobs is None:
            return None
        if not begins or not self._job.request.echo:
            return self._logprobs.write(completion.token_ids, completion.logprobs)
        echoed = self._logprobs.write_prompt(
            output.prompt_token_ids, output.prompt_logprobs or [], self._prompt.text or ""
        )
        return join_logprobs(echoed, self._logprobs.write(completion.token_ids, completion.logprobs))


class CompletionChunks:
    """Writes the chunks of one stream."""

    def __init__(self, job: CompletionJob, head: Head, prompts: Sequence[Prompt]) -> None:
        self._job = job
        self._head = head
        self._usage = UsageCounter(len(prompt.token_ids) for prompt in prompts)
        self._warnings = list(job.warnings)
        request, options = job.request, job.request.stream_options
        self._has_usage_chunk = options is not None and bool(options.include_usage)
        self._has_usage = options is not None and bool(options.continuous_usage_stats)
        self._has_details = (
            self._has_usage or request.logprobs is not None or bool(request.return_token_ids)
        )
        self._writers = [
            ChoiceWriter(job, index, prompt)
            for index, prompt in enumerate(prompt for prompt in prompts for _ in range(job.params.n))
        ]
        self._templates = [self._template(index) for index in range(len(self._writers))]

    def _template(self, index: int) -> Template:
        return Template(self._chunk([CompletionChoice(index=index, text=HOLE)]))

    def write(self, prompt: int, output: RequestOutput) -> bytes:
        """Return the events of one output."""
        output = self._job.visible(output)
        self._usage.add(prompt, output)
        first = prompt * self._job.params.n
        return b"".join([self._event(first + each.index, output, each) for each in output.outputs])

    def end(self) -> bytes:
        """Return the event of the usage, if it was asked for."""
        if not self._has_usage_chunk:
            return b""
        return event(encode(self._chunk([], usage=self._usage.usage())))

    def _event(self, index: int, output: RequestOutput, completion: CompletionOutput) -> bytes:
        writer = self._writers[index]
        is_plain = completion.finish_reason is None and not self._has_details
        if is_plain and writer.is_begun:
            return self._templates[index].fill(completion.text) if completion.text else b""
        if is_plain and not completion.text and not self._job.request.echo:
            return b""
        choice = writer.write(output, completion)
        warnings = [*self._warnings, *end_warnings([completion])]
        self._warnings = []
        usage = self._usage.usage() if self._has_usage else UNSET
        return event(encode(self._chunk([choice], usage=usage, warnings=warnings or UNSET)))

    def _chunk(self, choices: list[CompletionChoice], **fields: Any) -> CompletionAnswer:
        return CompletionAnswer(
            id=self._head.id,
            object="text_completion",
            created=self._head.created,
            model=self._head.model,
            system_fingerprint=self._head.system_fingerprint,
            choices=choices,
            **fields,
        )

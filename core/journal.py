"""The journal of every open request: what a client asked and what it has been told.

The front half of an engine, without a loop of its own: `submit` turns a client's request into
commands for an `EngineCore`, `take` turns the engine's output batches into what clients receive.
`LLM` and `Engine` share it; whatever reaches an engine has passed the validator here.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from core.counter_rng import resolve_seed
from core.detokenizer import IncrementalDetokenizer
from core.errors import InvalidRequestError
from core.messages import Finish, Submit
from core.outputs import CompletionOutput, Logprob, OutputKind, RequestOutput
from core.request import FinishReason, RequestLimits, SamplingParams

if TYPE_CHECKING:
    from collections.abc import Sequence

    from core.messages import Command, Ended, OutputBatch
    from core.step import PromptLogprobs, TokenLogprobs
    from core.tokenizer import Tokenizer


@dataclass(slots=True)
class _Sequence:
    """One completion of a request."""

    sequence_id: str
    request: OpenRequest
    output: CompletionOutput
    detokenizer: IncrementalDetokenizer | None
    num_tokens_told: int = 0
    """Tokens that a delta stream has received."""
    num_chars_told: int = 0
    """Characters that a delta stream has received."""
    is_end_told: bool = False
    is_waiting: bool = True
    """Whether it has not had a row yet."""


@dataclass(slots=True)
class OpenRequest:
    """A request as its client sees it: what it has been told, and what is new."""

    request_id: str
    params: SamplingParams
    kind: OutputKind
    output: RequestOutput
    num_open: int
    """Completions that have not ended."""
    arrival_time: float
    sequences: list[_Sequence] = field(default_factory=list)

    def read(self) -> RequestOutput:
        """Take what is to be told now: of a delta stream, all that came since the last time."""
        if self.kind is OutputKind.FINAL_ONLY:
            return self.output
        if self.kind is OutputKind.CUMULATIVE:
            return self.output.snapshot()
        deltas = []
        for sequence in self.sequences:
            output = sequence.output
            num_tokens, num_chars = len(output.token_ids), len(output.text)
            is_end = output.finish_reason is not None and not sequence.is_end_told
            if is_end or num_tokens > sequence.num_tokens_told or num_chars > sequence.num_chars_told:
                deltas.append(output.since(sequence.num_tokens_told, sequence.num_chars_told))
                sequence.num_tokens_told, sequence.num_chars_told = num_tokens, num_chars
                sequence.is_end_told |= is_end
        return self.output.snapshot(deltas)


class Journal:
    """All open requests of one front end.

    :param tokenizer: `None` serves token ids only.
    :param eos_token_ids: end a request unless it ignores them.
    :param seed: of the engine, for requests that bring none.
    """

    def __init__(
        self,
        limits: RequestLimits,
        tokenizer: Tokenizer | None,
        *,
        eos_token_ids: Sequence[int] = (),
        seed: int = 0,
    ) -> None:
        self.limits = limits
        self.tokenizer = tokenizer
        self._eos_token_ids = frozenset(eos_token_ids)
        self._seed = seed
        self.num_waiting = 0
        """Sequences that have not had a row yet."""
        self.num_waiting_tokens = 0
        """Prompt tokens of these."""
        self.num_started_tokens = 0
        """Prompt tokens of all that ever had a row: how fast this grows tells how long a queue lasts."""
        self._num_submitted = 0
        self._requests: dict[str, OpenRequest] = {}
        self._sequences: dict[str, _Sequence] = {}

    @property
    def num_open(self) -> int:
        """Requests that have not ended."""
        return len(self._requests)

    @property
    def num_open_sequences(self) -> int:
        """Completions that have not ended, waiting or running."""
        return len(self._sequences)

    def is_waiting(self, request_id: str) -> bool:
        """Whether the request is open and none of its sequences has had a row yet."""
        request = self._requests.get(request_id)
        return request is not None and all(sequence.is_waiting for sequence in request.sequences)

    # --- in ---

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
    ) -> list[Command]:
        """Open a request.

        :param prompt: text, or token ids.
        :param text: what the token ids were made from, if somebody knows.
        :return: the commands that the engine has to receive, in order.
        :raises RequestError: it is refused; nothing was opened then.
        """
        own_text, token_ids = self._tokenize(prompt)
        max_tokens = self.limits.check(
            token_ids, params, priority=priority, cache_salt=cache_salt, request_id=request_id
        )
        if params.stop_strings and self.tokenizer is None:
            raise InvalidRequestError("stop: needs a tokenizer, but this model has none", field="stop")
        ids = _sequence_ids(request_id, params.n)
        if request_id in self._requests or any(i in self._sequences for i in ids):
            raise InvalidRequestError(
                f"request_id: {request_id!r} is in use by another open request", field="request_id"
            )
        output = RequestOutput(
            request_id=request_id, prompt=own_text or text, prompt_token_ids=token_ids
        )
        request = self._open(output, params, kind, ids)
        seed = self._next_seed(params)
        stop_ids = set(params.stop_token_ids or ())
        if not params.ignore_eos:
            stop_ids |= self._eos_token_ids
        return [
            Submit(
                sequence_id,
                token_ids,
                params,
                max_tokens,
                sorted(stop_ids),
                seed if index == 0 else resolve_seed(seed, index),
                priority,
                request.arrival_time,
                cache_salt,
            )
            for index, sequence_id in enumerate(ids)
        ]

    def abort(self, request_id: str) -> list[Command]:
        """Close a request that its client no longer wants; harmless for unknown ids."""
        commands = self.cancel(request_id)
        for sequence in self._open_sequences(request_id):
            self._forget(sequence)
        self._requests.pop(request_id, None)
        return commands

    def cancel(self, request_id: str, error: str = "") -> list[Command]:
        """Ask the engine to end a request; its client hears of it when the engine has done so.

        :param error: what to tell the client, if it was not the client's wish.
        """
        request = self._requests.get(request_id)
        if request is not None:
            request.output.error = request.output.error or error
        return [
            Finish(sequence.sequence_id, FinishReason.ABORT)
            for sequence in self._open_sequences(request_id)
        ]

    def _open_sequences(self, request_id: str) -> list[_Sequence]:
        request = self._requests.get(request_id)
        sequences = [] if request is None else request.sequences
        return [sequence for sequence in sequences if sequence.sequence_id in self._sequences]

    def _tokenize(self, prompt: str | Sequence[int]) -> tuple[str | None, list[int]]:
        if not isinstance(prompt, str):
            if isinstance(prompt, bytes) or not hasattr(prompt, "__len__"):
                raise InvalidRequestError(
                    f"prompt: must be text or token ids, got {type(prompt).__name__}", field="prompt"
                )
            return None, list(prompt)
        if self.tokenizer is None:
            raise InvalidRequestError(
                "prompt: text needs a tokenizer, but this model has none; send token ids",
                field="prompt",
            )
        if not prompt:
            raise InvalidRequestError("prompt: text must not be empty", field="prompt")
        return prompt, self.tokenizer.encode(prompt)

    def _next_seed(self, params: SamplingParams) -> int:
        self._num_submitted += 1
        if params.seed is not None:
            return params.seed
        return resolve_seed(self._seed, self._num_submitted)

    def _open(
        self, output: RequestOutput, params: SamplingParams, kind: OutputKind, ids: list[str]
    ) -> OpenRequest:
        output.outputs = [
            CompletionOutput(index=i, logprobs=None if params.logprobs is None else [])
            for i in range(params.n)
        ]
        if params.prompt_logprobs is not None:
            output.prompt_logprobs = [None]
        request = OpenRequest(output.request_id, params, kind, output, params.n, time.monotonic())
        for sequence_id, completion in zip(ids, output.outputs, strict=True):
            detokenizer = self._make_detokenizer(params, output.prompt_token_ids)
            sequence = _Sequence(sequence_id, request, completion, detokenizer)
            request.sequences.append(sequence)
            self._sequences[sequence_id] = sequence
            self.num_waiting += 1
            self.num_waiting_tokens += len(output.prompt_token_ids)
        self._requests[output.request_id] = request
        return request

    def _make_detokenizer(
        self, params: SamplingParams, token_ids: list[int]
    ) -> IncrementalDetokenizer | None:
        if self.tokenizer is None:
            return None
        return IncrementalDetokenizer(
            self.tokenizer,
            stop=params.stop_strings,
            include_stop=params.include_stop_str_in_output,
            skip_special_tokens=params.skip_special_tokens,
            prompt_token_ids=token_ids,
            min_tokens=params.min_tokens,
        )

    # --- out ---

    def take(self, batch: OutputBatch) -> tuple[list[OpenRequest], list[Command]]:
        """Take in what a step gave.

        :return: the requests that have something to `read` now, and the commands that end sequences
            whose text reached a stop string.  Words about sequences that are closed already are passed
            over.
        """
        touched: dict[str, OpenRequest] = {}
        commands: list[Command] = []
        ended = {entry.request_id: entry for entry in batch.ended}
        for sequence_id, chunk in batch.prompt_logprobs.items():
            self._take_prompt_logprobs(sequence_id, chunk)
        for sequence_id, num_cached in batch.cached.items():
            if sequence_id in self._sequences:
                self._start(self._sequences[sequence_id], num_cached)
        for sequence_id, token in zip(batch.request_ids, batch.tokens, strict=True):
            sequence = self._sequences.get(sequence_id)
            if sequence is None:
                continue
            touched[sequence.request.request_id] = sequence.request
            logprobs = batch.logprobs.get(sequence_id)
            if self._take_token(sequence, token, logprobs, ended.get(sequence_id)):
                commands.append(Finish(sequence_id, FinishReason.STOP))
        for entry in batch.ended:
            sequence = self._sequences.get(entry.request_id)
            if sequence is not None:
                touched[sequence.request.request_id] = sequence.request
                self._end(sequence, entry)
        told = [r for r in touched.values() if r.output.finished or r.kind is not OutputKind.FINAL_ONLY]
        return told, commands

    def _start(self, sequence: _Sequence, num_cached: int) -> None:
        output = sequence.request.output
        output.num_cached_tokens = num_cached
        if sequence.is_waiting:
            self._stop_waiting(sequence)
            self.num_started_tokens += len(output.prompt_token_ids)

    def _stop_waiting(self, sequence: _Sequence) -> None:
        sequence.is_waiting = False
        self.num_waiting -= 1
        self.num_waiting_tokens -= len(sequence.request.output.prompt_token_ids)

    def _take_token(
        self, sequence: _Sequence, token: int, logprobs: TokenLogprobs | None, ended: Ended | None
    ) -> bool:
        """Add one token; whether its text reached a stop string, which closes the sequence."""
        output, params = sequence.output, sequence.request.params
        output.token_ids.append(token)
        if logprobs is not None and output.logprobs is not None:
            output.logprobs.append(self._logprob_dict(logprobs))
            output.cumulative_logprob = (output.cumulative_logprob or 0.0) + logprobs.logprob
        if sequence.detokenizer is None:
            return False
        is_stop_token = ended is not None and ended.reason is FinishReason.STOP
        if is_stop_token and not params.include_stop_str_in_output:
            return False  # the token that ended the request is reported as an id, not as text
        delta = sequence.detokenizer.push([token])
        output.text += delta.text
        if delta.stop_reason is None:
            return False
        output.finish_reason, output.stop_reason = str(FinishReason.STOP), delta.stop_reason
        self._close(sequence)
        return ended is None

    def _take_prompt_logprobs(self, sequence_id: str, chunk: PromptLogprobs) -> None:
        sequence = self._sequences.get(sequence_id)
        if sequence is None or sequence.output.index != 0:  # all completions share one prompt
            return
        known = sequence.request.output.prompt_logprobs
        if known is not None:
            # A preempted prompt is computed again from its start: pass over what is there already.
            new = chunk.entries[max(0, len(known) - chunk.first) :]
            known.extend(self._logprob_dict(entry) for entry in new)

    def _end(self, sequence: _Sequence, ended: Ended) -> None:
        output = sequence.output
        if sequence.detokenizer is not None:
            output.text += sequence.detokenizer.finish()
        output.finish_reason = str(ended.reason)
        explicit = sequence.request.params.stop_token_ids or ()
        output.stop_reason = ended.stop_reason if ended.stop_reason in explicit else None
        output_of_all = sequence.request.output
        output_of_all.error = output_of_all.error or ended.error
        self._close(sequence)

    def _forget(self, sequence: _Sequence) -> None:
        del self._sequences[sequence.sequence_id]
        if sequence.is_waiting:
            self._stop_waiting(sequence)

    def _close(self, sequence: _Sequence) -> None:
        self._forget(sequence)
        request = sequence.request
        request.num_open -= 1
        if not request.num_open:
            request.output.finished = True
            del self._requests[request.request_id]

    def _logprob_dict(self, entry: TokenLogprobs) -> dict[int, Logprob]:
        table = {entry.token_id: self._logprob(entry.token_id, entry.logprob, entry.rank)}
        for rank, (token_id, logprob) in enumerate(
            zip(entry.top_ids, entry.top_logprobs, strict=True), 1
        ):
            table.setdefault(token_id, self._logprob(token_id, logprob, rank))
        return table

    def _logprob(self, token_id: int, logprob: float, rank: int) -> Logprob:
        text = None if self.tokenizer is None else self.tokenizer.token_text(token_id)
        return Logprob(logprob, rank, text)


def _sequence_ids(request_id: str, count: int) -> list[str]:
    if count == 1:
        return [request_id]
    return [f"{request_id}/{index}" for index in range(count)]

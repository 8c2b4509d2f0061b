"""What clients receive: the records of results, under the names that vLLM's users know."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from collections.abc import Sequence


class OutputKind(enum.Enum):
    """What a stream of one request carries."""

    CUMULATIVE = enum.auto()
    """Each output holds everything since the start."""
    DELTA = enum.auto()
    """Each output holds what is new since the last one."""
    FINAL_ONLY = enum.auto()
    """One output, when the request has ended."""


class Logprob(msgspec.Struct):
    """The log-probability of one token at one position."""

    logprob: float
    """Natural logarithm."""
    rank: int | None = None
    """1 for the likeliest token of the vocabulary."""
    decoded_token: str | None = None
    """The token as text; `None` without a tokenizer."""


class CompletionOutput(msgspec.Struct):
    """One completion of a request, or, in a delta stream, the new part of it."""

    index: int
    """Which of the request's `n` completions this is."""
    text: str = ""
    token_ids: list[int] = []
    cumulative_logprob: float | None = None
    """Sum over all generated tokens, in a delta too; `None` unless log-probabilities were asked for."""
    logprobs: list[dict[int, Logprob]] | None = None
    """For each of `token_ids`: the token itself first, then the alternatives, likeliest first."""
    finish_reason: str | None = None
    """stop, length, abort or error; `None` while the completion goes on."""
    stop_reason: int | str | None = None
    """The stop string or stop id that ended it; `None` for end-of-sequence and all other reasons."""

    def finished(self) -> bool:
        """Whether this completion has ended."""
        return self.finish_reason is not None

    def snapshot(self) -> CompletionOutput:
        """Copy what is here now, so that later tokens do not show up in it."""
        return self.since(0, 0)

    def since(self, num_tokens: int, num_chars: int) -> CompletionOutput:
        """Copy what came after the first `num_tokens` tokens and `num_chars` characters of text."""
        return CompletionOutput(
            self.index,
            self.text[num_chars:],
            self.token_ids[num_tokens:],
            self.cumulative_logprob,
            None if self.logprobs is None else self.logprobs[num_tokens:],
            self.finish_reason,
            self.stop_reason,
        )


class RequestMetrics(msgspec.Struct):
    """When things happened to a request, in seconds of the monotonic clock."""

    arrival_time: float
    first_token_time: float | None = None
    last_token_time: float | None = None


class RequestOutput(msgspec.Struct):
    """One request: its prompt and its completions so far."""

    request_id: str
    prompt: str | None
    """As text; `None` if the client sent token ids."""
    prompt_token_ids: list[int]
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    """For each prompt token; the first entry is `None`, since nothing predicts that token."""
    outputs: list[CompletionOutput] = []
    finished: bool = False
    """Whether all completions have ended."""
    num_cached_tokens: int | None = None
    """Prompt tokens that the prefix cache held; `None` until the prompt was looked up."""
    metrics: RequestMetrics | None = None
    error: str = ""
    """What went wrong, if a completion's finish reason is error."""

    def snapshot(self, outputs: Sequence[CompletionOutput] | None = None) -> RequestOutput:
        """Copy the request as it stands now.

        :param outputs: completions that the copy holds; by default a snapshot of each one here.
        :return: a record that shares the prompt's lists, which do not change once tokens come.
        """
        if outputs is None:
            outputs = [output.snapshot() for output in self.outputs]
        return RequestOutput(
            self.request_id,
            self.prompt,
            self.prompt_token_ids,
            self.prompt_logprobs,
            list(outputs),
            self.finished,
            self.num_cached_tokens,
            self.metrics,
            self.error,
        )

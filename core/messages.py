"""What crosses between a front end and an engine: commands in, one batch of outputs per step out.

Plain msgspec records, so that the same messages serve one process and two.
"""

from __future__ import annotations

import msgspec

from core.request import FinishReason, SamplingParams
from core.step import PromptLogprobs, TokenLogprobs  # noqa: TC001  msgspec reads annotations


class Submit(msgspec.Struct, frozen=True, tag=True):
    """Start one sequence.  A request with `n` completions is `n` of these."""

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    max_tokens: int
    """Resolved: at least 1."""
    stop_ids: list[int]
    """Resolved: stop ids, and end-of-sequence unless ignored."""
    seed: int
    priority: int = 0
    arrival_time: float = 0.0
    """Seconds of the monotonic clock."""
    cache_salt: str = ""


class Finish(msgspec.Struct, frozen=True, tag=True):
    """End one sequence from outside: because the client left, or a stop string was seen."""

    request_id: str
    reason: FinishReason = FinishReason.ABORT


Command = Submit | Finish


class Ended(msgspec.Struct, frozen=True):
    """The last word on one sequence."""

    request_id: str
    reason: FinishReason
    stop_reason: int | str | None = None
    """The stop id that was drawn, if it is not an end-of-sequence id."""
    error: str = ""


class OutputBatch(msgspec.Struct, tag=True):
    """All that one step gave to the open sequences.  `request_ids` and `tokens` run in parallel."""

    request_ids: list[str] = []
    tokens: list[int] = []
    ended: list[Ended] = []
    cached: dict[str, int] = {}
    """Prompt tokens that the prefix cache held, for sequences that got a row in this step."""
    logprobs: dict[str, TokenLogprobs] = {}
    prompt_logprobs: dict[str, PromptLogprobs] = {}

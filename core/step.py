"""What crosses between scheduler and executor: one plan per step, one result per step.

Plain messages without tensors, so that a plan can travel to every rank as it is.
A *row* is a place in the persistent batch: a request keeps its row from the step that admits it
until it ends or is preempted, and ranks keep the row's tokens, parameters and block table.
"""

from __future__ import annotations

import msgspec

from core.request import SamplingParams  # noqa: TC001  msgspec reads the annotation at run time


class RowEntry(msgspec.Struct, frozen=True, array_like=True):
    """A request that enters a row: all that a rank must know of it, sent once."""

    row: int
    request_id: str
    token_ids: list[int]
    """Prompt and, after a preemption, the tokens generated so far."""
    num_prompt: int
    params: SamplingParams
    seed: int
    stop_ids: list[int]
    """Masked while fewer than `params.min_tokens` tokens have been generated."""
    num_cached: int = 0
    """Prompt tokens that the prefix cache held when the request first got a row."""


class BlockAppend(msgspec.Struct, frozen=True, array_like=True):
    """New blocks at the end of a row's block table."""

    row: int
    start: int
    """Index of the first of them in the table."""
    block_ids: list[int]


class StepPlan(msgspec.Struct, array_like=True):
    """One step of the engine.  The lists `rows`, `starts`, `counts` and `samples` run in parallel.

    Scheduled row `i` computes positions `starts[i] .. starts[i] + counts[i] - 1` of `rows[i]`; where
    `samples[i]`, the token after them is drawn and stored at position `starts[i] + counts[i]`.
    Rows that compute exactly one position and sample come first: `num_decodes` of them.
    """

    step: int
    added: list[RowEntry] = []
    appended: list[BlockAppend] = []
    rows: list[int] = []
    starts: list[int] = []
    counts: list[int] = []
    samples: list[bool] = []
    num_decodes: int = 0
    drawn: tuple[list[int], list[int], list[int]] | None = None
    """Rows, positions and tokens of results since the last step, for stages that did not draw them;
    filled in by an executor of several stages."""

    @property
    def num_tokens(self) -> int:
        """Positions that this step computes."""
        return sum(self.counts)


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log-probabilities at one position.

    Natural logarithms under the model's own distribution, before penalties, bans or temperature.
    """

    token_id: int
    logprob: float
    rank: int
    """1 for the likeliest token of the vocabulary."""
    top_ids: list[int]
    top_logprobs: list[float]


class PromptLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log-probabilities of consecutive prompt tokens."""

    first: int
    """Position of the first of them; at least 1, since nothing predicts position 0."""
    entries: list[TokenLogprobs]


class StepResult(msgspec.Struct, array_like=True):
    """What came back from one step.

    `tokens[i]` belongs to scheduled row `i` of the plan with the same number: the drawn token, or
    `NO_TOKEN` where the row did not sample, or `BAD_LOGITS` where its logits held a NaN.
    """

    step: int
    tokens: list[int]
    logprobs: dict[int, TokenLogprobs] = {}
    """By index of the scheduled row, only where the request asked."""
    prompt_logprobs: dict[int, PromptLogprobs] = {}
    """By index of the scheduled row, only where the request asked: the prompt tokens that the
    positions computed in this step predict."""


NO_TOKEN = -1
BAD_LOGITS = -2

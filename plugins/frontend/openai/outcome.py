"""How completions ended, and what they counted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from core.request import FinishReason
from plugins.frontend.openai.types import PromptTokensDetails, Usage

if TYPE_CHECKING:
    from collections.abc import Iterable

    from core.outputs import CompletionOutput, RequestOutput

CANCELLED: Final = "the request was cancelled, so that its text may be incomplete"


def finish_reason(completion: CompletionOutput) -> str | None:
    """Return the reason in the words that clients know: `stop` or `length`, `None` for no end yet.

    A completion that was cancelled has stopped; `warnings` says why.  One that failed is followed by
    an error.
    """
    reason = completion.finish_reason
    return reason if reason is None or reason == FinishReason.LENGTH else str(FinishReason.STOP)


def end_warnings(completions: Iterable[CompletionOutput]) -> list[str]:
    """Say what is to be said about how these completions ended."""
    is_cancelled = any(completion.finish_reason == FinishReason.ABORT for completion in completions)
    return [CANCELLED] if is_cancelled else []


class UsageCounter:
    """Counts the tokens of one answer.

    :param num_prompt_tokens: of each prompt.
    """

    def __init__(self, num_prompt_tokens: Iterable[int]) -> None:
        lengths = list(num_prompt_tokens)
        self._num_prompt = sum(lengths)
        self._num_completion = 0
        self._num_cached = [0] * len(lengths)

    def add(self, prompt: int, output: RequestOutput) -> None:
        """Count what is new in a delta, or all of a last output."""
        self._num_cached[prompt] = output.num_cached_tokens or 0
        for completion in output.outputs:
            self._num_completion += len(completion.token_ids)

    def usage(self) -> Usage:
        """Return the counts so far."""
        return Usage(
            self._num_prompt,
            self._num_completion,
            self._num_prompt + self._num_completion,
            PromptTokensDetails(sum(self._num_cached)),
        )

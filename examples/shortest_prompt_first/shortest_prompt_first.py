"""Starts waiting requests with short prompts first, and lets none wait forever.

Where prompts differ widely, serving the short ones first lowers the mean time to the first token.
Taken literally the rule starves long prompts: there may always be a shorter one.  So a request is
ranked by its place in the order of arrival plus a number of places that grows with its prompt:

    rank = arrival + prompt tokens / tokens_per_place

A later arrival goes first only if it is behind by fewer places than its prompt is shorter.  Hence
fewer than `prompt tokens / tokens_per_place` later arrivals can ever overtake a request, whatever
arrives.  Ranks never change, which is what the scheduler's queue needs, and no clock is read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from core import hookimpl
from core.registry import SchedulerEntry
from core.scheduler import TokenBudgetScheduler

if TYPE_CHECKING:
    from collections.abc import Iterable

    from core.interfaces import KVCache
    from core.plan import Plan
    from core.request import Request

core_api = "1.0"


@dataclass(frozen=True, slots=True)
class ShortestPromptSettings:
    """The table `[plugins."py:shortest_prompt_first"]`."""

    tokens_per_place: int = 32
    """Prompt tokens that cost one place in the queue.  With more of them the order comes closer to that
    of arrival; with 1 a prompt of 1000 tokens lets up to 999 later arrivals go first."""


@dataclass(frozen=True, slots=True)
class ShortestPromptRank:
    """Ranks requests for a `TokenBudgetScheduler`; lower ranks go first."""

    tokens_per_place: int

    def __call__(self, request: Request) -> float:
        """Rank a request that the scheduler has taken in."""
        return request.arrival + request.num_prompt / self.tokens_per_place


def make_scheduler(plan: Plan, kv_cache: KVCache) -> TokenBudgetScheduler:
    """Build the scheduler of the core with our ranks; everything else stays what it is."""
    config = plan.config
    return TokenBudgetScheduler(
        kv_cache,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        policy=config.scheduling_policy,
        long_prefill_threshold=config.long_prefill_token_threshold,
        num_micro_batches=plan.pipeline_parallel_size,
        rank=ShortestPromptRank(_settings(plan).tokens_per_place),
    )


def _settings(plan: Plan) -> ShortestPromptSettings:
    """Find our settings by their type: their name is the one that the user chose the plugin by."""
    found = (item for item in plan.settings.values() if isinstance(item, ShortestPromptSettings))
    return next(found)


# --- hooks -----------------------------------------------------------------------------------------


@hookimpl
def core_register_settings() -> type:
    """Contribute `tokens_per_place`."""
    return ShortestPromptSettings


@hookimpl
def core_register_schedulers() -> Iterable[SchedulerEntry]:
    """Offer the scheduler under the name `shortest_prompt_first`."""
    return [
        SchedulerEntry(
            name="shortest_prompt_first",
            factory=make_scheduler,
            summary="short prompts first, none overtaken without end",
        )
    ]


@hookimpl
def core_check_plan(plan: Plan) -> Iterable[str]:
    """Object to settings that rank nothing."""
    value = _settings(plan).tokens_per_place
    if value < 1:
        yield f"tokens_per_place is {value}, but must be at least 1"

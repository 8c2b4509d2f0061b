"""An executor that computes nothing, as a plugin: what is left is what the host costs.

python -m core serve MODEL --plugins py:core.bench.null_executor --executor null
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from core.hookspecs import hookimpl
from core.registry import ExecutorEntry
from core.step import NO_TOKEN, StepPlan, StepResult

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from core.assemble import Parts
    from core.plan import Plan

core_api = "1.0"

NAME: Final = "py:core.bench.null_executor"


@dataclass(frozen=True, slots=True)
class NullSettings:
    """The table `[plugins."py:core.bench.null_executor"]`."""

    step_ms: float = 0.0
    """How long a step takes at least, in milliseconds."""
    tokens: tuple[int, ...] = (7,)
    """What rows draw, in turn."""


class NullExecutor:
    """Fulfils `core.interfaces.Executor`.

    :param tokens: the n-th step draws the n-th of these for every row, in a circle.
    :param step_seconds: how long a step takes at least.
    """

    max_in_flight = 1

    def __init__(
        self, tokens: Sequence[int] = (7,), step_seconds: float = 0.0, num_blocks: int = 1
    ) -> None:
        self._tokens = tokens
        self._step_seconds = step_seconds
        self._num_blocks = num_blocks
        self._plans: deque[StepPlan] = deque()
        self._due = 0.0

    def load(self, _report: Callable[[int, int], None], /) -> None:
        """Load nothing."""

    def kv_capacity(self) -> int:
        """Claim what was asked for."""
        return self._num_blocks

    def allocate(self, _num_blocks: int, /) -> None:
        """Allocate nothing."""

    def submit(self, plan: StepPlan, /) -> None:
        """Remember the plan."""
        self._plans.append(plan)

    def collect(self) -> StepResult:
        """Answer the oldest plan, once its step would be over."""
        plan = self._plans.popleft()
        if self._step_seconds:
            now = time.perf_counter()
            time.sleep(max(0.0, self._due - now))
            self._due = max(self._due, now) + self._step_seconds
        token = self._tokens[plan.step % len(self._tokens)]
        return StepResult(
            plan.step, [token if samples else NO_TOKEN for samples in plan.samples], {}, {}
        )

    def close(self) -> None:
        """Close nothing."""


def make_null_executor(plan: Plan, _parts: Parts) -> NullExecutor:
    """Make one from the plugin's settings."""
    settings: NullSettings = plan.settings[NAME]
    num_blocks = plan.config.num_kv_blocks or 2**16
    return NullExecutor(settings.tokens, settings.step_ms / 1e3, num_blocks + 1)


@hookimpl
def core_register_settings() -> type:
    """Contribute `step_ms` and `tokens`."""
    return NullSettings


@hookimpl
def core_register_executors() -> list[ExecutorEntry]:
    """Contribute `null`."""
    summary = "computes nothing: for measuring what the host costs"
    return [ExecutorEntry(name="null", factory=make_null_executor, summary=summary)]

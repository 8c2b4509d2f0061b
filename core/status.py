"""How far an engine has come: what `/readyz`, the start display and the log tell."""

from __future__ import annotations

import enum
from collections.abc import Callable

import msgspec


class Phase(enum.StrEnum):
    """The phases of an engine, in their order."""

    STARTING = "starting"
    """Processes start, plugins are selected and the plan is made."""
    LOADING = "loading"
    """Weights are on their way to the device."""
    PROFILING = "profiling"
    """A trial step measures what the KV cache can have."""
    WARMING = "warming"
    """Caches are allocated and everything that runs later runs once."""
    READY = "ready"
    DRAINING = "draining"
    """Open requests are finished, new ones are turned away."""
    FAILED = "failed"
    STOPPED = "stopped"


class Status(msgspec.Struct, frozen=True, tag=True):
    """A phase and the progress in it."""

    phase: Phase = Phase.STARTING
    done: int = 0
    total: int = 0
    """0 if nobody knows."""
    error: str = ""

    @property
    def fraction(self) -> float:
        """Share of the phase that is done, 0 to 1."""
        return self.done / self.total if self.total else 0.0

    @property
    def percent(self) -> int:
        """The same in whole percent."""
        return int(100 * self.fraction)


Report = Callable[[Status], None]
"""Receives every change of a status."""


def report_nothing(_status: Status) -> None:
    """Pass over progress that nobody watches."""

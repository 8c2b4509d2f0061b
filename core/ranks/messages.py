"""What crosses between the engine and each of its ranks, framed as `core.link` frames.

Tensors never do: those go over torch.distributed, from rank to rank.
"""

from __future__ import annotations

from typing import Any

import msgspec

from core.step import StepPlan, StepResult  # noqa: TC001  msgspec reads the annotations at run time

# --- to a rank -------------------------------------------------------------------------------------


class Begin(msgspec.Struct, tag=True, frozen=True):
    """What a rank is to be; the first message to it."""

    rank: int
    local_rank: int
    """Among the ranks of its machine; the number of its GPU."""
    world_size: int
    local_world_size: int
    config: dict[str, Any]
    """As `EngineConfig.to_dict` gives it."""
    origins: dict[str, str]
    defaults: list[str]
    """Plugins that are active unless the configuration says otherwise."""
    digest: str
    """Of the plan that the rank must come to as well."""
    store_host: str
    """Where torch.distributed's store listens."""
    store_port: int
    timeout: float
    """Seconds that a collective may take."""


class Load(msgspec.Struct, tag=True, frozen=True):
    """Bring the weights to the device."""


class Measure(msgspec.Struct, tag=True, frozen=True):
    """Find how many KV blocks fit."""


class Allocate(msgspec.Struct, tag=True, frozen=True):
    """Allocate the KV cache."""

    num_blocks: int


class Run(msgspec.Struct, tag=True, frozen=True):
    """Run one step."""

    plan: StepPlan


class Ping(msgspec.Struct, tag=True, frozen=True):
    """Say how far you are."""

    want_stack: bool = False


class Close(msgspec.Struct, tag=True, frozen=True):
    """End."""


# --- from a rank -----------------------------------------------------------------------------------


class Joined(msgspec.Struct, tag=True, frozen=True):
    """The rank has made the same plan and has its device."""

    device: str


class Progress(msgspec.Struct, tag=True, frozen=True):
    """How far loading is, in bytes."""

    done: int
    total: int


class Done(msgspec.Struct, tag=True, frozen=True):
    """What was asked is done: `Load` or `Allocate`, or `Measure` with its result."""

    num_blocks: int = 0


class Refused(msgspec.Struct, tag=True, frozen=True):
    """The rank cannot start, or go on; its last message."""

    error: str
    exit_code: int
    trace: str
    """Of an error that nobody has foreseen; else empty."""


class StepDone(msgspec.Struct, tag=True, frozen=True):
    """The result of a step, from the rank that samples."""

    result: StepResult


class StepBroken(msgspec.Struct, tag=True, frozen=True):
    """A step has raised; the rank goes on, but its collectives may be out of order."""

    step: int
    error: str
    trace: str


class Pong(msgspec.Struct, tag=True, frozen=True):
    """How far a rank is."""

    step: int
    """The last one that it has begun; -1 before the first."""
    is_busy: bool
    """Whether that one, or an answer to another message, is still being worked on."""
    seconds: float
    """Since it began."""
    stack: str = ""
    """Of the thread that runs steps, if that was asked for."""


ToRank = Begin | Load | Measure | Allocate | Run | Ping | Close
FromRank = Joined | Progress | Done | Refused | StepDone | StepBroken | Pong

"""Measures attention: wraps `attention.torch` and logs how long each kind of layer took.

For measuring, not for serving: on a GPU every call waits for the device, or else the clock would show
how long it takes to launch kernels.  This module declares; `timed_attention` has the wrapper.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

import structlog

from core import hookimpl
from core.registry import AttentionEntry, Requirements

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from timed_attention import Meter

    from core.interfaces import AttentionBackend
    from core.plan import Plan

core_api = "1.0"

log = structlog.get_logger("attention.timer")


def make_backend(plan: Plan) -> AttentionBackend:
    """Build the wrapper around the backend that it measures."""
    # They import torch, and whoever only lists plugins has no use for another one.
    from timed_attention import TimedAttention  # noqa: PLC0415

    from plugins.attention import torch as wrapped  # noqa: PLC0415

    backend = TimedAttention(wrapped.make_backend(plan))
    # Works in the process of every rank, where nobody is told that the engine stops.
    weakref.finalize(backend, report, backend.meters)
    return backend


def report(meters: Mapping[str, Meter]) -> None:
    """Log a line for each kind of layer."""
    for kind, meter in meters.items():
        log.info(
            "attention",
            layers=kind,
            calls=meter.num_calls,
            tokens=meter.num_tokens,
            seconds=round(meter.seconds, 6),
            us_per_token=round(1e6 * meter.seconds / meter.num_tokens, 2),
        )


def unsupported(requirements: Requirements) -> list[str]:
    """Refuse what the wrapped backend refuses."""
    from plugins.attention import torch as wrapped  # noqa: PLC0415  see make_backend

    return wrapped.unsupported(requirements)


@hookimpl
def core_register_attention() -> Iterable[AttentionEntry]:
    """Offer the wrapper under the name `timer`; it is never chosen by itself."""
    return [
        AttentionEntry(
            name="timer",
            factory=make_backend,
            unsupported=unsupported,
            priority=-1,
            summary="attention.torch, with a clock beside it",
        )
    ]

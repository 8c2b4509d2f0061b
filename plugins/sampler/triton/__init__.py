"""Draws tokens with Triton: rows without penalties and cuts to the distribution, in one or two launches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from core.hookspecs import hookimpl
from core.registry import Requirements, SamplerEntry

if TYPE_CHECKING:
    from collections.abc import Iterable

    from core.interfaces import Sampler
    from core.plan import Plan

core_api = "1.0"

DTYPES: Final = ("bfloat16", "float16", "float32")
MODULES: Final = {"triton": "pip install cythera[cuda]"}


def make_sampler(plan: Plan | None) -> Sampler:
    """Build the sampler; only now are torch and Triton imported."""
    from plugins.sampler.triton.sampler import TritonSampler  # noqa: PLC0415  listing needs no torch

    return TritonSampler(None if plan is None else plan.dtype)


def unsupported(requirements: Requirements) -> list[str]:
    """Every reason why the kernels cannot serve the requirements."""
    return requirements.beyond(devices=["cuda"], dtypes=DTYPES, modules=MODULES)


@hookimpl
def core_register_samplers() -> Iterable[SamplerEntry]:
    """Offer the sampler under the name `triton`, preferred wherever it can serve."""
    return [
        SamplerEntry(
            name="triton",
            factory=make_sampler,
            unsupported=unsupported,
            summary="draws in one pass over the logits, for CUDA; the rest as the default sampler does",
            priority=100,
        )
    ]

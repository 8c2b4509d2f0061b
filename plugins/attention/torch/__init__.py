"""Paged attention in plain torch: any device, any head dimension, every mask the models need."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from core.hookspecs import hookimpl
from core.registry import AttentionEntry, Requirements

if TYPE_CHECKING:
    from collections.abc import Iterable

    from core.interfaces import AttentionBackend

core_api = "1.0"

DTYPES: Final = ("float32", "bfloat16", "float16", "float64")
KV_DTYPES: Final = (*DTYPES, "fp8", "fp8_e4m3", "float8_e4m3fn")
"""Besides `auto`.  The last three are names of the same."""


def make_backend(_plan: Any) -> AttentionBackend:
    """Build the backend; only now is torch imported."""
    from plugins.attention.torch.backend import TorchAttention  # noqa: PLC0415  listing needs no torch

    return TorchAttention()


def unsupported(requirements: Requirements) -> list[str]:
    """Every reason why this backend cannot serve the requirements."""
    return requirements.beyond(dtypes=DTYPES, kv_cache_dtypes=KV_DTYPES)


@hookimpl
def core_register_attention() -> Iterable[AttentionEntry]:
    """Offer the backend under the name `torch`, with the lowest priority of the built-in ones."""
    return [
        AttentionEntry(
            name="torch",
            factory=make_backend,
            unsupported=unsupported,
            summary="paged attention in plain torch, for any device",
        )
    ]

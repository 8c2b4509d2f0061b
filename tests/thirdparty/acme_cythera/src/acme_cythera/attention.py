"""Attention row by row, over pages that hold keys and values side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from core import hookimpl
from core.registry import AttentionEntry, Requirements

if TYPE_CHECKING:
    from collections.abc import Iterable

    from core.interfaces import AttentionBackend
    from core.plan import Plan

core_api = "1.0"

DTYPES: Final = ("float32", "bfloat16", "float16", "float64")


def make_backend(_plan: Plan) -> AttentionBackend:
    """Build the backend."""
    from acme_cythera.rowwise import RowwiseAttention  # noqa: PLC0415  imports torch

    return RowwiseAttention()


def unsupported(requirements: Requirements) -> list[str]:
    """Every reason why this backend cannot serve the requirements."""
    reasons = []
    if requirements.dtype not in DTYPES:
        reasons.append(f"dtype {requirements.dtype!r} is none of {', '.join(DTYPES)}")
    if requirements.kv_cache_dtype not in {"auto", requirements.dtype}:
        reasons.append(f"kv_cache_dtype {requirements.kv_cache_dtype!r} is not the model's dtype")
    return reasons


@hookimpl
def core_register_attention() -> Iterable[AttentionEntry]:
    """Offer the backend under the name `acme`."""
    return [
        AttentionEntry(
            name="acme",
            factory=make_backend,
            unsupported=unsupported,
            block_sizes=(32, 64, 128),
            default_block_size=32,
            summary="row by row, keys and values side by side",
        )
    ]

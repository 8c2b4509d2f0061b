"""Paged attention in Triton: split decodes, flash prompts, rotary embedding on the way."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from core.hookspecs import hookimpl
from core.registry import AttentionEntry, Requirements

if TYPE_CHECKING:
    from collections.abc import Iterable

    from core.interfaces import AttentionBackend

core_api = "1.0"

DTYPES: Final = ("bfloat16", "float16", "float32")
MODULES: Final = {"triton": "pip install cythera[cuda]"}
FP8_DTYPES: Final = ("fp8", "fp8_e4m3", "float8_e4m3fn")
"""Names of the same."""
BLOCK_SIZES: Final = (64, 32, 16, 128)
MIN_HEAD_DIM: Final = 64
MAX_HEAD_DIM: Final = 256
HEAD_DIM_STEP: Final = 16
MAX_GROUP: Final = 16
"""Query heads for each key-value head: the rows of the smallest matrix product."""


def make_backend(_plan: Any) -> AttentionBackend:
    """Build the backend; only now are torch and Triton imported."""
    from plugins.attention.triton.backend import TritonAttention  # noqa: PLC0415  listing needs no torch

    return TritonAttention()


def unsupported(requirements: Requirements) -> list[str]:
    """Every reason why this backend cannot serve the requirements."""
    reasons = requirements.beyond(
        devices=["cuda"],
        dtypes=DTYPES,
        kv_cache_dtypes=FP8_DTYPES,
        block_sizes=BLOCK_SIZES,
        modules=MODULES,
    )
    reasons += [
        f"head_dim {size} is no multiple of {HEAD_DIM_STEP} from {MIN_HEAD_DIM} to {MAX_HEAD_DIM}"
        for size in sorted(requirements.head_dims)
        if not MIN_HEAD_DIM <= size <= MAX_HEAD_DIM or size % HEAD_DIM_STEP
    ]
    if requirements.num_kv_heads:
        group = requirements.num_heads // requirements.num_kv_heads
        if group > MAX_GROUP:
            reasons.append(f"{group} query heads for each key-value head are more than {MAX_GROUP}")
    return reasons


@hookimpl
def core_register_attention() -> Iterable[AttentionEntry]:
    """Offer the backend under the name `triton`, preferred wherever it can serve."""
    return [
        AttentionEntry(
            name="triton",
            factory=make_backend,
            unsupported=unsupported,
            summary="paged attention in Triton, for CUDA from compute capability 8.0 on",
            block_sizes=BLOCK_SIZES,
            default_block_size=BLOCK_SIZES[0],
            priority=100,
        )
    ]

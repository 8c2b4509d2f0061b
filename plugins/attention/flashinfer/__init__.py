"""Paged attention by the kernels of FlashInfer, where that library is installed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from core.hookspecs import hookimpl
from core.registry import AttentionEntry, Requirements

if TYPE_CHECKING:
    from collections.abc import Iterable

    from core.interfaces import AttentionBackend

core_api = "1.0"

DTYPES: Final = ("bfloat16", "float16")
HEAD_DIMS: Final = (64, 128, 256)
BLOCK_SIZES: Final = (64, 16, 32, 128)
MODULES: Final = {"flashinfer": "pip install cythera[flashinfer]"}


def make_backend(_plan: Any) -> AttentionBackend:
    """Build the backend; only now are torch and FlashInfer imported."""
    import flashinfer  # noqa: PLC0415  an extra, and it makes folders when it is imported

    from plugins.attention.flashinfer.backend import FlashInferAttention  # noqa: PLC0415  imports torch

    return FlashInferAttention(flashinfer)


def unsupported(requirements: Requirements) -> list[str]:
    """Every reason why this backend cannot serve the requirements."""
    reasons = requirements.beyond(
        devices=["cuda"],
        dtypes=DTYPES,
        kv_cache_dtypes=(),
        block_sizes=BLOCK_SIZES,
        modules=MODULES,
    )
    return reasons + [
        f"head_dim {size} is none of {', '.join(map(str, HEAD_DIMS))}"
        for size in sorted(requirements.head_dims)
        if size not in HEAD_DIMS
    ]


@hookimpl
def core_register_attention() -> Iterable[AttentionEntry]:
    """Offer the backend under the name `flashinfer`; where `triton` is active too, it goes first."""
    return [
        AttentionEntry(
            name="flashinfer",
            factory=make_backend,
            unsupported=unsupported,
            summary="paged attention by FlashInfer's kernels, for CUDA from compute capability 8.0 on",
            block_sizes=BLOCK_SIZES,
            default_block_size=BLOCK_SIZES[0],
            priority=50,
        )
    ]

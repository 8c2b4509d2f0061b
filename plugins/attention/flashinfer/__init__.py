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
    return [*_device_reasons(requirements), *_shape_reasons(requirements)]


def _device_reasons(requirements: Requirements) -> list[str]:
    reasons = requirements.beyond(devices=["cuda"], dtypes=DTYPES, modules=MODULES)
    if requirements.kv_cache_dtype not in ("auto", requirements.dtype):
        reasons.append(
            f"kv_cache_dtype {requirements.kv_cache_dtype!r} is neither auto nor the dtype "
            f"{requirements.dtype!r}"
        )
    return reasons


def _shape_reasons(requirements: Requirements) -> list[str]:
    reasons = [
        f"head_dim {size} is none of {', '.join(map(str, HEAD_DIMS))}"
        for size in sorted(requirements.head_dims)
        if size not in HEAD_DIMS
    ]
    if requirements.block_size not in (None, *BLOCK_SIZES):
        known = ", ".join(map(str, sorted(BLOCK_SIZES)))
        reasons.append(f"block_size {requirements.block_size} is none of {known}")
    return reasons


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

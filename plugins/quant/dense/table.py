"""Which kernel computes an operation, by its shape and the number of tokens.

Measured on an H200 with `python -m core tune`; other shapes take the entry of the nearest kind.
`None` stands for the library's matrix product, with separate kernels for what comes before and after.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from plugins.quant.dense.launch import KernelConfig

if TYPE_CHECKING:
    from plugins.quant.dense.launch import Operation

MAX_TOKENS: Final = 64
"""Beyond that many, the library's products are at the limit of the card."""
_WIDE: Final = 65536
"""Outputs of a layer that fills the card with large tiles, as an output projection does."""
_DEEP: Final = 8192
"""Inputs of a layer that needs its sum split even for many outputs."""


def tile(block_m: int, block_n: int, block_k: int, split_k: int, num_stages: int, **more: int | bool) -> KernelConfig:
    """Make a configuration of the tensor-core kernel."""
    return KernelConfig(
        kernel="tile", block_m=block_m, block_n=block_n, block_k=block_k, split_k=split_k,
        num_stages=num_stages, **more,
    )  # fmt: skip


def vector(block_n: int, block_k: int, num_warps: int) -> KernelConfig:
    """Make a configuration of the kernel for one token."""
    return KernelConfig(kernel="vector", block_n=block_n, block_k=block_k, num_warps=num_warps)


def choose(op: Operation, num_tokens: int) -> KernelConfig | None:
    """Choose for a card of compute capability 9."""
    if num_tokens > MAX_TOKENS:
        return None
    if num_tokens == 1:
        return _choose_vector(op)
    if num_tokens <= 16:
        return _choose_16(op)
    return _choose_32(op) if num_tokens <= 32 else _choose_64(op)


def _choose_vector(op: Operation) -> KernelConfig:
    if op.activation:
        return vector(2, 4096, 8)
    if op.num_outputs >= _WIDE:
        return vector(4, 4096, 4)
    if op.num_inputs >= _DEEP:
        return vector(2, 2048, 4)
    return vector(16, 1024, 8) if op.num_outputs <= 4096 else vector(8, 512, 2)


def _choose_16(op: Operation) -> KernelConfig:
    if op.activation or op.num_outputs >= _WIDE:
        return tile(16, 64, 128, 1, 1, swap=True, eager=True)
    if op.norm:
        return tile(16, 64, 64, 4, 7, swap=True)
    return tile(16, 64, 256, 4, 1, swap=True, eager=True, fuse_norm=False)


def _choose_32(op: Operation) -> KernelConfig:
    if op.activation:
        return tile(32, 64, 64, 1, 5, swap=True, tma=True, fuse_norm=False)
    if op.num_outputs >= _WIDE:
        return tile(32, 128, 128, 1, 5, swap=True, num_warps=8, fuse_norm=False)
    if op.num_inputs >= _DEEP:
        return tile(32, 64, 256, 4, 1, swap=True, eager=True, num_warps=8, fuse_norm=False)
    if op.norm:
        return tile(32, 64, 128, 1, 7, swap=True, fuse_norm=False)
    return tile(32, 64, 256, 2, 4, swap=True, fuse_norm=False)


def _choose_64(op: Operation) -> KernelConfig | None:
    if op.activation:
        return tile(64, 64, 128, 1, 4, tma=True, fuse_norm=False)
    if op.num_outputs >= _WIDE:
        return tile(64, 128, 128, 1, 4, num_warps=8, fuse_norm=False)
    if op.num_inputs >= _DEEP:
        return tile(64, 64, 256, 2, 3, fuse_norm=False)
    return None

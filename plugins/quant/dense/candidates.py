"""What is worth trying for an operation: sizes that were fast for some shape, where this shape allows them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from plugins.quant.dense.operation import FOR_ANY_TOKENS, TOKENS_OF_VECTOR, KernelConfig, Operation
from plugins.quant.dense.table import FUSED, LIBRARY, MAX_TOKENS, MIN_BLOCK_K, shrink

if TYPE_CHECKING:
    from collections.abc import Sequence

    from core.model.spec import ModelSpec
    from plugins.quant.dense.operation import Overlap

FUSES_NORM_UP_TO: Final = 16
"""Tokens: with more, each program would spend too long on normalizing all of them."""

VECTORS: Final = ((4, 1024, 4), (4, 4096, 8), (8, 512, 2), (4, 2048, 2), (2, 2048, 4), (1, 4096, 4))
"""(block_n, block_k, num_warps) for one token."""
VECTORS_OF_GATES: Final = ((2, 4096, 8), (4, 4096, 8), (1, 4096, 4), (2, 2048, 4))
VECTORS_OF_TWO: Final = ((4, 4096, 8), (4, 2048, 4), (2, 2048, 4))


def _tile(block_m: int, block_n: int, block_k: int, **more: Any) -> KernelConfig:
    return KernelConfig("tile", block_m=block_m, block_n=block_n, block_k=block_k, **more)


def _eager(block_k: int, split_k: int, **more: Any) -> KernelConfig:
    return _tile(16, 64, block_k, split_k=split_k, swap=True, eager=True, **more)


TILES: Final = {
    16: (
        _eager(256, 4),
        _eager(256, 4, num_warps=8),
        _eager(256, 2),
        _eager(128, 1),
        _tile(16, 64, 64, split_k=4, num_stages=6, swap=True),
        _tile(16, 64, 256, num_stages=5, swap=True),
    ),
    32: (
        _tile(32, 64, 256, num_stages=4, swap=True, tma=True),
        _tile(32, 64, 256, split_k=2, num_stages=4, swap=True, tma=True),
        _tile(32, 64, 64, num_stages=5, swap=True, tma=True),
        _tile(32, 64, 128, split_k=2, num_stages=6, swap=True),
        _tile(32, 64, 256, split_k=4, num_warps=8, swap=True, eager=True),
        _tile(32, 128, 128, num_warps=8, num_stages=5, swap=True),
    ),
    64: (
        _tile(64, 64, 128, num_stages=4, tma=True),
        _tile(64, 64, 256, split_k=2, num_stages=3),
        _tile(64, 64, 256, num_stages=3, tma=True),
        _tile(64, 32, 128, split_k=2, num_stages=4),
        _tile(64, 128, 128, num_warps=8, num_stages=4),
    ),
}
"""By block_m."""


GATES_OF_MANY: Final = (KernelConfig("whole"), KernelConfig("shared"))


class Slot(NamedTuple):
    """A linear layer in a chain: what it computes, from which buffer into which."""

    name: str
    op: Operation
    reads: str
    """Its first `num_inputs` columns."""
    writes: str


def slots_of_layer(model: ModelSpec) -> tuple[Slot, ...]:
    """List the linear layers of a decoder layer, in the order in which they run."""
    hidden, inner, style = model.hidden_size, model.intermediate_size, model.norm_style
    qkv = Operation(model.q_size + 2 * model.kv_size, hidden, norm=style, bias=model.qkv_bias)
    out = Operation(hidden, model.q_size, residual=True, bias=model.out_bias)
    up = Operation(inner, hidden, norm=style, activation=model.activation, bias=model.mlp_bias)
    down = Operation(hidden, inner, residual=True, bias=model.mlp_bias)
    return (
        Slot("qkv", qkv, "stream", "qkv"),
        Slot("out", out, "qkv", "stream"),
        Slot("gate_up", up, "stream", "inner"),
        Slot("down", down, "inner", "stream"),
    )


def slots_of_head(model: ModelSpec) -> tuple[Slot, ...]:
    """List the output projection; nothing if the embedding serves as one."""
    if model.tied:
        return ()
    op = Operation(model.vocab_size, model.hidden_size, norm=model.norm_style)
    return (Slot("lm_head", op, "stream", "logits"),)


def candidates(op: Operation, num_tokens: int, chosen: KernelConfig) -> list[KernelConfig]:
    """List configurations to measure, the one that is in the table first.

    They overlap as early as possible; see `overlaps`.
    """
    if num_tokens > MAX_TOKENS:
        gates = (*GATES_OF_MANY, FUSED) if op.activation else ()
        return list(dict.fromkeys([replace(chosen, overlap="early"), LIBRARY, *gates]))
    found = [replace(chosen, overlap="early"), *_vectors(op, num_tokens)]
    for config in _tiles(op, num_tokens):
        found.append(replace(config, fuse_norm=not op.norm or num_tokens <= FUSES_NORM_UP_TO))
        if op.norm and num_tokens <= FUSES_NORM_UP_TO:
            found.append(replace(config, fuse_norm=False))
    return list(dict.fromkeys([*found, LIBRARY]))


def _vectors(op: Operation, num_tokens: int) -> list[KernelConfig]:
    sizes: Sequence[tuple[int, int, int]] = ()
    if num_tokens == TOKENS_OF_VECTOR[0]:
        sizes = VECTORS_OF_GATES if op.activation else VECTORS
    elif num_tokens == TOKENS_OF_VECTOR[1] and not op.activation:
        sizes = VECTORS_OF_TWO
    return [
        KernelConfig("vector", n, k, block_m=num_tokens, num_warps=warps)
        for n, k, warps in sizes
        if k <= max(op.num_inputs, MIN_BLOCK_K)
    ]


def _tiles(op: Operation, num_tokens: int) -> list[KernelConfig]:
    block_m = next(block_m for block_m in TILES if block_m >= num_tokens)
    fitting = (shrink(op, config) for config in TILES[block_m])
    found = dict.fromkeys(config for config in fitting if config is not None)
    # Rows that nothing divides: masked, which costs little beside a product that is not there.
    return list(found) or list(TILES[block_m])


def overlaps(config: KernelConfig) -> list[KernelConfig]:
    """List the other ways in which a configuration can overlap with its neighbours."""
    is_for_any = config.kernel in FOR_ANY_TOKENS
    ways: Sequence[Overlap] = ("", "early") if is_for_any else ("", "late", "early")
    return [replace(config, overlap=way) for way in ways if way != config.overlap]

"""Tensor parallelism: every rank holds a part of every layer.

Queries are divided by head, the MLP by feature, embedding and head by token.  A rank's query heads
belong to whole groups of key-value heads, or to one part of one group; where there are more ranks
than key-value heads, several ranks keep the same one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from core.errors import ConfigError
from core.hookspecs import hookimpl
from core.registry import TensorParallelEntry
from core.sharding import Share, Span, divide

if TYPE_CHECKING:
    from collections.abc import Iterable

    from core.interfaces import TensorParallel
    from core.model.spec import ModelSpec
    from core.plan import Plan

core_api = "1.0"
VOCAB_STEP = 64  # keeps the rows of each rank's logits aligned


@dataclass(frozen=True, slots=True)
class Settings:
    """Settings of tensor parallelism."""

    size: int | None = None
    """Ranks that share each layer; the same as --tensor-parallel-size."""


def divide_layers(model: ModelSpec, size: int, step: int) -> tuple[Share, ...]:
    """Divide every layer, as evenly as whole heads allow.

    :param step: multiples of which the MLP is best cut by.
    :raises ConfigError: there are more ranks than query heads, or than features or tokens.
    """
    if size > min(model.num_heads, model.intermediate_size, model.vocab_size):
        raise ConfigError(
            f"--tensor-parallel-size {size} is more than the {model.num_heads} query heads of the model; "
            f"use more stages (--pipeline-parallel-size) instead"
        )
    heads = divide_heads(model.num_heads, model.num_kv_heads, size)
    inner = divide(model.intermediate_size, size, step)
    vocab = divide(model.vocab_size, size, VOCAB_STEP)
    return tuple(
        Share(
            layers=Span(0, model.num_layers),
            heads=heads[rank][0],
            kv_heads=heads[rank][1],
            inner=inner[rank],
            vocab=vocab[rank],
            tensor_rank=rank,
        )
        for rank in range(size)
    )


def divide_heads(num_heads: int, num_kv_heads: int, size: int) -> list[tuple[Span, Span]]:
    """Divide query heads, and give each rank the key-value heads that its own ones use."""
    group = num_heads // num_kv_heads
    if size <= num_kv_heads:
        return [(kv.scaled(group), kv) for kv in divide(num_kv_heads, size)]
    parts = []
    for kv_head, ranks in enumerate(divide(size, num_kv_heads)):
        own = Span(kv_head, kv_head + 1)
        parts += [(q.shifted(kv_head * group), own) for q in divide(group, ranks.size)]
    return parts


def make_strategy(plan: Plan, rank: int) -> TensorParallel:
    """Join this rank to the others of its stage."""
    from plugins.parallel.tp.collectives import (  # noqa: PLC0415  imports torch
        join_stage,
    )

    return join_stage(plan, rank)


@hookimpl
def core_register_settings() -> type:
    """Take the number of ranks from the plugin's settings too."""
    return Settings


@hookimpl
def core_register_parallel() -> Iterable[Any]:
    """Contribute `tp`."""
    summary = "splits every layer over ranks; heads may divide unevenly"
    return [
        TensorParallelEntry(name="tp", factory=make_strategy, divide=divide_layers, summary=summary)
    ]

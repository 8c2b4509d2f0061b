"""Pipeline parallelism: every stage holds some of the layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from core.errors import ConfigError
from core.hookspecs import hookimpl
from core.registry import PipelineParallelEntry
from core.sharding import Span, divide

if TYPE_CHECKING:
    from collections.abc import Iterable

    from core.interfaces import PipelineParallel
    from core.model.spec import ModelSpec
    from core.plan import Plan

core_api = "1.0"


@dataclass(frozen=True, slots=True)
class Settings:
    """Settings of pipeline parallelism."""

    size: int | None = None
    """Stages; the same as --pipeline-parallel-size."""
    layers: tuple[int, ...] = ()
    """Layers of each stage, such as [20, 20, 22, 18]; by default as even as possible."""


def divide_layers(model: ModelSpec, size: int, settings: Settings | None) -> tuple[Span, ...]:
    """Divide the layers among stages, in order.

    :raises ConfigError: there are more stages than layers, or the explicit split does not add up.
    """
    if size > model.num_layers:
        raise ConfigError(
            f"--pipeline-parallel-size {size} is more than the {model.num_layers} layers of the model"
        )
    counts = settings.layers if settings else ()
    if not counts:
        # The last stage has the output projection besides, so larger parts come first.
        return divide(model.num_layers, size)
    if len(counts) != size or sum(counts) != model.num_layers or min(counts) < 1:
        raise ConfigError(
            f"[plugins.'parallel.pp'] layers = {list(counts)}: {size} numbers above 0 are needed that "
            f"add up to the {model.num_layers} layers of the model"
        )
    spans, start = [], 0
    for count in counts:
        spans.append(Span(start, start + count))
        start += count
    return tuple(spans)


def make_strategy(plan: Plan, rank: int) -> PipelineParallel:
    """Join this rank to its neighbours in other stages."""
    from plugins.parallel.pp.transport import (  # noqa: PLC0415  imports torch
        DistributedPipeline,
    )

    return DistributedPipeline(plan.pipeline_parallel_size, plan.tensor_parallel_size, rank)


@hookimpl
def core_register_settings() -> type:
    """Take the number of stages and an explicit split."""
    return Settings


@hookimpl
def core_register_parallel() -> Iterable[Any]:
    """Contribute `pp`."""
    return [
        PipelineParallelEntry(
            name="pp",
            factory=make_strategy,
            divide=divide_layers,
            summary="divides the layers among stages; several steps are on their way at a time",
        )
    ]

"""Finds configurations under which a chain of layers is fast, by measuring the chain as a whole.

A kernel alone tells too little: it overlaps with its neighbours, and finds the caches as they leave them.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Final, NamedTuple

from plugins.quant.dense.candidates import overlaps

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from plugins.quant.dense.operation import KernelConfig, Overlap

    Configs = Mapping[str, KernelConfig]
    """By slot."""
    Measure = Callable[[Configs], float]
    """µs of the chain; infinite if it cannot run."""

MIN_GAIN: Final = 0.0015
"""By how much, relatively, a chain has to be faster to replace another; less is noise."""
NUM_FINALISTS: Final = 3
"""Candidates of a slot that are tried with other overlaps."""


class Found(NamedTuple):
    """A chain, and how long it takes."""

    configs: Configs
    micros: float


def search(
    chosen: Configs,
    candidates: Mapping[str, Sequence[KernelConfig]],
    measure: Measure,
    is_over: Callable[[], bool],
) -> Found:
    """Improve one slot after the other, twice: first the kernel, then how it overlaps.

    :param chosen: to begin with, with the best of its overlaps.
    :param candidates: by slot, in the order in which slots are tried.
    :param is_over: whether to stop; what was best until then is returned.
    """
    best = _fastest([chosen, *(_with_overlap(chosen, way) for way in ("", "late", "early"))], measure)
    seen: dict[str, dict[KernelConfig, float]] = {slot: {} for slot in candidates}
    for slot, options in candidates.items():
        way = best.configs[slot].overlap
        best = _improve(best, slot, [_overlapping(c, way) for c in options], measure, is_over, seen)
    for slot in candidates:
        ranked = sorted(seen[slot], key=seen[slot].__getitem__)
        finalists = dict.fromkeys([best.configs[slot], *ranked[:NUM_FINALISTS]])
        options = [variant for config in finalists for variant in (config, *overlaps(config))]
        best = _improve(best, slot, options, measure, is_over, seen)
    return best


def _improve(  # noqa: PLR0917  private, and called twice
    best: Found,
    slot: str,
    options: Iterable[KernelConfig],
    measure: Measure,
    is_over: Callable[[], bool],
    seen: dict[str, dict[KernelConfig, float]],
) -> Found:
    """Try options of a slot among what the others have at present."""
    current = best.configs
    for option in dict.fromkeys(options):
        if option == current[slot]:
            continue
        if is_over():
            break
        configs = {**current, slot: option}
        micros = measure(configs)
        seen[slot][option] = micros
        if micros < best.micros * (1 - MIN_GAIN):
            best = Found(configs, micros)
    return best


def _fastest(chains: Iterable[Configs], measure: Measure) -> Found:
    best: Found | None = None
    for configs in chains:
        found = Found(configs, measure(configs))
        if best is None or found.micros < best.micros * (1 - MIN_GAIN) or math.isinf(best.micros):
            best = found
    if best is None:
        raise ValueError("no chain to measure")
    return best


def _with_overlap(configs: Configs, way: Overlap) -> Configs:
    return {slot: _overlapping(config, way) for slot, config in configs.items()}


def _overlapping(config: KernelConfig, way: Overlap) -> KernelConfig:
    """Let a configuration overlap in a way; the library knows no `late`."""
    is_late = config.kernel == "library" and way == "late"
    return replace(config, overlap="early" if is_late else way)

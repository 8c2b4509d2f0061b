"""Finds configurations under which a chain of layers is fast, by measuring the chain as a whole.

A kernel alone tells too little: it overlaps with its neighbours, and finds the caches as they leave them.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Final, NamedTuple

from plugins.quant.dense.candidates import overlaps
from plugins.quant.dense.operation import FOR_ANY_TOKENS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from plugins.quant.dense.operation import KernelConfig, Overlap

    Configs = Mapping[str, KernelConfig]
    """By slot."""
    Measure = Callable[[Configs], float]
    """µs of the chain; infinite if it cannot run."""
    Prepare = Callable[[Iterable[tuple[str, KernelConfig]]], None]
    """Hears of (slot, configuration) before they are measured, to compile them side by side."""

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
    prepare: Prepare,
    is_over: Callable[[], bool],
) -> Found:
    """Improve one slot after the other, twice: first the kernel, then how it overlaps.

    :param chosen: to begin with, in the overlap that is best for all slots together.
    :param candidates: by slot, in the order in which slots are tried.
    :param is_over: whether to stop; what was best until then is returned.
    """
    starts = [chosen, *(_with_overlap(chosen, way) for way in ("", "late", "early"))]
    prepare(job for start in starts for job in start.items())
    best = _fastest(starts, measure)
    first = {
        slot: [_overlapping(config, best.configs[slot].overlap) for config in configs]
        for slot, configs in candidates.items()
    }
    best, seen = _improve(best, first, measure, prepare, is_over)
    second = {slot: _finalists(best.configs[slot], seen[slot]) for slot in candidates}
    best, _ = _improve(best, second, measure, prepare, is_over)
    return best


def _finalists(current: KernelConfig, seen: Mapping[KernelConfig, float]) -> list[KernelConfig]:
    """Choose the best few of a slot, in each of their overlaps."""
    ranked = sorted(seen, key=seen.__getitem__)[:NUM_FINALISTS]
    chosen = dict.fromkeys([current, *ranked])
    return [variant for config in chosen for variant in (config, *overlaps(config))]


def _improve(
    best: Found,
    options: Mapping[str, Sequence[KernelConfig]],
    measure: Measure,
    prepare: Prepare,
    is_over: Callable[[], bool],
) -> tuple[Found, dict[str, dict[KernelConfig, float]]]:
    """Try the options of each slot among what the other slots have by then.

    :return: the best chain, and the µs with each option, by slot.
    """
    seen: dict[str, dict[KernelConfig, float]] = {slot: {} for slot in options}
    if not is_over():
        prepare((slot, config) for slot, configs in options.items() for config in configs)
    for slot, configs in options.items():
        base = best.configs
        seen[slot][base[slot]] = best.micros
        for config in dict.fromkeys(configs):
            if config == base[slot]:
                continue
            if is_over():
                return best, seen
            found = Found({**base, slot: config}, measure({**base, slot: config}))
            seen[slot][config] = found.micros
            if found.micros < best.micros * (1 - MIN_GAIN):
                best = found
    return best, seen


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
    """Let a configuration overlap in a way; kernels for any number of tokens know no `late`."""
    is_late = config.kernel in FOR_ANY_TOKENS and way == "late"
    return replace(config, overlap="early" if is_late else way)

"""An attention backend around another one, with a clock beside it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from core.interfaces import SupportsQuantizedKV

if TYPE_CHECKING:
    from collections.abc import Callable

    from core.batch import StepBatch
    from core.interfaces import AttentionBackend, AttentionSpec, KVCacheSpec


@dataclass(slots=True)
class Meter:
    """What one kind of layer has cost so far."""

    num_calls: int = 0
    num_tokens: int = 0
    """Queries, over all layers of the kind."""
    seconds: float = 0.0


class TimedAttention:
    """Fulfils `core.interfaces.AttentionBackend` by passing everything on.

    :param inner: does the work.
    :param clock: seconds.
    """

    def __init__(self, inner: AttentionBackend, clock: Callable[[], float] = time.perf_counter) -> None:
        self._inner = inner
        self._clock = clock
        self.meters: dict[str, Meter] = {}
        """By kind of layer: `full`, or `window 4096`."""

    def allocate_cache(self, spec: KVCacheSpec, /) -> None:
        """Allocate, or allocate anew, the pages of all layers."""
        self._inner.allocate_cache(spec)

    def cache_bytes_per_block(self, spec: KVCacheSpec, /) -> int:
        """Bytes of one block over all layers."""
        return self._inner.cache_bytes_per_block(spec)

    def set_kv_scales(self, k_scales: torch.Tensor, v_scales: torch.Tensor, /) -> None:
        """Pass scales on; a backend that cannot take them refuses a cache that needs them."""
        if isinstance(self._inner, SupportsQuantizedKV):
            self._inner.set_kv_scales(k_scales, v_scales)

    def prepare(self, batch: StepBatch, /) -> Any:
        """Compute what all layers of a step share: what the wrapped backend wants to be given."""
        return self._inner.prepare(batch)

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        spec: AttentionSpec,
        meta: Any,
        /,
    ) -> torch.Tensor:
        """Attend, and note how long that took; a call that raises is not counted."""
        begin = self._now(q.device)
        out = self._inner.forward(q, k, v, spec, meta)
        seconds = self._now(q.device) - begin
        meter = self.meters.setdefault(_kind(spec), Meter())
        meter.num_calls += 1
        meter.num_tokens += len(q)
        meter.seconds += seconds
        return out

    def _now(self, device: torch.device) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return self._clock()


def _kind(spec: AttentionSpec) -> str:
    return "full" if spec.window is None else f"window {spec.window}"

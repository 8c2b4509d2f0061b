"""What a GPU can do at best, measured on the spot: bytes per second, and bf16 multiplications."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Callable

NUM_BYTES: Final = 2**31
"""Of the buffer that is read: far more than any cache holds."""
MATRIX_SIZE: Final = 8192
NUM_RUNS: Final = 10


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Rates of one device."""

    name: str
    read_bytes_per_second: float
    copy_bytes_per_second: float
    """Bytes read and bytes written together."""
    flops: float
    """Of a large bf16 matrix product, per second."""

    @property
    def bytes_per_second(self) -> float:
        """The better of reading and copying."""
        return max(self.read_bytes_per_second, self.copy_bytes_per_second)


def measure_ceilings(device: torch.device) -> Ceilings:
    """Measure a CUDA device; needs 4 GiB of its memory, and gives them back."""
    with torch.cuda.device(device):
        read, copy = _measure_bytes(device)
        flops = _measure_flops(device)
        torch.cuda.empty_cache()
    return Ceilings(torch.cuda.get_device_name(device), read, copy, flops)


def _measure_bytes(device: torch.device) -> tuple[float, float]:
    """Bytes per second of reading and of copying."""
    source = torch.ones(NUM_BYTES // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    read = NUM_BYTES / _median_seconds(source.sum)
    return read, 2 * NUM_BYTES / _median_seconds(lambda: target.copy_(source))


def _measure_flops(device: torch.device) -> float:
    # Random values: zeros draw less power, and the clock stays higher than it does with real ones.
    left, right = (
        torch.randn(MATRIX_SIZE, MATRIX_SIZE, dtype=torch.bfloat16, device=device) for _ in range(2)
    )
    product = torch.empty_like(left)
    return 2 * MATRIX_SIZE**3 / _median_seconds(lambda: torch.mm(left, right, out=product))


def _median_seconds(run: Callable[[], object]) -> float:
    """Time one call; the median, since the clock of the device moves."""
    for _ in range(3):
        run()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(NUM_RUNS + 1)]
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    torch.cuda.synchronize()
    times = [a.elapsed_time(b) for a, b in itertools.pairwise(events)]
    return float(np.median(times)) / 1e3

"""Watts and clock of a GPU while something runs: one at the limit of its power lowers its clock."""

from __future__ import annotations

import threading
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, Final, Self

import torch

INTERVAL_SECONDS: Final = 0.01
MILLI: Final = 1e-3
"""NVML counts milliwatts."""


@dataclass(frozen=True, slots=True)
class Power:
    """Medians over some time, and what the card allows."""

    watts: float
    limit_watts: float
    clock_mhz: float
    """Of the multiprocessors."""
    max_clock_mhz: float

    def __str__(self) -> str:
        """Say it in half a line."""
        return (
            f"{self.watts:.0f} W of {self.limit_watts:.0f}, "
            f"multiprocessors at {self.clock_mhz:.0f} MHz of {self.max_clock_mhz:.0f}"
        )

    def to_dict(self) -> dict[str, float]:
        """Plain data for a file of results."""
        return asdict(self)


class PowerMeter:
    """Reads watts and clock, again and again, in a thread of its own while it is open.

    Without the package `nvidia-ml-py`, or where the driver does not tell, it reads nothing.

    :param device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._is_over = threading.Event()
        self._samples: list[tuple[float, float]] = []
        self._limits = 0.0, 0.0
        self._thread = threading.Thread(target=self._read, name="power-meter", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    @property
    def power(self) -> Power | None:
        """What has been read; `None` if that is nothing."""
        if not self._samples:
            return None
        watts, clocks = zip(*self._samples, strict=True)
        limit, max_clock = self._limits
        return Power(median(watts), limit, median(clocks), max_clock)

    def _read(self) -> None:
        try:
            import pynvml  # noqa: PLC0415  an extra
        except ImportError:
            return
        try:
            pynvml.nvmlInit()
            self._read_until_over(pynvml)
        except pynvml.NVMLError:
            self._samples.clear()

    def _read_until_over(self, nvml: Any) -> None:
        uuid = torch.cuda.get_device_properties(self._device).uuid
        handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        self._limits = (
            nvml.nvmlDeviceGetEnforcedPowerLimit(handle) * MILLI,
            nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_SM),
        )
        while not self._is_over.wait(INTERVAL_SECONDS):
            clock = nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)
            self._samples.append((_read_watts(nvml, handle), clock))


def _read_watts(nvml: Any, handle: Any) -> float:
    """Return what is drawn now; on cards that do not tell, the mean of the last second."""
    [field] = nvml.nvmlDeviceGetFieldValues(handle, [nvml.NVML_FI_DEV_POWER_INSTANT])
    if field.nvmlReturn == nvml.NVML_SUCCESS:
        return float(field.value.uiVal) * MILLI
    return float(nvml.nvmlDeviceGetPowerUsage(handle)) * MILLI

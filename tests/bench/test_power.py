"""Watts and clocks beside a step's time, read from a stand-in for the driver."""

from __future__ import annotations

import sys
import time
from types import ModuleType, SimpleNamespace

import pytest
import torch

from core.bench.power import Power, PowerMeter

UUID = "11111111-2222-3333-4444-555555555555"


class Driver(ModuleType):
    """As much of `pynvml` as a meter needs; watts and clocks go up from reading to reading."""

    NVML_CLOCK_SM = 1
    NVML_SUCCESS = 0
    NVML_FI_DEV_POWER_INSTANT = 186

    class NVMLError(Exception):
        pass

    def __init__(self, *, has_instant=True, is_there=True):
        super().__init__("pynvml")
        self.has_instant = has_instant
        self.is_there = is_there
        self.num_readings = 0

    def nvmlInit(self):  # noqa: N802  as the driver has it
        if not self.is_there:
            raise self.NVMLError

    def nvmlDeviceGetHandleByUUID(self, uuid):  # noqa: N802
        assert uuid == f"GPU-{UUID}"
        return "handle"

    def nvmlDeviceGetEnforcedPowerLimit(self, _handle):  # noqa: N802
        return 700_000

    def nvmlDeviceGetMaxClockInfo(self, _handle, _kind):  # noqa: N802
        return 1980

    def nvmlDeviceGetClockInfo(self, _handle, kind):  # noqa: N802
        assert kind == self.NVML_CLOCK_SM
        self.num_readings += 1
        return 1400 + 100 * min(self.num_readings, 3)

    def nvmlDeviceGetFieldValues(self, _handle, fields):  # noqa: N802
        assert fields == [self.NVML_FI_DEV_POWER_INSTANT]
        watts = SimpleNamespace(uiVal=690_000)
        return [SimpleNamespace(nvmlReturn=0 if self.has_instant else 3, value=watts)]

    def nvmlDeviceGetPowerUsage(self, _handle):  # noqa: N802
        return 555_000


def read(monkeypatch, driver):
    monkeypatch.setitem(sys.modules, "pynvml", driver)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid=UUID))
    with PowerMeter(torch.device("cuda")) as meter:
        deadline = time.monotonic() + 10
        while driver is not None and driver.num_readings < 6 and driver.is_there:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    return meter.power


def test_medians_of_what_the_driver_tells(monkeypatch):
    power = read(monkeypatch, Driver())
    assert power == Power(690.0, 700.0, 1700.0, 1980.0)
    assert str(power) == "690 W of 700, multiprocessors at 1700 MHz of 1980"
    assert power.to_dict()["limit_watts"] == 700.0


def test_cards_that_tell_the_mean_of_a_second_only(monkeypatch):
    assert read(monkeypatch, Driver(has_instant=False)).watts == 555.0


@pytest.mark.parametrize("driver", [None, Driver(is_there=False)], ids=["no package", "no driver"])
def test_nothing_is_read_where_nobody_tells(monkeypatch, driver):
    assert read(monkeypatch, driver) is None

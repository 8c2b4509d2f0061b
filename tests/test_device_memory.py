from __future__ import annotations

import pytest
import torch

from core.device_memory import explain_out_of_memory
from core.errors import CapacityError


def test_running_out_of_memory_names_the_numbers_and_the_knobs(monkeypatch):
    gib = 2**30
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (1 * gib, 80 * gib))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _device: 70 * gib)
    with (
        pytest.raises(CapacityError) as caught,
        explain_out_of_memory(torch.device("cuda", 1), "loading the weights", "--knob"),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory")
    assert str(caught.value) == (
        "loading the weights: cuda:1 is out of memory (80.00 GiB in all, 70.00 GiB taken by this "
        "engine, 9.00 GiB by CUDA and other processes, 1.00 GiB free); what helps: --knob"
    )
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)


def test_other_devices_and_other_errors_pass(monkeypatch):
    with (
        pytest.raises(CapacityError, match="step 3: cpu is out of memory; what helps: less"),
        explain_out_of_memory(torch.device("cpu"), "step 3", "less"),
    ):
        raise torch.OutOfMemoryError
    with (
        pytest.raises(ValueError, match="mine"),
        explain_out_of_memory(torch.device("cpu"), "step 3", "less"),
    ):
        raise ValueError("mine")

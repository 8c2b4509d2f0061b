"""Errors of a device that has run out of memory, with numbers and knobs."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from core.errors import CapacityError

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def explain_out_of_memory(device: torch.device, doing: str, knobs: str) -> Iterator[None]:
    """Turn torch's error into one that says what there is and what helps.

    :param doing: what needs the memory.
    :param knobs: settings that lower the need.
    :raises CapacityError: the device had no memory left.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise CapacityError(_describe(device, doing, knobs)) from error


def _describe(device: torch.device, doing: str, knobs: str) -> str:
    if device.type != "cuda":
        return f"{doing}: {device} is out of memory; what helps: {knobs}"
    free, total = torch.cuda.mem_get_info(device)
    ours = torch.cuda.memory_reserved(device)
    others = total - free - ours
    sizes = (
        f"{_gib(total)} in all, {_gib(ours)} taken by this engine, {_gib(others)} by CUDA and other "
        f"processes, {_gib(free)} free"
    )
    return f"{doing}: {device} is out of memory ({sizes}); what helps: {knobs}"


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"

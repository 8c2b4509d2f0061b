"""Runs a function in a thread, for so long and no longer."""

from __future__ import annotations

import ctypes
import threading
from typing import TYPE_CHECKING, Generic, TypeVar

import anyio
from anyio import to_thread

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")


class BudgetExceededError(Exception):
    """The function took longer than it was allowed to."""


class _Interrupt(BaseException):
    """Raised inside a function whose time is up; no `except Exception` of its own can keep it going."""


async def run_with_budget(
    function: Callable[[], T], seconds: float, limiter: anyio.CapacityLimiter | None = None
) -> T:
    """Run a function off the event loop and interrupt it when its time is up.

    HAZARD: only bytecode can be interrupted; one long call into C runs to its end, in its thread.

    :param limiter: how many may run side by side; the time starts when it is this one's turn.
    :raises BudgetExceededError: the time ran out.
    """
    call = _Call(function)
    async with limiter or anyio.CapacityLimiter(1):
        with anyio.move_on_after(seconds):
            return await to_thread.run_sync(call.run, abandon_on_cancel=True)
    call.interrupt()
    raise BudgetExceededError(f"took longer than {seconds:g} s")


class _Call(Generic[T]):
    """One run of a function, in whatever thread it gets."""

    def __init__(self, function: Callable[[], T]) -> None:
        self._function = function
        self._lock = threading.Lock()
        self._thread_id: int | None = None

    def run(self) -> T:
        try:
            with self._lock:
                self._thread_id = threading.get_ident()
            return self._function()
        finally:
            with self._lock:  # from here on the thread may belong to somebody else
                self._thread_id = None

    def interrupt(self) -> None:
        with self._lock:
            if self._thread_id is not None:
                thread_id, error = ctypes.c_ulong(self._thread_id), ctypes.py_object(_Interrupt)
                ctypes.pythonapi.PyThreadState_SetAsyncExc(thread_id, error)

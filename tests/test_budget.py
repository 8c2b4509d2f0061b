"""A budget of time really ends what it bounds, and leaves the rest alone."""

from __future__ import annotations

import contextlib
import threading
import time

import anyio
import pytest

from core.budget import BudgetExceededError, run_with_budget

pytestmark = pytest.mark.anyio


async def test_what_is_quick_enough_is_returned():
    assert await run_with_budget(lambda: 6 * 7, 5.0) == 42


async def test_what_it_raises_is_raised():
    with pytest.raises(ZeroDivisionError):
        await run_with_budget(lambda: 1 // 0, 5.0)


async def test_an_endless_loop_is_ended_and_its_thread_with_it():
    ended = threading.Event()

    def spin():
        try:
            while True:
                with contextlib.suppress(Exception):  # must not keep it alive
                    sum(range(100))
        finally:
            ended.set()

    begin = time.monotonic()
    with pytest.raises(BudgetExceededError, match=r"longer than 0\.05 s"):
        await run_with_budget(spin, 0.05)
    assert time.monotonic() - begin < 2
    assert ended.wait(5), "the thread spins on"


async def test_the_loop_goes_on_meanwhile():
    ticks = 0

    async def tick():
        nonlocal ticks
        while True:
            await anyio.sleep(0.005)
            ticks += 1

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(tick)
        with pytest.raises(BudgetExceededError):
            await run_with_budget(lambda: [sum(range(50)) for _ in iter(int, 1)], 0.2)
        tasks.cancel_scope.cancel()
    assert ticks >= 3


async def test_a_thread_that_is_used_again_is_not_hit():
    for _ in range(20):
        with pytest.raises(BudgetExceededError):
            await run_with_budget(lambda: time.sleep(0.02), 0.001)
        assert await run_with_budget(lambda: "fine", 5.0) == "fine"


async def test_the_limiter_bounds_how_many_run_side_by_side():
    limiter, running, most = anyio.CapacityLimiter(2), 0, 0
    lock = threading.Lock()

    def work():
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.01)
        with lock:
            running -= 1

    async with anyio.create_task_group() as tasks:
        for _ in range(8):
            tasks.start_soon(run_with_budget, work, 5.0, limiter)
    assert most == 2

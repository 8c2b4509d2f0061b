"""Running things side by side, with plain exceptions instead of groups of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from starlette.types import Receive

    Job = Callable[[], Awaitable[None]]


async def run_all(*jobs: Job) -> None:
    """Run all jobs to their end; the first that fails cancels the others and is raised as it is."""
    if len(jobs) == 1:
        await jobs[0]()
        return
    await _run(jobs, is_first_enough=False)


async def run_until_first(*jobs: Job) -> None:
    """Run jobs until the first one ends; what it raises is raised as it is."""
    await _run(jobs, is_first_enough=True)


async def _run(jobs: tuple[Job, ...], *, is_first_enough: bool) -> None:
    failures: list[Exception] = []
    async with anyio.create_task_group() as group:

        async def run(job: Job) -> None:
            try:
                await job()
            except Exception as error:  # noqa: BLE001  raised again outside of the group
                failures.append(error)
            if failures or is_first_enough:
                group.cancel_scope.cancel()

        for job in jobs:
            group.start_soon(run, job)
    if failures:
        raise failures[0]


async def wait_for_disconnect(receive: Receive) -> None:
    """Return when the client has left.  Call it once the body has been read."""
    while (await receive())["type"] != "http.disconnect":
        pass

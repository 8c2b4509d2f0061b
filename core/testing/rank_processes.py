"""Real ranks for tests: processes that are joined by torch.distributed, run one function and end."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
import traceback
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import distributed

from core.ranks.network import interface_towards

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection
    from multiprocessing.context import ForkServerContext, SpawnContext
    from multiprocessing.process import BaseProcess

TIMEOUT: Final = 100.0
"""Seconds that all ranks together get, starting included."""
COLLECTIVE_TIMEOUT: Final = 30.0
"""Seconds that a rank waits for others."""
_GRACE: Final = 2.0  # seconds that others get to tell what they saw of a rank's failure


class RankFailedError(AssertionError):
    """A rank raised, died or did not answer; says which, and what it told."""


def run_ranks(
    count: int,
    function: Callable[..., Any],
    *arguments: Any,
    backend: str = "gloo",
    timeout: float = TIMEOUT,
) -> list[Any]:
    """Run a function on several ranks of one machine.

    :param function: called as `function(rank, *arguments)` once all ranks have joined; a module-level
        function of a module that can be imported, since each rank is a process without this one's memory.
    :param arguments: can be pickled.
    :param backend: of torch.distributed.
    :param timeout: seconds.
    :return: what it returned, by rank.
    :raises RankFailedError: a rank raised, died or took too long.
    """
    context = _make_context()
    processes: list[BaseProcess] = []
    answers: list[Connection] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for rank in range(count):
                answer, sender = context.Pipe(duplex=False)
                work = {
                    "rank": rank,
                    "count": count,
                    "store": str(Path(folder, "store")),
                    "backend": backend,
                    "function": function,
                    "arguments": arguments,
                    "sender": sender,
                }
                processes.append(context.Process(target=_be_rank, kwargs=work, daemon=True))
                processes[-1].start()
                answers.append(answer)
                sender.close()
            return _gather(answers, timeout)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _make_context() -> ForkServerContext | SpawnContext:
    """Choose how processes start: where it can be, forked from one that has imported torch already."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed"])
    return context


def _gather(answers: list[Connection], timeout: float) -> list[Any]:
    """Wait for an answer of each rank; after a failure not for long any more."""
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    deadline = time.monotonic() + timeout
    while waiting := [rank for rank in range(len(answers)) if rank not in results | failures]:
        ready = wait([answers[rank] for rank in waiting], max(0.0, deadline - time.monotonic()))
        if not ready:
            failures |= dict.fromkeys(waiting, "gave no answer in time")
        for rank in waiting:
            if answers[rank] in ready:
                _take_answer(answers[rank], rank, results, failures)
        if failures:
            deadline = min(deadline, time.monotonic() + _GRACE)
    if failures:
        told = "\n".join(f"rank {rank} of {len(answers)} {text}" for rank, text in failures.items())
        raise RankFailedError(told)
    return [results[rank] for rank in range(len(answers))]


def _take_answer(
    answer: Connection, rank: int, results: dict[int, Any], failures: dict[int, str]
) -> None:
    try:
        error, result = answer.recv()
    except EOFError:
        failures[rank] = "died"
        return
    if error:
        failures[rank] = f"raised\n{error}"
    else:
        results[rank] = result


def _be_rank(
    *,
    rank: int,
    count: int,
    store: str,
    backend: str,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    sender: Connection,
) -> None:
    """Join the others, work, and send (error, result)."""
    torch.set_num_threads(1)
    interface = interface_towards("127.0.0.1")
    if interface:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    try:
        distributed.init_process_group(
            backend,
            store=distributed.FileStore(store, count),  # type: ignore[attr-defined]
            rank=rank,
            world_size=count,
            timeout=timedelta(seconds=COLLECTIVE_TIMEOUT),
        )
        sender.send(("", function(rank, *arguments)))
    except Exception:  # noqa: BLE001  raised where the ranks were started
        sender.send((traceback.format_exc(), None))
    sender.close()
    # Others may still talk to this rank; whoever started it ends it.
    time.sleep(TIMEOUT)

"""Ranks as child processes of this one."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Final

import structlog

from core.errors import EngineStartError
from core.log import QUIET_TORCH
from core.ranks.watch import STACK_WAIT
from core.ranks.worker import STACK_SIGNAL

if TYPE_CHECKING:
    from collections.abc import Sequence

    from core.ranks.watch import RankHandle

log = structlog.get_logger(__name__)

LOOPBACK: Final = "127.0.0.1"
KILL_SECONDS: Final = 10.0
"""A killed process is gone by then, unless a driver holds it."""


class Worker:
    """The process of a rank, as its parent sees it.

    :param process: `python -m core.ranks.worker`.
    :param stacks: the file that it writes the stacks of its threads to, when it crashes or is told to.
    """

    def __init__(self, process: subprocess.Popen[bytes], stacks: BinaryIO) -> None:
        self.process = process
        self._stacks = stacks

    def dump_stack(self) -> str:
        """Let the process write the stacks of its threads; one that has crashed has done so."""
        if self.process.poll() is None:
            if is_stopped(self.process.pid):
                return "the process is stopped (SIGSTOP)"
            self.process.send_signal(STACK_SIGNAL)
            time.sleep(STACK_WAIT)
        self._stacks.seek(0)
        return self._stacks.read().decode(errors="replace")

    def kill(self) -> None:
        """End it at once."""
        self.process.kill()
        try:
            self.process.wait(KILL_SECONDS)
        except subprocess.TimeoutExpired:
            log.exception("a killed rank does not end; its device may hang", pid=self.process.pid)
        self._stacks.close()


def start_worker(sock: socket.socket) -> Worker:
    """Start the process of one rank and give it its end of the connection, which is closed here."""
    stacks = tempfile.TemporaryFile(prefix="cythera-stacks-")  # noqa: SIM115  lives with the process
    fds = (sock.fileno(), stacks.fileno())
    try:
        process = subprocess.Popen(  # noqa: S603  our own interpreter and module
            [sys.executable, "-m", "core.ranks.worker", *map(str, fds)],
            pass_fds=fds,
            stdin=subprocess.DEVNULL,
            env={**QUIET_TORCH, **os.environ},
        )
    except OSError as error:
        stacks.close()
        raise EngineStartError(f"the process of a rank cannot be started: {error}") from error
    finally:
        sock.close()
    return Worker(process, stacks)


class LocalRank:
    """A rank that is a child of this process; fulfils `core.ranks.watch.RankHandle`."""

    def __init__(self, local_rank: int, local_world_size: int) -> None:
        self.sock, theirs = socket.socketpair()
        self.local_rank = local_rank
        self.local_world_size = local_world_size
        try:
            self._worker = start_worker(theirs)
        except BaseException:
            self.sock.close()
            raise
        self.name = f"pid {self._worker.process.pid}"

    def ended(self, timeout: float) -> str | None:
        """Say how the process ended; `None` if it runs."""
        try:
            return describe_exit(self._worker.process.wait(timeout))
        except subprocess.TimeoutExpired:
            return None

    def dump_stack(self) -> str:
        """Get the stacks of its threads."""
        return self._worker.dump_stack()

    def kill(self) -> None:
        """End it at once."""
        self._worker.kill()


class ProcessLauncher:
    """Starts every rank as a child of this process; fulfils `core.ranks.executor.Launcher`."""

    store_host = LOOPBACK

    def __init__(self, world_size: int) -> None:
        self._world_size = world_size

    def start(self) -> Sequence[LocalRank]:
        """Start all ranks."""
        ranks: list[LocalRank] = []
        try:
            for rank in range(self._world_size):
                ranks.append(LocalRank(rank, self._world_size))  # noqa: PERF401  kept if the next fails
        except BaseException:
            end(ranks)
            raise
        return ranks

    def close(self) -> None:
        """Do nothing: nobody joins from elsewhere."""


def end(ranks: Sequence[RankHandle]) -> None:
    """End ranks of a start that has failed."""
    for rank in ranks:
        rank.kill()
        rank.sock.close()


def describe_exit(code: int) -> str:
    """Say how a process ended."""
    if code < 0:
        return f"died of signal {-code} ({signal.strsignal(-code)})"
    return f"ended with exit code {code}"


def is_stopped(pid: int) -> bool:
    """Whether a process of this machine was stopped by a signal or a debugger."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] in ("T", "t")

"""Ranks as child processes of this one."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from core.ranks.watch import STACK_WAIT
from core.ranks.worker import STACK_SIGNAL

if TYPE_CHECKING:
    from collections.abc import Sequence

    from core.assemble import Plan

LOOPBACK: Final = "127.0.0.1"


class LocalRank:
    """A rank that is a child of this process; fulfils `core.ranks.watch.RankHandle`.

    :param sock: this end of the connection to it.
    :param child_sock: its end, which this process closes.
    """

    def __init__(
        self,
        sock: socket.socket,
        child_sock: socket.socket,
        *,
        local_rank: int,
        local_world_size: int,
    ) -> None:
        self.sock = sock
        self.local_rank = local_rank
        self.local_world_size = local_world_size
        self._process, self._dump = start_worker(child_sock)
        self.name = f"pid {self._process.pid}"

    def ended(self, timeout: float) -> str | None:
        """Say how the process ended; `None` if it runs."""
        try:
            return describe_exit(self._process.wait(timeout))
        except subprocess.TimeoutExpired:
            return None

    def dump_stack(self) -> str:
        """Let the process write the stacks of its threads, or say that it is stopped."""
        if is_stopped(self._process.pid):
            return "the process is stopped (SIGSTOP)"
        self._process.send_signal(STACK_SIGNAL)
        time.sleep(STACK_WAIT)
        self._dump.seek(0)
        return self._dump.read().decode(errors="replace")

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()
        self._process.wait()
        self._dump.close()


class ProcessLauncher:
    """Starts every rank as a child of this process; fulfils `core.ranks.executor.Launcher`."""

    store_host = LOOPBACK

    def __init__(self, world_size: int) -> None:
        self._world_size = world_size

    def start(self) -> Sequence[LocalRank]:
        """Start all ranks."""
        ranks = []
        for rank in range(self._world_size):
            ours, theirs = socket.socketpair()
            ranks.append(LocalRank(ours, theirs, local_rank=rank, local_world_size=self._world_size))
        return ranks

    def close(self) -> None:
        """Do nothing: nobody joins from elsewhere."""


def make_process_launcher(plan: Plan) -> ProcessLauncher:
    """Start ranks as children of the engine."""
    return ProcessLauncher(plan.world_size)


def start_worker(
    sock: socket.socket,
) -> tuple[subprocess.Popen[bytes], tempfile._TemporaryFileWrapper[bytes]]:
    """Start the process of one rank and give it its end of the connection.

    :return: the process, and the file that it writes its stacks to when it gets `STACK_SIGNAL`.
    """
    dump = tempfile.NamedTemporaryFile(prefix="cythera-stack-")  # noqa: SIM115  lives with the rank
    fds = (sock.fileno(), dump.fileno())
    process = subprocess.Popen(  # noqa: S603  our own interpreter and module
        [sys.executable, "-m", "core.ranks.worker", *map(str, fds)],
        pass_fds=fds,
        stdin=subprocess.DEVNULL,
    )
    sock.close()
    return process, dump


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

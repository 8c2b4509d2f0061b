"""The half of one rank: `python -m core.ranks.worker FD [DUMP_FD]`.

The main thread loads and launches steps, a second one waits for their results, a third one reads
messages and answers at once how far the others are, so that a rank that hangs can still say where.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import queue
import signal
import socket
import sys
import threading
import time
import traceback
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final

from core.config import restore_config
from core.errors import CytheraError, PlanError
from core.link import READ_BYTES, Framer, encode
from core.log import configure_logging
from core.ranks.messages import (
    Allocate,
    Begin,
    Close,
    Done,
    FromRank,
    Joined,
    Load,
    Measure,
    Ping,
    Pong,
    Progress,
    Refused,
    Run,
    StepBroken,
    StepDone,
    ToRank,
)
from core.ranks.network import interface_towards

if TYPE_CHECKING:
    from collections.abc import Sequence

    from core.interfaces import Executor
    from core.plan import Plan

EXIT_GRACE: Final = 5.0
"""Seconds that a rank gets to end by itself."""
REPORT_INTERVAL: Final = 0.2
STACK_SIGNAL: Final = signal.SIGUSR1
"""Makes a rank write the stacks of its threads, even while it holds the interpreter's lock."""


class Worker:
    """One rank.

    :param sock: joined to the engine.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._send_lock = threading.Lock()
        self._inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._launched: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._main = threading.get_ident()
        self._executor: Executor | None = None
        self._is_sampling = False
        self._step = -1
        self._pending_lock = threading.Lock()
        self._num_pending = 0  # messages taken and not yet worked off, and steps in flight
        self._since = time.monotonic()

    def run(self) -> int:
        """Work until the engine says so or is gone; return the exit code."""
        threading.Thread(target=self._read, name="reader", daemon=True).start()
        begin = self._inbox.get()
        if not isinstance(begin, Begin):
            return 0
        try:
            self._begin(begin)
            self._finish_message()
            threading.Thread(target=self._collect, name="collector", daemon=True).start()
            while not isinstance(message := self._inbox.get(), Close):
                self._work(message)
        except Exception as error:  # noqa: BLE001  sent to the engine, which tells the user
            self._send(_refuse(error))
            return error.exit_code if isinstance(error, CytheraError) else 1
        if self._executor is not None:
            self._executor.close()
        return 0

    # --- the main thread ---

    def _begin(self, begin: Begin) -> None:
        config = restore_config(begin.config, begin.origins)
        configure_logging(config.log_level, config.log_format)
        from core.assemble import (  # noqa: PLC0415  imports torch
            make_parts,
            make_rank_executor,
            resolve,
            start_plugins,
        )

        assembly = resolve(config, start_plugins(config, begin.defaults))
        plan = assembly.plan
        if plan.digest() != begin.digest:
            objection = (
                f"rank {begin.rank} came to another plan than the engine: the versions of cythera, of its "
                f"plugins or of the checkpoint differ between the machines"
            )
            raise PlanError([objection])
        device = join_world(begin, plan)
        assembly.host.worker_started(begin.rank, device)
        parts = make_parts(plan, begin.rank, device)
        self._executor = make_rank_executor(assembly, parts)
        self._is_sampling = begin.rank == plan.sampling_rank
        self._send(Joined(device))

    def _work(self, message: Load | Measure | Allocate | Run) -> None:
        executor = self._executor
        if executor is None:
            return
        match message:
            case Run():
                executor.submit(message.plan)
                self._launched.put(message.plan.step)
                return
            case Load():
                executor.load(self._make_report())
                self._send(Done())
            case Measure():
                self._send(Done(executor.kv_capacity()))
            case Allocate():
                executor.allocate(message.num_blocks)
                self._send(Done())
        self._finish_message()

    def _make_report(self) -> Any:
        last = 0.0

        def report(done: int, total: int) -> None:
            nonlocal last
            if time.monotonic() - last >= REPORT_INTERVAL or done == total:
                last = time.monotonic()
                self._send(Progress(done, total))

        return report

    # --- the thread that waits for results ---

    def _collect(self) -> None:
        while True:
            step = self._launched.get()
            executor = self._executor
            if executor is None:
                return
            try:
                result = executor.collect()
            except Exception as error:  # noqa: BLE001  sent to the engine
                text = f"{type(error).__name__}: {error}"
                self._send(StepBroken(step, text, "".join(traceback.format_exception(error))))
            else:
                if self._is_sampling:
                    self._send(StepDone(result))
            self._finish_message()

    # --- the thread that reads ---

    def _read(self) -> None:
        framer = Framer(ToRank)
        with contextlib.suppress(CytheraError):  # what it sends cannot be read: as good as gone
            while data := self._receive():
                for message in framer.feed(data):
                    self._take(message)
        os._exit(1)  # the engine is gone, and a collective may wait for ever

    def _receive(self) -> bytes:
        try:
            return self._sock.recv(READ_BYTES)
        except OSError:
            return b""

    def _take(self, message: Any) -> None:
        if isinstance(message, Ping):
            self._answer(message)
            return
        if isinstance(message, Run):
            self._step = message.plan.step
        with self._pending_lock:
            if self._num_pending == 0:
                self._since = time.monotonic()
            self._num_pending += 1
        self._inbox.put(message)
        if isinstance(message, Close):
            timer = threading.Timer(EXIT_GRACE, os._exit, (1,))
            timer.daemon = True
            timer.start()

    def _finish_message(self) -> None:
        with self._pending_lock:
            self._since = time.monotonic()
            self._num_pending -= 1

    def _answer(self, ping: Ping) -> None:
        stack = ""
        if ping.want_stack:
            frame = sys._current_frames().get(self._main)  # noqa: SLF001  the documented way
            stack = "".join(traceback.format_stack(frame)) if frame else ""
        busy = self._num_pending > 0
        self._send(Pong(self._step, busy, time.monotonic() - self._since, stack))

    def _send(self, message: FromRank) -> None:
        try:
            with self._send_lock:
                self._sock.sendall(encode(message))
        except OSError:  # the reader notices that the engine is gone
            return


def join_world(begin: Begin, plan: Plan) -> str:
    """Choose this rank's device and join torch.distributed; return the device."""
    import torch  # noqa: PLC0415  slow; the engine's first message is read before
    from torch import distributed  # noqa: PLC0415
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # noqa: PLC0415

    on_gpu = plan.device.startswith("cuda")
    device = f"cuda:{begin.local_rank}" if on_gpu else plan.device
    if on_gpu:
        torch.cuda.set_device(device)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // begin.local_world_size))
    timeout = timedelta(seconds=begin.timeout)
    interface = interface_towards(begin.store_host)
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        if interface:
            os.environ.setdefault(variable, interface)
    # For libraries and plugins that look there, as under torchrun.
    os.environ.update(
        RANK=str(begin.rank),
        LOCAL_RANK=str(begin.local_rank),
        WORLD_SIZE=str(begin.world_size),
        LOCAL_WORLD_SIZE=str(begin.local_world_size),
        MASTER_ADDR=begin.store_host,
        MASTER_PORT=str(begin.store_port),
    )
    store = TCPStore(begin.store_host, begin.store_port, is_master=False, timeout=timeout)
    distributed.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=store,
        rank=begin.rank,
        world_size=begin.world_size,
        timeout=timeout,
    )
    return device


def _refuse(error: Exception) -> Refused:
    if isinstance(error, CytheraError):  # says all that the user needs
        return Refused(str(error), error.exit_code, "")
    trace = "".join(traceback.format_exception(error))
    return Refused(f"{type(error).__name__}: {error}", 1, trace)


def main(argv: Sequence[str]) -> None:
    """Be the rank of the engine that holds the other end of socket `argv[0]`.

    :param argv: the socket, and the file that stacks are written to, as descriptors.
    """
    # The engine decides when to end: a terminal sends Ctrl-C to every process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if len(argv) > 1:
        stacks = int(argv[1])
        faulthandler.enable(file=stacks)
        faulthandler.register(STACK_SIGNAL, file=stacks, all_threads=True)
    code = Worker(socket.socket(fileno=int(argv[0]))).run()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # threads and process groups are in no state to be taken apart


if __name__ == "__main__":
    main(sys.argv[1:])

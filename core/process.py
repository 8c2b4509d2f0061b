"""Where an engine runs: in a process of its own, or in a thread of this one.

`EngineHost` is the engine's half and the same in both places.  `EngineProcess` and `EngineThread` are
its two links to the event loop that serves clients; they have the same methods.

The child is `python -m core.process FD`: nothing is forked and nothing is pickled, its settings are
the first message over the link.
"""

from __future__ import annotations

import contextlib
import gc
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, Protocol, cast

import anyio
from anyio import from_thread, to_thread
from anyio.lowlevel import current_token

from core.config import EngineConfig, restore_config
from core.errors import CytheraError
from core.link import (
    READ_BYTES,
    Failed,
    Framer,
    FromEngine,
    Ready,
    RelayBus,
    Start,
    Stop,
    ToEngine,
    Wanted,
    encode,
)
from core.log import QUIET_TORCH, configure_logging
from core.messages import Finish, Submit

if TYPE_CHECKING:
    from collections.abc import Sequence

    from core.assemble import Assembly
    from core.engine import EngineCore

Deliver = Callable[[list[FromEngine]], None]
EXIT_GRACE: Final = 10.0
"""Seconds that the child gets to end after its engine has stopped."""


class EngineLink(Protocol):
    """An engine as the event loop sees it."""

    def start(self, start: Start) -> None:
        """Begin to load, if the engine can do so by itself."""

    def attach(self, assembly: Assembly, types: Sequence[str]) -> None:
        """Tell what this side has resolved, and which events are wanted."""

    def send(self, message: ToEngine) -> None:
        """Send a message; never blocks."""

    async def run(self, deliver: Deliver) -> None:
        """Hand over messages until the engine has ended; the last one is `Failed` if it did not stop."""


def _gather(items: queue.SimpleQueue[Any]) -> tuple[list[Any], bool]:
    """Wait for an item and take what else there is; the other result is whether more will follow."""
    gathered = [items.get()]
    while not items.empty():
        gathered.append(items.get_nowait())
    present = [item for item in gathered if item is not None]
    return present, len(present) == len(gathered)


# --- the engine's half -----------------------------------------------------------------------------


class EngineHost:
    """Builds an engine, says how that goes, and runs it until it is told to stop.

    :param send: takes each message to the other side; called on the thread of `run`.
    :param owns_process: whether the process is there for this engine only.
    """

    def __init__(self, send: Callable[[FromEngine], None], *, owns_process: bool = False) -> None:
        self.engine: EngineCore | None = None
        self._owns_process = owns_process
        self._send = send
        self._wanted: queue.SimpleQueue[list[str]] = queue.SimpleQueue()
        self._is_stopping = False

    def take(self, message: ToEngine) -> None:
        """Take in one message; from any thread."""
        match message:
            case Submit() | Finish():
                if self.engine is not None:
                    self.engine.send(message)
            case Wanted():
                self._wanted.put(message.types)
            case Stop():
                self._is_stopping = True
                if self.engine is not None:
                    self.engine.stop()

    def run(self, make_assembly: Callable[[], Assembly]) -> None:
        """Build and run the engine; what goes wrong is sent as `Failed`, then raised."""
        try:
            self._run(make_assembly())
        except BaseException as error:
            self._send(_describe(error))
            raise

    def _run(self, assembly: Assembly) -> None:
        from core.assemble import build_engine  # noqa: PLC0415  imports torch; the port is open first

        bus = RelayBus(self._send, self._wanted.get())
        self.engine = build_engine(assembly, self._send, bus=bus, report=self._send)
        if self._is_stopping:
            self.engine.close()
            return
        if self._owns_process:
            freeze_heap()
        self._send(Ready(assembly.plan.digest(), self.engine.kv_cache.num_blocks))
        self.engine.run()


def freeze_heap() -> None:
    """Keep the garbage collector off what was made at start and stays: modules, plan, tokenizer.

    Each full collection would walk through about a million objects of libraries, in the middle of a step.
    For processes that are all ours: other people's collector is their own matter.
    """
    gc.collect()
    gc.freeze()


def _describe(error: BaseException) -> Failed:
    if isinstance(error, CytheraError):
        return Failed(str(error), error.exit_code, "".join(traceback.format_exception(error)))
    text = f"{type(error).__name__}: {error}"
    return Failed(text, 1, "".join(traceback.format_exception(error)))


# --- a thread of this process ----------------------------------------------------------------------


class EngineThread:
    """An engine in a thread of the process that serves clients: for tests and as a library."""

    def __init__(self) -> None:
        self._messages: queue.SimpleQueue[FromEngine | None] = queue.SimpleQueue()
        self._host = EngineHost(self._messages.put)
        self._assembly: Assembly | None = None
        self._attached = anyio.Event()
        self.error: BaseException | None = None
        """What ended the engine, if it did not just stop."""

    @property
    def core(self) -> EngineCore:
        """The engine itself, once it is ready."""
        if self._host.engine is None:
            raise CytheraError("the engine is not ready yet")
        return self._host.engine

    def start(self, _start: Start) -> None:
        """Do nothing: this side resolves the plan for both."""

    def attach(self, assembly: Assembly, types: Sequence[str]) -> None:
        """Begin to load."""
        self._assembly = assembly
        self._host.take(Wanted(list(types)))
        self._attached.set()

    def send(self, message: ToEngine) -> None:
        """Send a message; never blocks."""
        self._host.take(message)
        if isinstance(message, Stop):
            self._attached.set()

    async def run(self, deliver: Deliver) -> None:
        """Hand over messages until the engine has ended."""
        await self._attached.wait()
        if self._assembly is None:  # stopped before there was anything to run
            return
        token = current_token()
        threads = [
            threading.Thread(target=self._run_engine, name="engine", daemon=True),
            threading.Thread(target=self._pump, args=(deliver, token), name="engine-pump", daemon=True),
        ]
        for thread in threads:
            thread.start()
        with anyio.CancelScope(shield=True):
            for thread in threads:
                await to_thread.run_sync(thread.join)

    def _run_engine(self) -> None:
        try:
            self._host.run(lambda: cast("Assembly", self._assembly))
        except BaseException as error:  # noqa: BLE001  sent as `Failed`, and kept for the caller
            self.error = error
        finally:
            self._messages.put(None)

    def _pump(self, deliver: Deliver, token: Any) -> None:
        """Carry messages to the event loop, as many at a time as have gathered."""
        is_open = True
        while is_open:
            messages, is_open = _gather(self._messages)
            try:
                from_thread.run_sync(deliver, messages, token=token)
            except anyio.RunFinishedError:  # the event loop ended before the engine was closed
                return


# --- a process of its own --------------------------------------------------------------------------


class EngineProcess:
    """An engine in a child process, joined to this one by a socket pair."""

    def __init__(self) -> None:
        self._sock, self._child_sock = socket.socketpair()
        self._sock.setblocking(False)
        self._process: subprocess.Popen[bytes] | None = None
        self._unsent = bytearray()
        self._has_unsent = anyio.Event()
        self._is_loaded = False
        self._is_failure_known = False
        self._is_stopping = False

    def start(self, start: Start) -> None:
        """Start the child, which begins to load at once."""
        with self._child_sock:  # closed here even if there is no child, or `run` would wait for one
            fd = self._child_sock.fileno()
            self._process = subprocess.Popen(  # noqa: S603  our own interpreter and module
                [sys.executable, "-m", "core.process", str(fd)],
                pass_fds=(fd,),
                stdin=subprocess.DEVNULL,
                env={**QUIET_TORCH, **os.environ},
            )
        self.send(start)

    def attach(self, _assembly: Assembly, types: Sequence[str]) -> None:
        """Tell which events are wanted; the child makes the same plan by itself."""
        self.send(Wanted(list(types)))

    def send(self, message: ToEngine) -> None:
        """Send a message; never blocks: what the socket does not take at once follows later."""
        if isinstance(message, Stop):
            self._is_stopping = True
            if not self._is_loaded and self._process is not None:
                self._process.kill()  # there is nothing to bring to an end yet
        data = encode(message)
        if not self._unsent:
            data = data[self._send_some(data) :]
        if data:
            self._unsent += data
            self._has_unsent.set()

    def _send_some(self, data: bytes | bytearray) -> int:
        try:
            return self._sock.send(data)
        except BlockingIOError:
            return 0
        except OSError:  # the child is gone; `run` finds out why
            return len(data)

    async def run(self, deliver: Deliver) -> None:
        """Hand over messages until the child has ended."""
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._write)
                await self._read(deliver)
                tasks.cancel_scope.cancel()
            code = await to_thread.run_sync(self._wait)
            if not self._is_stopping and not self._is_failure_known:
                deliver([Failed(_describe_exit(code))])
        finally:
            self._kill()

    async def _read(self, deliver: Deliver) -> None:
        framer = Framer(FromEngine)
        while True:
            await anyio.wait_readable(self._sock)
            try:
                data = self._sock.recv(READ_BYTES)
            except BlockingIOError:
                continue
            except OSError:
                return
            if not data:
                return
            messages = list(framer.feed(data))
            self._is_loaded |= any(isinstance(message, Ready) for message in messages)
            self._is_failure_known |= any(isinstance(message, Failed) for message in messages)
            if messages:
                deliver(messages)

    async def _write(self) -> None:
        while True:
            await self._has_unsent.wait()
            await anyio.wait_writable(self._sock)
            del self._unsent[: self._send_some(self._unsent)]
            if not self._unsent:
                self._has_unsent = anyio.Event()

    def _wait(self) -> int:
        if self._process is None:
            return 0
        try:
            return self._process.wait(EXIT_GRACE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    def _kill(self) -> None:
        self._sock.close()
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()


def _describe_exit(code: int) -> str:
    if code == -signal.SIGKILL:
        return (
            "the engine's process was killed (SIGKILL); often by the kernel because memory ran out: "
            "lower --gpu-memory-utilization, --kv-cache-memory-bytes or --max-num-seqs"
        )
    if code < 0:
        return f"the engine's process died of signal {-code} ({signal.strsignal(-code)})"
    return f"the engine's process ended with exit code {code}"


# --- the child -------------------------------------------------------------------------------------


class _Wire:
    """The child's end of the socket pair: a thread reads, another one writes."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._framer = Framer(ToEngine)
        self._frames: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._writer = threading.Thread(target=self._write, name="link-writer", daemon=True)
        self._writer.start()

    def receive(self) -> list[ToEngine]:
        """Wait for messages; empty when the other side is gone."""
        while data := self._sock.recv(READ_BYTES):
            if messages := list(self._framer.feed(data)):
                return messages
        return []

    def send(self, message: FromEngine) -> None:
        """Queue one message: a front end that is busy must not hold up a step."""
        self._frames.put(encode(message))

    def flush(self) -> None:
        """Write out what is queued and write no more."""
        self._frames.put(None)
        self._writer.join(EXIT_GRACE)

    def _write(self) -> None:
        is_open = True
        while is_open:
            frames, is_open = _gather(self._frames)
            with contextlib.suppress(OSError):  # the reader notices that the other side is gone
                self._sock.sendall(b"".join(frames))


def main(argv: Sequence[str]) -> int:
    """Run the engine of the process that holds the other end of socket `argv[0]`."""
    # The parent decides when to end: a terminal sends Ctrl-C to both, systemd sends SIGTERM to both.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    wire = _Wire(socket.socket(fileno=int(argv[0])))
    first, *rest = wire.receive() or [Stop()]
    if not isinstance(first, Start):
        return 0
    config = restore_config(first.config, first.origins)
    configure_logging(config.log_level, config.log_format)
    host = EngineHost(wire.send, owns_process=True)
    for message in rest:
        host.take(message)
    threading.Thread(target=_read, args=(wire, host), name="link-reader", daemon=True).start()
    try:
        host.run(lambda: _assemble(config, first.defaults))
    except Exception as error:  # noqa: BLE001  sent as `Failed`; the parent tells the user
        return error.exit_code if isinstance(error, CytheraError) else 1
    finally:
        wire.flush()
    return 0


def _assemble(config: EngineConfig, defaults: Sequence[str]) -> Assembly:
    from core.assemble import resolve, start_plugins  # noqa: PLC0415  imports torch

    return resolve(config, start_plugins(config, defaults))


def _read(wire: _Wire, host: EngineHost) -> None:
    while messages := wire.receive():
        for message in messages:
            host.take(message)
        if host.engine is None and any(isinstance(message, Stop) for message in messages):
            os._exit(0)  # loading cannot be interrupted in any other way
    if host.engine is None:
        os._exit(0)
    host.take(Stop())  # the parent is gone
    time.sleep(EXIT_GRACE)
    os._exit(1)  # the step in progress hangs


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""`python -m core serve`: from a configuration to an answering server, and to a clean end.

The port is open before anything is imported that takes time.  Everything that happens then is told
twice: to clients by the server's health routes, to the person at the terminal by the display.
"""

from __future__ import annotations

import os
import signal
import socket
import tempfile
import traceback
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import anyio

from core.errors import ConfigError, CytheraError, first_cause
from core.process import freeze_heap
from core.service import Service
from core.start_display import StartDisplay
from core.status import Phase, Status

if TYPE_CHECKING:
    from core.config import EngineConfig
    from core.interfaces import Server

LAST_WORDS_SECONDS: Final = 5.0
"""How long the last answers may take to leave once the engine has ended."""
BACKLOG: Final = 2048
"""Connections that the kernel holds before they are accepted."""


def serve(config: EngineConfig) -> int:
    """Serve until a signal ends it; on a machine that joins another one, run ranks for that one.

    :return: the exit code: 0 after SIGTERM or SIGINT.
    :raises CytheraError: it cannot be served; the message says what to do.
    """
    if config.node_rank > 0:
        from core.ranks.cluster import run_agent  # noqa: PLC0415  for machines that join others

        return run_agent(config)
    check_exposure(config)
    with open_socket(config.host, config.port) as sock:
        try:
            anyio.run(_Serving(config, sock).run, backend="asyncio", backend_options=_loop_options())
        except BaseExceptionGroup as group:
            raise first_cause(group) from None
    return 0


def open_socket(host: str, port: int) -> socket.socket:
    """Bind and listen.

    :raises ConfigError: the address is taken, or none of this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {host} port {port}: {error.strerror}; choose with --host and --port"
        ) from error


def check_exposure(config: EngineConfig) -> None:
    """Refuse to be reachable for everybody by accident.

    :raises ConfigError: others can reach the address, there is no key, and nobody said that is fine.
    """
    if config.api_key or config.insecure or _is_local(config.host):
        return
    raise ConfigError(
        f"host = {config.host} ({config.origin_of('host')}) can be reached from other machines, and "
        f"without a key everybody there can use the model; set --api-key, or --insecure if that is meant"
    )


def _is_local(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def _loop_options() -> dict[str, Any]:
    try:
        import uvloop  # noqa: F401, PLC0415  faster, where it exists
    except ImportError:
        return {}
    return {"use_uvloop": True}


class _Serving:
    """One run of the server."""

    def __init__(self, config: EngineConfig, sock: socket.socket) -> None:
        self._config = config
        self._sock = sock
        self._stop_server = anyio.Event()
        self._display = StartDisplay(config)

    async def run(self) -> None:
        config = self._config
        service = Service(config, report=self._take_status)
        self._service = service
        server = service.make_server(service.make_frontends())
        with self._display:
            self._display.show_plugins(service)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._obey_signals)
                error = await self._serve_until_stopped(server)
                tasks.cancel_scope.cancel()
        if error is not None:
            raise _with_trace_file(error)

    async def _serve_until_stopped(self, server: Server) -> Exception | None:
        """Run server and engine until both have ended; what ended the engine, if it was not told to."""
        error = None
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(server.serve, self._sock, self._stop_server, self._config.shutdown_timeout)
            try:
                await self._service.run()
            except Exception as caught:  # noqa: BLE001  clients are to hear of it before it is raised
                error = caught
            self._stop_server.set()
            tasks.cancel_scope.deadline = anyio.current_time() + LAST_WORDS_SECONDS
        return error

    def _take_status(self, status: Status) -> None:
        if status.phase is Phase.READY:
            freeze_heap()
            self._display.show_ready(self._service, self._address())
        else:
            self._display.show_status(status)

    def _address(self) -> str:
        host, port = self._sock.getsockname()[:2]
        if host in ("0.0.0.0", "::"):  # noqa: S104  only to name an address that works
            host = "127.0.0.1"
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    async def _obey_signals(self) -> None:
        """Drain on the first signal, stop on the second."""
        with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            async with anyio.create_task_group() as tasks:
                count = 0
                async for _ in signals:
                    count += 1
                    if count == 1:
                        tasks.start_soon(self._drain)
                    else:
                        self._display.say("stopping at once")
                        self._service.stop()

    async def _drain(self) -> None:
        grace = self._config.shutdown_timeout
        if num_open := self._service.num_open:
            self._display.say(
                f"finishing {num_open} open requests within {grace:g} s; a second signal stops at once"
            )
        await self._service.drain(grace)
        self._stop_server.set()
        self._service.stop()


def _with_trace_file(error: Exception) -> Exception:
    """Write the whole story to a file, and add where it is to the message."""
    trace = getattr(error, "trace", "") or "".join(traceback.format_exception(error))
    path = Path(tempfile.gettempdir()) / f"cythera-{os.getpid()}.log"
    try:
        path.write_text(trace, encoding="utf-8")
    except OSError:
        return error
    if isinstance(error, CytheraError):
        error.args = (f"{error}\nthe full trace is in {path}",)
        return error
    return CytheraError(f"{type(error).__name__}: {error}\nthe full trace is in {path}")

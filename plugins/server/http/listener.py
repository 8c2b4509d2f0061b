"""Serves an ASGI application on a socket: starts, stops gracefully, and leaves signals and logs alone."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

import anyio
import uvicorn

from plugins.server.http.connection import Connection, Connections

if TYPE_CHECKING:
    import socket

    from starlette.types import ASGIApp

    from plugins.server.http import HttpSettings

BACKLOG: Final = 2048
"""Connections that the system may hold ready for us."""
CLEANUP_SECONDS: Final = 1.0
"""How long an application may clean up after its client is gone, before its task is cancelled."""


async def serve(
    app: ASGIApp, sock: socket.socket, settings: HttpSettings, *, stop: anyio.Event, grace: float
) -> None:
    """Serve until `stop` is set; then accept nothing new, finish what is open, close what is idle.

    Several may run in one event loop, which must be one of asyncio.  A client that closes its side
    of the connection is gone: its request ends, for nobody can tell a half-closed connection from
    an abandoned one.

    :param app: sees HTTP requests only; it gets no lifespan messages.
    :param sock: bound; closed when serving stops.
    :param grace: seconds that open requests get after `stop`; then they are cut off.
    """
    config = uvicorn.Config(
        app,
        interface="asgi3",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
    )
    config.load()
    connections = Connections()
    server = await asyncio.get_running_loop().create_server(
        lambda: Connection(config, connections, settings), sock=sock, backlog=BACKLOG
    )
    try:
        await stop.wait()
        connections.is_stopping = True
        server.close()
        with anyio.move_on_after(grace):
            await _finish(connections)
    finally:
        server.close()
        with anyio.CancelScope(shield=True):
            await _cut_off(connections)


async def _finish(connections: Connections) -> None:
    """Wait until every open request is answered and its connection closed."""
    for connection in list(connections.connections):
        connection.shutdown()
    while connections.connections:
        connections.all_closed.clear()
        await connections.all_closed.wait()
    if connections.tasks:
        await asyncio.wait(connections.tasks)


async def _cut_off(connections: Connections) -> None:
    """Close every connection now and wait for the tasks, which learn that their clients are gone."""
    connections.is_stopping = True
    for connection in list(connections.connections):
        connection.transport.abort()
    if not connections.tasks:
        return
    _, late = await asyncio.wait(connections.tasks, timeout=CLEANUP_SECONDS)
    for task in late:
        task.cancel()
    if late:
        await asyncio.wait(late, timeout=CLEANUP_SECONDS)

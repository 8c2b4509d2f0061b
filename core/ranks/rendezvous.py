"""Where ranks meet their engine: one port, and a handshake in which both prove that they know a key."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import secrets
import socket
import threading
import time
from typing import TYPE_CHECKING, Any, Final

import msgspec
import structlog

from core.errors import ConfigError, CytheraError
from core.link import HEADER, Framer, encode

if TYPE_CHECKING:
    from collections.abc import Callable

log = structlog.get_logger(__name__)

HANDSHAKE_SECONDS: Final = 10.0
"""For each message of it."""
MAX_MESSAGE_BYTES: Final = 1024
"""Of the handshake: nobody has proved anything yet."""
MAX_HANDSHAKES: Final = 64
"""At a time; others wait in the backlog."""
NONCE_BYTES: Final = 32
BACKLOG: Final = 256
_PAUSE: Final = 0.1  # seconds, after a connection that could not be accepted


class Challenge(msgspec.Struct, tag=True, frozen=True):
    """Prove that you know the key; the first frame on a connection, from the engine."""

    nonce: bytes


class Hello(msgspec.Struct, tag=True, frozen=True):
    """Who joins; the answer to `Challenge`."""

    node: int
    local_rank: int
    attempt: int
    """The number that `Spawn` had."""
    nonce: bytes
    """For the engine to prove the same."""
    proof: bytes


class Welcome(msgspec.Struct, tag=True, frozen=True):
    """The engine's proof."""

    proof: bytes


def prove(key: str, *parts: object) -> bytes:
    """Show that one knows the key without saying it: HMAC-SHA-256 of what both ends have seen."""
    text = "\n".join(part.hex() if isinstance(part, bytes) else str(part) for part in parts)
    return hmac.digest(key.encode(), text.encode(), hashlib.sha256)


def receive(sock: socket.socket, kind: Any) -> Any:
    """Wait for one frame of the handshake; nothing behind it is taken.

    :raises CytheraError: the other end is gone, or sends something else.
    :raises TimeoutError: it takes more than `HANDSHAKE_SECONDS`.
    """
    deadline = time.monotonic() + HANDSHAKE_SECONDS
    header = _receive_bytes(sock, HEADER.size, deadline)
    (size,) = HEADER.unpack(header)
    if size > MAX_MESSAGE_BYTES:
        raise CytheraError(f"a message of {size} bytes in a handshake; at most {MAX_MESSAGE_BYTES}")
    (message,) = Framer(kind).feed(header + _receive_bytes(sock, size, deadline))
    return message


def _receive_bytes(sock: socket.socket, size: int, deadline: float) -> bytes:
    data = b""
    while len(data) < size:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        sock.settimeout(left)
        if not (received := sock.recv(size - len(data))):
            raise CytheraError("the connection was closed during the handshake")
        data += received
    return data


def tune(sock: socket.socket) -> None:
    """Send small messages at once, and notice that a machine is gone that nothing is sent to."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, option):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


# --- the engine's side -----------------------------------------------------------------------------


class Rendezvous:
    """Listens for ranks, and for whoever starts them on other machines.

    :param key: the secret that both sides must know.
    :param admit: called on a thread with each connection that has proved it, its `Hello` and its address.
    :raises ConfigError: the port is taken, or the address is not one of this machine.
    """

    def __init__(
        self, host: str, port: int, key: str, admit: Callable[[socket.socket, Hello, str], None]
    ) -> None:
        self._key = key
        self._admit = admit
        self._is_closed = False
        self._places = threading.BoundedSemaphore(MAX_HANDSHAKES)
        try:
            self._listener = socket.create_server((host, port), backlog=BACKLOG)
        except OSError as error:
            raise ConfigError(
                f"cannot listen for ranks at {host} port {port}: {error.strerror}; choose with "
                f"--master-addr and --master-port"
            ) from error
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, name="rendezvous", daemon=True).start()

    def close(self) -> None:
        """Let nobody join any more."""
        self._is_closed = True
        with contextlib.suppress(OSError):  # closing alone does not end a wait for connections
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while not self._is_closed:
            self._places.acquire()
            try:
                sock, address = self._listener.accept()
            except OSError as error:
                self._places.release()
                if not self._is_closed:  # such as too many open files
                    log.warning("cannot accept who wants to join", reason=str(error))
                    time.sleep(_PAUSE)
                continue
            threading.Thread(target=self._greet, args=(sock, address[0]), daemon=True).start()

    def _greet(self, sock: socket.socket, address: str) -> None:
        """Find out who has connected, and that it may."""
        try:
            hello = self._shake_hands(sock)
            sock.settimeout(None)
        except (CytheraError, OSError) as error:
            log.warning("turned away who wanted to join", address=address, reason=str(error))
            sock.close()
            return
        finally:
            self._places.release()
        if self._is_closed:
            sock.close()
            return
        tune(sock)
        self._admit(sock, hello, address)

    def _shake_hands(self, sock: socket.socket) -> Hello:
        nonce = secrets.token_bytes(NONCE_BYTES)
        sock.settimeout(HANDSHAKE_SECONDS)
        sock.sendall(encode(Challenge(nonce)))
        hello: Hello = receive(sock, Hello)
        whom = (hello.node, hello.local_rank, hello.attempt)
        expected = prove(self._key, "join", nonce, hello.nonce, *whom)
        if not hmac.compare_digest(hello.proof, expected):
            raise CytheraError("it does not know the cluster's key")
        sock.sendall(encode(Welcome(prove(self._key, "welcome", nonce, hello.nonce))))
        return hello


# --- the other side --------------------------------------------------------------------------------


def join(
    address: tuple[str, int], key: str, *, node: int, local_rank: int, attempt: int
) -> socket.socket:
    """Connect to the engine and prove that one may.

    :raises OSError: nobody listens there (yet).
    :raises CytheraError: the engine turns this side away, or does not know the key itself.
    """
    sock = socket.create_connection(address, HANDSHAKE_SECONDS)
    try:
        _introduce(sock, key, node, local_rank, attempt)
    except BaseException:
        sock.close()
        raise
    sock.settimeout(None)
    tune(sock)
    return sock


def _introduce(sock: socket.socket, key: str, node: int, local_rank: int, attempt: int) -> None:
    challenge = receive(sock, Challenge)
    nonce = secrets.token_bytes(NONCE_BYTES)
    proof = prove(key, "join", challenge.nonce, nonce, node, local_rank, attempt)
    sock.sendall(encode(Hello(node, local_rank, attempt, nonce, proof)))
    welcome = receive(sock, Welcome)
    if not hmac.compare_digest(welcome.proof, prove(key, "welcome", challenge.nonce, nonce)):
        raise CytheraError("what listens there does not know the cluster's key")

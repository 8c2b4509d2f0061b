"""Where ranks meet their engine: one port, and a handshake in which both prove that they know a key."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import socket
import threading
from typing import TYPE_CHECKING, Any, Final

import msgspec
import structlog

from core.errors import ConfigError, CytheraError
from core.link import Framer, encode

if TYPE_CHECKING:
    from collections.abc import Callable

log = structlog.get_logger(__name__)

HANDSHAKE_SECONDS: Final = 10.0
NONCE_BYTES: Final = 32
BACKLOG: Final = 256


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
    """Wait for one frame of the handshake, byte by byte so that nothing behind it is taken.

    :raises CytheraError: the other end is gone, or sends something else.
    """
    framer = Framer(kind)
    while data := sock.recv(1):
        for message in framer.feed(data):
            return message
    raise CytheraError("the connection was closed during the handshake")


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
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                sock, address = self._listener.accept()
            except OSError:  # closed
                return
            threading.Thread(target=self._greet, args=(sock, address[0]), daemon=True).start()

    def _greet(self, sock: socket.socket, address: str) -> None:
        """Find out who has connected, and that it may."""
        sock.settimeout(HANDSHAKE_SECONDS)
        try:
            hello = self._shake_hands(sock)
        except (CytheraError, OSError) as error:
            log.warning("turned away who wanted to join", address=address, reason=str(error))
            sock.close()
            return
        sock.settimeout(None)
        self._admit(sock, hello, address)

    def _shake_hands(self, sock: socket.socket) -> Hello:
        nonce = secrets.token_bytes(NONCE_BYTES)
        sock.sendall(encode(Challenge(nonce)))
        hello: Hello = receive(sock, Hello)
        expected = prove(self._key, "join", nonce, hello.nonce, hello.node, hello.local_rank)
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
    return sock


def _introduce(sock: socket.socket, key: str, node: int, local_rank: int, attempt: int) -> None:
    challenge = receive(sock, Challenge)
    nonce = secrets.token_bytes(NONCE_BYTES)
    proof = prove(key, "join", challenge.nonce, nonce, node, local_rank)
    sock.sendall(encode(Hello(node, local_rank, attempt, nonce, proof)))
    welcome = receive(sock, Welcome)
    if not hmac.compare_digest(welcome.proof, prove(key, "welcome", challenge.nonce, nonce)):
        raise CytheraError("what listens there does not know the cluster's key")

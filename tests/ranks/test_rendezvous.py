"""Where ranks meet their engine: who proves that it knows the key joins, nobody else costs much."""

from __future__ import annotations

import queue
import socket
import threading
import time

import pytest

from core.errors import ConfigError, CytheraError
from core.link import HEADER
from core.ranks import rendezvous
from core.ranks.executor import _open_store
from core.ranks.rendezvous import Rendezvous, join

HOST = "127.0.0.1"


@pytest.fixture
def admitted():
    made = queue.SimpleQueue()
    yield made
    while not made.empty():
        made.get()[0].close()


@pytest.fixture
def meeting(admitted, monkeypatch):
    monkeypatch.setattr(rendezvous, "HANDSHAKE_SECONDS", 1.0)
    monkeypatch.setattr(rendezvous, "MAX_HANDSHAKES", 2)
    made = Rendezvous(HOST, 0, "key", lambda *who: admitted.put(who))
    yield made
    made.close()


def join_as(meeting, key="key"):
    return join((HOST, meeting.port), key, node=1, local_rank=2, attempt=3)


def connect(meeting):
    return socket.create_connection((HOST, meeting.port), 10)


def test_who_knows_the_key_joins(meeting, admitted):
    with join_as(meeting) as sock:
        theirs, hello, address = admitted.get(timeout=10)
        assert (hello.node, hello.local_rank, hello.attempt, address) == (1, 2, 3, HOST)
        theirs.sendall(b"behind")  # nothing behind the handshake is lost, and neither end times out
        assert sock.recv(6) == b"behind"
        assert sock.gettimeout() is None
        assert theirs.gettimeout() is None
        theirs.close()


def test_who_does_not_know_it_is_turned_away(meeting, admitted):
    with pytest.raises(CytheraError, match="closed during the handshake"):
        join_as(meeting, "another key")
    assert admitted.empty()


def test_a_listener_that_does_not_know_it_is_not_joined():
    with socket.create_server((HOST, 0)) as impostor:

        def welcome():
            sock, _ = impostor.accept()
            with sock:
                sock.sendall(rendezvous.encode(rendezvous.Challenge(b"nonce")))
                rendezvous.receive(sock, rendezvous.Hello)
                sock.sendall(rendezvous.encode(rendezvous.Welcome(b"trust me")))

        thread = threading.Thread(target=welcome)
        thread.start()
        with pytest.raises(CytheraError, match="does not know the cluster's key"):
            join(impostor.getsockname(), "key", node=1, local_rank=0, attempt=1)
        thread.join()


def test_a_large_message_is_refused_before_it_is_taken(meeting, admitted):
    with connect(meeting) as sock:
        rendezvous.receive(sock, rendezvous.Challenge)
        sock.sendall(HEADER.pack(2**29))
        sock.settimeout(10)
        assert sock.recv(1) == b""
    assert admitted.empty()


def trickle(sock):
    for _ in range(200):
        sock.sendall(b"x")
        time.sleep(0.1)


def test_a_trickle_does_not_keep_a_handshake_open(meeting):
    with connect(meeting) as sock:
        rendezvous.receive(sock, rendezvous.Challenge)
        sock.sendall(HEADER.pack(1000))
        with pytest.raises(OSError):
            trickle(sock)


def test_silent_ones_keep_nobody_out(meeting, admitted):
    silent = [connect(meeting) for _ in range(6)]
    join_patiently = time.monotonic() + 20
    while admitted.empty() and time.monotonic() < join_patiently:
        try:
            join_as(meeting).close()
        except OSError:  # it had to wait behind them for too long
            continue
    assert not admitted.empty()
    admitted.get()[0].close()
    for sock in silent:
        sock.close()


def test_a_failed_accept_is_not_the_last(meeting, admitted, monkeypatch):
    real, failures = meeting._listener, []

    class Listener:
        def accept(self):
            if not failures:
                failures.append(1)
                raise OSError(24, "Too many open files")
            return real.accept()

        def __getattr__(self, name):
            return getattr(real, name)

    monkeypatch.setattr(meeting, "_listener", Listener())
    for _ in range(2):
        join_as(meeting).close()
        admitted.get(timeout=10)[0].close()
    assert failures


def test_nobody_joins_once_it_is_closed(admitted):
    others = set(threading.enumerate())
    meeting = Rendezvous(HOST, 0, "key", lambda *who: admitted.put(who))
    (thread,) = set(threading.enumerate()) - others
    meeting.close()
    thread.join(10)
    assert not thread.is_alive()
    with pytest.raises(OSError):
        join_as(meeting)
    socket.create_server((HOST, meeting.port)).close()  # the port is free
    assert admitted.empty()


def test_the_store_listens_at_one_address():
    store = _open_store(HOST)
    socket.create_connection((HOST, store.port), 10).close()
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.2", store.port), 10)


def test_an_address_of_another_machine_is_refused():
    with pytest.raises(ConfigError, match=r"cannot listen for ranks at 192\.0\.2\.1"):
        _open_store("192.0.2.1")

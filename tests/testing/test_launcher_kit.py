"""The kit for launchers catches ranks that are not there, not right, or not to be got rid of."""

from __future__ import annotations

import contextlib
import socket
import threading

import pytest

from core.link import Framer, encode
from core.ranks.messages import Ping, Pong, ToRank
from core.registry import LauncherEntry
from core.testing import launcher as kit_module
from core.testing.launcher import LauncherConformance


class FakeRank:
    """A thread in place of a process; `bug` names one mistake to make."""

    def __init__(self, rank, bug):
        self.bug = bug
        self.sock, self.theirs = socket.socketpair()
        self.local_rank = 7 if bug == "counts wrongly" else rank
        self.local_world_size = 2
        self.name = "rank" if bug == "gives one name" else f"rank {rank}"
        self.end = "was killed" if bug == "says that it has ended" else None
        if bug != "does not answer":
            threading.Thread(target=self.answer, daemon=True).start()

    def answer(self):
        framer = Framer(ToRank)
        with contextlib.suppress(OSError):  # killed meanwhile
            while data := self.theirs.recv(1000):
                for message in framer.feed(data):
                    if isinstance(message, Ping):
                        self.theirs.sendall(encode(Pong(-1, is_busy=False, seconds=0.0)))

    def ended(self, timeout):
        return self.end

    def dump_stack(self):
        return None if self.bug == "has no stack" else "a stack"

    def kill(self):
        if self.end is None and self.bug != "survives":
            self.end = "was killed"
        with contextlib.suppress(OSError):  # killed already
            self.theirs.shutdown(socket.SHUT_RDWR)
        self.theirs.close()


class FakeLauncher:
    def __init__(self, bug=""):
        self.bug, self.ranks, self.is_closed = bug, [], False
        self.store_host = "" if bug == "has no address" else "127.0.0.1"

    def start(self):
        if self.bug == "starts only once" and self.ranks:
            return self.ranks
        count = 1 if self.bug == "starts too few" else 2
        self.ranks = [FakeRank(rank, self.bug) for rank in range(count)]
        return self.ranks

    def close(self):
        if self.bug == "closes once" and self.is_closed:
            raise RuntimeError("closed already")
        self.is_closed = True


class Buggy(LauncherConformance):
    __test__ = False

    def __init__(self, bug=""):
        self.entry = LauncherEntry(name="x", factory=lambda plan: FakeLauncher(bug))


PROTOCOL = "test_fulfils_the_protocol"
ANSWERS = "test_every_rank_answers"
KILLED = "test_a_killed_rank_has_ended"
ANEW = "test_ranks_can_be_started_anew"
STACKS = "test_stacks_are_text"
TWICE = "test_it_can_be_closed_twice"


@pytest.fixture(autouse=True)
def little_patience(monkeypatch):
    monkeypatch.setattr(kit_module, "PATIENCE", 2.0)


@pytest.mark.parametrize(
    ("bug", "law", "message"),
    [
        ("has no address", PROTOCOL, "store_host"),
        ("starts too few", ANSWERS, "1 of 2 ranks"),
        ("gives one name", ANSWERS, "of one name"),
        ("counts wrongly", ANSWERS, "rank 0 is number 7 of 2"),
        ("says that it has ended", ANSWERS, "is said to have ended"),
        ("does not answer", ANSWERS, "rank 0 cannot be talked to|does not answer"),
        ("survives", KILLED, "is said to run"),
        ("starts only once", ANEW, "rank 0"),
        ("has no stack", STACKS, "dump_stack returns None"),
    ],
)
def test_planted_bug_is_caught(bug, law, message):
    with pytest.raises(AssertionError, match=message):
        getattr(Buggy(bug), law)()


def test_closing_twice_is_tried():
    with pytest.raises(RuntimeError, match="closed already"):
        getattr(Buggy("closes once"), TWICE)()


@pytest.mark.parametrize("law", [PROTOCOL, ANSWERS, KILLED, ANEW, STACKS, TWICE])
def test_a_right_launcher_passes(law):
    getattr(Buggy(), law)()


def test_kit_without_an_entry_says_what_is_missing():
    with pytest.raises(NotImplementedError, match="entry"):
        LauncherConformance().make_launcher()

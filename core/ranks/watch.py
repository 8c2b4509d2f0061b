"""The engine's connection to its ranks: sends to all, hears from each, and finds out who is to blame.

A rank is lost when its process ends, when it does not answer, when it gets no further, or when a step
raises on it.  One lost rank stalls all others in their next collective, so the first sign of trouble
may come from an innocent one: evidence is gathered for a moment before anybody is named.
"""

from __future__ import annotations

import contextlib
import queue
import selectors
import socket
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Protocol

import structlog

from core.errors import CytheraError, DeviceLostError
from core.link import READ_BYTES, Framer, encode
from core.ranks.messages import (
    Close,
    Done,
    FromRank,
    Joined,
    Ping,
    Pong,
    Progress,
    Refused,
    StepBroken,
    StepDone,
    ToRank,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from core.step import StepResult

log = structlog.get_logger(__name__)

PING_INTERVAL: Final = 1.0
GATHERING: Final = 1.0
"""Seconds in which further signs of trouble are gathered after the first one."""
STARTING: Final = 60.0
"""Seconds that a process gets to import what it needs and to join before it must answer."""
STACK_WAIT: Final = 0.5
_MAX_STACK_LINES: Final = 30


class RankHandle(Protocol):
    """A rank that has been started, as its launcher knows it."""

    sock: socket.socket
    local_rank: int
    local_world_size: int
    name: str
    """For people, such as `pid 4711`."""

    def ended(self, timeout: float) -> str | None:
        """Say how its process ended, waiting for the news for up to `timeout`; `None` if it runs."""

    def dump_stack(self) -> str:
        """Get the stacks of a process that does not answer; empty if that cannot be had."""

    def kill(self) -> None:
        """End it at once."""


@dataclass(slots=True)
class _Rank:
    """What is known of one rank."""

    rank: int
    handle: RankHandle
    lock: threading.Lock = field(default_factory=threading.Lock)
    """Held by whoever sends, so that frames of two threads do not mix."""
    unsent: bytearray = field(default_factory=bytearray)
    """What the connection has not taken yet."""
    events: int = selectors.EVENT_READ
    """What the selector waits for; 0 once the connection is closed."""
    framer: Framer = field(default_factory=lambda: Framer(FromRank))
    is_gone: bool = False
    is_up: bool = False
    """Whether it has joined: while it imports libraries from a slow disk no thread of it can answer."""
    last_heard: float = field(default_factory=time.monotonic)
    pong: Pong = field(default_factory=lambda: Pong(-1, is_busy=False, seconds=0.0))
    broken: StepBroken | None = None
    progress: Progress | None = None

    @property
    def title(self) -> str:
        return f"rank {self.rank} ({self.handle.name})"

    def flush(self, frame: bytes = b"") -> bool:
        """Send as much as the connection takes; whether the watching thread has to see to the rest."""
        with self.lock:
            if self.is_gone:
                return False
            self.unsent += frame
            try:
                while self.unsent:
                    del self.unsent[: self.handle.sock.send(self.unsent)]
            except BlockingIOError:
                return True
            except OSError:
                self.is_gone = True
            return self.is_gone


class RankGroup:
    """All ranks of one engine.

    :param answer_timeout: seconds after which a rank that does not answer is given up.
    :param step_timeout: seconds that a step may take.
    """

    def __init__(
        self, handles: Sequence[RankHandle], *, answer_timeout: float, step_timeout: float
    ) -> None:
        self.results: queue.SimpleQueue[StepResult | Exception] = queue.SimpleQueue()
        self.replies: queue.SimpleQueue[tuple[int, Joined | Done] | Exception] = queue.SimpleQueue()
        self._ranks = [_Rank(rank, handle) for rank, handle in enumerate(handles)]
        self._answer_timeout = answer_timeout
        self._step_timeout = step_timeout
        self._report: Callable[[int, int], None] | None = None
        self._asked = 0.0  # when everybody was asked for their stack
        self._waiting_since: float | None = None  # while an answer of any kind is due
        self._last_step = -1
        self._is_broken = False
        self._closed = threading.Event()
        self._selector = selectors.DefaultSelector()
        self._waker, self._woken = socket.socketpair()
        for sock in (self._waker, self._woken):
            sock.setblocking(False)
        self._selector.register(self._woken, selectors.EVENT_READ)
        for rank in self._ranks:
            rank.handle.sock.setblocking(False)
            self._selector.register(rank.handle.sock, selectors.EVENT_READ, rank)
        self._thread = threading.Thread(target=self._watch, name="ranks", daemon=True)
        self._thread.start()

    # --- called by the executor ---

    def send(self, message: ToRank, rank: int | None = None) -> None:
        """Send to one rank, or to all, without waiting for any of them.

        The watching thread sends what a connection does not take at once, and finds who cannot be reached.
        """
        frame = encode(message)
        ranks = self._ranks if rank is None else [self._ranks[rank]]
        needs_help = [one.flush(frame) for one in ranks]
        if any(needs_help):
            self._wake()

    def ask_all(
        self, message: ToRank | None, report: Callable[[int, int], None] | None = None
    ) -> list[Joined | Done]:
        """Send to all ranks and wait for the answer of each.

        :param message: `None` only waits.
        :param report: called with the bytes that all ranks have loaded and have to load.
        :raises CytheraError: a rank has failed or is lost.
        """
        self._report = report
        self._waiting_since = time.monotonic()
        if message is not None:
            self.send(message)
        answers: dict[int, Joined | Done] = {}
        while len(answers) < len(self._ranks):
            reply = self.replies.get()
            if isinstance(reply, Exception):
                self.replies.put(reply)  # whoever asks again must not wait for ever
                raise reply
            answers[reply[0]] = reply[1]
        self._waiting_since = None
        return [answers[rank] for rank in range(len(self._ranks))]

    def take_result(self) -> StepResult:
        """Wait for the next result.

        :raises DeviceLostError: a rank is lost; raised again and again from then on.
        """
        result = self.results.get()
        if isinstance(result, Exception):
            self.results.put(result)
            raise result
        return result

    def expect(self, step: int | None) -> None:
        """Watch for a step's result from now on; `None` when none is due any more."""
        if step is None:
            self._waiting_since = None
            return
        self._last_step = step
        if self._waiting_since is None:
            self._waiting_since = time.monotonic()

    def restart_clock(self) -> None:
        """Give the next step its full time: the one before it has come back."""
        self._waiting_since = time.monotonic()

    def close(self, patience: float = 0.0) -> None:
        """End all ranks, the hard way if they do not go by themselves.

        :param patience: seconds that they get for it, if none is lost or busy.
        """
        self._closed.set()
        self._wake()
        self._thread.join(GATHERING + STACK_WAIT)
        if patience and not self._thread.is_alive() and self._waiting_since is None:
            self._let_go(patience)
        for rank in self._ranks:
            try:
                rank.handle.kill()
            except Exception:  # the others have to end too
                log.exception("a rank cannot be ended", rank=rank.rank, name=rank.handle.name)
            rank.handle.sock.close()
        self._put_error(DeviceLostError("the ranks have been ended", rank=0))
        if not self._thread.is_alive():
            self._selector.close()
            self._waker.close()
            self._woken.close()

    def _let_go(self, patience: float) -> None:
        """Tell ranks to end, and wait until they have; the watching thread has ended before."""
        deadline = time.monotonic() + patience
        self.send(Close())
        while any(rank.events for rank in self._ranks) and (left := deadline - time.monotonic()) > 0:
            self._exchange(left)

    def _wake(self) -> None:
        with contextlib.suppress(OSError):  # full: it wakes anyway; closed: nobody is left to wake
            self._waker.send(b"\0")

    def _put_error(self, error: Exception) -> None:
        self.results.put(error)
        self.replies.put(error)

    # --- the watching thread ---

    def _watch(self) -> None:
        try:
            error: Exception | None = self._watch_until_trouble()
        except Exception as raised:  # whoever waits for ranks must not wait for ever
            if self._closed.is_set():
                return
            log.exception("ranks cannot be watched any more")
            text = f"the ranks cannot be watched any more: {type(raised).__name__}: {raised}"
            error = DeviceLostError(text, rank=0)
        if error is not None:
            self._put_error(error)

    def _watch_until_trouble(self) -> DeviceLostError | None:
        last_ping = time.monotonic()
        while not self._closed.is_set():
            self._exchange(PING_INTERVAL if self._waiting_since is None else PING_INTERVAL / 4)
            if self._closed.is_set():
                return None
            now = time.monotonic()
            if self._waiting_since is not None and now - last_ping >= PING_INTERVAL:
                last_ping = now
                self.send(Ping())
            if (error := self._find_trouble(now)) is not None:
                return error
        return None

    def _exchange(self, timeout: float) -> None:
        """Take in what ranks have sent and send what waits, for up to `timeout` until anything happens."""
        for rank in self._ranks:
            wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if rank.unsent else 0)
            if rank.events not in (0, wanted):
                self._selector.modify(rank.handle.sock, wanted, rank)
                rank.events = wanted
        for key, events in self._selector.select(timeout):
            if key.data is None:
                self._woken.recv(READ_BYTES)
                continue
            if events & selectors.EVENT_WRITE:
                key.data.flush()
            if events & selectors.EVENT_READ:
                self._read(key.data)

    def _read(self, rank: _Rank) -> None:
        try:
            data = rank.handle.sock.recv(READ_BYTES)
            messages = list(rank.framer.feed(data))
        except BlockingIOError:
            return
        except (OSError, CytheraError):
            data, messages = b"", []
        if not data:
            with rank.lock:
                rank.is_gone = True
                rank.unsent.clear()
            self._selector.unregister(rank.handle.sock)
            rank.events = 0
        rank.last_heard = time.monotonic()
        for message in messages:
            self._take(rank, message)

    def _take(self, rank: _Rank, message: Any) -> None:
        match message:
            case StepDone():
                # Others may have met a rank that has failed in the wrong collective: believe nothing.
                if not self._is_broken:
                    self.results.put(message.result)
            case Pong():
                rank.pong = message
            case Joined() | Done():
                rank.is_up = True
                self.replies.put((rank.rank, message))
            case Progress():
                rank.progress = message
                self._report_progress()
            case StepBroken():
                rank.broken = rank.broken or message
                self._is_broken = True
            case Refused() if self._last_step >= 0:
                self._take(rank, StepBroken(self._last_step, message.error, message.trace))
            case Refused():
                stack = f"\nits stack:\n{message.trace}" if message.trace else ""
                error = CytheraError(f"{rank.title}: {message.error}{stack}")
                error.exit_code = message.exit_code
                self.replies.put(error)

    def _report_progress(self) -> None:
        known = [rank.progress for rank in self._ranks if rank.progress is not None]
        if self._report is not None and len(known) == len(self._ranks):
            self._report(sum(p.done for p in known), sum(p.total for p in known))

    # --- who is to blame ---

    def _find_trouble(self, now: float) -> DeviceLostError | None:
        since = self._waiting_since
        is_late = self._last_step >= 0 and since is not None and now - since > self._step_timeout
        if not is_late and not any(self._is_in_trouble(rank, now) for rank in self._ranks):
            return None
        self._gather_evidence()
        culprit, reason = self._blame(is_late)
        others = [self._describe(rank) for rank in self._ranks if rank is not culprit]
        message = "; ".join([f"{culprit.title} {reason}", *others])
        return DeviceLostError(message + self._stack_of(culprit), rank=culprit.rank)

    def _is_in_trouble(self, rank: _Rank, now: float) -> bool:
        if rank.is_gone or rank.broken is not None:
            return True
        since = self._waiting_since
        if since is None:
            return False
        limit = self._answer_timeout if rank.is_up else max(self._answer_timeout, STARTING)
        return now - max(rank.last_heard, since) > limit

    def _gather_evidence(self) -> None:
        """Ask everybody for their stacks, and give others' failures time to arrive."""
        self._asked = time.monotonic()
        self.send(Ping(want_stack=True))
        while (left := self._asked + GATHERING - time.monotonic()) > 0:
            self._exchange(left)

    def _blame(self, is_late: bool) -> tuple[_Rank, str]:
        """Choose the rank whose trouble explains that of the others, and say what it is."""
        # In order of how much each explains.
        for find in (self._death, self._own_failure, self._lost_link, self._silence, self._failure):
            for rank in self._ranks:
                if reason := find(rank):
                    return rank, reason
        late = min(
            self._ranks, key=lambda r: ("distributed" in r.pong.stack, r.pong.step, not r.pong.is_busy)
        )
        if is_late:
            what = f"takes more than {self._step_timeout:.0f} s (--step-timeout), {self._where(late)}"
            return late, what
        return late, f"did not answer for a while, {self._where(late)}"

    def _death(self, rank: _Rank) -> str | None:
        if not rank.is_gone or rank.broken is not None:  # one that has failed may end for that
            return None
        how = rank.handle.ended(STACK_WAIT)
        return f"{how}, {self._where(rank)}" if how is not None else None

    def _own_failure(self, rank: _Rank) -> str | None:
        """Tell of a failure, but not of one from waiting in vain for another rank."""
        is_own = rank.broken is not None and "distributed" not in rank.broken.trace
        return self._failure(rank) if is_own else None

    def _silence(self, rank: _Rank) -> str | None:
        is_silent = rank.last_heard < self._asked and not rank.is_gone
        return f"does not answer; {self._last_seen(rank)}" if is_silent else None

    def _lost_link(self, rank: _Rank) -> str | None:
        is_lost = rank.is_gone and rank.broken is None
        return f"closed its connection, {self._where(rank)}" if is_lost else None

    def _failure(self, rank: _Rank) -> str | None:
        return f"failed in step {rank.broken.step}: {rank.broken.error}" if rank.broken else None

    def _describe(self, rank: _Rank) -> str:
        if failure := self._failure(rank):
            return f"{rank.title} {failure}"
        if rank.is_gone:
            return f"{rank.title} is gone too"
        return f"{rank.title} was {self._where(rank)}"

    def _where(self, rank: _Rank) -> str:
        if self._last_step < 0 and rank.pong.step < 0:
            return "while starting"
        if not rank.pong.is_busy and not rank.is_gone:
            return f"done with step {rank.pong.step}"
        return f"in step {max(rank.pong.step, self._last_step if rank.is_gone else -1)}"

    def _last_seen(self, rank: _Rank) -> str:
        if self._last_step < 0:
            return "it was to start"
        return f"step {self._last_step} was due, and it was last heard of in step {rank.pong.step}"

    def _stack_of(self, rank: _Rank) -> str:
        stack = rank.broken.trace if rank.broken is not None else rank.pong.stack
        if not stack or rank.last_heard < self._asked or rank.is_gone:
            stack = rank.handle.dump_stack() or stack
        lines = stack.strip().splitlines()[-_MAX_STACK_LINES:]
        return "\nits stack:\n" + "\n".join(lines) if lines else ""

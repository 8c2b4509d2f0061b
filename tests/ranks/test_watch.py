"""What the engine's end of the connections to its ranks does whatever these do: it never waits for ever."""

from __future__ import annotations

import socket
import threading
import time

import pytest

from core.errors import CytheraError, DeviceLostError
from core.link import Framer, encode
from core.ranks import watch
from core.ranks.messages import (
    Close,
    Done,
    Joined,
    Load,
    Ping,
    Pong,
    Refused,
    Run,
    StepBroken,
    StepDone,
    ToRank,
)
from core.ranks.watch import RankGroup
from core.request import SamplingParams
from core.step import RowEntry, StepPlan, StepResult


class Handle:
    """A rank that is this test."""

    def __init__(self, number):
        self.sock, self.theirs = socket.socketpair()
        self.local_rank, self.local_world_size = number, 2
        self.name = f"test {number}"
        self.how = None
        self.was_killed = False

    def ended(self, _timeout):
        if isinstance(self.how, Exception):
            raise self.how
        return self.how

    def dump_stack(self):
        return ""

    def kill(self):
        self.was_killed = True

    def say(self, message):
        self.theirs.sendall(encode(message))


@pytest.fixture
def handles():
    made = [Handle(0), Handle(1)]
    yield made
    for handle in made:
        handle.sock.close()
        handle.theirs.close()


@pytest.fixture
def group(handles, monkeypatch):
    monkeypatch.setattr(watch, "GATHERING", 0.2)
    made = RankGroup(handles, answer_timeout=20.0, step_timeout=20.0)
    yield made
    made.close()


def big_run(step):
    entry = RowEntry(0, "r", list(range(100_000)), 1, SamplingParams(), 0, [])
    return Run(StepPlan(step, added=[entry]))


def test_frames_of_several_threads_do_not_mix(group, handles):
    received = []
    everybody = 2 * 20 + 200

    def read():
        framer = Framer(type(Ping()) | Load)
        while len(received) < everybody:
            received.extend(framer.feed(handles[0].theirs.recv(1000)))

    class Big(Load, frozen=True, tag="Load"):
        padding: str = "x" * 300_000

    def send(message, count):
        for _ in range(count):
            group.send(message, rank=0)

    reader = threading.Thread(target=read, daemon=True)
    senders = [threading.Thread(target=send, args=(Big(), 20)) for _ in range(2)]
    senders.append(threading.Thread(target=send, args=(Ping(), 200)))
    for thread in (reader, *senders):
        thread.start()
    reader.join(60)
    assert [type(message).__name__ for message in received].count("Load") == 40
    assert len(received) == everybody


def test_a_rank_that_does_not_read_holds_up_nobody(group, handles):
    began = time.monotonic()
    for step in range(20):
        group.send(big_run(step))
    assert time.monotonic() - began < 10  # the watching thread pings besides
    framer, steps = Framer(ToRank), []
    handles[1].theirs.settimeout(20)
    while len(steps) < 20:
        steps += [m.plan.step for m in framer.feed(handles[1].theirs.recv(2**20)) if isinstance(m, Run)]
    assert steps == list(range(20))


def test_a_loss_is_raised_whenever_somebody_waits_again(group, handles):
    handles[1].how = "died of boredom"
    handles[1].theirs.close()
    for _ in range(2):
        with pytest.raises(DeviceLostError, match=r"^rank 1 \(test 1\) died of boredom"):
            group.take_result()
        with pytest.raises(DeviceLostError, match=r"^rank 1 \(test 1\) died of boredom"):
            group.ask_all(Load())


def test_an_error_while_watching_ends_the_wait(group, handles):
    handles[0].how = RuntimeError("planted")
    handles[0].theirs.close()
    with pytest.raises(DeviceLostError, match="cannot be watched any more: RuntimeError: planted"):
        group.ask_all(Load())


def test_closing_ends_the_wait(group):
    waiting = threading.Timer(0.2, group.close)
    waiting.start()
    with pytest.raises(DeviceLostError, match="have been ended"):
        group.take_result()
    waiting.join()


def test_nothing_is_believed_after_a_failure(group, handles):
    group.expect(3)
    handles[1].say(StepBroken(3, "ValueError: planted", "in my own code"))
    time.sleep(0.1)
    handles[0].say(StepDone(StepResult(3, [1])))
    with pytest.raises(DeviceLostError, match=r"^rank 1 \(test 1\) failed in step 3: ValueError"):
        group.take_result()


def test_who_failed_is_named_rather_than_who_is_busy_elsewhere(group, handles):
    group.expect(3)
    handles[1].say(StepBroken(3, "ValueError: planted", "in my own code"))
    handles[1].say(Pong(3, is_busy=True, seconds=0.0))  # rank 0 holds its interpreter's lock meanwhile
    with pytest.raises(DeviceLostError, match=r"^rank 1 \(test 1\) failed in step 3") as caught:
        group.take_result()
    assert caught.value.rank == 1


def test_a_rank_that_ends_in_a_step_says_why(group, handles):
    group.expect(3)
    handles[1].say(Refused("MemoryError: planted", 1, "the stack"))
    handles[1].how = "ended with exit code 1"
    handles[1].theirs.close()
    with pytest.raises(DeviceLostError, match=r"failed in step 3: MemoryError: planted[^$]*the stack"):
        group.take_result()


def test_who_refuses_to_start_tells_its_stack(group, handles):
    handles[1].say(Refused("KeyError: 'planted'", 1, "the stack"))
    with pytest.raises(CytheraError, match=r"^rank 1 \(test 1\): KeyError: 'planted'[^$]*the stack"):
        group.ask_all(Load())


def test_a_lost_link_is_blamed_on_its_rank(group, handles):
    group.expect(0)
    handles[0].say(Pong(0, is_busy=True, seconds=0.0))
    handles[1].theirs.close()
    with pytest.raises(DeviceLostError, match=r"^rank 1 \(test 1\) closed its connection"):
        group.take_result()


def test_what_is_no_message_is_a_lost_link(group, handles):
    group.expect(0)
    handles[1].theirs.sendall(b"\xff" * 64)
    with pytest.raises(DeviceLostError, match=r"^rank 1 "):
        group.take_result()


def test_ranks_answer_in_order_of_rank(group, handles):
    for number in (1, 0):
        handles[number].say(Joined(f"device {number}"))
    assert [answer.device for answer in group.ask_all(None)] == ["device 0", "device 1"]
    for number in (1, 0):
        handles[number].say(Done(number))
    assert [answer.num_blocks for answer in group.ask_all(Load())] == [0, 1]


def test_idle_ranks_may_end_by_themselves(group, handles):
    heard = []

    def end(handle):
        framer = Framer(ToRank)
        heard.extend(framer.feed(handle.theirs.recv(1000)))
        assert not handle.was_killed
        handle.theirs.close()

    threads = [threading.Thread(target=end, args=(handle,)) for handle in handles]
    for thread in threads:
        thread.start()
    began = time.monotonic()
    group.close(patience=20.0)
    for thread in threads:
        thread.join()
    assert [type(message) for message in heard] == [Close, Close]
    assert time.monotonic() - began < 10
    assert all(handle.was_killed for handle in handles)


def test_busy_ranks_are_not_waited_for(group):
    group.expect(0)
    began = time.monotonic()
    group.close(patience=20.0)
    assert time.monotonic() - began < 10

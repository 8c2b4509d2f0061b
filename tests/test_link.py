"""Frames: whatever crosses the link arrives as it was, however the bytes are cut."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import CytheraError
from core.events import (
    AnyEvent,
    RequestFinished,
    RequestQueued,
    StepCompleted,
)
from core.link import (
    HEADER,
    MAX_FRAME_BYTES,
    Failed,
    Framer,
    FromEngine,
    Published,
    Ready,
    RelayBus,
    Start,
    Stop,
    ToEngine,
    Wanted,
    encode,
)
from core.messages import Ended, Finish, OutputBatch, Submit
from core.request import FinishReason, SamplingParams
from core.status import Phase, Status
from core.step import PromptLogprobs, TokenLogprobs

TO_ENGINE = [
    Start({"model": "m", "nested": {"a": [1, None]}}, {"model": "flag"}, ["a.b"]),
    Wanted(["StepCompleted"]),
    Submit(
        "r",
        [1, 2, 2**31],
        SamplingParams(temperature=0.5, logit_bias={3: -1.5}, stop=["a", "ü"], allowed_token_ids=[1]),
        7,
        [0],
        2**63 - 1,
        -5,
        1.25,
        "salt",
    ),
    Finish("r", FinishReason.STOP),
    Stop(),
]
FROM_ENGINE = [
    Status(Phase.LOADING, 3, 4),
    Ready("digest", 7),
    Failed("why", 6, "trace"),
    OutputBatch(
        ["r", "s"],
        [1, 2],
        [Ended("s", FinishReason.LENGTH, 5, "")],
        {"r": 16},
        {"r": TokenLogprobs(1, -0.5, 1, [1, 2], [-0.5, float("-inf")])},
        {"s": PromptLogprobs(1, [TokenLogprobs(1, -0.5, 1, [], [])])},
    ),
    Published([RequestQueued("r", 3), StepCompleted(1, 2, 1, 1, 0, 0.5, 0.01, ["r"], [7])], 1, 2.5),
]


@pytest.mark.parametrize(("union", "messages"), [(ToEngine, TO_ENGINE), (FromEngine, FROM_ENGINE)])
def test_there_is_an_example_of_every_message(union, messages):
    assert {type(message) for message in messages} == set(union.__args__)


@pytest.mark.parametrize(("union", "messages"), [(ToEngine, TO_ENGINE), (FromEngine, FROM_ENGINE)])
@given(data=st.data())
def test_messages_arrive_however_the_bytes_are_cut(union, messages, data):
    sent = data.draw(st.lists(st.sampled_from(messages), max_size=8))
    stream = b"".join(map(encode, sent))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    framer = Framer(union)
    received = [
        message
        for start, end in itertools.pairwise([0, *cuts, len(stream)])
        for message in framer.feed(stream[start:end])
    ]
    assert received == sent


@pytest.mark.parametrize(
    "frame",
    [
        HEADER.pack(MAX_FRAME_BYTES + 1),
        HEADER.pack(3) + b"\xc1\xc1\xc1",
        HEADER.pack(1) + b"\x01",
        encode(TO_ENGINE[0]),  # of the other direction
    ],
    ids=["too long", "no MessagePack", "no message", "other direction"],
)
def test_what_is_no_message_is_an_error(frame):
    with pytest.raises(CytheraError, match="link"):
        list(Framer(FromEngine).feed(frame))


def test_every_event_can_cross():
    assert {kind.__name__ for kind in AnyEvent.__args__} >= {"WorkerLost", "SubscriberDropped"}


def test_the_relay_sends_what_is_wanted_and_notes_with_the_next_batch():
    sent = []
    bus = RelayBus(sent.append, ["RequestQueued", "RequestFinished"])
    queued, finished = RequestQueued("r", 1), RequestFinished("r", "stop", 1, 1, 0, 0, 0.1)
    step = StepCompleted(1, 1, 1, 1, 0, 0.0, 0.0, [], [])
    assert bus.is_active
    assert bus.wants(RequestQueued, StepCompleted)
    assert not bus.wants(StepCompleted)
    bus.note(finished)
    bus.publish([queued, step], 3)
    bus.publish([step], 4)
    [published] = sent
    assert (published.events, published.step) == ([queued, finished], 3)


def test_a_relay_for_nobody_is_inactive():
    assert not RelayBus(pytest.fail, []).is_active

"""The link between the process that serves clients and the one that runs the engine.

Frames over a socket pair: four bytes of length, then one message in MessagePack.  Every message is
one of the records below, decoded into its type; nothing that could run code ever crosses.
"""

from __future__ import annotations

import struct
import time
from typing import TYPE_CHECKING, Any, Final, cast

import msgspec

from core.errors import CytheraError
from core.events import EVENT_TYPES, AnyEvent, Event
from core.messages import Finish, OutputBatch, Submit
from core.status import Status

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

HEADER: Final = struct.Struct("<I")
MAX_FRAME_BYTES: Final = 2**30
READ_BYTES: Final = 2**20
"""Read from a link at a time."""


class Start(msgspec.Struct, tag=True):
    """What an engine is to be; the first message to it."""

    config: dict[str, Any]
    """As `EngineConfig.to_dict` gives it."""
    origins: dict[str, str]
    defaults: list[str]
    """Plugins that are active unless the configuration says otherwise."""


class Wanted(msgspec.Struct, tag=True):
    """The events that subscribers want; the engine waits for it before its first step."""

    types: list[str]


class Stop(msgspec.Struct, tag=True):
    """Run no further step."""


class Ready(msgspec.Struct, tag=True, frozen=True):
    """The engine is loaded and takes requests."""

    plan_digest: str
    num_kv_blocks: int
    """Usable ones."""


class Failed(msgspec.Struct, tag=True, frozen=True):
    """The engine has ended because of an error; the last message from it."""

    error: str
    exit_code: int = 1
    trace: str = ""


class Published(msgspec.Struct, tag=True):
    """Events of one step."""

    events: list[AnyEvent]
    step: int
    time: float
    """Seconds since the epoch, when the step ended."""


ToEngine = Start | Wanted | Stop | Submit | Finish
FromEngine = Status | Ready | Failed | OutputBatch | Published


class Framer:
    """Cuts a stream of bytes into messages of one union.

    :param union: what messages may be, such as `ToEngine`.
    """

    def __init__(self, union: Any) -> None:
        self._decoder = msgspec.msgpack.Decoder(union)
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[Any]:
        """Take in bytes and give back every message that is complete.

        :raises CytheraError: the bytes are no message; the link cannot be used any more.
        """
        buffer = self._buffer
        buffer += data
        offset = 0
        while len(buffer) - offset >= HEADER.size:
            (size,) = HEADER.unpack_from(buffer, offset)
            if size > MAX_FRAME_BYTES:
                raise CytheraError(
                    f"a frame of {size} bytes came over the link; at most {MAX_FRAME_BYTES}"
                )
            end = offset + HEADER.size + size
            if len(buffer) < end:
                break
            with memoryview(buffer)[offset + HEADER.size : end] as frame:
                message = self._decode(frame)
            offset = end
            yield message
        del buffer[:offset]

    def _decode(self, frame: memoryview) -> Any:
        try:
            return self._decoder.decode(frame)
        except msgspec.DecodeError as error:
            raise CytheraError(f"what came over the link is no message: {error}") from error


_encoder = msgspec.msgpack.Encoder()


def encode(message: msgspec.Struct) -> bytes:
    """Make one frame."""
    body = _encoder.encode(message)
    return HEADER.pack(len(body)) + body


class RelayBus:
    """What an engine publishes to when its subscribers are elsewhere.

    Has the methods of `EventBus` that an engine calls.

    :param send: takes one message to the process of the subscribers.
    :param types: names of the events that they want.
    """

    def __init__(self, send: Callable[[Published], None], types: Sequence[str]) -> None:
        self._send = send
        self._types = tuple(EVENT_TYPES[name] for name in types)
        self._notes: list[Event] = []
        self.is_active = bool(types)

    def wants(self, *types: type[Event]) -> bool:
        """Whether anybody subscribed to one of these types."""
        return any(kind in self._types for kind in types)

    def publish(self, events: Sequence[Event], step: int) -> None:
        """Send what is wanted of these events, and of those noted before."""
        notes, self._notes = self._notes, []
        wanted = [event for event in (*events, *notes) if isinstance(event, self._types)]
        if wanted:
            self._send(Published(cast("list[AnyEvent]", wanted), step, time.time()))

    def note(self, event: Event) -> None:
        """Add an event that travels with the next batch."""
        self._notes.append(event)

    def close(self) -> None:
        """Do nothing: the link outlives the engine."""

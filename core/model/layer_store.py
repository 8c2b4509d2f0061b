"""Decoder layers whose weights lie in the host's memory and visit the device when they run.

The store has two buffers on the device, each as large as the largest of its layers.  The layers use
them in turn: the weights of the first, third, fifth … are views of one buffer, those of the second,
fourth, sixth … views of the other, for good.  As soon as a layer has run, the next one that uses its
buffer is copied there, while the layer after it computes out of the other buffer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

import torch

from core.errors import CapacityError
from core.offload import NUM_BUFFERS

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import nn

    from core.model.layers import DecoderLayer
    from core.model.slots import LayerSlots

_ALIGNMENT: Final = 256
"""Bytes at whose multiples tensors begin, as in memory from torch's own allocator."""


class Place(NamedTuple):
    """Where a tensor lies in its layer's bytes."""

    offset: int
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """From the tensor's first element to its last, gaps included."""
        if math.prod(self.shape) == 0:
            return 0
        last = sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        return (last + 1) * self.dtype.itemsize

    def view(self, memory: torch.Tensor) -> torch.Tensor:
        """Return the tensor, as part of its layer's bytes."""
        part = memory[self.offset : self.offset + self.num_bytes].view(self.dtype)
        return part.as_strided(self.shape, self.stride)


@dataclass(frozen=True, slots=True)
class StoredLayer:
    """A layer and its bytes on the host."""

    tensors: list[tuple[torch.Tensor, Place]]
    """Parameters and buffers of the layer."""
    memory: torch.Tensor
    """[bytes] uint8 on the host, pinned for a GPU."""


class Copier(Protocol):
    """Copies layers to the device, in order with what is computed there."""

    def start(self, buffer: int, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copy to a buffer, after all that has been launched so far."""

    def wait(self, buffer: int) -> None:
        """Let all that is launched from now on come after the last copy to a buffer."""


class PlainCopier:
    """Copies at once: for the CPU."""

    def start(self, _buffer: int, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copy."""
        target.copy_(source)

    def wait(self, _buffer: int) -> None:
        """Do nothing."""


class CudaCopier:
    """Copies on a stream of its own, while others compute."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._done = [torch.cuda.Event() for _ in range(NUM_BUFFERS)]

    def start(self, buffer: int, target: torch.Tensor, source: torch.Tensor) -> None:
        """Launch a copy."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            self._done[buffer].record(self._stream)

    def wait(self, buffer: int) -> None:
        """Let the current stream wait."""
        torch.cuda.current_stream(self._device).wait_event(self._done[buffer])


class LayerStore:
    """Keeps some layers of a decoder on the host.

    Filled layer by layer with `take`, in the order in which they run, then closed with `settle`.

    :param indices: of the layers in the whole model.
    :param copier: by default the one for the device.
    """

    def __init__(
        self, indices: Iterable[int], device: torch.device, copier: Copier | None = None
    ) -> None:
        self.indices = frozenset(indices)
        self._device = device
        self._is_cuda = device.type == "cuda"
        self._copier = copier or (CudaCopier(device) if self._is_cuda else PlainCopier())
        self._layers: list[StoredLayer] = []
        self._buffers: list[torch.Tensor] = []
        self._held: list[int | None] = [None] * NUM_BUFFERS
        """Which layer each buffer has, by its place in the order."""

    # --- filling ---

    def take(self, layer: DecoderLayer, slots: LayerSlots) -> LayerSlots:
        """Move the weights of a layer to the host, and let its slots fetch them.

        Until `settle` its tensors are empty.

        :param slots: as they would be without a store.
        """
        turn = len(self._layers)
        self._layers.append(self._move(layer))

        def qkv(stream: Any) -> Any:
            self.enter(turn)
            return slots.qkv(stream)

        def down(inner: Any, stream: Any) -> Any:
            out = slots.down(inner, stream)
            self.leave(turn)
            return out

        return slots._replace(qkv=qkv, down=down)

    def settle(self) -> None:
        """Allocate the device's buffers and point the layers' tensors there."""
        largest = max((len(layer.memory) for layer in self._layers), default=0)
        count = min(NUM_BUFFERS, len(self._layers))
        self._buffers = [
            torch.empty(largest, dtype=torch.uint8, device=self._device) for _ in range(count)
        ]
        for turn, layer in enumerate(self._layers):
            for tensor, place in layer.tensors:
                tensor.data = place.view(self._buffers[turn % NUM_BUFFERS])
        for turn in range(count):
            self._fetch(turn)

    def _move(self, layer: nn.Module) -> StoredLayer:
        tensors = list(_place(layer))
        num_bytes = max((place.offset + place.num_bytes for _, place in tensors), default=0)
        memory = self._allocate_on_host(num_bytes)
        for tensor, place in tensors:
            place.view(memory).copy_(tensor)
            tensor.data = torch.empty(0, dtype=tensor.dtype, device=self._device)
        return StoredLayer(tensors, memory)

    def _allocate_on_host(self, num_bytes: int) -> torch.Tensor:
        try:
            return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=self._is_cuda)
        except RuntimeError as error:
            done = sum(len(layer.memory) for layer in self._layers)
            raise CapacityError(
                f"the host has no {num_bytes} bytes for one more layer, after {done} bytes for "
                f"{len(self._layers)} of {len(self.indices)}; lower --cpu-offload-gb"
            ) from error

    # --- running ---

    def enter(self, turn: int) -> None:
        """Have the weights of a layer in place for what is launched after this."""
        self._fetch(turn)  # already there, unless a step has failed between two layers
        self._copier.wait(turn % NUM_BUFFERS)

    def leave(self, turn: int) -> None:
        """Give the buffer of a layer, all of whose work is launched, to the next one that uses it."""
        following = turn + NUM_BUFFERS
        self._fetch(following if following < len(self._layers) else turn % NUM_BUFFERS)

    def _fetch(self, turn: int) -> None:
        buffer = turn % NUM_BUFFERS
        if self._held[buffer] == turn:
            return
        self._held[buffer] = turn
        memory = self._layers[turn].memory
        self._copier.start(buffer, self._buffers[buffer][: len(memory)], memory)


def _place(layer: nn.Module) -> Iterator[tuple[torch.Tensor, Place]]:
    """Lay the tensors of a layer one after the other; those that are the same object once."""
    offset = 0
    for named in (layer.named_parameters(), layer.named_buffers()):
        for _, tensor in named:
            place = Place(offset, tensor.shape, tensor.stride(), tensor.dtype)
            yield tensor, place
            offset += -(-place.num_bytes // _ALIGNMENT) * _ALIGNMENT

"""Which decoder layers of a rank are kept in the host's memory."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from core.sharding import Span

NUM_BUFFERS: Final = 2
"""Layers that have room on the device at one time: one runs, the next is on its way."""


def choose_layers(layers: Span, layer_bytes: float, wanted_bytes: float) -> tuple[int, ...]:
    """Choose the fewest layers that hold `wanted_bytes`, all of them if they hold less.

    They are spread evenly, so that there is as much time as possible to copy one while those before
    it run, from one step to the next too.

    :param layers: those of the rank.
    :param layer_bytes: of one layer on the rank.
    :return: indices in the whole model, ascending.
    """
    if wanted_bytes <= 0 or layer_bytes <= 0:
        return ()
    count = min(layers.size, max(1, math.ceil(wanted_bytes / layer_bytes)))
    # The last layer of each of `count` stretches: the first to run is thus as late as it can be.
    return tuple(layers.start + (turn + 1) * layers.size // count - 1 for turn in range(count))

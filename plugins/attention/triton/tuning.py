"""Sizes of tiles and grids, chosen for a card and a cache.

The numbers for Hopper were measured on an H200; elsewhere they are scaled down until they fit into
shared memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch

STAGE_BYTES: Final = 32 << 10
"""Keys and values of one tile of a decode: as much as keeps the memory busy with two programs on a
multiprocessor, each of which has a few tiles on the way."""


@dataclass(frozen=True, slots=True)
class Card:
    """What limits the kernels."""

    num_sms: int
    capability: tuple[int, int]
    shared_bytes: int
    """Of one multiprocessor, as far as one program may use it."""

    @property
    def has_fp8(self) -> bool:
        """Whether there are instructions that convert E4M3."""
        return self.capability >= (8, 9)

    @property
    def has_pdl(self) -> bool:
        """Whether a kernel may start before the one in front of it has ended."""
        return self.capability >= (9, 0)

    @property
    def has_boxes(self) -> bool:
        """Whether whole tiles are copied by the tensor memory accelerator."""
        return self.capability >= (9, 0)


NO_CARD: Final = Card(num_sms=3, capability=(0, 0), shared_bytes=96 << 10)
"""Triton's interpreter."""


@dataclass(frozen=True, slots=True)
class DecodeTuning:
    """How decodes are cut."""

    block_n: int
    """Keys of a tile."""
    num_ctas: int
    """Programs of the grid."""
    min_tiles: int
    """Below so many tiles no program takes a part: adding parts up costs time too."""
    num_warps: int
    num_stages: int
    is_fused: bool
    """Whether the decode kernel itself rotates, and stores the newest key and value, where it can."""


@dataclass(frozen=True, slots=True)
class PrefillTuning:
    """How prompts are cut."""

    block_m: int
    """Queries times query heads of a key-value head."""
    block_n: int
    num_warps: int
    num_stages: int
    has_boxes: bool


@dataclass(frozen=True, slots=True)
class Tuning:
    """Of all kernels."""

    decode: DecodeTuning
    prefill: PrefillTuning
    write_heads: int = 16
    """Heads that one program rotates and stores."""
    decode_few: tuple[tuple[int, DecodeTuning], ...] = ()
    """In place of `decode`, for up to so many rows, ascending."""

    def decode_for(self, num_rows: int) -> DecodeTuning:
        """Return the tuning for a step."""
        return next((tuning for most, tuning in self.decode_few if num_rows <= most), self.decode)

    @property
    def most_ctas(self) -> int:
        """Programs of the largest grid of a decode."""
        return max(self.decode.num_ctas, *(tuning.num_ctas for _, tuning in self.decode_few), 0)


FOR_INTERPRETER: Final = Tuning(
    DecodeTuning(block_n=32, num_ctas=6, min_tiles=1, num_warps=1, num_stages=1, is_fused=True),
    PrefillTuning(block_m=128, block_n=64, num_warps=1, num_stages=1, has_boxes=False),
    write_heads=512,
)
"""Few programs, as they run one after another."""


def describe_card(device: torch.device) -> Card:
    """Ask the driver; what is not CUDA is Triton's interpreter."""
    if device.type != "cuda":
        return NO_CARD
    properties: Any = torch.cuda.get_device_properties(device)
    return Card(
        num_sms=properties.multi_processor_count,
        capability=(properties.major, properties.minor),
        shared_bytes=properties.shared_memory_per_block_optin,
    )


def choose_tuning(card: Card, head_dim: int, block_size: int, kv_itemsize: int) -> Tuning:
    """Choose for a cache.

    :param head_dim: padded to a power of two.
    :param kv_itemsize: bytes of a number of the cache.
    """
    if card == NO_CARD:
        return FOR_INTERPRETER
    key_bytes = 2 * head_dim * kv_itemsize
    # The best of some twenty on an H200.  For very few rows one program with deep buffers on each
    # multiprocessor was as fast by itself, but at batch 1 a step with it took 0.4 ms longer: perhaps for
    # want of room beside the kernels in front and behind.
    some, many = (
        _choose_decode(card, key_bytes, block_size, per_sm=per_sm, num_stages=stages, num_warps=warps)
        for per_sm, stages, warps in ((2, 4, 4), (4, 2, 2))
    )
    return Tuning(
        many,
        _choose_prefill(card, head_dim, block_size, kv_itemsize),
        decode_few=((16, many), (48, some)),
    )


MAX_RING: Final = 6
"""Stages beyond which nothing was gained."""
RING_KEYS: Final = 64
RING_SCRATCH: Final = 128
"""Bytes for each number of a head that the programs of `decode_hopper` take beside their ring."""
RESERVED_BYTES: Final = 1 << 10
"""Of a multiprocessor's shared memory, by each program."""


def tune_ring(card: Card, head_dim: int) -> DecodeTuning:
    """Choose for `decode_hopper`, with numbers of two bytes.

    Two programs on a multiprocessor with as many stages as fit: on an H200 the fastest of five from 32
    rows on.
    """
    per_sm = 2
    shared = (card.shared_bytes + RESERVED_BYTES) // per_sm - RESERVED_BYTES
    room = shared - RING_SCRATCH * head_dim - RESERVED_BYTES
    return DecodeTuning(
        block_n=RING_KEYS,
        num_ctas=per_sm * card.num_sms,
        min_tiles=1,
        num_warps=4,
        num_stages=min(MAX_RING, room // (4 * RING_KEYS * head_dim)),
        is_fused=True,
    )


def _choose_decode(
    card: Card, key_bytes: int, block_size: int, *, per_sm: int, num_stages: int, num_warps: int
) -> DecodeTuning:
    """Make a tuning that fits: of several stages, all but one are buffers in shared memory."""
    block_n = max(16, min(64, STAGE_BYTES // key_bytes))
    while num_stages > 2 and per_sm * (num_stages - 1) * block_n * key_bytes > card.shared_bytes:
        num_stages -= 1
    while per_sm > 1 and per_sm * (num_stages - 1) * block_n * key_bytes > card.shared_bytes:
        per_sm -= 1
    return DecodeTuning(
        block_n=min(block_n, block_size) if block_size >= 32 else block_n,
        num_ctas=per_sm * card.num_sms,
        min_tiles=1,
        num_warps=num_warps,
        num_stages=num_stages,
        is_fused=True,
    )


def _choose_prefill(card: Card, head_dim: int, block_size: int, kv_itemsize: int) -> PrefillTuning:
    itemsize = max(kv_itemsize, 2)  # of the model, unless that is float32 over a cache of FP8
    if itemsize == 4:  # products without matrix units keep their operands in registers
        return PrefillTuning(block_m=32, block_n=16, num_warps=4, num_stages=1, has_boxes=False)
    block_n = max(16, min(64, STAGE_BYTES // (head_dim * itemsize)))
    stage_bytes = 2 * block_n * head_dim * kv_itemsize

    def count_stages(block_m: int) -> int:
        return (card.shared_bytes - block_m * head_dim * itemsize) // stage_bytes

    # Hopper multiplies 64 rows at a time, by four warps.
    block_m = 128 if card.capability >= (9, 0) and count_stages(128) >= 1 else 64
    return PrefillTuning(
        block_m=block_m,
        block_n=block_n,
        num_warps=8 if block_m == 128 else 4,
        num_stages=max(1, min(3, count_stages(block_m))),
        has_boxes=card.has_boxes and block_n <= block_size and kv_itemsize == 2,
    )

"""Launches of the kernels for Hopper, where keys and values travel by the tensor memory accelerator."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

import torch
import triton

from plugins.attention.triton import decode_hopper, prefill_hopper
from plugins.attention.triton.tuning import tune_ring

if TYPE_CHECKING:
    from collections.abc import Sequence

    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from core.batch import StepBatch
    from core.interfaces import AttentionSpec, KVCacheSpec
    from plugins.attention.triton.backend import Layer, Workspace
    from plugins.attention.triton.tuning import Card, DecodeTuning

FEW_ROWS: Final = 16
"""Up to so many rows it takes longer in place, if not by itself: with a ring in shared memory, the kernel
behind cannot start early.  At batch 1 a step of an 8B model took 0.28 ms longer on an H200."""
WIDE_GROUP: Final = 8
"""With more query heads the decode kernel needs room that is a stage of its ring."""
ALIGNMENT: Final = 16
"""Bytes: of whatever the accelerator copies."""
DECODE_REGISTERS: Final = 128
"""Of a thread on average: two programs share a multiprocessor."""


class Boxes(NamedTuple):
    """Descriptors of the cache of one layer."""

    k_of_decode: TensorDescriptor
    v_of_decode: TensorDescriptor
    k_of_prefill: TensorDescriptor
    v_of_prefill: TensorDescriptor


def serves_cache(card: Card, spec: KVCacheSpec) -> bool:
    """Whether there are kernels for a cache: of numbers of two bytes, in boxes of 64 by 64."""
    return (
        card.capability == (9, 0)
        and spec.dtype in {torch.bfloat16, torch.float16}
        and spec.head_dim in {64, 128}
        and spec.block_size % prefill_hopper.BOX.value == 0
    )


class HopperLaunches:
    """Launches over one cache.

    :param layers: of the cache.
    """

    def __init__(self, spec: KVCacheSpec, layers: Sequence[Layer], card: Card) -> None:
        self._spec = spec
        self._num_sms = card.num_sms
        self.ring = tune_ring(card, spec.head_dim)
        """Of all decodes that it launches: beside prompts, each tuning is a kernel to compile."""
        self._boxes = [
            Boxes(
                decode_hopper.make_boxes(layer.k),
                decode_hopper.make_boxes(layer.v),
                prefill_hopper.make_boxes(layer.k),
                prefill_hopper.make_boxes(layer.v),
            )
            for layer in layers
        ]
        self._counters = torch.zeros(2, dtype=torch.int32, device=spec.device)

    # --- decode ------------------------------------------------------------------------------------

    def can_decode(self, spec: AttentionSpec, num_rows: int, *, is_fused: bool) -> bool:
        """Whether the kernel serves a layer, and is worth it."""
        is_worth_it = num_rows > FEW_ROWS or not is_fused
        return is_worth_it and spec.softcap is None

    def decode(
        self,
        q: torch.Tensor,
        out: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor] | None,
        spec: AttentionSpec,
        *,
        batch: StepBatch,
        layer: Layer,
        work: Workspace,
        plan: torch.Tensor,
        window: int,
        is_early: bool,
    ) -> None:
        """Attend in the rows with one query, as `decode` does."""
        boxes, group = self._boxes[spec.layer], spec.num_heads // spec.num_kv_heads
        cos, sin = rotary or (None, None)
        tuning = self.ring
        decode_hopper.decode_hopper[(tuning.num_ctas,)](
            q, out, boxes.k_of_decode, boxes.v_of_decode, layer.k, layer.v, cos, sin,
            plan, batch.query_starts, batch.seq_lens, batch.slots, batch.block_tables,
            work.parts, work.stats, work.counters,
            q.stride(0), batch.block_tables.stride(0), batch.num_rows, window, int(is_early), spec.scale,
            spec.num_kv_heads, group, spec.head_dim, self._spec.block_size,
            tuning.num_ctas, tuning.min_tiles, num_stages(tuning, group),
            rotary is not None,
            num_warps=tuning.num_warps, maxnreg=DECODE_REGISTERS, launch_pdl=True,
        )  # fmt: skip

    # --- prefill -----------------------------------------------------------------------------------

    def can_prefill(self, q: torch.Tensor, spec: AttentionSpec) -> bool:
        """Whether the kernel serves a layer, and these queries: [T, ...]."""
        return (
            spec.softcap is None
            and spec.window is None
            and q.data_ptr() % ALIGNMENT == 0
            and q.stride(0) * q.element_size() % ALIGNMENT == 0
        )

    def tokens_of_block(self, group: int) -> int:
        """Count the tokens whose queries one program takes at once."""
        return int(
            prefill_hopper.NUM_GROUPS.value * prefill_hopper.ROWS.value // triton.next_power_of_2(group)
        )

    def prefill(
        self,
        q: torch.Tensor,
        out: torch.Tensor,
        spec: AttentionSpec,
        batch: StepBatch,
        *,
        plan: torch.Tensor,
        num_blocks: int,
        is_early: bool,
    ) -> None:
        """Attend in the rows with several queries, as `prefill` does.

        :param q: [T, ...], each row beginning with its H heads.
        :param plan: for blocks of `tokens_of_block`.
        :param num_blocks: at least as many as there are.
        :param is_early: the plan is older than the kernel in front.
        """
        boxes, group = self._boxes[spec.layer], spec.num_heads // spec.num_kv_heads
        padded = triton.next_power_of_2(group)
        queries = prefill_hopper.make_query_boxes(q, spec.num_heads, padded, spec.head_dim)
        prefill_hopper.prefill_hopper[(min(num_blocks * spec.num_kv_heads, self._num_sms),)](
            queries, boxes.k_of_prefill, boxes.v_of_prefill, out,
            plan, batch.query_starts, batch.seq_lens, batch.block_tables, self._counters,
            batch.block_tables.stride(0), batch.num_rows, int(is_early), spec.scale,
            spec.num_kv_heads, group, padded, spec.head_dim, self._spec.block_size,
            num_warps=4, launch_pdl=True,
        )  # fmt: skip


def num_stages(ring: DecodeTuning, group: int) -> int:
    """Count the stages for a number of query heads of a key-value head."""
    return ring.num_stages - (group > WIDE_GROUP)

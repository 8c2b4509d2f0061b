"""The backend: owns the cache and decides which kernels a step needs.

A step in which every row has one query needs the decode kernel alone, if rotation is left to it.
Any other step first writes keys and values to their pages; then the decode kernel takes the rows with one
query and the prefill kernel those with several.  Both learn the lengths on the device.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from plugins.attention.triton.decode import NUM_QUERY_ROWS, decode
from plugins.attention.triton.plan import plan_decodes, plan_prompts
from plugins.attention.triton.prefill import prefill
from plugins.attention.triton.tuning import Card, DecodeTuning, Tuning, choose_tuning, describe_card
from plugins.attention.triton.write import write

if TYPE_CHECKING:
    from core.batch import StepBatch
    from core.interfaces import AttentionSpec, KVCacheSpec
    from plugins.attention.triton.hopper import HopperLaunches

NO_WINDOW: Final = 1 << 30
FP8: Final = torch.float8_e4m3fn
PLAN_BLOCK: Final = 1024


@dataclass(slots=True)
class Layer:
    """The cache of one layer, in the forms in which kernels take it."""

    k: torch.Tensor
    """[num_blocks, G, block_size, D]; bytes, if it holds FP8."""
    v: torch.Tensor
    k_scales: torch.Tensor | None = None
    """[G] float32."""
    v_scales: torch.Tensor | None = None
    k_boxes: Any = None
    """A `TensorDescriptor`, where the card has them."""
    v_boxes: Any = None


@dataclass(frozen=True, slots=True)
class Workspace:
    """What programs of the decode kernel leave for one another."""

    parts: torch.Tensor
    stats: torch.Tensor
    counters: torch.Tensor


@dataclass(slots=True)
class StepMeta:
    """What all layers of a step share."""

    batch: StepBatch
    has_prompts: bool
    """Whether a row may have several queries."""
    has_decodes: bool
    """Whether a row may have one."""
    decode_plans: dict[tuple[int, bool, bool], torch.Tensor] = field(default_factory=dict)
    """By window, whether the decode kernel is fused and whether it is Hopper's; made when first wanted."""
    prefill_plans: dict[int, tuple[torch.Tensor, int]] = field(default_factory=dict)
    """By queries of a block: the plan and at least as many blocks as there are."""


class TritonAttention:
    """Attention on CUDA devices; fulfils `core.interfaces.AttentionBackend`.

    Its optional parts too: `SupportsQuantizedKV`, `SupportsCudaGraph` and `SupportsRotary`.  Steps must
    follow one another in one stream, since they share the workspace of the decodes.

    :param tuning: sizes of tiles and grids; by default what suits the device and the cache, and on Hopper
        kernels of its own where they can serve.
    """

    can_capture = True
    _spec: KVCacheSpec
    _card: Card
    _layers: list[Layer]
    _workspace: Workspace
    _hopper: HopperLaunches | None = None

    def __init__(self, tuning: Tuning | None = None) -> None:
        self._wanted_tuning = tuning

    # --- the cache ---------------------------------------------------------------------------------

    def allocate_cache(self, spec: KVCacheSpec, /) -> None:
        """Allocate, or allocate anew, the pages of all layers, and the workspace."""
        self._layers, self._hopper = [], None  # the old pages must be gone first
        self._spec = spec
        self._card = describe_card(spec.device)
        self._is_narrow = spec.dtype == FP8
        self._has_fp8 = self._card.has_fp8
        self._has_pdl = self._card.has_pdl
        self._padded_dim = triton.next_power_of_2(spec.head_dim)
        self._padded_half = triton.next_power_of_2(spec.head_dim // 2)
        self._tuning = self._wanted_tuning or choose_tuning(
            self._card, self._padded_dim, spec.block_size, spec.dtype.itemsize
        )
        page = (spec.num_kv_heads, spec.block_size, spec.head_dim)
        cache = torch.empty(
            (spec.num_layers, 2, spec.num_blocks, *page),
            dtype=torch.uint8 if self._is_narrow else spec.dtype,
            device=spec.device,
        )
        self._layers = [Layer(*layer.unbind()) for layer in cache.unbind()]
        if self._tuning.prefill.has_boxes:
            for layer in self._layers:
                layer.k_boxes, layer.v_boxes = self._boxes(layer.k), self._boxes(layer.v)
        self._hopper = self._make_hopper(spec) if self._wanted_tuning is None else None
        self._allocate_workspace()

    def _make_hopper(self, spec: KVCacheSpec) -> HopperLaunches | None:
        if self._card.capability != (9, 0):
            return None
        # Other cards have no use for Gluon, and interpreted kernels none either.
        from plugins.attention.triton import hopper  # noqa: PLC0415

        if not hopper.serves_cache(self._card, spec):
            return None
        return hopper.HopperLaunches(spec, self._layers, self._card)

    def _boxes(self, pages: torch.Tensor) -> TensorDescriptor:
        rows = pages.flatten(0, 2)
        return TensorDescriptor.from_tensor(rows, [self._tuning.prefill.block_n, self._padded_dim])

    def _allocate_workspace(self) -> None:
        most_ctas = max(self._tuning.most_ctas, self._hopper.ring.num_ctas if self._hopper else 0)
        num_slots, device = 2 * most_ctas, self._spec.device
        shape = (num_slots, NUM_QUERY_ROWS.value, self._padded_dim)
        self._workspace = Workspace(
            parts=torch.empty(shape, dtype=torch.float32, device=device),
            stats=torch.empty((num_slots, 2, shape[1]), dtype=torch.float32, device=device),
            counters=torch.zeros(num_slots // 2, dtype=torch.int32, device=device),
        )

    def cache_bytes_per_block(self, spec: KVCacheSpec, /) -> int:
        """Bytes of one block over all layers; `spec.num_blocks` is ignored."""
        num_elements = spec.num_kv_heads * spec.block_size * spec.head_dim
        return spec.num_layers * 2 * num_elements * spec.dtype.itemsize

    def set_kv_scales(self, k_scales: torch.Tensor, v_scales: torch.Tensor, /) -> None:
        """Take the factors by which stored values are multiplied when they are read.

        :param k_scales: [layers, G] float32.
        :param v_scales: [layers, G] float32.
        """
        scales = torch.stack((k_scales, v_scales), dim=1).to(self._spec.device).contiguous()
        for layer, (of_keys, of_values) in zip(self._layers, scales, strict=True):
            layer.k_scales, layer.v_scales = of_keys, of_values

    # --- steps -------------------------------------------------------------------------------------

    def prepare(self, batch: StepBatch, /) -> StepMeta:
        """Note which kernels a step needs; where its work is cut is computed with the first layer."""
        is_decode = batch.num_decodes == batch.num_rows
        # Rows of a captured step, for which the lists are empty, may come to be of either kind.
        has_decodes = is_decode or not batch.counts or 1 in batch.counts
        return StepMeta(batch, has_prompts=not is_decode, has_decodes=has_decodes)

    @torch.no_grad()
    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        spec: AttentionSpec,
        meta: StepMeta,
        /,
    ) -> torch.Tensor:
        """Store k and v at the batch's slots, then attend.

        :param q: [T, H, D] after rotary embedding.
        :param k: [T, G, D] after rotary embedding.
        :param v: [T, G, D].
        :return: [T, H, D] in q's dtype.
        """
        q, k, v = (_with_dense_heads(x) for x in (q, k, v))
        self._write((q, k, v), None, spec, meta)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        self._attend(q, out, spec, meta)
        return out

    def rotary_objections(self, spec: AttentionSpec, rotary_dim: int, /) -> list[str]:
        """Every reason why it cannot rotate for a layer; empty if it can."""
        if rotary_dim % 2 or not 0 < rotary_dim <= spec.head_dim:
            return [f"rotary_dim {rotary_dim} is no even number from 2 to head_dim {spec.head_dim}"]
        return []

    @torch.no_grad()
    def forward_rotary(
        self,
        qkv: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        spec: AttentionSpec,
        meta: StepMeta,
        /,
    ) -> torch.Tensor:
        """Rotate queries and keys, store keys and values, then attend.

        :param qkv: [T, (H + 2 G) · D], contiguous; overwritten.
        :param cos: [L, R / 2] in qkv's dtype, by position.
        :param sin: as `cos`.
        :return: [T, H · D] in qkv's dtype.
        """
        size = spec.num_heads * spec.head_dim
        out = torch.empty((qkv.shape[0], size), dtype=qkv.dtype, device=qkv.device)
        is_whole = 2 * cos.shape[1] == spec.head_dim
        if is_whole and self._tuning.decode.is_fused and not meta.has_prompts:
            self._decode(qkv, out, (cos, sin), spec, meta)
            return out
        k = qkv[:, size:]
        v = qkv[:, size + spec.num_kv_heads * spec.head_dim :]
        self._write((qkv, k, v), (cos, sin), spec, meta)
        self._attend(qkv, out, spec, meta)
        return out

    def _write(
        self,
        qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        rotary: tuple[torch.Tensor, torch.Tensor] | None,
        spec: AttentionSpec,
        meta: StepMeta,
    ) -> None:
        """Store keys and values; with `rotary`, rotate queries in place and keys on the way."""
        layer, batch = self._layers[spec.layer], meta.batch
        (q, k, v), (cos, sin) = qkv, rotary or (None, None)
        num_tokens, block_h = q.shape[0], self._tuning.write_heads
        num_programs = triton.cdiv(num_tokens * spec.num_kv_heads, block_h)
        if cos is not None:
            num_programs += triton.cdiv(num_tokens * spec.num_heads, block_h)
        write[(num_programs,)](
            q, k, v, layer.k, layer.v, layer.k_scales, layer.v_scales, cos, sin,
            batch.positions, batch.slots, num_tokens, q.stride(0), k.stride(0), v.stride(0),
            spec.num_kv_heads, spec.num_heads, spec.head_dim,
            0 if cos is None else 2 * cos.shape[1],
            self._spec.block_size, block_h, self._is_narrow, layer.k_scales is not None,
            self._has_pdl, num_warps=4, launch_pdl=self._has_pdl,
        )  # fmt: skip

    def _attend(self, q: torch.Tensor, out: torch.Tensor, spec: AttentionSpec, meta: StepMeta) -> None:
        """Attend over what has been written."""
        if meta.has_decodes:
            self._decode(q, out, None, spec, meta)
        if meta.has_prompts:
            self._prefill(q, out, spec, meta)

    def _decode(
        self,
        q: torch.Tensor,
        out: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor] | None,
        spec: AttentionSpec,
        meta: StepMeta,
    ) -> None:
        """Attend in the rows with one query; with `rotary` in the fused form."""
        layer, batch, work = self._layers[spec.layer], meta.batch, self._workspace
        cos, sin = rotary or (None, None)
        window = spec.window or NO_WINDOW
        is_fused = cos is not None
        hopper = self._hopper
        if hopper is not None and not hopper.can_decode(spec, batch.num_rows, is_fused=is_fused):
            hopper = None
        tuning = self._decode_tuning(batch, is_fused=is_fused) if hopper is None else hopper.ring
        key = window, is_fused, hopper is not None
        plan = meta.decode_plans.get(key)
        # A plan made just now is the kernel in front, and must be waited for.
        is_early = plan is not None
        if plan is None:
            plan = meta.decode_plans[key] = self._plan_decodes(batch, window, tuning, is_fused=is_fused)
        if hopper is not None:
            hopper.decode(
                q, out, rotary, spec, batch=batch, layer=layer, work=work, plan=plan,
                window=window, is_early=is_early,
            )  # fmt: skip
            return
        decode[(tuning.num_ctas,)](
            q, out, layer.k, layer.v, layer.k_scales, layer.v_scales, cos, sin,
            plan, batch.query_starts, batch.seq_lens, batch.slots, batch.block_tables,
            work.parts, work.stats, work.counters,
            q.stride(0), batch.block_tables.stride(0), batch.num_rows, window, int(is_early), spec.scale,
            spec.num_kv_heads, spec.num_heads // spec.num_kv_heads, spec.head_dim,
            self._padded_half, self._padded_dim, self._spec.block_size,
            tuning.block_n, tuning.num_ctas, tuning.min_tiles, tuning.num_stages,
            spec.softcap or 0.0, is_fused, self._is_narrow, layer.k_scales is not None,
            self._has_fp8, self._has_pdl,
            num_warps=tuning.num_warps, launch_pdl=self._has_pdl,
        )  # fmt: skip

    def _decode_tuning(self, batch: StepBatch, *, is_fused: bool) -> DecodeTuning:
        """Choose by the number of rows; beside prompts always the same, for each is a kernel to compile."""
        return self._tuning.decode_for(batch.num_rows) if is_fused else self._tuning.decode

    def _plan_decodes(
        self, batch: StepBatch, window: int, tuning: DecodeTuning, *, is_fused: bool
    ) -> torch.Tensor:
        size = batch.num_rows + 1 + tuning.num_ctas
        plan = torch.empty(size, dtype=torch.int32, device=self._spec.device)
        plan_decodes[(1,)](
            batch.seq_lens, batch.query_starts, plan, batch.num_rows, window,
            self._spec.num_kv_heads, tuning.block_n, tuning.num_ctas, tuning.min_tiles, is_fused,
            PLAN_BLOCK, self._has_pdl, launch_pdl=self._has_pdl,
        )  # fmt: skip
        return plan

    def _prefill(self, q: torch.Tensor, out: torch.Tensor, spec: AttentionSpec, meta: StepMeta) -> None:
        """Attend in the rows with several queries."""
        layer, batch, tuning = self._layers[spec.layer], meta.batch, self._tuning.prefill
        group = spec.num_heads // spec.num_kv_heads
        hopper = (
            self._hopper if self._hopper is not None and self._hopper.can_prefill(q, spec) else None
        )
        block_tokens = tuning.block_m // group if hopper is None else hopper.tokens_of_block(group)
        is_early = block_tokens in meta.prefill_plans
        if not is_early:
            meta.prefill_plans[block_tokens] = self._plan_prompts(batch, block_tokens)
        plan, num_blocks = meta.prefill_plans[block_tokens]
        if hopper is not None:
            hopper.prefill(q, out, spec, batch, plan=plan, num_blocks=num_blocks, is_early=is_early)
            return
        prefill[(num_blocks * spec.num_kv_heads,)](
            q, out, layer.k, layer.v, layer.k_boxes, layer.v_boxes, layer.k_scales, layer.v_scales,
            plan, batch.query_starts, batch.seq_lens, batch.block_tables,
            q.stride(0), batch.block_tables.stride(0), batch.num_rows, spec.window or NO_WINDOW, spec.scale,
            spec.num_kv_heads, group, spec.head_dim, self._padded_dim, self._spec.block_size,
            tuning.block_m, tuning.block_n, tuning.num_stages,
            spec.softcap or 0.0, spec.window is not None, self._is_narrow, layer.k_scales is not None,
            self._has_fp8, layer.k_boxes is not None, self._has_pdl,
            num_warps=tuning.num_warps, launch_pdl=self._has_pdl,
        )  # fmt: skip

    def _plan_prompts(self, batch: StepBatch, block_tokens: int) -> tuple[torch.Tensor, int]:
        num_blocks = batch.num_tokens // block_tokens + batch.num_rows
        size = batch.num_rows + 1 + num_blocks
        plan = torch.empty(size, dtype=torch.int32, device=self._spec.device)
        plan_prompts[(1,)](
            batch.query_starts, plan, batch.num_rows, num_blocks, block_tokens,
            PLAN_BLOCK, self._has_pdl, launch_pdl=self._has_pdl,
        )  # fmt: skip
        return plan, num_blocks


def _with_dense_heads(x: torch.Tensor) -> torch.Tensor:
    """Return [T, N, D] as it is, if the heads of a token lie one behind the other, else a copy."""
    return x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous()

"""The backend: owns the cache, and keeps FlashInfer's wrappers for each kind of layer.

A wrapper has to be told a step's lengths before it runs, and is told by way of the host: it *plans*.  So
each kind of layer (heads, scale, window, softcap) has wrappers of its own, which are planned when the first
such layer of a step is reached.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch

from plugins.attention.flashinfer.pages import Layout, Rows, lay_out

if TYPE_CHECKING:
    from core.batch import StepBatch
    from core.interfaces import AttentionSpec, KVCacheSpec

KV_LAYOUT: Final = "HND"
"""Pages of a head lie together: [num_blocks, G, block_size, D]."""
MIN_WORKSPACE_BYTES: Final = 128 << 20
"""What the library's documentation recommends."""
MAX_TILE_ROWS: Final = 128
"""Queries of the library's largest tile."""
CTAS_PER_SM: Final = 2
"""Of the grid for which the library splits keys."""


class LayerKind(NamedTuple):
    """What layers must have in common to share a plan."""

    num_heads: int
    scale: float
    window: int | None
    softcap: float | None


class Wrappers:
    """The library's wrappers for layers of one kind: for rows with one query, and for those with several.

    :param library: the module `flashinfer`.
    :param workspace: bytes on the device, which steps that follow one another in a stream may share.
    """

    def __init__(
        self, library: Any, kind: LayerKind, cache: KVCacheSpec, workspace: torch.Tensor
    ) -> None:
        self._kind = kind
        self._cache = cache
        # Several heads over one of keys fill a matrix unit, and one head costs no more than without.
        self._decode = library.BatchDecodeWithPagedKVCacheWrapper(
            workspace, KV_LAYOUT, use_tensor_cores=True
        )
        self._prefill = library.BatchPrefillWithPagedKVCacheWrapper(workspace, KV_LAYOUT)
        self._planned: Layout | None = None
        self._copied: torch.cuda.Event | None = None
        self._compile()

    def _compile(self) -> None:
        """Plan a row of either sort, so that a kernel is compiled now and not in the midst of serving."""
        one = torch.ones(1, dtype=torch.int32)
        starts = torch.tensor([0, 1], dtype=torch.int32)
        pages = torch.zeros(1, dtype=torch.int32, device=self._cache.device)
        rows = Rows(slice(0, 1), starts, starts, one, 1, pages)
        self._plan_decodes(rows)
        self._plan_prompts(rows)
        self._note_copy()

    def plan(self, layout: Layout) -> None:
        """Plan a step, unless it is the one that was planned last."""
        if self._planned is layout:
            return
        self._planned = None
        if self._copied is not None:
            # A plan is copied to the device from pinned memory that the next one overwrites.
            self._copied.synchronize()
        if layout.decodes is not None:
            self._plan_decodes(layout.decodes)
        if layout.prompts is not None:
            self._plan_prompts(layout.prompts)
        self._note_copy()
        self._planned = layout

    def _note_copy(self) -> None:
        if self._cache.device.type == "cuda":
            self._copied = self._copied or torch.cuda.Event()
            self._copied.record()

    def _plan_decodes(self, rows: Rows) -> None:
        self._decode.plan(
            rows.page_starts,
            rows.pages,
            rows.last_lens,
            self._kind.num_heads,
            self._cache.num_kv_heads,
            self._cache.head_dim,
            self._cache.block_size,
            **self._options(),
        )

    def _plan_prompts(self, rows: Rows) -> None:
        self._prefill.plan(
            rows.query_starts,
            rows.page_starts,
            rows.pages,
            rows.last_lens,
            self._kind.num_heads,
            self._cache.num_kv_heads,
            self._cache.head_dim,
            self._cache.block_size,
            causal=True,
            max_token_per_sequence=rows.longest,
            **self._options(),
        )

    def _options(self) -> dict[str, Any]:
        kind, dtype = self._kind, self._cache.dtype
        return {
            # The library counts the keys before a query's own.
            "window_left": -1 if kind.window is None else kind.window - 1,
            "logits_soft_cap": kind.softcap,
            "sm_scale": kind.scale,
            "q_data_type": dtype,
            "kv_data_type": dtype,
        }

    def run(
        self, q: torch.Tensor, pages: tuple[torch.Tensor, torch.Tensor], layout: Layout
    ) -> torch.Tensor:
        """Attend in all rows of the step that was planned last.

        :param q: [T, H, D].
        :param pages: of keys and of values, each [num_blocks, G, block_size, D].
        :return: [T, H, D].
        """
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        for wrapper, rows in ((self._decode, layout.decodes), (self._prefill, layout.prompts)):
            if rows is not None:
                wrapper.run(q[rows.tokens], pages, out=out[rows.tokens])
        return out


class FlashInferAttention:
    """Attention by FlashInfer; fulfils `core.interfaces.AttentionBackend`.

    Steps must follow one another in one stream, since they share a workspace.

    :param library: the module `flashinfer`.
    """

    can_capture = False
    """A plan depends on lengths that the host has to know, and a captured step learns them on the device."""
    _spec: KVCacheSpec
    _cache: torch.Tensor
    """[layers, 2, num_blocks, G, block_size, D], left uninitialised."""
    _workspace: torch.Tensor
    _wrappers: dict[LayerKind, Wrappers]

    def __init__(self, library: Any) -> None:
        self._library = library

    def allocate_cache(self, spec: KVCacheSpec, /) -> None:
        """Allocate, or allocate anew, the pages of all layers, and the workspace."""
        self._wrappers = {}  # the old ones must be gone first, and what they hold
        self._cache = self._workspace = torch.empty(0)
        self._spec = spec
        page = (spec.num_kv_heads, spec.block_size, spec.head_dim)
        self._cache = torch.empty(
            (spec.num_layers, 2, spec.num_blocks, *page), dtype=spec.dtype, device=spec.device
        )
        self._workspace = self._make_workspace(MIN_WORKSPACE_BYTES)

    def _make_workspace(self, size: int) -> torch.Tensor:
        # The library wants zeros.
        return torch.zeros(size, dtype=torch.uint8, device=self._spec.device)

    def cache_bytes_per_block(self, spec: KVCacheSpec, /) -> int:
        """Bytes of one block over all layers; `spec.num_blocks` is ignored."""
        num_elements = spec.num_kv_heads * spec.block_size * spec.head_dim
        return spec.num_layers * 2 * num_elements * spec.dtype.itemsize

    def prepare(self, batch: StepBatch, /) -> Layout:
        """List the pages of the step's rows; plans are made when the first layer of a kind is reached."""
        return lay_out(batch, self._spec.block_size)

    @torch.no_grad()
    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        spec: AttentionSpec,
        meta: Layout,
        /,
    ) -> torch.Tensor:
        """Store k and v at the batch's slots, then attend.

        :param q: [T, H, D] after rotary embedding.
        :param k: [T, G, D] after rotary embedding.
        :param v: [T, G, D].
        :return: [T, H, D] in q's dtype.
        """
        k_pages, v_pages = self._cache[spec.layer]
        self._append(k, v, (k_pages, v_pages), meta)
        wrappers = self._wrappers_for(spec)
        wrappers.plan(meta)
        return wrappers.run(q, (k_pages, v_pages), meta)

    def _append(
        self, k: torch.Tensor, v: torch.Tensor, pages: tuple[torch.Tensor, torch.Tensor], layout: Layout
    ) -> None:
        place = layout.placement
        self._library.append_paged_kv_cache(
            k,
            v,
            place.rows,
            place.positions,
            pages,
            place.pages,
            place.page_starts,
            place.last_lens,
            kv_layout=KV_LAYOUT,
        )

    def _wrappers_for(self, spec: AttentionSpec) -> Wrappers:
        kind = LayerKind(spec.num_heads, spec.scale, spec.window, spec.softcap)
        if kind not in self._wrappers:
            size = workspace_bytes(kind.num_heads, self._spec, num_sms_of(self._spec.device))
            if size > len(self._workspace):
                self._workspace = self._make_workspace(size)
            self._wrappers[kind] = Wrappers(self._library, kind, self._spec, self._workspace)
        return self._wrappers[kind]


def workspace_bytes(num_heads: int, cache: KVCacheSpec, num_sms: int) -> int:
    """Bound what the library needs for the parts of rows whose keys it splits.

    After `PrefillPlan` in its `scheduler.cuh`: it splits only as long as the parts of all key-value heads
    fit into one grid, and has an output and a sum in float32 for each query of a tile, in each head.
    """
    num_parts = max(1, CTAS_PER_SM * num_sms // cache.num_kv_heads)
    return num_heads * num_parts * MAX_TILE_ROWS * (cache.head_dim + 1) * 4 + 32


def num_sms_of(device: torch.device) -> int:
    """Multiprocessors of a GPU; 0 elsewhere."""
    if device.type != "cuda":
        return 0
    return int(torch.cuda.get_device_properties(device).multi_processor_count)

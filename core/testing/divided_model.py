"""A small model with random weights: run as a whole, and divided over simulated ranks."""

from __future__ import annotations

import queue
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any

import torch
from hypothesis import strategies as st
from safetensors.torch import save_file

from core.model.decoder import make_decoder
from core.model.linear import PlainScheme
from core.model.spec import LayerSpec, ModelSpec, RopeSpec
from core.model.weights import SINGLE_FILE, load_weights
from core.sharding import Share, Span, divide
from core.testing.attention import dense_attention
from core.testing.simulated_ranks import Meeting, SimulatedPipeline, SimulatedTensorParallel

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from core.interfaces import AttentionSpec, KVCacheSpec, TensorParallel
    from core.model.decoder import Decoder

CPU = torch.device("cpu")


class WholeSequence:
    """Fulfils `core.interfaces.AttentionBackend` for one sequence that is computed at once."""

    def allocate_cache(self, spec: KVCacheSpec, /) -> None:
        """Do nothing: there is no cache."""

    def cache_bytes_per_block(self, spec: KVCacheSpec, /) -> int:
        """Return 0."""
        return 0

    def prepare(self, batch: Any, /) -> None:
        """Do nothing: positions begin at 0."""

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec, meta: Any, /
    ) -> torch.Tensor:
        """Attend as the formula is written."""
        return dense_attention(q, k, v, spec, 0).to(q.dtype)


def make_model(
    spec: ModelSpec,
    *,
    share: Share | None = None,
    tensor: TensorParallel | None = None,
    dtype: torch.dtype = torch.float64,
    max_len: int = 64,
) -> Decoder:
    """Make an empty decoder on the host, whole or a rank's part, for one sequence at a time."""
    return make_decoder(
        spec,
        scheme=PlainScheme(),
        attention=WholeSequence(),
        dtype=dtype,
        device=CPU,
        max_len=max_len,
        share=share,
        tensor=tensor,
    )


def save_random_weights(spec: ModelSpec, folder: Path, seed: int) -> Path:
    """Write a checkpoint of a model, weights only, in float64.

    :return: `folder`.
    """
    generator = torch.Generator().manual_seed(seed)
    decoder = make_model(spec)
    tensors: dict[str, torch.Tensor] = {}

    def add(name: str, shape: Sequence[int]) -> None:
        noise = torch.randn(*shape, generator=generator, dtype=torch.float64)
        tensors[name] = noise * shape[-1] ** -0.5 if len(shape) > 1 else 1 + 0.3 * noise

    for weight in decoder.plain_weights():
        add(weight.name, weight.whole_shape)
    for linear, scheme in decoder.whole_linears():
        for shard, (prefix, _) in enumerate(linear.shards):
            for suffix, tensor in scheme.tensors(linear, shard).items():
                add(f"{prefix}.{suffix}", tensor.shape)
    save_file(tensors, folder / SINGLE_FILE)
    return folder


@torch.inference_mode()
def run_whole(
    spec: ModelSpec, folder: Path, tokens: Sequence[int], *, dtype: torch.dtype = torch.float64
) -> torch.Tensor:
    """Compute the logits of one sequence on one rank.

    :return: [T, vocab] float32, or float64 of a float64 model.
    """
    decoder = make_model(spec, dtype=dtype, max_len=max(64, len(tokens)))
    load_weights(decoder, folder, device=CPU)
    return decoder.logits(decoder(torch.tensor(tokens), torch.arange(len(tokens)), None))


def split_by_kv_heads(spec: ModelSpec, size: int, step: int = 1) -> tuple[Share, ...]:
    """Divide all layers, heads by whole groups: what most strategies do where it comes out even.

    :param size: ranks, no more than there are key-value heads.
    :param step: multiples of which the MLP is cut by.
    """
    group = spec.num_heads // spec.num_kv_heads
    parts = zip(
        divide(spec.num_kv_heads, size),
        divide(spec.intermediate_size, size, step),
        divide(spec.vocab_size, size),
        strict=True,
    )
    return tuple(
        Share(
            layers=Span(0, spec.num_layers),
            heads=kv_heads.scaled(group),
            kv_heads=kv_heads,
            inner=inner,
            vocab=vocab,
            tensor_rank=rank,
        )
        for rank, (kv_heads, inner, vocab) in enumerate(parts)
    )


def run_divided(
    spec: ModelSpec, folder: Path, stages: Sequence[Sequence[Share]], tokens: Sequence[int]
) -> torch.Tensor:
    """Compute the logits of one sequence on simulated ranks, each in a thread of its own.

    :param stages: what each rank of each stage holds; all have as many ranks.
    :return: [T, vocab] float64, as the first rank of the last stage has them.
    :raises Exception: what a rank raised.
    """
    meetings = [Meeting(len(stage)) for stage in stages]
    links = [queue.SimpleQueue[torch.Tensor]() for _ in stages]

    @torch.inference_mode()
    def work(stage: int, rank: int) -> torch.Tensor:
        shares = stages[stage]
        tensor = SimulatedTensorParallel(meetings[stage], rank)
        pipeline = SimulatedPipeline(len(stages), stage, links)
        decoder = make_model(spec, share=shares[rank], tensor=tensor, max_len=max(64, len(tokens)))
        load_weights(decoder, folder, device=CPU)
        stream = torch.tensor(tokens)
        if not decoder.is_first:
            stream = pipeline.recv(torch.empty(len(tokens), spec.hidden_size, dtype=torch.float64))
        hidden: torch.Tensor = decoder(stream, torch.arange(len(tokens)), None)
        if not decoder.is_last:
            pipeline.send(hidden)
            return hidden
        return tensor.gather(decoder.logits(hidden), [share.vocab.size for share in shares])

    places = [(stage, rank) for stage, shares in enumerate(stages) for rank in range(len(shares))]
    with ThreadPoolExecutor(len(places)) as pool:
        futures = [pool.submit(work, *place) for place in places]
        wait(futures, return_when=FIRST_EXCEPTION)
        if any(future.done() and future.exception() for future in futures):
            for meeting in meetings:
                meeting.leave()
        results = dict(zip(places, [future.result() for future in futures], strict=True))
    return results[len(stages) - 1, 0]


def model_specs() -> st.SearchStrategy[ModelSpec]:
    """Generate models of all shapes, with and without biases, norms, and fused projections."""
    return st.builds(
        _make_spec,
        num_layers=st.integers(1, 4),
        num_kv_heads=st.sampled_from([1, 2, 3, 4, 8]),
        group=st.sampled_from([1, 2, 3, 4, 7]),
        head_dim=st.sampled_from([4, 8]),
        intermediate_size=st.integers(1, 5).map(lambda n: 16 * n) | st.integers(1, 70),
        vocab_size=st.sampled_from([64, 128, 320]) | st.integers(1, 300),
        flags=st.fixed_dictionaries(
            {
                name: st.booleans()
                for name in (
                    "qkv_bias",
                    "out_bias",
                    "mlp_bias",
                    "qk_norm",
                    "post_norms",
                    "tied",
                    "fused_qkv",
                    "fused_gate_up",
                )
            }
        ),
    )


def _make_spec(
    *,
    num_layers: int,
    num_kv_heads: int,
    group: int,
    head_dim: int,
    intermediate_size: int,
    vocab_size: int,
    flags: dict[str, bool],
) -> ModelSpec:
    return ModelSpec(
        model_type="llama",
        vocab_size=vocab_size,
        hidden_size=12,
        intermediate_size=intermediate_size,
        num_layers=num_layers,
        num_heads=num_kv_heads * group,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_position=64,
        layers=(LayerSpec(window=None, rope="default"),) * num_layers,
        ropes={"default": RopeSpec(kind="default", theta=10_000.0, rotary_dim=head_dim)},
        attention_scale=head_dim**-0.5,
        **flags,  # type: ignore[arg-type]
    )

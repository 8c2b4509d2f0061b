"""The parts of a decoder: norms, embedding, and one layer with its five plain slots."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from core.interfaces import AttentionSpec, LinearSpec
from core.model.linear import make_weight
from core.model.rope import apply_rotary
from core.sharding import Cut, Share, Span

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from core.interfaces import AttentionBackend, QuantScheme, TensorParallel
    from core.model.rope import RotaryTable
    from core.model.spec import Activation, ModelSpec, NormStyle

ACTIVATIONS: Final[Mapping[Activation, Callable[[torch.Tensor], torch.Tensor]]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
    "relu": functional.relu,
}


class StepContext(NamedTuple):
    """What all layers of a step share."""

    positions: torch.Tensor
    """[T] int64."""
    rotations: dict[str, tuple[torch.Tensor, torch.Tensor]]
    """Cosine and sine of the positions, by key of `ModelSpec.ropes`; empty if no slot needs them."""
    tables: dict[str, RotaryTable]
    """Of all positions, by the same keys."""
    meta: Any
    """What the attention backend prepared."""


class Build(NamedTuple):
    """What every part of a decoder is built with."""

    spec: ModelSpec
    scheme: QuantScheme
    attention: AttentionBackend
    dtype: torch.dtype
    device: torch.device
    share: Share
    """Which part of the model this rank holds."""
    tensor: TensorParallel | None
    """The ranks that hold the other parts of its layers; `None` if there are none."""

    @property
    def is_whole(self) -> bool:
        """Whether this rank's layers are whole."""
        return self.tensor is None or self.tensor.size == 1

    def all_reduce(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """Return what sums the parts of a layer that several ranks computed."""
        return _identity if self.is_whole or self.tensor is None else self.tensor.all_reduce


class SplitLinear(NamedTuple):
    """A linear layer: what this rank holds of it, and what the checkpoint holds."""

    local: LinearSpec
    whole: LinearSpec


class RMSNorm(nn.Module):
    """x / rms(x) · w over the last dimension, computed in float32 or better."""

    def __init__(
        self, size: int, eps: float, style: NormStyle, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.weight = make_weight((size,), dtype, device)
        self.eps = eps
        self.style = style

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalize.  Where the result is rounded to x's dtype is part of a family's definition."""
        wide = _widen(x)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        if self.style == "one_plus":
            return (wide * (1.0 + _widen(self.weight))).to(x.dtype)
        return self.weight * wide.to(x.dtype)


class Embedding(nn.Module):
    """Token ids -> [T, hidden], scaled if the family scales.

    Ranks hold consecutive rows; each looks up what it has, and the sum over them is complete.
    """

    def __init__(self, build: Build) -> None:
        super().__init__()
        spec, vocab = build.spec, build.share.vocab
        self.weight = make_weight((vocab.size, spec.hidden_size), build.dtype, build.device)
        self._part = None if build.is_whole else vocab
        self._all_reduce = build.all_reduce()
        # Rounded to the dtype first, as the models were trained.
        scale = spec.embedding_scale
        self.scale = None if scale is None else torch.tensor(scale, dtype=build.dtype).item()

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Look up.

        :param token_ids: [T] int64.
        """
        embedded = self._look_up(token_ids)
        return embedded if self.scale is None else embedded * self.scale

    def _look_up(self, token_ids: torch.Tensor) -> torch.Tensor:
        if self._part is None:
            return functional.embedding(token_ids, self.weight)
        local = token_ids - self._part.start
        is_here = (local >= 0) & (local < self._part.size)
        embedded = functional.embedding(local.where(is_here, 0), self.weight)
        return self._all_reduce(embedded * is_here.unsqueeze(-1))


class DecoderLayer(nn.Module):
    """Weights of one layer, and the plain forms of its five slots.

    Between the slots flows the stream: the sum of the embedding and of what all former slots added,
    [T, hidden].  H and G are the query and key-value heads of this rank.

    :param index: of the layer in the whole model.
    """

    def __init__(self, build: Build, index: int) -> None:
        super().__init__()
        spec, share = build.spec, build.share
        self.index = index
        self._head_counts = [share.heads.size, share.kv_heads.size, share.kv_heads.size]
        self._head_dim = spec.head_dim
        self._all_reduce = build.all_reduce()
        self.rope = spec.layers[index].rope
        self._activation = ACTIVATIONS[spec.activation]
        self._attention_forward = build.attention.forward
        self.attention_spec = make_attention_spec(spec, share, index)
        linears = self.split_linears = make_layer_linears(build, index)
        make = build.scheme.make_linear
        self.qkv_proj = make(linears["qkv_proj"].local)
        self.out_proj = make(linears["out_proj"].local)
        self.gate_up_proj = make(linears["gate_up_proj"].local)
        self.down_proj = make(linears["down_proj"].local)
        self._make_norms(build)

    def _make_norms(self, build: Build) -> None:
        spec = build.spec
        self.input_norm = make_norm(build, spec.hidden_size)
        self.mlp_norm = make_norm(build, spec.hidden_size)
        self.q_norm = make_norm(build, spec.head_dim) if spec.qk_norm else nn.Identity()
        self.k_norm = make_norm(build, spec.head_dim) if spec.qk_norm else nn.Identity()
        has_post = spec.post_norms
        self.attention_post_norm = make_norm(build, spec.hidden_size) if has_post else nn.Identity()
        self.mlp_post_norm = make_norm(build, spec.hidden_size) if has_post else nn.Identity()

    def linears(self) -> Iterator[tuple[SplitLinear, nn.Module]]:
        """Each linear layer with what the model knows about it."""
        for name, linear in self.split_linears.items():
            yield linear, self.get_submodule(name)

    # --- the plain slots ---

    def qkv(self, stream: torch.Tensor) -> torch.Tensor:
        """Norm and projection: [T, hidden] -> [T, (H + 2 G) · D]."""
        projected: torch.Tensor = self.qkv_proj(self.input_norm(stream))
        return projected

    def attend(self, qkv: torch.Tensor, context: StepContext) -> torch.Tensor:
        """Rotary embedding, KV write and attention: [T, (H + 2 G) · D] -> [T, H · D]."""
        heads = qkv.view(len(qkv), sum(self._head_counts), self._head_dim)
        q, k, v = torch.split(heads, self._head_counts, dim=1)
        q, k = apply_rotary(self.q_norm(q), self.k_norm(k), *context.rotations[self.rope])
        attended = self._attention_forward(q, k, v, self.attention_spec, context.meta)
        return attended.flatten(1)

    def out(self, attended: torch.Tensor, stream: torch.Tensor) -> torch.Tensor:
        """Projection back into the stream."""
        added: torch.Tensor = self.attention_post_norm(self._all_reduce(self.out_proj(attended)))
        return stream + added

    def up(self, stream: torch.Tensor) -> torch.Tensor:
        """Norm, projection and gate: [T, hidden] -> [T, intermediate]."""
        gate, up = self.gate_up_proj(self.mlp_norm(stream)).chunk(2, dim=-1)
        inner: torch.Tensor = self._activation(gate) * up
        return inner

    def down(self, inner: torch.Tensor, stream: torch.Tensor) -> torch.Tensor:
        """Projection back into the stream."""
        added: torch.Tensor = self.mlp_post_norm(self._all_reduce(self.down_proj(inner)))
        return stream + added


def make_norm(build: Build, size: int) -> RMSNorm:
    """Make an empty norm of the model's style."""
    return RMSNorm(size, build.spec.norm_eps, build.spec.norm_style, build.dtype, build.device)


def make_attention_spec(spec: ModelSpec, share: Share, index: int) -> AttentionSpec:
    """Describe what a rank computes of the attention of one layer."""
    return AttentionSpec(
        layer=index - share.layers.start,
        num_heads=share.heads.size,
        num_kv_heads=share.kv_heads.size,
        head_dim=spec.head_dim,
        scale=spec.attention_scale,
        window=spec.layers[index].window,
        softcap=spec.attention_softcap,
    )


def make_layer_linears(build: Build, index: int) -> dict[str, SplitLinear]:
    """Describe the four linear layers of one layer, by the name of their module."""
    spec, share, dim = build.spec, build.share, build.spec.head_dim
    hidden, inner = Span(0, spec.hidden_size), share.inner
    attention, mlp = f"model.layers.{index}.self_attn", f"model.layers.{index}.mlp"
    q, kv = share.heads.scaled(dim), share.kv_heads.scaled(dim)
    qkv = _shards(
        {"q_proj": (q, spec.q_size), "k_proj": (kv, spec.kv_size), "v_proj": (kv, spec.kv_size)},
        fused="qkv_proj" if spec.fused_qkv else None,
    )
    gate_up = _shards(
        {"gate_proj": (inner, spec.intermediate_size), "up_proj": (inner, spec.intermediate_size)},
        fused="gate_up_proj" if spec.fused_gate_up else None,
    )
    split = partial(split_linear, build)
    return {
        "qkv_proj": split(
            "qkv", f"{attention}.qkv_proj", (hidden, hidden.size), qkv, bias=spec.qkv_bias
        ),
        "out_proj": split(
            "out",
            f"{attention}.o_proj",
            (q, spec.q_size),
            _all_of("o_proj", hidden),
            bias=spec.out_bias,
        ),
        "gate_up_proj": split(
            "gate_up", f"{mlp}.gate_up_proj", (hidden, hidden.size), gate_up, bias=spec.mlp_bias
        ),
        "down_proj": split(
            "down",
            f"{mlp}.down_proj",
            (inner, spec.intermediate_size),
            _all_of("down_proj", hidden),
            bias=spec.mlp_bias,
        ),
    }


class StoredShard(NamedTuple):
    """One stored projection: how large it is, and which of its outputs a rank holds."""

    name: str
    size: int
    spans: tuple[Span, ...]


def _all_of(name: str, outputs: Span) -> tuple[StoredShard, ...]:
    return (StoredShard(name, outputs.size, (outputs,)),)


def _shards(parts: Mapping[str, tuple[Span, int]], fused: str | None) -> tuple[StoredShard, ...]:
    """Describe projections that lie side by side, stored apart or fused into one."""
    if fused is None:
        return tuple(StoredShard(name, size, (span,)) for name, (span, size) in parts.items())
    spans, offset = [], 0
    for span, size in parts.values():
        spans.append(span.shifted(offset))
        offset += size
    return (StoredShard(fused, offset, tuple(spans)),)


def split_linear(
    build: Build,
    role: str,
    name: str,
    inputs: tuple[Span, int],
    shards: Sequence[StoredShard],
    *,
    bias: bool,
) -> SplitLinear:
    """Describe one linear layer, whole and as this rank holds it.

    :param name: module path; the shards are siblings of the module.
    :param inputs: input features of this rank, and how many there are in all.
    """
    parent = name[: name.rfind(".") + 1]
    span, num_inputs = inputs
    whole = LinearSpec(
        name=name,
        in_features=num_inputs,
        shards=tuple((parent + shard.name, shard.size) for shard in shards),
        bias=bias,
        dtype=build.dtype,
        device=build.device,
        role=role,
    )
    if build.is_whole:
        return SplitLinear(whole, whole)
    sizes = [sum(part.size for part in shard.spans) for shard in shards]
    local = replace(
        whole,
        in_features=span.size,
        shards=tuple((parent + s.name, size) for s, size in zip(shards, sizes, strict=True)),
        # Where ranks sum up their parts, the bias must be added once.
        bias=bias and (span.size == num_inputs or build.share.tensor_rank == 0),
        cut=Cut(span, tuple(shard.spans for shard in shards)),
    )
    return SplitLinear(local, whole)


def _identity(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _widen(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()

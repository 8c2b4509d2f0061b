"""The parts of a decoder: norms, embedding, and one layer with its five plain slots."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from core.interfaces import AttentionSpec, LinearSpec
from core.model.linear import make_weight
from core.model.rope import apply_rotary

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from core.interfaces import AttentionBackend, QuantScheme
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
    """Cosine and sine of the positions, by key of `ModelSpec.ropes`."""
    meta: Any
    """What the attention backend prepared."""


class Build(NamedTuple):
    """What every part of a decoder is built with."""

    spec: ModelSpec
    scheme: QuantScheme
    attention: AttentionBackend
    dtype: torch.dtype
    device: torch.device


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
    """Token ids -> [T, hidden], scaled if the family scales."""

    def __init__(self, build: Build) -> None:
        super().__init__()
        spec = build.spec
        self.weight = make_weight((spec.vocab_size, spec.hidden_size), build.dtype, build.device)
        # Rounded to the dtype first, as the models were trained.
        scale = spec.embedding_scale
        self.scale = None if scale is None else torch.tensor(scale, dtype=build.dtype).item()

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Look up.

        :param token_ids: [T] int64.
        """
        embedded = functional.embedding(token_ids, self.weight)
        return embedded if self.scale is None else embedded * self.scale


class DecoderLayer(nn.Module):
    """Weights of one layer, and the plain forms of its five slots.

    Between the slots flows the stream: the sum of the embedding and of what all former slots added,
    [T, hidden].

    :param index: of the layer.
    """

    def __init__(self, build: Build, index: int) -> None:
        super().__init__()
        spec = build.spec
        self._head_counts = [spec.num_heads, spec.num_kv_heads, spec.num_kv_heads]
        self._head_dim = spec.head_dim
        self._rope = spec.layers[index].rope
        self._activation = ACTIVATIONS[spec.activation]
        self._attention_forward = build.attention.forward
        self.attention_spec = make_attention_spec(spec, index)
        specs = make_layer_linears(build, index)
        self.linear_specs = specs
        self.qkv_proj = build.scheme.make_linear(specs["qkv_proj"])
        self.out_proj = build.scheme.make_linear(specs["out_proj"])
        self.gate_up_proj = build.scheme.make_linear(specs["gate_up_proj"])
        self.down_proj = build.scheme.make_linear(specs["down_proj"])
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

    def linears(self) -> Iterator[tuple[LinearSpec, nn.Module]]:
        """Each linear layer with what the model knows about it."""
        for name, spec in self.linear_specs.items():
            yield spec, self.get_submodule(name)

    # --- the plain slots ---

    def qkv(self, stream: torch.Tensor) -> torch.Tensor:
        """Norm and projection: [T, hidden] -> [T, (H + 2 G) · D]."""
        projected: torch.Tensor = self.qkv_proj(self.input_norm(stream))
        return projected

    def attend(self, qkv: torch.Tensor, context: StepContext) -> torch.Tensor:
        """Rotary embedding, KV write and attention: [T, (H + 2 G) · D] -> [T, H · D]."""
        heads = qkv.view(len(qkv), sum(self._head_counts), self._head_dim)
        q, k, v = torch.split(heads, self._head_counts, dim=1)
        q, k = apply_rotary(self.q_norm(q), self.k_norm(k), *context.rotations[self._rope])
        attended = self._attention_forward(q, k, v, self.attention_spec, context.meta)
        return attended.flatten(1)

    def out(self, attended: torch.Tensor, stream: torch.Tensor) -> torch.Tensor:
        """Projection back into the stream."""
        added: torch.Tensor = self.attention_post_norm(self.out_proj(attended))
        return stream + added

    def up(self, stream: torch.Tensor) -> torch.Tensor:
        """Norm, projection and gate: [T, hidden] -> [T, intermediate]."""
        gate, up = self.gate_up_proj(self.mlp_norm(stream)).chunk(2, dim=-1)
        inner: torch.Tensor = self._activation(gate) * up
        return inner

    def down(self, inner: torch.Tensor, stream: torch.Tensor) -> torch.Tensor:
        """Projection back into the stream."""
        added: torch.Tensor = self.mlp_post_norm(self.down_proj(inner))
        return stream + added


def make_norm(build: Build, size: int) -> RMSNorm:
    """Make an empty norm of the model's style."""
    return RMSNorm(size, build.spec.norm_eps, build.spec.norm_style, build.dtype, build.device)


def make_attention_spec(spec: ModelSpec, index: int) -> AttentionSpec:
    """Describe the attention of one layer."""
    return AttentionSpec(
        layer=index,
        num_heads=spec.num_heads,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        scale=spec.attention_scale,
        window=spec.layers[index].window,
        softcap=spec.attention_softcap,
    )


def make_layer_linears(build: Build, index: int) -> dict[str, LinearSpec]:
    """Describe the four linear layers of one layer, by the name of their module."""
    spec = build.spec
    hidden, inner, q_size, kv_size = spec.hidden_size, spec.intermediate_size, spec.q_size, spec.kv_size
    attention, mlp = f"model.layers.{index}.self_attn", f"model.layers.{index}.mlp"
    qkv = {"q_proj": q_size, "k_proj": kv_size, "v_proj": kv_size}
    gate_up = {"gate_proj": inner, "up_proj": inner}
    if spec.fused_qkv:
        qkv = {"qkv_proj": q_size + 2 * kv_size}
    if spec.fused_gate_up:
        gate_up = {"gate_up_proj": 2 * inner}
    make = partial(make_linear_spec, build)
    return {
        "qkv_proj": make("qkv", f"{attention}.qkv_proj", hidden, qkv, bias=spec.qkv_bias),
        "out_proj": make("out", f"{attention}.o_proj", q_size, {"o_proj": hidden}, bias=spec.out_bias),
        "gate_up_proj": make("gate_up", f"{mlp}.gate_up_proj", hidden, gate_up, bias=spec.mlp_bias),
        "down_proj": make("down", f"{mlp}.down_proj", inner, {"down_proj": hidden}, bias=spec.mlp_bias),
    }


def make_linear_spec(
    build: Build, role: str, name: str, in_features: int, shards: Mapping[str, int], *, bias: bool
) -> LinearSpec:
    """Describe one linear layer.

    :param name: module path.
    :param shards: output features by name; the shards are siblings of the module.
    """
    parent = name[: name.rfind(".") + 1]
    return LinearSpec(
        name=name,
        in_features=in_features,
        shards=tuple((parent + shard, size) for shard, size in shards.items()),
        bias=bias,
        dtype=build.dtype,
        device=build.device,
        role=role,
    )


def _widen(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()

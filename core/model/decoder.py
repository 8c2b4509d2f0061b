"""The decoder that every family runs on: embedding, layers of five slots, norm, logits.

The loop over the layers calls five bound callables per layer and nothing else, so that a CUDA graph
captures it as it is, and so that assembly can fill a slot with a fused form.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from core.model.layers import Build, DecoderLayer, Embedding, StepContext, make_linear_spec, make_norm
from core.model.rope import RotaryTable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from core.interfaces import AttentionBackend, LinearSpec, QuantScheme
    from core.model.spec import ModelSpec


class LayerSlots(NamedTuple):
    """The five callables of one layer, filled once.

    `stream` is opaque to the loop: plain slots pass a tensor [T, hidden], a chain of fused slots may
    pass more, if all its members agree.
    """

    qkv: Callable[[Any], Any]
    """(stream) -> what `attend` takes."""
    attend: Callable[[Any, StepContext], Any]
    """(qkv, context) -> what `out` takes."""
    out: Callable[[Any, Any], Any]
    """(attended, stream) -> stream."""
    up: Callable[[Any], Any]
    """(stream) -> what `down` takes."""
    down: Callable[[Any, Any], Any]
    """(inner, stream) -> stream."""


def compose_layer(layer: DecoderLayer) -> LayerSlots:
    """Fill the slots with their plain forms."""
    return LayerSlots(layer.qkv, layer.attend, layer.out, layer.up, layer.down)


class Decoder(nn.Module):
    """A decoder for inference; made empty by `make_decoder`, filled by `core.model.weights`.

    :param max_len: longest sequence to serve, in tokens: rows of the rotary tables.
    """

    def __init__(self, build: Build, max_len: int) -> None:
        super().__init__()
        spec = self.spec = build.spec
        self.scheme = build.scheme
        self.dtype = build.dtype
        self.embedding = Embedding(build)
        self.layers = nn.ModuleList(DecoderLayer(build, index) for index in range(spec.num_layers))
        self.norm = make_norm(build, spec.hidden_size)
        self._head_spec = make_linear_spec(
            build, "lm_head", "lm_head", spec.hidden_size, {"lm_head": spec.vocab_size}, bias=False
        )
        self.lm_head = None if spec.tied else build.scheme.make_linear(self._head_spec)
        self._build = build
        self.limit_length(max_len)
        self.slots = [compose_layer(layer) for layer in self._layers()]

    def limit_length(self, max_len: int) -> None:
        """Make the rotary tables for sequences of up to `max_len` tokens; some kinds depend on it."""
        build = self._build
        self.rotary = {
            key: RotaryTable(rope, max_len, build.device, build.dtype)
            for key, rope in self.spec.ropes.items()
        }

    def forward(self, token_ids: torch.Tensor, positions: torch.Tensor, meta: Any) -> torch.Tensor:
        """Run all layers.  Writes the keys and values of the step into the attention's cache.

        :param token_ids: [T] int64.
        :param positions: [T] int64, each within its sequence.
        :param meta: what the attention's `prepare` returned for this step.
        :return: [T, hidden] after the last norm.
        """
        rotations = {key: table.cos_sin(positions) for key, table in self.rotary.items()}
        context = StepContext(positions, rotations, meta)
        stream = self.embedding(token_ids)
        for qkv, attend, out, up, down in self.slots:
            stream = out(attend(qkv(stream), context), stream)
            stream = down(up(stream), stream)
        hidden: torch.Tensor = self.norm(stream)
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Score the vocabulary.

        :param hidden: [N, hidden].
        :return: [N, vocab] float32, or float64 of a float64 model.
        """
        if self.lm_head is None:
            logits = functional.linear(hidden, self.embedding.weight)
        else:
            logits = self.lm_head(hidden)
        if self.dtype != torch.float64:
            logits = logits.float()
        cap = self.spec.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    # --- for those who fill it ---

    def linears(self) -> Iterator[tuple[LinearSpec, nn.Module]]:
        """Every linear layer that the scheme made, with what the model knows about it."""
        for layer in self._layers():
            yield from layer.linears()
        if self.lm_head is not None:
            yield self._head_spec, self.lm_head

    def plain_weights(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Every weight that belongs to no linear layer, by its name in a checkpoint."""
        yield "model.embed_tokens.weight", self.embedding.weight
        for index, layer in enumerate(self._layers()):
            for module, name in _norm_names(self.spec):
                yield f"model.layers.{index}.{name}.weight", layer.get_parameter(f"{module}.weight")
        yield "model.norm.weight", self.norm.weight

    def _layers(self) -> Iterator[DecoderLayer]:
        for layer in self.layers:
            if isinstance(layer, DecoderLayer):
                yield layer


def _norm_names(spec: ModelSpec) -> list[tuple[str, str]]:
    """Names of a layer's norms: as module and in checkpoints."""
    names = [("input_norm", "input_layernorm")]
    if spec.post_norms:
        names += [
            ("attention_post_norm", "post_attention_layernorm"),
            ("mlp_norm", "pre_feedforward_layernorm"),
            ("mlp_post_norm", "post_feedforward_layernorm"),
        ]
    else:
        names += [("mlp_norm", "post_attention_layernorm")]
    if spec.qk_norm:
        names += [("q_norm", "self_attn.q_norm"), ("k_norm", "self_attn.k_norm")]
    return names


def make_decoder(
    spec: ModelSpec,
    *,
    scheme: QuantScheme,
    attention: AttentionBackend,
    dtype: torch.dtype,
    device: torch.device,
    max_len: int,
) -> Decoder:
    """Make a decoder with uninitialized weights.

    :param scheme: makes the linear layers.
    :param attention: attends; its cache may be allocated later.
    :param device: `meta` allocates nothing.
    :param max_len: longest sequence to serve, in tokens.
    """
    return Decoder(Build(spec, scheme, attention, dtype, torch.device(device)), max_len)

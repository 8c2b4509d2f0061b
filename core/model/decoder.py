"""The decoder that every family runs on: embedding, layers of five slots, norm, logits.

The loop over the layers calls five bound callables per layer, so that a CUDA graph captures it as it is,
and so that assembly can fill a slot with a fused form.  In the last layer it goes on with the tokens that
are to be scored: for a long prompt that is one of thousands.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from core.interfaces import SupportsNorm
from core.model.layers import (
    Build,
    DecoderLayer,
    Embedding,
    SplitLinear,
    StepContext,
    StoredShard,
    make_layer_linears,
    make_norm,
    split_linear,
)
from core.model.linear import PlainScheme
from core.model.rope import RotaryTable
from core.model.slots import compose_layer
from core.sharding import Span

if TYPE_CHECKING:
    from collections.abc import Iterator

    from core.interfaces import AttentionBackend, LinearSpec, QuantScheme, TensorParallel
    from core.model.layer_store import LayerStore
    from core.model.spec import ModelSpec
    from core.sharding import Share


EMBEDDING: Final = "model.embed_tokens"
HEAD: Final = "lm_head"


class PlainWeight(NamedTuple):
    """A weight that belongs to no linear layer, and what this rank holds of it."""

    name: str
    """In a checkpoint."""
    parameter: nn.Parameter
    whole_shape: tuple[int, ...]
    rows: Span | None = None
    """Of the stored tensor; `None` for all."""


class Section(NamedTuple):
    """Weights that are filled together."""

    plain: tuple[PlainWeight, ...]
    linears: tuple[tuple[SplitLinear, nn.Module, QuantScheme], ...]


class Decoder(nn.Module):
    """A decoder for inference; made empty by `make_decoder`, filled by `core.model.weights`.

    A rank that runs some of the layers only has the embedding if it runs the first of them, norm and
    head if it runs the last.

    :param max_len: longest sequence to serve, in tokens: rows of the rotary tables.
    :param store: keeps some of the layers; `None` if all are on the device.
    """

    def __init__(self, build: Build, max_len: int, store: LayerStore | None = None) -> None:
        super().__init__()
        spec = self.spec = build.spec
        share = self.share = build.share
        self.scheme = build.scheme
        self.dtype = build.dtype
        self.device = build.device
        self.is_first = share.layers.start == 0
        self.is_last = share.layers.stop == spec.num_layers
        self.embedding = Embedding(build) if self.is_first else None
        self._store = store
        # Layers of the store are made when they are filled; until then they only tell shapes.
        shapes = build._replace(device=torch.device("meta"))
        stored = frozenset[int]() if store is None else store.indices
        self.layers = nn.ModuleList(
            DecoderLayer(shapes if i in stored else build, i) for i in range(*share.layers)
        )
        self.norm = make_norm(build, spec.hidden_size) if self.is_last else None
        self.head_split, self._head_scheme = _describe_head(build)
        # A tied head is the embedding, unless that is on another rank.
        has_head = self.is_last and not (spec.tied and self.is_first)
        self.lm_head = self._head_scheme.make_linear(self.head_split.local) if has_head else None
        self._build = build
        self.limit_length(max_len)
        composed = [compose_layer(layer, build) for layer in self._layers()]
        self.slots = [slots for slots, _ in composed]
        self.forms = composed[0][1] if composed else ()
        """How the slots of the first layer were filled; the others are like it."""
        # Tables need not be looked up by position where all attention rotates for itself.
        self._rotates = any(
            form.slot == "attend" and not form.is_fused for _, forms in composed for form in forms
        )

    def limit_length(self, max_len: int) -> None:
        """Make the rotary tables for sequences of up to `max_len` tokens; some kinds depend on it."""
        build = self._build
        self.rotary = {
            key: RotaryTable(rope, max_len, build.device, build.dtype)
            for key, rope in self.spec.ropes.items()
        }

    def forward(
        self,
        stream: torch.Tensor,
        positions: torch.Tensor,
        meta: Any,
        wanted: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run the layers.  Writes the keys and values of the step into the attention's cache.

        :param stream: [T] int64 token ids for the first layer, else [T, hidden] of the layer before.
        :param positions: [T] int64, each within its sequence.
        :param meta: what the attention's `prepare` returned for this step.
        :param wanted: [N] int64, which of the T tokens are to be scored, if this rank runs the last
            layer; `None` for all.  The others need nothing of that layer but their keys and values.
        :return: [T, hidden], or [N, hidden] of those that are wanted; before the last norm.
        """
        rotations = (
            {key: table.cos_sin(positions) for key, table in self.rotary.items()}
            if self._rotates
            else {}
        )
        context = StepContext(positions, rotations, self.rotary, meta)
        if self.embedding is not None:
            stream = self.embedding(stream)
        last = len(self.slots) - 1
        for index, (qkv, attend, out, up, down) in enumerate(self.slots):
            attended = attend(qkv(stream), context)
            if wanted is not None and index == last:
                attended, stream = _keep(attended, wanted), _keep(stream, wanted)
            stream = out(attended, stream)
            stream = down(up(stream), stream)
        return stream if wanted is None else stream[: len(wanted)]

    def logits(self, stream: torch.Tensor) -> torch.Tensor:
        """Normalize and score this rank's part of the vocabulary; if it runs the last layer.

        :param stream: [N, hidden], some rows of what `forward` returned.
        :return: [N, vocab] in the model's dtype, or float32 if that is narrower and there is a softcap.
        """
        logits = self._score(stream)
        cap = self.spec.logit_softcap
        if cap is None:
            return logits
        wide = logits.to(torch.promote_types(self.dtype, torch.float32))
        return cap * torch.tanh(wide / cap)

    def _score(self, stream: torch.Tensor) -> torch.Tensor:
        norm = self.norm
        head: object = self.lm_head
        if norm is None:
            raise RuntimeError("this rank runs no last layer")
        if isinstance(head, SupportsNorm) and not head.norm_objections(norm.style):
            return head.forward_norm(stream, norm.weight, norm.eps)
        if self.lm_head is not None:
            logits: torch.Tensor = self.lm_head(norm(stream))
            return logits
        if self.embedding is None:
            raise RuntimeError("the tied head is on another rank")
        return functional.linear(norm(stream), self.embedding.weight)

    # --- for those who fill it ---

    def sections(self) -> Iterator[Section]:
        """Divide all weights: embedding, each layer, norm and head."""
        yield self._first_section()
        for layer in self._layers():
            yield self._layer_section(layer)
        yield self._last_section()

    def sections_to_fill(self) -> Iterator[Section]:
        """Divide all weights, and make room for those of each section when it is asked for.

        A layer of the store goes there when the next section is asked for, so each has to be filled
        and repacked by then; the device never holds more than one of them.
        """
        yield self._first_section()
        for position, layer in enumerate(self._layers()):
            if self._store is None or layer.index not in self._store.indices:
                yield self._layer_section(layer)
                continue
            made = DecoderLayer(self._build, layer.index)
            self.layers[position] = made
            yield self._layer_section(made)
            self.slots[position] = self._store.take(made, compose_layer(made, self._build)[0])
        yield self._last_section()
        if self._store is not None:
            self._store.settle()

    def linears(self) -> Iterator[tuple[SplitLinear, nn.Module, QuantScheme]]:
        """Every linear layer, with what the model knows about it and the scheme that made it."""
        for section in self.sections():
            yield from section.linears

    def plain_weights(self) -> Iterator[PlainWeight]:
        """Every weight that belongs to no linear layer."""
        for section in self.sections():
            yield from section.plain

    def whole_linears(self) -> Iterator[tuple[LinearSpec, QuantScheme]]:
        """Every linear layer of the whole model, on whichever rank it is."""
        for index in range(self.spec.num_layers):
            for linear in make_layer_linears(self._build, index).values():
                yield linear.whole, self.scheme
        if not self.spec.tied:
            yield self.head_split.whole, self._head_scheme

    def whole_plain_names(self) -> Iterator[str]:
        """Names of the plain weights of the whole model, on whichever rank they are."""
        yield f"{EMBEDDING}.weight"
        for index in range(self.spec.num_layers):
            for _, name in _norm_names(self.spec):
                yield _layer_weight(index, name)
        yield "model.norm.weight"

    def _first_section(self) -> Section:
        if self.embedding is None:
            return Section((), ())
        shape = (self.spec.vocab_size, self.spec.hidden_size)
        rows = None if self._build.is_whole else self.share.vocab
        return Section((PlainWeight(f"{EMBEDDING}.weight", self.embedding.weight, shape, rows),), ())

    def _layer_section(self, layer: DecoderLayer) -> Section:
        weights = {
            _layer_weight(layer.index, name): layer.get_parameter(f"{module}.weight")
            for module, name in _norm_names(self.spec)
        }
        plain = [PlainWeight(name, weight, tuple(weight.shape)) for name, weight in weights.items()]
        linears = ((linear, module, self.scheme) for linear, module in layer.linears())
        return Section(tuple(plain), tuple(linears))

    def _last_section(self) -> Section:
        plain, linears = [], []
        if self.norm is not None:
            weight = self.norm.weight
            plain.append(PlainWeight("model.norm.weight", weight, tuple(weight.shape)))
        if self.lm_head is not None:
            linears.append((self.head_split, self.lm_head, self._head_scheme))
        return Section(tuple(plain), tuple(linears))

    def _layers(self) -> Iterator[DecoderLayer]:
        for layer in self.layers:
            if isinstance(layer, DecoderLayer):
                yield layer


def _keep(stream: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Select tokens; one if none is wanted, for a layer need not bear empty tensors."""
    return stream[wanted] if len(wanted) else stream[:1]


def _describe_head(build: Build) -> tuple[SplitLinear, QuantScheme]:
    """Describe the output projection; a tied one is stored as the embedding, never quantized."""
    spec = build.spec
    name = EMBEDDING if spec.tied else HEAD
    shard = StoredShard(name, spec.vocab_size, (build.share.vocab,))
    hidden = Span(0, spec.hidden_size)
    split = split_linear(build, "lm_head", HEAD, (hidden, hidden.size), (shard,), bias=False)
    return split, PlainScheme() if spec.tied else build.scheme


def _layer_weight(index: int, name: str) -> str:
    return f"model.layers.{index}.{name}.weight"


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
    share: Share | None = None,
    tensor: TensorParallel | None = None,
    store: LayerStore | None = None,
) -> Decoder:
    """Make a decoder with uninitialized weights.

    :param scheme: makes the linear layers.
    :param attention: attends; its cache may be allocated later.
    :param device: `meta` allocates nothing.
    :param max_len: longest sequence to serve, in tokens.
    :param share: the part of the model that this rank holds; `None` for all.
    :param tensor: joins the ranks that hold the other parts of the same layers.
    :param store: keeps some of the layers on the host; `None` if all are to be on the device.
    """
    share = share or spec.whole_share()
    build = Build(spec, scheme, attention, dtype, torch.device(device), share, tensor)
    return Decoder(build, max_len, store)

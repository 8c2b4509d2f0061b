"""One linear layer that is filled as a decoder is: through files, cuts, checks and dummy weights."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final, cast

import torch
from safetensors.torch import save_file
from torch import nn

from core.model.layers import SplitLinear
from core.model.linear import make_weight
from core.model.spec import LayerSpec, ModelSpec, RopeSpec
from core.model.weights import SINGLE_FILE, load_dummy, load_weights
from core.sharding import Cut, Span

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from core.interfaces import LinearSpec, QuantScheme
    from core.model.decoder import Decoder, PlainWeight

TINY_MODEL: Final = ModelSpec(
    model_type="llama",
    vocab_size=64,
    hidden_size=64,
    intermediate_size=128,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_position=128,
    layers=(LayerSpec(window=None, rope="default"),) * 2,
    ropes={"default": RopeSpec(kind="default", theta=10_000.0, rotary_dim=16)},
    attention_scale=0.25,
)
"""A model for parts that want to know one."""


class LoneLinear(nn.Module):
    """Stands in for a decoder that has one linear layer and nothing else.

    :param whole: the layer.
    :param local: the part of it that this rank holds; `None` for all.
    """

    def __init__(
        self, scheme: QuantScheme, whole: LinearSpec, local: LinearSpec | None = None
    ) -> None:
        super().__init__()
        self.spec = TINY_MODEL
        self.scheme = scheme
        self.split = SplitLinear(local or whole, whole)
        self.linear = scheme.make_linear(self.split.local)
        self.norm = make_weight((1,), whole.dtype, whole.device)  # tells the device, as in a decoder

    def linears(self) -> Iterator[tuple[SplitLinear, nn.Module, QuantScheme]]:
        """As `Decoder.linears`."""
        yield self.split, self.linear, self.scheme

    def plain_weights(self) -> Iterator[PlainWeight]:
        """As `Decoder.plain_weights`: there are none."""
        return iter(())

    def whole_linears(self) -> Iterator[tuple[LinearSpec, QuantScheme]]:
        """As `Decoder.whole_linears`."""
        yield self.split.whole, self.scheme

    def whole_plain_names(self) -> Iterator[str]:
        """As `Decoder.whole_plain_names`: there are none."""
        return iter(())

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Load from a file that holds these tensors.

        :param tensors: by their whole name.
        :raises CheckpointError: they are not those that the scheme wants.
        """
        with tempfile.TemporaryDirectory() as folder:
            save_file(
                {name: tensor.contiguous() for name, tensor in tensors.items()},
                Path(folder, SINGLE_FILE),
            )
            load_weights(self._as_decoder(), folder, device=self.split.whole.device)

    def fill(self, seed: int) -> None:
        """Load dummy weights."""
        load_dummy(self._as_decoder(), seed)

    def _as_decoder(self) -> Decoder:
        return cast("Decoder", self)  # it has all that loading asks of one

    def run(self, x: torch.Tensor) -> torch.Tensor:
        """Apply to rows [T, in_features of the part], as a step does."""
        with torch.inference_mode():
            out: torch.Tensor = self.linear(x)
        return out


def cut_linear(
    whole: LinearSpec, inputs: Span, outputs: Sequence[Sequence[Span]], *, bias: bool
) -> LinearSpec:
    """Describe the part of a layer that a rank holds.

    :param outputs: of each shard.
    :param bias: whether this rank adds the bias, if there is one.
    """
    shards = zip(whole.shards, outputs, strict=True)
    return replace(
        whole,
        in_features=inputs.size,
        shards=tuple((prefix, sum(span.size for span in spans)) for (prefix, _), spans in shards),
        bias=whole.bias and bias,
        cut=Cut(inputs, tuple(map(tuple, outputs))),
    )


def indices(spans: Sequence[Span]) -> list[int]:
    """List the features that spans select, in order."""
    return [index for span in spans for index in range(*span)]

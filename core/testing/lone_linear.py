"""One linear layer that is filled as a decoder is: through files, cuts, checks and dummy weights."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final, cast

import torch
from safetensors.torch import save_file
from torch import nn

from core.model.decoder import Section
from core.model.layers import SplitLinear
from core.model.spec import LayerSpec, ModelSpec, RopeSpec
from core.model.weights import SINGLE_FILE, load_dummy, load_weights

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from core.interfaces import LinearSpec, QuantScheme
    from core.model.decoder import Decoder

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
"""For parts that want to know a model."""


class LoneLinear(nn.Module):
    """Stands in for a decoder that has one linear layer and nothing else.

    :param whole: the layer.
    :param local: the part of it that this rank holds; `None` for all.
    """

    def __init__(self, scheme: QuantScheme, whole: LinearSpec, local: LinearSpec | None = None) -> None:
        super().__init__()
        self.spec = TINY_MODEL
        self.scheme = scheme
        self.split = SplitLinear(local or whole, whole)
        self.linear = scheme.make_linear(self.split.local)
        self.device = whole.device

    def sections(self) -> Iterator[Section]:
        """As `Decoder.sections`."""
        yield Section((), ((self.split, self.linear, self.scheme),))

    def sections_to_fill(self) -> Iterator[Section]:
        """As `Decoder.sections_to_fill`."""
        return self.sections()

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
            stored = {name: tensor.contiguous() for name, tensor in tensors.items()}
            save_file(stored, Path(folder, SINGLE_FILE))
            load_weights(self._as_decoder(), folder, device=self.split.whole.device)

    def fill(self, seed: int) -> None:
        """Load dummy weights."""
        load_dummy(self._as_decoder(), seed)

    def run(self, x: torch.Tensor) -> torch.Tensor:
        """Apply to [T, in_features of the part], as a step does."""
        with torch.inference_mode():
            out: torch.Tensor = self.linear(x)
        return out

    def storage(self) -> list[torch.Tensor]:
        """List all that the layer holds."""
        return [*self.linear.parameters(), *self.linear.buffers()]

    def _as_decoder(self) -> Decoder:
        return cast("Decoder", self)  # it has all that loading asks of one

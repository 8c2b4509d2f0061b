"""What comes before a linear layer and can hand its outputs over divided, channel by channel.

Where that is undone in the weights of the linear layer, the model computes the same as before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from core.model.spec import ModelSpec, NormStyle
    from core.quant.calibration import CalibratedLayer, CalibratedLinear


class Source(Protocol):
    """What produces the inputs of a linear layer."""

    def nearest(self, scale: torch.Tensor, /) -> torch.Tensor:
        """Change divisors, [in_features] float32 above 0, to some that `divide` can keep to exactly."""

    def divide(self, scale: torch.Tensor, /) -> None:
        """Divide the outputs, in place, by divisors that `nearest` returned."""


class NormSource:
    """A norm, which multiplies by its weight anyway.

    :param weight: [in_features] float32, changed in place.
    :param style: `one_plus` multiplies by 1 + weight.
    """

    def __init__(self, weight: torch.Tensor, style: NormStyle) -> None:
        self._weight = weight
        self._offset = 1.0 if style == "one_plus" else 0.0

    def nearest(self, scale: torch.Tensor, /) -> torch.Tensor:
        """Choose the divisors after which the weight is a number of bfloat16.

        Checkpoints store norms in 16 bits.  If the divisors followed only the exact weight, rounding
        it would change the model.
        """
        before, after = self._weight + self._offset, self._divided(scale) + self._offset
        exact = before / after
        return torch.where((exact > 0) & exact.isfinite(), exact, torch.ones_like(exact))

    def divide(self, scale: torch.Tensor, /) -> None:
        """Store the weights that `nearest` settled on; those that it left alone stay what they are."""
        self._weight.copy_(torch.where(scale == 1, self._weight, self._divided(scale)))

    def _divided(self, scale: torch.Tensor) -> torch.Tensor:
        divided = (self._weight + self._offset) / scale - self._offset
        return divided.bfloat16().float()


class RowsSource:
    """The outputs of another linear layer, which reach this one multiplied or averaged only.

    :param weight: [N, features] float32, changed in place.
    :param bias: [N] float32, changed in place.
    :param head_dim: consecutive outputs that stay together.
    :param num_uses: inputs that each output becomes: the query heads of a key-value head.
    """

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None, head_dim: int = 1, num_uses: int = 1
    ) -> None:
        self._weight = weight
        self._bias = bias
        self._uses = (-1, num_uses, head_dim)

    def nearest(self, scale: torch.Tensor, /) -> torch.Tensor:
        """Give all uses of an output the same divisor, their geometric mean."""
        by_use = scale.view(self._uses)
        return by_use.log().mean(1, keepdim=True).exp().expand_as(by_use).flatten()

    def divide(self, scale: torch.Tensor, /) -> None:
        """Divide rows and biases."""
        scale = scale.view(self._uses)[:, 0].flatten()
        self._weight.div_(scale.unsqueeze(-1))
        if self._bias is not None:
            self._bias.div_(scale)


class Fold(NamedTuple):
    """A linear layer to be quantized, and what produces its inputs."""

    linear: CalibratedLinear
    source: Source


def find_folds(layer: CalibratedLayer) -> Iterator[Fold]:
    """Find every linear layer to quantize whose inputs can be divided; ignored layers stay as they are."""
    linears, norms, model = layer.linears, layer.norms, layer.model
    sources: dict[str, Source] = {
        "qkv_proj": NormSource(norms["input_norm"], model.norm_style),
        "gate_up_proj": NormSource(norms["mlp_norm"], model.norm_style),
    }
    if "qkv_proj" not in layer.ignored:
        values = find_last_rows(linears["qkv_proj"], model.kv_size)
        sources["out_proj"] = RowsSource(*values, *_uses_of_values(model))
    if "gate_up_proj" not in layer.ignored:
        ups = find_last_rows(linears["gate_up_proj"], model.intermediate_size)
        sources["down_proj"] = RowsSource(*ups)
    for name, source in sources.items():
        if name not in layer.ignored:
            yield Fold(linears[name], source)


def find_last_rows(linear: CalibratedLinear, count: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """View the last rows, of values or of `up`, whether a checkpoint stores them apart or fused."""
    bias = linear.biases[-1]
    return linear.weights[-1][-count:], None if bias is None else bias[-count:]


def _uses_of_values(model: ModelSpec) -> tuple[int, int]:
    return model.head_dim, model.num_heads // model.num_kv_heads

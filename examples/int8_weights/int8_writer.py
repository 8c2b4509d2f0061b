"""Writes checkpoints for `python -m core quantize --method int8`; a quantizer may do without."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from int8_linear import quantize

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from core.quant.calibration import CalibratedLayer


class Int8Writer:
    """Fulfils `core.quant.calibration.LayerQuantizer`; looks at weights only, not at activations.

    :param config: `quantization_config` of the checkpoint.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        self._config = config

    def quantize_layer(self, layer: CalibratedLayer, /) -> Mapping[str, Mapping[str, torch.Tensor]]:
        """Quantize the linear layers that are not ignored."""
        return {
            prefix: quantize(weight) | ({} if bias is None else {"bias": bias})
            for name, linear in layer.linears.items()
            if name not in layer.ignored
            for (prefix, _), weight, bias in zip(
                linear.spec.shards, linear.weights, linear.biases, strict=True
            )
        }

    def config(self) -> dict[str, Any]:
        """Return what `make_scheme` reads."""
        return self._config

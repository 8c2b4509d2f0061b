"""Writes FP8 checkpoints, rounded so that outputs on the calibration text change little."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final, cast, get_args

import torch

from core.errors import CheckpointError, ConfigError
from core.quant.compressed_tensors import METHOD as COMPRESSED
from core.quant.feedback import find_hessian
from core.quant.names import REGEX
from plugins.quant.fp8.blocks import BLOCK_SIZE
from plugins.quant.fp8.calibrated import quantize
from plugins.quant.fp8.compressed import FLOAT_QUANTIZED
from plugins.quant.fp8.formats import Strategy
from plugins.quant.fp8.native import NATIVE
from plugins.quant.fp8.rounding import scale_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from core.quant.calibration import CalibratedLayer, CalibratedLinear, QuantizeOptions

_HEAD: Final = "lm_head"  # no method is given it, so it is never quantized
_STRATEGIES: Final = get_args(Strategy)
_SCHEMES: Final = ("dynamic", "static")


class Fp8Writer:
    """Fulfils `core.quant.calibration.LayerQuantizer`.

    A scale for each tensor or block is written in the native format.  That one has no scales for each
    output feature, so these are written in the format of compressed-tensors.

    :raises ConfigError: an option is unknown or out of range, or blocks are to have static inputs.
    """

    def __init__(self, options: QuantizeOptions) -> None:
        problems = list(_problems(options))
        if problems:
            raise ConfigError("; ".join(problems))
        self._strategy = cast("Strategy", options.strategy)
        self._damp_percent = options.damp_percent
        self._is_static = options.activation_scheme == "static"
        self._ignored: list[str] = []
        self._other_parts: tuple[str, ...] = ()

    def quantize_layer(self, layer: CalibratedLayer, /) -> Mapping[str, Mapping[str, torch.Tensor]]:
        """Quantize the linear layers that are not ignored.

        :raises CheckpointError: weights or inputs are not finite.
        """
        self._other_parts = layer.model.ignored_prefixes
        tensors: dict[str, dict[str, torch.Tensor]] = {}
        for name, linear in layer.linears.items():
            if name in layer.ignored:
                self._ignored += [prefix for prefix, _ in linear.spec.shards]
            else:
                tensors.update(self._quantize(linear))
        return tensors

    def config(self) -> dict[str, Any]:
        """Return `quantization_config`; it names the layers that were ignored one by one.

        Other engines know no patterns in the native format.  Parts that the decoder does not run are
        named too, as those who run them would look for scales there.
        """
        ignored = [*self._ignored, _HEAD]
        if self._strategy == "channel":
            ignored += [f"{REGEX}{re.escape(prefix)}" for prefix in self._other_parts]
            return _compressed_config(ignored, is_static=self._is_static)
        ignored += [prefix.removesuffix(".") for prefix in self._other_parts]
        config: dict[str, Any] = {
            "quant_method": NATIVE,
            "activation_scheme": "static" if self._is_static else "dynamic",
            "ignored_layers": ignored,
        }
        if self._strategy == "block":
            config["weight_block_size"] = [BLOCK_SIZE, BLOCK_SIZE]
        return config

    def _quantize(self, linear: CalibratedLinear) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        spec = linear.spec
        input_scale = _input_scale(linear) if self._is_static else None
        prefixes = [prefix for prefix, _ in spec.shards]
        quantized = quantize(
            dict(zip(prefixes, linear.weights, strict=True)),
            find_hessian(linear.inputs),
            self._strategy,
            damp_percent=self._damp_percent,
            name=spec.name,
        )
        suffix = "weight_scale_inv" if self._strategy == "block" else "weight_scale"
        for prefix, bias in zip(prefixes, linear.biases, strict=True):
            codes, scales = quantized[prefix]
            tensors = {
                "weight": codes,
                suffix: scales.reshape(1) if self._strategy == "tensor" else scales,
            }
            if input_scale is not None:
                tensors["input_scale"] = input_scale.clone()  # files hold no storage twice
            if bias is not None:
                tensors["bias"] = bias
            yield prefix, tensors


def _problems(options: QuantizeOptions) -> Iterator[str]:
    if options.strategy not in _STRATEGIES:
        yield f"--strategy {options.strategy} is none of {', '.join(_STRATEGIES)}"
    if options.activation_scheme not in _SCHEMES:
        yield f"--activation-scheme {options.activation_scheme} is none of {', '.join(_SCHEMES)}"
    if options.strategy == "block" and options.activation_scheme == "static":
        yield "--strategy block needs --activation-scheme dynamic: no format has both"
    if not 0 < options.damp_percent < 1:
        yield f"--damp-percent {options.damp_percent} is not between 0 and 1"


def _input_scale(linear: CalibratedLinear) -> torch.Tensor:
    """Bring the largest input of the calibration text to 448.

    :return: [1] float32.
    """
    if not linear.inputs.isfinite().all():
        raise CheckpointError(
            f"the inputs of {linear.spec.name} are not finite on the calibration text, so that no scale "
            f"fits them; use --activation-scheme dynamic or another dtype"
        )
    amax = linear.inputs.abs().amax() if linear.inputs.numel() else torch.zeros(())
    return scale_of(amax).reshape(1)


def _compressed_config(ignored: list[str], *, is_static: bool) -> dict[str, Any]:
    usual = {"num_bits": 8, "type": "float", "symmetric": True}
    inputs = {"strategy": "tensor" if is_static else "token", "dynamic": not is_static}
    group = {
        "targets": ["Linear"],
        "weights": {**usual, "strategy": "channel", "dynamic": False},
        "input_activations": {**usual, **inputs},
        "output_activations": None,
    }
    return {
        "quant_method": COMPRESSED,
        "format": FLOAT_QUANTIZED,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ignored,
        "kv_cache_scheme": None,
    }

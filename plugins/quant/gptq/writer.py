"""Writes GPTQ checkpoints, in the form that other engines read most widely (v1)."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

import torch

from core.errors import ConfigError
from core.quant.feedback import find_hessian
from core.quant.names import REGEX
from core.quant.packing import pack
from plugins.quant.gptq.grid import Grid
from plugins.quant.gptq.rounding import quantize
from plugins.quant.gptq.rules import BITS, HEAD, METHOD, SKIP

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from core.quant.calibration import CalibratedLayer, CalibratedLinear, QuantizeOptions
    from plugins.quant.gptq.rounding import Quantized

GROUP_SIZES: Final = (-1, 32, 64, 128)
FEATURE_STEP: Final = 32
"""Other engines want inputs and outputs by multiples of it, whatever the bits."""


class GptqWriter:
    """Fulfils `core.quant.calibration.LayerQuantizer`.

    :raises ConfigError: an option is out of range; names all that are.
    """

    def __init__(self, options: QuantizeOptions) -> None:
        problems = list(_problems(options))
        if problems:
            raise ConfigError("; ".join(problems))
        self._options = options
        self._grid = Grid(bits=options.bits, symmetric=options.symmetric is not False)
        self._group_size = None if options.group_size == -1 else options.group_size
        self._skipped_fused: dict[str, None] = {}

    def quantize_layer(self, layer: CalibratedLayer, /) -> Mapping[str, Mapping[str, torch.Tensor]]:
        """Quantize the linear layers that are not ignored.

        :raises ConfigError: the sizes of a layer do not fit the options.
        :raises CheckpointError: weights or inputs are not finite.
        """
        tensors: dict[str, dict[str, torch.Tensor]] = {}
        for name, linear in layer.linears.items():
            if name not in layer.ignored:
                tensors.update(self._quantize(linear))
            elif linear.spec.name not in {prefix for prefix, _ in linear.spec.shards}:
                self._skipped_fused[linear.spec.name] = None
        return tensors

    def config(self) -> dict[str, Any]:
        """Return `quantization_config`; layers that are ignored become rules of `dynamic`."""
        options = self._options
        config: dict[str, Any] = {
            "quant_method": METHOD,
            "bits": options.bits,
            "group_size": options.group_size,
            "desc_act": options.act_order,
            "sym": self._grid.symmetric,
            "checkpoint_format": "gptq",
            "damp_percent": options.damp_percent,
            "static_groups": False,
            "true_sequential": False,
            HEAD: False,
        }
        patterns = [_to_regex(pattern) for pattern in options.ignore if pattern != HEAD]
        # Some engines ask for the name under which they fuse layers.
        patterns += [f"^{re.escape(name)}$" for name in self._skipped_fused]
        if patterns:
            config["dynamic"] = {SKIP + pattern: {} for pattern in patterns}
        return config

    def _quantize(self, linear: CalibratedLinear) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        """Quantize all shards at once: they have the same inputs, and rows do not touch each other."""
        spec, options = linear.spec, self._options
        self._check_sizes(linear)
        quantized = quantize(
            torch.cat(linear.weights),
            find_hessian(linear.inputs),
            self._grid,
            self._group_size,
            damp_percent=options.damp_percent,
            act_order=options.act_order,
            name=spec.name,
        )
        for shard, ((prefix, _), bias) in enumerate(zip(spec.shards, linear.biases, strict=True)):
            tensors = pack_shard(quantized, spec.rows(shard), options.bits)
            yield prefix, tensors if bias is None else {**tensors, "bias": bias}

    def _check_sizes(self, linear: CalibratedLinear) -> None:
        group_size = self._group_size or 1
        for prefix, num_outputs in linear.spec.shards:
            num_inputs = linear.spec.in_features
            if num_inputs % group_size or num_inputs % FEATURE_STEP or num_outputs % FEATURE_STEP:
                raise ConfigError(
                    f"{prefix} has {num_inputs} inputs and {num_outputs} outputs, but both have to be "
                    f"multiples of {FEATURE_STEP}, and the inputs of the group size {group_size}; "
                    f"choose another --group-size, or name the layer in --ignore"
                )


def pack_shard(quantized: Quantized, rows: slice, bits: int) -> dict[str, torch.Tensor]:
    """Store some output features as GPTQ does, inputs first and zero points less one."""
    return {
        "qweight": pack(quantized.codes[rows].T, bits, dim=0),
        "qzeros": pack(quantized.zeros[rows].T - 1, bits, dim=1),
        "scales": quantized.scales[rows].T.to(torch.float16).contiguous(),
        "g_idx": quantized.groups.clone(),  # files hold no tensor twice
    }


def _problems(options: QuantizeOptions) -> Iterator[str]:
    if options.bits not in BITS:
        yield f"--bits {options.bits} is none of {', '.join(map(str, BITS))}"
    if options.group_size not in GROUP_SIZES:
        yield f"--group-size {options.group_size} is none of {', '.join(map(str, GROUP_SIZES))}"
    if not 0 < options.damp_percent < 1:
        yield f"--damp-percent {options.damp_percent} is not between 0 and 1"


def _to_regex(pattern: str) -> str:
    """Turn a pattern of `core.quant.names.matches` into a regular expression for whole names."""
    if pattern.startswith(REGEX):
        return pattern.removeprefix(REGEX)
    return rf"^(?:.*\.)?{re.escape(pattern)}(?:\..*)?$"

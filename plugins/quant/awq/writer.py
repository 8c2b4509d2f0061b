"""Writes AWQ checkpoints: scales and clipping as calibration finds them, then rounding to nearest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch

from core.errors import CheckpointError, ConfigError
from plugins.quant.awq.config import ALL_INPUTS, BITS, GROUP_SIZES, VERSION
from plugins.quant.awq.fold import find_folds
from plugins.quant.awq.layout import pack
from plugins.quant.awq.rounding import round_to_nearest, split_rows
from plugins.quant.awq.scheme import check_layer
from plugins.quant.awq.search import clip, find_limits, find_scale, gather_stats

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from core.quant.calibration import CalibratedLayer, CalibratedLinear, QuantizeOptions
    from plugins.quant.awq.search import InputStats

_HEAD: Final = "lm_head"  # no method is given it, so it is never quantized


class AwqWriter:
    """Fulfils `core.quant.calibration.LayerQuantizer`.

    :raises ConfigError: an option asks for what the layout does not have.
    """

    def __init__(self, options: QuantizeOptions) -> None:
        problems = list(_problems(options))
        if problems:
            raise ConfigError("; ".join(problems))
        self._group_size = options.group_size
        self._skipped: dict[str, None] = {}

    @torch.no_grad()
    def quantize_layer(self, layer: CalibratedLayer, /) -> Mapping[str, Mapping[str, torch.Tensor]]:
        """Quantize the linear layers that are not ignored.

        Norms, weights, biases and inputs of the layer are left with the scales folded in: together
        they compute what they did before, and the codes stand for these weights.

        :raises CheckpointError: a layer does not fit into words and groups, or holds or is fed a number
            that is not finite.
        """
        self._note_skipped(layer)
        linears = [linear for name, linear in layer.linears.items() if name not in layer.ignored]
        for linear in linears:
            self._check(linear)
        stats = {linear.spec.name: gather_stats(linear.inputs) for linear in linears}
        self._fold(layer, stats)
        tensors: dict[str, Mapping[str, torch.Tensor]] = {}
        for linear in linears:
            num_exact = linear.spec.out_features - layer.model.kv_size if _has_queries(linear) else 0
            tensors.update(self._quantize(linear, stats[linear.spec.name], num_exact))
        return tensors

    def config(self) -> dict[str, Any]:
        """Return `quantization_config`; it names the layers that were ignored one by one."""
        return {
            "quant_method": "awq",
            "bits": BITS,
            "group_size": self._group_size,
            "zero_point": True,
            "version": VERSION,
            "modules_to_not_convert": [*self._skipped, _HEAD],
        }

    def _note_skipped(self, layer: CalibratedLayer) -> None:
        """Note what stays as it is, parts that the decoder does not run included."""
        names = [prefix.strip(".") for prefix in layer.model.ignored_prefixes]
        for name in sorted(layer.ignored):
            names += [prefix for prefix, _ in layer.linears[name].spec.shards]
        self._skipped |= dict.fromkeys(names)

    def _check(self, linear: CalibratedLinear) -> None:
        try:
            check_layer(linear.spec, self._group_size)
        except CheckpointError as error:
            raise CheckpointError(
                f"{error}; use another --group-size, or leave the layer out with --ignore"
            ) from None
        if not all(weight.isfinite().all() for weight in linear.weights):
            raise CheckpointError(f"{linear.spec.name} holds a weight that is not finite")
        if not linear.inputs.isfinite().all():
            raise CheckpointError(
                f"the inputs of {linear.spec.name} are not finite on the calibration text; use another "
                f"--dtype"
            )

    def _fold(self, layer: CalibratedLayer, stats: dict[str, InputStats]) -> None:
        """Divide inputs where that makes rounding err less, and multiply weights; updates `stats`."""
        for linear, source in find_folds(layer):
            name = linear.spec.name
            scale = find_scale(linear.weights, stats[name], source, self._size(linear))
            source.divide(scale)
            for weight in linear.weights:
                weight.mul_(scale)
            linear.inputs = linear.inputs / scale
            stats[name] = stats[name].divided(scale)

    def _quantize(
        self, linear: CalibratedLinear, stats: InputStats, num_exact: int
    ) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        """Clip and round each shard.

        :param num_exact: leading outputs of the layer that are not clipped.
        """
        shards = zip(linear.spec.shards, linear.weights, linear.biases, strict=True)
        for (prefix, size), weight, bias in shards:
            limits = weight.new_full((size, weight.shape[1] // self._size(linear)), torch.inf)
            if num_exact < size:
                first = max(num_exact, 0)
                limits[first:] = find_limits(weight[first:], stats, self._size(linear))
            num_exact -= size
            tensors = _round_and_pack(weight, limits, prefix)
            if bias is not None:
                tensors["bias"] = bias.to(linear.spec.dtype)
            yield prefix, tensors

    def _size(self, linear: CalibratedLinear) -> int:
        return linear.spec.in_features if self._group_size == ALL_INPUTS else self._group_size


def _problems(options: QuantizeOptions) -> Iterator[str]:
    if options.bits != BITS:
        yield f"--bits {options.bits} is not supported by awq; its weights have {BITS} bits"
    if options.group_size not in (*GROUP_SIZES, ALL_INPUTS):
        known = ", ".join(map(str, GROUP_SIZES))
        yield (
            f"--group-size {options.group_size} is not supported by awq; known are {known} and "
            f"{ALL_INPUTS} for all inputs"
        )
    if options.symmetric:
        yield "--symmetric is not supported by awq, which stores zero points in any case"


def _has_queries(linear: CalibratedLinear) -> bool:
    """Whether outputs are multiplied with one another, so that their own errors say little."""
    return linear.spec.role == "qkv"


def _round_and_pack(weight: torch.Tensor, limits: torch.Tensor, prefix: str) -> dict[str, torch.Tensor]:
    """Round a clipped weight and bring it to the layout.

    :param weight: [N, in_features] float32.
    :param limits: [N, groups] float32.
    """
    words, zeros, scales = [], [], []
    for rows, part in split_rows(weight):
        groups = part.unflatten(-1, (limits.shape[1], -1))
        rounded = round_to_nearest(clip(groups, limits[rows]))
        words.append(pack(rounded.codes.flatten(1).T))
        zeros.append(pack(rounded.zeros.flatten(1).T))
        scales.append(rounded.scales.flatten(1).T)
    tensors = {
        "qweight": torch.cat(words, 1),
        "qzeros": torch.cat(zeros, 1),
        "scales": torch.cat(scales, 1),
    }
    if not tensors["scales"].isfinite().all():
        raise CheckpointError(f"{prefix} has weights too large for the scales, which are float16")
    return tensors

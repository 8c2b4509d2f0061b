"""Scales of keys and values in a quantized KV cache: which tensors hold them, and how to find them.

A stored number times its scale is what was to be stored.  Checkpoints hold one scale for all heads
of a layer, or one for each, under names that differ from tool to tool.  They are optional, and what
serves with a wider cache passes over them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import structlog
import torch

from core.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from core.model.spec import ModelSpec
    from core.model.weights import CheckpointReader
    from core.sharding import Share

log = structlog.get_logger(__name__)

FP8_MAX: Final = torch.finfo(torch.float8_e4m3fn).max
HEADROOM: Final = 2.0
"""How much larger than anything in the calibration text a number may be before it saturates.

It costs nothing: FP8 is a floating-point format, so the relative error is the same all over the 15
octaves of its normal numbers, and only what is thousands of times smaller than the largest is lost.
"""
MIN_SCALE: Final = 2.0**-14
"""For heads that the calibration text has left at zero."""

COMPRESSED_TENSORS_SCHEME: Final[Mapping[str, Any]] = {
    "num_bits": 8,
    "type": "float",
    "strategy": "tensor",
    "symmetric": True,
    "dynamic": False,
}
"""`kv_cache_scheme` of a `quantization_config` whose checkpoint holds what `scale_tensors` returns."""

_ATTENTION: Final = ".self_attn."
_PLACES: Final = ("{x}_proj.{x}_", "{x}_", "attn.{x}_", "qkv_proj.{x}_", "{x}_proj.output_")
"""Where tensors of keys (x = k) and of values (x = v) are; the first that a checkpoint has counts."""
_BOTH: Final = "kv_scale"
"""Of older checkpoints, for keys and values alike."""
_UNUSED: Final = ("q_proj.q_scale", "q_scale", "attn.q_scale", "qkv_proj.q_scale", "attn.prob_scale")
"""For engines that round queries and weights of the attention too."""


def needs_scales(dtype: torch.dtype) -> bool:
    """Whether numbers of a cache of this dtype are too few to do without scales."""
    return dtype.itemsize == 1


def _names(x: str, what: str) -> list[str]:
    return [place.format(x=x) + what for place in _PLACES]


_KNOWN: Final = frozenset(
    [_BOTH, *_UNUSED, *(n for x in "kv" for what in ("scale", "zero_point") for n in _names(x, what))]
)


def is_about_cache(name: str) -> bool:
    """Whether a tensor of a checkpoint is about the KV cache: no weight, and never missed."""
    return name.partition(_ATTENTION)[2] in _KNOWN


# --- reading ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class KVScales:
    """The scales of the layers and heads of one rank."""

    keys: torch.Tensor
    """[layers, G] float32."""
    values: torch.Tensor
    """[layers, G] float32."""

    @classmethod
    def ones(cls, share: Share, device: torch.device) -> KVScales:
        """Make those of a model that has none."""
        shape = (share.layers.size, share.kv_heads.size)
        return cls(torch.ones(shape, device=device), torch.ones(shape, device=device))


def load_kv_scales(scales: KVScales, reader: CheckpointReader, spec: ModelSpec, share: Share) -> None:
    """Fill in what a checkpoint holds; scales that it lacks stay as they are.

    Warns on one rank if any layer of the model lacks its own.

    :raises CheckpointError: a scale is impossible, of the wrong shape, or comes with a zero point.
    """
    for row, index in enumerate(range(*share.layers)):
        for x, target in (("k", scales.keys[row]), ("v", scales.values[row])):
            _refuse_zero_points(reader, index, x)
            name = _find(reader, index, x)
            if name is not None:
                target.copy_(_read(reader, name, spec, share))
    if share.layers.start == 0 and share.tensor_rank == 0:
        _warn_about_missing(reader, spec)


def _find(reader: CheckpointReader, index: int, x: str) -> str | None:
    prefix = f"model.layers.{index}{_ATTENTION}"
    names = [prefix + suffix for suffix in (*_names(x, "scale"), _BOTH)]
    return next((name for name in names if name in reader.tensors), None)


def _read(reader: CheckpointReader, name: str, spec: ModelSpec, share: Share) -> torch.Tensor:
    """Read the scales of the rank's heads: [G], or [1] for all of them."""
    stored, scale = reader.tensors[name], reader.read(name)
    where = f"{stored.file}: {stored.name}"
    if scale.numel() not in {1, spec.num_kv_heads} or not scale.is_floating_point():
        raise CheckpointError(
            f"{where} has shape {list(stored.shape)} and dtype {stored.dtype}, but a KV cache has one "
            f"scale for a layer or one for each of {spec.num_kv_heads} heads, in a floating dtype"
        )
    scale = scale.flatten().float()
    if not (scale.isfinite() & (scale > 0)).all():
        raise CheckpointError(f"{where} holds {scale.tolist()}, but scales are positive and finite")
    return scale if scale.numel() == 1 else scale[slice(*share.kv_heads)]


def _refuse_zero_points(reader: CheckpointReader, index: int, x: str) -> None:
    """Pass over zero points that are zero, as some tools write them.

    :raises CheckpointError: one is not.
    """
    for suffix in _names(x, "zero_point"):
        name = f"model.layers.{index}{_ATTENTION}{suffix}"
        if name in reader.tensors and reader.read(name).float().any():
            stored = reader.tensors[name]
            raise CheckpointError(
                f"{stored.file}: {stored.name} is not zero, but only scales of a KV cache are supported; "
                f"use --kv-cache-dtype auto"
            )


def _warn_about_missing(reader: CheckpointReader, spec: ModelSpec) -> None:
    missing = [i for i in range(spec.num_layers) if any(_find(reader, i, x) is None for x in "kv")]
    if missing:
        log.warning(
            "the checkpoint lacks scales of the KV cache, so those layers use 1.0; if answers suffer, "
            "write a checkpoint that has them: python -m core quantize --kv-cache-dtype fp8",
            num_layers=len(missing),
            first_layer=missing[0],
        )


# --- finding ---------------------------------------------------------------------------------------


def calibrate(keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose the scale of each head, from what one layer has stored for a calibration text.

    The largest magnitude, `HEADROOM` times, becomes the largest number of FP8.  A text may come in
    parts: the scales of the whole are the maximum (`torch.maximum`) of those of its parts.

    :param keys: [T, G, D] floating, after rotary embedding.
    :param values: [T, G, D] floating.
    :return: scales of keys and of values, each [G] float32.
    """
    return _calibrate(keys), _calibrate(values)


def _calibrate(x: torch.Tensor) -> torch.Tensor:
    largest = x.abs().amax(dim=(0, 2)).float()
    return (largest * (HEADROOM / FP8_MAX)).clamp(min=MIN_SCALE)


def scale_tensors(
    index: int, k_scales: torch.Tensor, v_scales: torch.Tensor
) -> dict[str, dict[str, torch.Tensor]]:
    """Name what a checkpoint has to hold for one layer: a single scale for all its heads.

    One for each head would be read here, but few other engines read it, and a floating-point format
    gains nothing from it as long as the heads are within some octaves of one another.

    :param k_scales: [G], as `calibrate` returns them.
    :param v_scales: [G].
    :return: by prefix, as the decoder names modules, the tensor by suffix: `k_scale` beside the weight
        of `k_proj`, `v_scale` beside that of `v_proj`; scalars in float32.
    """
    prefix = f"model.layers.{index}{_ATTENTION}"
    pairs = {"k": k_scales, "v": v_scales}
    return {f"{prefix}{x}_proj": {f"{x}_scale": scales.max().float()} for x, scales in pairs.items()}

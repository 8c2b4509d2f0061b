"""Weights of 2, 3, 4 or 8 bits as GPTQ stores them, and packed integers of compressed-tensors."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any

from core.errors import CheckpointError
from core.hookspecs import hookimpl
from core.quant.compressed_tensors import METHOD as COMPRESSED
from core.registry import QuantizerEntry, Requirements
from plugins.quant.gptq.compressed import packed_format, read_packed
from plugins.quant.gptq.rules import METHOD, read_gptq

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from core.interfaces import QuantScheme
    from core.plan import Plan
    from core.quant.calibration import LayerQuantizer, QuantizeOptions
    from plugins.quant.gptq.formats import LayerFormat

core_api = "1.0"


def make_scheme(plan: Plan) -> QuantScheme:
    """Build the scheme of a checkpoint; only now is torch imported."""
    from plugins.quant.gptq.scheme import GptqScheme  # noqa: PLC0415  imports torch

    config, model = plan.quantization, plan.model
    if config.get("quant_method") == COMPRESSED:
        compressed = read_packed(config, model)

        def packed_format_of(prefix: str) -> LayerFormat | None:
            group = compressed.scheme_of(prefix)
            return None if group is None else packed_format(group)

        return GptqScheme(packed_format_of)
    return GptqScheme(partial(read_gptq(config).format_of, model=model))


def make_writer(options: QuantizeOptions) -> LayerQuantizer:
    """Build what writes checkpoints.

    :raises ConfigError: the options name bits, a group size or a damping that there is not.
    """
    from plugins.quant.gptq.writer import GptqWriter  # noqa: PLC0415  imports torch

    return GptqWriter(options)


def unsupported(requirements: Requirements) -> list[str]:
    """Every reason why the checkpoint cannot be served."""
    try:
        _formats(requirements.quantization_config)
    except CheckpointError as error:
        return [str(error)]
    return []


def weight_bits(requirements: Requirements) -> float | None:
    """Bits of a weight with its share of scale and zero point, in the widest of the formats."""
    formats = _formats(requirements.quantization_config)
    return max((layout.bits_per_weight for layout in formats), default=None)


def cut_step(requirements: Requirements) -> int:
    """Whole groups and whole words, along both dimensions."""
    formats = _formats(requirements.quantization_config)
    return math.lcm(*(layout.cut_step for layout in formats))


def _formats(config: Mapping[str, Any]) -> list[LayerFormat]:
    """List the formats that layers may have.

    :raises CheckpointError: the config cannot be served.
    """
    if config.get("quant_method") == COMPRESSED:
        return [packed_format(group) for group in read_packed(config).groups.values()]
    return list(read_gptq(config).formats)


@hookimpl
def core_register_quantizers() -> Iterable[Any]:
    """Contribute `gptq`."""
    return [
        QuantizerEntry(
            name="gptq",
            factory=make_scheme,
            methods=(METHOD, COMPRESSED),
            unsupported=unsupported,
            weight_bits=weight_bits,
            cut_step=cut_step,
            make_writer=make_writer,
            summary="GPTQ weights of 2, 3, 4 or 8 bits, and packed ones of compressed-tensors",
        )
    ]

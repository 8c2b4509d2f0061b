"""FP8 weights (e4m3): reads them, makes them at load, and writes them."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

from core.hookspecs import hookimpl
from core.quant.compressed_tensors import METHOD as COMPRESSED
from core.registry import QuantizerEntry, Requirements
from plugins.quant.fp8.config import find_problems, list_blocks, read_formats
from plugins.quant.fp8.formats import Strategy  # noqa: TC001  pydantic resolves it in Settings
from plugins.quant.fp8.native import NATIVE

if TYPE_CHECKING:
    from collections.abc import Iterable

    from core.interfaces import QuantScheme
    from core.plan import Plan
    from core.quant.calibration import LayerQuantizer, QuantizeOptions

core_api = "1.0"

NAME: Final = "quant.fp8"
WEIGHT_BITS: Final = 8
SCALE_BITS: Final = 32


@dataclass(frozen=True, slots=True)
class Settings:
    """Settings of FP8."""

    activations: Literal["quantize", "keep"] = "quantize"
    """quantize: round inputs to FP8 where the checkpoint says so, and where weights are converted at
    load.  keep: multiply them as they are, which is more accurate."""
    strategy: Strategy = "channel"
    """What shares a scale where weights are converted at load: channel, tensor or block (128 x 128)."""


def make_scheme(plan: Plan) -> QuantScheme:
    """Build the scheme of a checkpoint; only now is torch imported."""
    from plugins.quant.fp8.convert import ConvertingScheme  # noqa: PLC0415  imports torch
    from plugins.quant.fp8.scheme import Fp8Scheme  # noqa: PLC0415  imports torch

    settings: Settings = plan.settings[NAME]
    keep_inputs = settings.activations == "keep"
    if not plan.quantization:
        return ConvertingScheme(settings.strategy, keep_inputs=keep_inputs)
    return Fp8Scheme(read_formats(plan.quantization, plan.model, keep_inputs=keep_inputs))


def make_writer(options: QuantizeOptions) -> LayerQuantizer:
    """Build what writes checkpoints.

    :raises ConfigError: the options name a strategy or scheme that there is not.
    """
    from plugins.quant.fp8.writer import Fp8Writer  # noqa: PLC0415  imports torch

    return Fp8Writer(options)


def unsupported(requirements: Requirements) -> list[str]:
    """Every reason why the checkpoint cannot be served."""
    config = requirements.quantization_config
    return find_problems(config) if config else []


def weight_bits(requirements: Requirements) -> float:
    """Bits of a weight with its share of a scale, where inputs have several."""
    blocks = _blocks(requirements)
    return WEIGHT_BITS + max((SCALE_BITS / columns for _, columns in blocks), default=0.0)


def cut_step(requirements: Requirements) -> int:
    """Whole blocks, along both dimensions."""
    return math.lcm(*itertools.chain(*_blocks(requirements)))


def _blocks(requirements: Requirements) -> list[tuple[int, int]]:
    config = requirements.quantization_config
    return list_blocks(config) if config else []


@hookimpl
def core_register_settings() -> type:
    """Take what becomes of activations, and how to convert."""
    return Settings


@hookimpl
def core_register_quantizers() -> Iterable[Any]:
    """Contribute `fp8`."""
    return [
        QuantizerEntry(
            name="fp8",
            factory=make_scheme,
            methods=(NATIVE, COMPRESSED),
            unsupported=unsupported,
            can_convert=True,
            weight_bits=weight_bits,
            cut_step=cut_step,
            make_writer=make_writer,
            summary="FP8 weights (e4m3), from the checkpoint or converted at load",
        )
    ]

"""Weights of linear layers as int8, one scale for each output feature.

Reads checkpoints whose `quantization_config` states the method `int8-rows`, writes them, and converts
others while they are loaded: `--quantization int8`.  This module only declares; `int8_linear` and
`int8_writer` have the tensors, so that listing plugins and making plans need no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from core import hookimpl
from core.registry import QuantizerEntry, Requirements

if TYPE_CHECKING:
    from collections.abc import Iterable

    from core.interfaces import QuantScheme
    from core.plan import Plan
    from core.quant.calibration import LayerQuantizer, QuantizeOptions

core_api = "1.0"

METHOD: Final = "int8-rows"
IGNORED: Final = ("lm_head",)
"""What stays as it is unless the checkpoint says otherwise: the output projection is sensitive."""


def make_scheme(plan: Plan) -> QuantScheme:
    """Build the scheme: for codes if the checkpoint holds codes, else for weights to convert."""
    from int8_linear import Int8Scheme  # noqa: PLC0415  imports torch

    config = plan.quantization
    is_stored = config.get("quant_method") == METHOD
    return Int8Scheme(is_stored=is_stored, ignored=tuple(config.get("ignore", IGNORED)))


def make_writer(options: QuantizeOptions) -> LayerQuantizer:
    """Build what writes checkpoints; the only option that means something to it is `ignore`."""
    from int8_writer import Int8Writer  # noqa: PLC0415  imports torch

    return Int8Writer({"quant_method": METHOD, "ignore": list(options.ignore)})


def weight_bits(_requirements: Requirements) -> float:
    """Bits of an element; its share of a scale is too small to count."""
    return 8.0


@hookimpl
def core_register_quantizers() -> Iterable[QuantizerEntry]:
    """Offer the quantizer under the name `int8`."""
    return [
        QuantizerEntry(
            name="int8",
            factory=make_scheme,
            methods=(METHOD,),
            can_convert=True,
            weight_bits=weight_bits,
            make_writer=make_writer,
            summary="int8 weights, one scale for each output feature",
        )
    ]

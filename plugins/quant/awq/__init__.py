"""AWQ weights: reads checkpoints of the GEMM layout, and writes them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from core.hookspecs import hookimpl
from core.registry import QuantizerEntry, Requirements
from plugins.quant.awq.config import find_cut_step, find_problems, find_weight_bits, read_config

if TYPE_CHECKING:
    from collections.abc import Iterable

    from core.interfaces import QuantScheme
    from core.plan import Plan
    from core.quant.calibration import LayerQuantizer, QuantizeOptions

core_api = "1.0"


def make_scheme(plan: Plan) -> QuantScheme:
    """Build the scheme of a checkpoint; only now is torch imported.

    :raises CheckpointError: the config cannot be served.
    """
    from plugins.quant.awq.scheme import AwqScheme  # noqa: PLC0415  imports torch

    return AwqScheme(read_config(plan.quantization), plan.model)


def make_writer(options: QuantizeOptions) -> LayerQuantizer:
    """Build what writes checkpoints.

    :raises ConfigError: the options ask for what the layout does not have.
    """
    from plugins.quant.awq.writer import AwqWriter  # noqa: PLC0415  imports torch

    return AwqWriter(options)


def unsupported(requirements: Requirements) -> list[str]:
    """Every reason why the checkpoint cannot be served."""
    return list(find_problems(requirements.quantization_config))


def weight_bits(requirements: Requirements) -> float:
    """Count the bits of a weight, with its share of scale and zero point."""
    return find_weight_bits(requirements.quantization_config)


def cut_step(requirements: Requirements) -> int:
    """Count the inputs that share a scale, so that each rank gets whole groups."""
    return find_cut_step(requirements.quantization_config)


@hookimpl
def core_register_quantizers() -> Iterable[QuantizerEntry]:
    """Contribute `awq`."""
    return [
        QuantizerEntry(
            name="awq",
            factory=make_scheme,
            unsupported=unsupported,
            summary="4 bits with a scale and a zero point for each group of inputs",
            methods=("awq",),
            weight_bits=weight_bits,
            cut_step=cut_step,
            make_writer=make_writer,
        )
    ]

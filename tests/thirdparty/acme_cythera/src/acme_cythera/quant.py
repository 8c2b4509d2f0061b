"""Four-bit weights, in blocks of 32 inputs that share their largest magnitude."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from core import hookimpl
from core.registry import QuantizerEntry, Requirements

if TYPE_CHECKING:
    from collections.abc import Iterable

    from core.interfaces import QuantScheme
    from core.plan import Plan

core_api = "1.0"

METHOD: Final = "acme-block4"
BLOCK: Final = 32
"""Inputs that share a magnitude."""


def make_scheme(plan: Plan) -> QuantScheme:
    """Build the scheme: for codes if the checkpoint holds codes, else for weights to convert."""
    from acme_cythera.block4 import Block4Scheme  # noqa: PLC0415  imports torch

    return Block4Scheme(is_stored=plan.quantization.get("quant_method") == METHOD)


def weight_bits(_requirements: Requirements) -> float:
    """Bits of an element: its code, and its part of a float16."""
    return 4 + 16 / BLOCK


def cut_step(_requirements: Requirements) -> int:
    """Features by which to cut: a magnitude is best not shared by ranks."""
    return BLOCK


def unsupported(requirements: Requirements) -> list[str]:
    """Refuse checkpoints of another block size."""
    size = requirements.quantization_config.get("block_size", BLOCK)
    return [] if size == BLOCK else [f"block_size {size!r} of the checkpoint is not {BLOCK}"]


@hookimpl
def core_register_quantizers() -> Iterable[QuantizerEntry]:
    """Offer the quantizer under the name `acme`."""
    return [
        QuantizerEntry(
            name="acme",
            factory=make_scheme,
            unsupported=unsupported,
            methods=(METHOD,),
            can_convert=True,
            weight_bits=weight_bits,
            cut_step=cut_step,
            summary="4 bits, blocks of 32 inputs share their largest magnitude",
        )
    ]

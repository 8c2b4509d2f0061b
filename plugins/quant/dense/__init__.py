"""Linear layers of unquantized weights on a GPU: fused kernels for few tokens, cuBLAS for many."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from core.hookspecs import hookimpl
from core.registry import QuantizerEntry, Requirements

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from core.interfaces import QuantScheme
    from core.plan import Plan

core_api = "1.0"

DTYPES: Final = ("bfloat16", "float16")
MODULES: Final = {"triton": "pip install cythera[cuda]"}


def make_scheme(plan: Plan) -> QuantScheme:
    """Build the scheme; only now are torch and triton imported."""
    from plugins.quant.dense.scheme import DenseScheme  # noqa: PLC0415  listing needs no torch

    return DenseScheme(plan)


def unsupported(requirements: Requirements) -> list[str]:
    """Every reason why the kernels cannot serve the requirements."""
    return requirements.beyond(devices=["cuda"], dtypes=DTYPES, modules=MODULES)


@hookimpl
def core_register_quantizers() -> Iterable[QuantizerEntry]:
    """Offer the scheme for checkpoints that are not quantized."""
    return [
        QuantizerEntry(
            name="dense",
            factory=make_scheme,
            unsupported=unsupported,
            serves_plain=True,
            priority=100,
            summary="unquantized weights on a GPU, with fused kernels",
        )
    ]


@hookimpl
def core_register_commands(subcommands: Callable[[str, Callable[..., Any]], None]) -> None:
    """Add `tune`."""
    from plugins.quant.dense.command import tune  # noqa: PLC0415  only a command line needs it

    subcommands("tune", tune)

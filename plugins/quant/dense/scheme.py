"""Weights as they are stored, in layers that fuse what surrounds them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from core.model.linear import PlainScheme
from plugins.quant.dense.linear import DenseLinear

if TYPE_CHECKING:
    from core.interfaces import LinearSpec
    from core.plan import Plan


class DenseScheme(PlainScheme):
    """Fulfils `core.interfaces.QuantScheme` for unquantized weights on a GPU."""

    def __init__(self, plan: Plan) -> None:
        self._norm_style = plan.model.norm_style
        self._activation = plan.model.activation

    def make_linear(self, spec: LinearSpec, /) -> DenseLinear:  # type: ignore[override]
        """Make an empty layer."""
        return DenseLinear(spec, self._norm_style, self._activation)

"""What quantizing a checkpoint did to it, as data."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Final

REPORT_FILE: Final = "quantize_report.json"


@dataclass(frozen=True, slots=True)
class LayerReport:
    """One decoder layer.  Errors are ‖y - ŷ‖ / ‖y‖ over the calibration text."""

    index: int
    error: float
    """Of the stream after the layer, if the stream before it is the same."""
    linears: dict[str, float]
    """Of each linear layer that was quantized, if its inputs are the same, by module name."""
    seconds: float


@dataclass(frozen=True, slots=True)
class Quality:
    """How well a text is predicted before and after, computed in the dtype of the calibration."""

    text: str
    """Where the text is from."""
    num_tokens: int
    """That were predicted."""
    before: float
    """Perplexity of the checkpoint that was read."""
    after: float
    """Perplexity of the one that was written."""
    agreement: float
    """Share of positions at which both hold the same token for the likeliest."""


@dataclass(slots=True)
class Report:
    """One run."""

    options: dict[str, Any]
    num_calibration_tokens: int
    bits_per_weight: float
    """Of the linear layers that were quantized, with everything that is stored to read them."""
    bytes_before: int
    bytes_after: int
    """Of all tensors of the checkpoint."""
    layers: list[LayerReport] = field(default_factory=list)
    quality: Quality | None = None
    """`None` if it was not measured."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

"""What a quantizer is given to write one layer of a checkpoint, and how it is asked to."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from core.interfaces import LinearSpec
    from core.model.spec import ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeOptions:
    """How to quantize: what `python -m core quantize` was told.  A method ignores what is not its own."""

    method: str
    bits: int = 4
    group_size: int = 128
    """Inputs that share a scale; -1 for all inputs of an output feature."""
    symmetric: bool | None = None
    """Whether codes have no zero point; `None` for the method's own choice."""
    act_order: bool = False
    """GPTQ: quantize inputs in order of their importance (desc_act)."""
    damp_percent: float = 0.01
    """GPTQ and FP8: added to the diagonal of the Hessian, as a share of its mean."""
    activation_scheme: str = "dynamic"
    """FP8: `dynamic` or `static`."""
    strategy: str = "channel"
    """FP8: `tensor`, `channel` or `block` (128 x 128)."""
    kv_cache_dtype: str = "auto"
    """`fp8` writes scales of keys and values too, whatever the method."""
    ignore: tuple[str, ...] = ("lm_head",)
    """Layers to leave as they are; see `core.quant.names.matches`."""


@dataclass(slots=True)
class CalibratedLinear:
    """A linear layer with what flows into it."""

    spec: LinearSpec
    """Of the whole layer."""
    weights: list[torch.Tensor]
    """Of each shard, float32 [out_features of the shard, in_features]."""
    biases: list[torch.Tensor | None]
    """Of each shard, float32 [out_features of the shard]."""
    inputs: torch.Tensor
    """[T, in_features] float32: inputs of the calibration text, after all earlier layers were
    quantized."""


@dataclass(slots=True)
class CalibratedLayer:
    """One decoder layer to quantize.  A method may change weights and norms in place."""

    index: int
    model: ModelSpec
    linears: dict[str, CalibratedLinear]
    """`qkv_proj`, `out_proj`, `gate_up_proj`, `down_proj`."""
    norms: dict[str, torch.Tensor]
    """Weights of `input_norm`, `mlp_norm` and what others the family has, float32, by module name."""
    ignored: frozenset[str] = field(default_factory=frozenset)
    """Names of `linears` that stay as they are."""


@runtime_checkable
class LayerQuantizer(Protocol):
    """Writes checkpoints: made by `QuantizerEntry.make_writer(options)`."""

    def quantize_layer(self, layer: CalibratedLayer, /) -> Mapping[str, Mapping[str, torch.Tensor]]:
        """Quantize the linear layers that are not ignored.

        :return: by checkpoint prefix (`model.layers.0.self_attn.q_proj`) the tensors of that shard by
            suffix (`qweight` …), on any device, biases included; the prefixes of ignored layers are
            left out.
        """

    def config(self) -> dict[str, Any]:
        """Return `quantization_config` for config.json, as other engines read it."""

"""The model family SmolLM3: a Llama of which every fourth layer has no rotary embedding.

A layer without one ("NoPE") sees keys in no order but that of the mask.  `ModelSpec` lets each layer
name its rotary embedding, so such layers name one that rotates no dimensions.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from core import hookimpl
from core.errors import CheckpointError
from core.model.families import read_decoder
from core.model.spec import LayerSpec, RopeSpec
from core.registry import ModelEntry

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from core.model.spec import ModelSpec

core_api = "1.0"

NO_ROPE: Final = RopeSpec(kind="default", theta=1.0, rotary_dim=0)


def read_smollm3(config: Any) -> ModelSpec:
    """Read the config of a SmolLM3 model.

    :param config: of `transformers`.
    :raises CheckpointError: it cannot be served; names the key, its value and what is supported.
    """
    bias = bool(config.attention_bias)
    model = read_decoder(config, qkv_bias=bias, out_bias=bias, mlp_bias=bool(config.mlp_bias))
    rope, *others = model.ropes
    if others:
        raise CheckpointError(
            f"rope_parameters of {config.model_type} has {len(model.ropes)} entries, but one is supported"
        )
    return replace(
        model,
        ropes={**model.ropes, "none": NO_ROPE},
        layers=tuple(_read_layers(config, rope)),
    )


def _read_layers(config: Any, rope: str) -> Iterator[LayerSpec]:
    """Describe each layer.

    :param rope: of the layers that rotate, which are those with a 1 in `no_rope_layers`.
    """
    count = config.num_hidden_layers
    for key in ("no_rope_layers", "layer_types"):
        values = getattr(config, key)
        if len(values) < count:
            raise CheckpointError(
                f"{key} of {config.model_type} names {len(values)} layers, but num_hidden_layers is {count}"
            )
    window = config.sliding_window if config.use_sliding_window else None
    for kind, rotates in zip(config.layer_types[:count], config.no_rope_layers, strict=False):
        if kind not in {"full_attention", "sliding_attention"}:
            raise CheckpointError(
                f"layer_types {kind!r} of {config.model_type} is not supported; known are "
                f"full_attention, sliding_attention"
            )
        yield LayerSpec(window if kind == "sliding_attention" else None, rope if rotates else "none")


@hookimpl
def core_register_models() -> Iterable[ModelEntry]:
    """Read `model_type` smollm3."""
    return [
        ModelEntry(
            name="smollm3",
            factory=read_smollm3,
            model_types=("smollm3",),
            summary="SmolLM3: every fourth layer without rotary embedding",
        )
    ]

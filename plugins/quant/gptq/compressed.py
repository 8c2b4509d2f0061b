"""The format pack-quantized of compressed-tensors: codes as GPTQ has them, in the other direction."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from core.errors import CheckpointError
from core.quant.compressed_tensors import read_config
from plugins.quant.gptq.formats import LayerFormat

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from core.model.spec import ModelSpec
    from core.quant.compressed_tensors import CompressedConfig, Group

FORMAT: Final = "pack-quantized"
MAX_BITS: Final = 8
STRATEGIES: Final = ("group", "channel")


def read_packed(config: Mapping[str, Any], model: ModelSpec | None = None) -> CompressedConfig:
    """Read a config all of whose groups are packed integers.

    :raises CheckpointError: it cannot be served; gives every reason.
    """
    compressed = read_config(config, model)
    problems = [
        f"config_groups.{name}.{problem}"
        for name, group in compressed.groups.items()
        for problem in _problems(group)
    ]
    if problems:
        raise CheckpointError("quantization_config: " + "; ".join(problems))
    return compressed


def packed_format(group: Group) -> LayerFormat:
    """Tell how the layers of a group are stored."""
    weights = group.weights
    return LayerFormat(
        layout=FORMAT,
        bits=weights.num_bits,
        group_size=weights.group_size,
        symmetric=weights.symmetric,
        ordered=weights.actorder == "group" and weights.group_size is not None,
    )


def _problems(group: Group) -> Iterator[str]:
    weights = group.weights
    if group.format != FORMAT:
        yield f"format is {group.format!r}, but only {FORMAT} can be read"
        return
    if weights.type != "int" or weights.num_bits > MAX_BITS:
        kind = f"{weights.num_bits}-bit {weights.type}"
        yield f"weights are {kind}, but only int of 1 to {MAX_BITS} bits can be read"
    if weights.strategy not in STRATEGIES:
        yield f"weights.strategy is {weights.strategy!r}, but only {', '.join(STRATEGIES)} can be read"
    if weights.dynamic:
        yield "weights.dynamic is true, but weights are stored"
    if group.input_activations is not None:
        inputs = group.input_activations
        yield f"input_activations are {inputs.num_bits}-bit {inputs.type}, but only null can be served"

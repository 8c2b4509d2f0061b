"""The float formats of compressed-tensors: FP8 in groups of layers, each with a scheme of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from core.errors import CheckpointError
from core.quant.compressed_tensors import read_config
from core.quant.names import ask_shards
from plugins.quant.fp8.formats import LayerFormat

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from core.interfaces import LinearSpec
    from core.model.spec import ModelSpec
    from core.quant.compressed_tensors import Arguments, Group

FLOAT_QUANTIZED: Final = "float-quantized"
_FORMATS: Final = (FLOAT_QUANTIZED, "naive-quantized")
_WEIGHTS: Final = ("tensor", "channel", "group", "block")


def compressed_problems(config: Mapping[str, Any]) -> Iterator[str]:
    """Find every reason, one sentence each, why a config of compressed-tensors cannot be served."""
    try:
        compressed = read_config(config)
    except CheckpointError as error:
        yield str(error)
        return
    for name, group in compressed.groups.items():
        yield from (f"config_groups.{name}.{problem}" for problem in _problems(group))


def compressed_formats(
    config: Mapping[str, Any], model: ModelSpec
) -> Callable[[LinearSpec], LayerFormat | None]:
    """Tell how each layer is stored."""
    compressed = read_config(config, model)

    def format_of(spec: LinearSpec) -> LayerFormat | None:
        group = ask_shards(spec, compressed.scheme_of, "how they are quantized")
        return None if group is None else _layout(group)

    return format_of


def compressed_layouts(config: Mapping[str, Any]) -> list[LayerFormat]:
    """List the formats that layers have."""
    return [_layout(group) for group in read_config(config).groups.values()]


def _layout(group: Group) -> LayerFormat:
    weights, inputs = group.weights, group.input_activations
    block = weights.block_structure
    if weights.group_size is not None:
        block = (1, weights.group_size)
    if inputs is None:
        return LayerFormat(block=block)
    if not inputs.dynamic:
        return LayerFormat(block=block, inputs="static")
    return LayerFormat(block=block, inputs="dynamic", group_size=inputs.group_size)


def _problems(group: Group) -> Iterator[str]:
    if group.format not in _FORMATS:
        yield f"format is {group.format!r}, which is not FP8; known are {', '.join(_FORMATS)}"
        return
    weights, inputs = group.weights, group.input_activations
    yield from _code_problems("weights", weights)
    if weights.strategy not in _WEIGHTS:
        yield f"weights.strategy is {weights.strategy!r}; known are {', '.join(_WEIGHTS)}"
    if weights.actorder == "group":
        yield "weights.actorder is 'group', but FP8 weights are stored in their order"
    if inputs is not None:
        yield from _code_problems("input_activations", inputs)
        yield from _input_problems(inputs)


def _code_problems(what: str, args: Arguments) -> Iterator[str]:
    if (args.num_bits, args.type, args.symmetric) != (8, "float", True):
        sign = "symmetric" if args.symmetric else "asymmetric"
        yield f"{what} is {args.num_bits}-bit {args.type}, {sign}; known is 8-bit float, symmetric"


def _input_problems(args: Arguments) -> Iterator[str]:
    what = f"input_activations.strategy is {args.strategy!r}"
    if args.dynamic and args.strategy == "tensor":
        yield f"{what} and dynamic, by which requests that share a step would change one another"
    elif args.dynamic and args.strategy not in ("token", "group"):
        yield f"{what}; known are token and group where scales are dynamic"
    elif not args.dynamic and args.strategy != "tensor":
        yield f"{what}; known is tensor where scales are static"

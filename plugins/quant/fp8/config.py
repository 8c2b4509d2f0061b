"""Reads `quantization_config`, in whichever of the two formats it is; knows nothing of torch."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from core.errors import CheckpointError
from core.quant.compressed_tensors import METHOD as COMPRESSED
from plugins.quant.fp8.compressed import (
    compressed_formats,
    compressed_layouts,
    compressed_problems,
)
from plugins.quant.fp8.native import NATIVE, native_formats, native_layout, native_problems

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from core.interfaces import LinearSpec
    from core.model.spec import ModelSpec
    from plugins.quant.fp8.formats import LayerFormat


def find_problems(config: Mapping[str, Any]) -> list[str]:
    """Find every reason, one sentence each, why a checkpoint cannot be served."""
    method = config.get("quant_method")
    if method not in (NATIVE, COMPRESSED):
        return [f"quant_method {method!r} is not supported; known are {NATIVE}, {COMPRESSED}"]
    return list(compressed_problems(config) if method == COMPRESSED else native_problems(config))


def read_formats(
    config: Mapping[str, Any], model: ModelSpec, *, keep_inputs: bool = False
) -> Callable[[LinearSpec], LayerFormat | None]:
    """Tell how a layer is stored; `None` if it is not quantized.

    :param keep_inputs: leave inputs as they are, whatever the checkpoint says.
    :raises CheckpointError: the config cannot be served.
    """
    problems = find_problems(config)
    if problems:
        raise CheckpointError("; ".join(problems))
    read = compressed_formats if _is_compressed(config) else native_formats
    format_of = read(config, model)

    def kept(spec: LinearSpec) -> LayerFormat | None:
        layout = format_of(spec)
        return None if layout is None else replace(layout, inputs="keep")

    return kept if keep_inputs else format_of


def list_blocks(config: Mapping[str, Any]) -> list[tuple[int, int]]:
    """List the blocks in which weights share scales."""
    layouts = compressed_layouts(config) if _is_compressed(config) else [native_layout(config)]
    return [layout.block for layout in layouts if layout.block is not None]


def _is_compressed(config: Mapping[str, Any]) -> bool:
    return config.get("quant_method") == COMPRESSED

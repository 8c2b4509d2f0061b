"""The native format: `quant_method` fp8, one format for all layers but those in a list."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from core.quant.names import ask_shards, matches_any, spellings
from plugins.quant.fp8.formats import HEAD_ROLE, LayerFormat

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from core.interfaces import LinearSpec
    from core.model.spec import ModelSpec

NATIVE: Final = "fp8"
_CHOICES: Final = {
    "activation_scheme": ("dynamic", "static"),
    "fmt": ("e4m3",),
    "scale_fmt": ("float", "ue8m0"),
}
"""What each key may say; the first is also what it means to say nothing."""
_SKIP_LISTS: Final = ("ignored_layers", "modules_to_not_convert")


def native_problems(config: Mapping[str, Any]) -> Iterator[str]:
    """Find every reason, one sentence each, why a native config cannot be served."""
    for key, known in _CHOICES.items():
        if config.get(key) not in (None, *known):
            yield f"{key} {config[key]!r} is not supported; known are {', '.join(map(repr, known))}"
    block = config.get("weight_block_size")
    if block is not None and not _is_block(block):
        yield f"weight_block_size is {block!r}, but two numbers above 0 are needed, such as [128, 128]"
    if block is not None and config.get("activation_scheme") == "static":
        yield (
            f"weight_block_size {block!r} with activation_scheme 'static' is not supported: weights in "
            f"blocks take dynamic inputs"
        )
    for key in _SKIP_LISTS:
        if not isinstance(config.get(key) or [], list | tuple):
            yield f"{key} is {config[key]!r}, but a list of names is needed"
    if config.get("modules_to_convert"):
        yield (
            f"modules_to_convert is {config['modules_to_convert']!r}, but embeddings and lm_head are read "
            f"unquantized only"
        )


def native_layout(config: Mapping[str, Any]) -> LayerFormat:
    """Read the format of all layers that are quantized."""
    block = config.get("weight_block_size")
    return LayerFormat(
        block=None if block is None else (block[0], block[1]),
        inputs="static" if config.get("activation_scheme") == "static" else "dynamic",
        group_size=None if block is None else block[1],
        power_of_two=config.get("scale_fmt") == "ue8m0",
    )


def native_formats(
    config: Mapping[str, Any], model: ModelSpec
) -> Callable[[LinearSpec], LayerFormat | None]:
    """Tell layers that are quantized from those that are not; `lm_head` never is."""
    layout = native_layout(config)
    patterns = [pattern for key in _SKIP_LISTS for pattern in config.get(key) or ()]

    def is_skipped(prefix: str) -> bool:
        names = spellings(prefix, model)
        return any(matches_any(name, patterns) for name in names)

    def format_of(spec: LinearSpec) -> LayerFormat | None:
        if spec.role == HEAD_ROLE or ask_shards(spec, is_skipped, "whether they are skipped"):
            return None
        return layout

    return format_of


def _is_block(value: Any) -> bool:
    return (
        isinstance(value, list | tuple)
        and len(value) == 2
        and all(isinstance(size, int) and size > 0 for size in value)
    )

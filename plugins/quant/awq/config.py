"""What `quantization_config` says about AWQ, under the keys of AutoAWQ, transformers and GPTQModel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from core.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

BITS: Final = 4
SCALE_BITS: Final = 16
CODES_PER_WORD: Final = 32 // BITS
GROUP_SIZES: Final = (16, 32, 64, 128)
ALL_INPUTS: Final = -1
"""The `group_size` of files in which all inputs of an output feature share a scale."""
VERSION: Final = "gemm"

_BITS_KEYS: Final = ("bits", "w_bit")
_GROUP_SIZE_KEYS: Final = ("group_size", "q_group_size")
_VERSION_KEYS: Final = ("version", "format", "checkpoint_format")
_OTHER_LAYOUT: Final = "llm-awq"  # a `backend` that goes with a layout of its own


@dataclass(frozen=True, slots=True, kw_only=True)
class AwqConfig:
    """How the quantized layers are stored, and which are not."""

    group_size: int
    """Inputs that share a scale; `ALL_INPUTS` for all."""
    skipped: tuple[str, ...] = ()
    """As the checkpoint names them; see `core.quant.names.matches`."""
    is_head_quantized: bool = False
    has_zero_points: bool = True
    """Otherwise the zero point is 8 everywhere, whether files store it or not."""


def find_problems(config: Mapping[str, Any]) -> Iterator[str]:
    """Find every reason, one sentence each, why a config cannot be served."""
    bits, group_size, version = _read_values(config)
    if bits != BITS:
        yield f"bits {bits!r} is not supported; AWQ weights have {BITS} bits"
    if group_size not in (*GROUP_SIZES, ALL_INPUTS):
        known = ", ".join(map(str, GROUP_SIZES))
        yield f"group_size {group_size!r} is not supported; known are {known} and {ALL_INPUTS} for all"
    if version != VERSION:
        yield f"version {version!r} is not supported, only {VERSION!r}; convert the checkpoint to it"
    if config.get("backend") == _OTHER_LAYOUT:
        yield f"backend {_OTHER_LAYOUT!r} has a layout of its own, and only version {VERSION!r} is read"
    if config.get("dynamic"):
        yield "dynamic holds rules for single layers, but only modules_to_not_convert is read"
    if not _are_names(config.get("modules_to_not_convert")):
        yield f"modules_to_not_convert is {config['modules_to_not_convert']!r}, but names are needed"


def read_config(config: Mapping[str, Any]) -> AwqConfig:
    """Read a config.

    :raises CheckpointError: the config cannot be served.
    """
    problems = list(find_problems(config))
    if problems:
        raise CheckpointError("quantization_config: " + "; ".join(problems))
    _, group_size, _ = _read_values(config)
    return AwqConfig(
        group_size=group_size,
        skipped=tuple(config.get("modules_to_not_convert") or ()),
        is_head_quantized=bool(config.get("lm_head")),
        has_zero_points=bool(config.get("zero_point", True)),
    )


def find_weight_bits(config: Mapping[str, Any]) -> float:
    """Count the bits of a weight, with its share of scale and zero point unless all inputs share those."""
    _, group_size, _ = _read_values(config)
    return BITS if group_size == ALL_INPUTS else BITS + (SCALE_BITS + BITS) / group_size


def find_cut_step(config: Mapping[str, Any]) -> int:
    """Count the features by multiples of which layers are best cut: whole groups and whole words."""
    group_size: int = _read_values(config)[1]
    return CODES_PER_WORD if group_size == ALL_INPUTS else group_size


def _read_values(config: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    """Read bits, group size and version; what is missing is as `transformers` takes it to be."""
    version = _read(config, _VERSION_KEYS, VERSION)
    return (
        _read(config, _BITS_KEYS, BITS),
        _read(config, _GROUP_SIZE_KEYS, 128),
        version.lower() if isinstance(version, str) else version,
    )


def _read(config: Mapping[str, Any], keys: tuple[str, ...], default: Any) -> Any:
    return next((config[key] for key in keys if config.get(key) is not None), default)


def _are_names(value: Any) -> bool:
    return value is None or (
        isinstance(value, list | tuple) and all(isinstance(name, str) for name in value)
    )

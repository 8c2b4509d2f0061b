"""What `quantization_config` of GPTQ says: one format for all layers, and rules for some of them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, cast

from core.errors import CheckpointError
from core.quant.names import matches, spellings
from plugins.quant.gptq.formats import LayerFormat, Layout

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from core.model.spec import ModelSpec

METHOD: Final = "gptq"
SKIP: Final = "-:"
OVERRIDE: Final = "+:"
BITS: Final = (2, 3, 4, 8)
LAYOUTS: Final = ("gptq", "gptq_v2")
HEAD: Final = "lm_head"


@dataclass(frozen=True, slots=True)
class Rule:
    """What a rule of `dynamic` makes of the layers whose names begin with what it matches."""

    regex: str
    format: LayerFormat | None
    """`None`: they are not quantized."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GptqConfig:
    """A config that was read; made by `read_gptq`."""

    default: LayerFormat
    rules: tuple[Rule, ...]
    """The first that matches counts."""
    modules: tuple[str, ...]
    """Patterns of the layers of a block that are quantized; none: all of them."""
    has_head: bool
    """Whether the output projection is quantized too."""

    @property
    def formats(self) -> tuple[LayerFormat, ...]:
        """Every format that a layer may have."""
        return (self.default, *(rule.format for rule in self.rules if rule.format is not None))

    def format_of(self, prefix: str, model: ModelSpec | None = None) -> LayerFormat | None:
        """Tell how a stored layer is quantized; `None` if it is not."""
        names = spellings(prefix, model)
        if prefix == HEAD:
            if not self.has_head:
                return None
        elif self.modules and not any(matches(n, pattern) for n in names for pattern in self.modules):
            return None
        for rule in self.rules:
            if any(re.match(rule.regex, name) for name in names):
                return rule.format
        return self.default


def read_gptq(config: Mapping[str, Any]) -> GptqConfig:
    """Read a config.

    :raises CheckpointError: it cannot be served; gives every reason.
    """
    problems: list[str] = []
    dynamic = config.get("dynamic") or {}
    if not isinstance(dynamic, dict):
        problems.append(f"dynamic is {dynamic!r}, but a table of rules is needed")
        dynamic = {}
    parsed = GptqConfig(
        default=_read_format(config, "", problems),
        rules=tuple(_read_rule(pattern, dynamic[pattern], config, problems) for pattern in dynamic),
        modules=tuple(_flatten(config.get("modules_in_block_to_quantize") or (), problems)),
        has_head=bool(config.get(HEAD, False)),
    )
    if problems:
        raise CheckpointError("quantization_config: " + "; ".join(problems))
    return parsed


def _read_rule(pattern: str, overrides: Any, config: Mapping[str, Any], problems: list[str]) -> Rule:
    regex = pattern.removeprefix(SKIP if pattern.startswith(SKIP) else OVERRIDE)
    try:
        re.compile(regex)
    except re.error as error:
        problems.append(f"dynamic[{pattern!r}] is no regular expression: {error}")
    if pattern.startswith(SKIP):
        return Rule(regex, None)
    if not isinstance(overrides, dict):
        problems.append(f"dynamic[{pattern!r}] is {overrides!r}, but a table of settings is needed")
        overrides = {}
    return Rule(regex, _read_format({**config, **overrides}, f"dynamic[{pattern!r}].", problems))


def _read_format(config: Mapping[str, Any], where: str, problems: list[str]) -> LayerFormat:
    """Read what one layer is stored with; `bits` alone has no default.

    :param where: put before the keys in messages.
    """
    bits, size = config.get("bits"), config.get("group_size", -1)
    layout = config.get("checkpoint_format") or config.get("format") or METHOD
    layout = layout.lower() if isinstance(layout, str) else layout
    known = {
        "bits": (bits, BITS),
        "checkpoint_format": (layout, LAYOUTS),
        "pack_dtype": (config.get("pack_dtype") or "int32", ("int32",)),
        "is_marlin_format": (config.get("is_marlin_format") or False, (False,)),
    }
    problems += [
        f"{where}{key} is {value!r}, but only {', '.join(map(str, supported))} can be read"
        for key, (value, supported) in known.items()
        if value not in supported
    ]
    if not isinstance(size, int) or size == 0 or size < -1:
        problems.append(f"{where}group_size is {size!r}, but -1 or a number above 0 is needed")
        size = -1
    return LayerFormat(
        layout=cast("Layout", layout),
        bits=bits if isinstance(bits, int) else BITS[0],
        group_size=None if size == -1 else size,
        symmetric=bool(config.get("sym", True)),
        ordered=bool(config.get("desc_act", False)) and size != -1,
    )


def _flatten(value: Any, problems: list[str]) -> Iterator[str]:
    """Walk lists of names, which may be in lists of what is quantized together."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _flatten(item, problems)
    else:
        problems.append(f"modules_in_block_to_quantize holds {value!r}, which is no name")

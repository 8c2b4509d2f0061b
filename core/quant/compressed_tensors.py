"""`quantization_config` of the library compressed-tensors: which layers are stored how.

Layers are told by their names and their class, and share what they are quantized with in groups.
How a format lays out its tensors is not told here; that is for the quantizers that read it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal, cast, get_args

from core.errors import CheckpointError
from core.quant.names import REGEX, matches_exactly, spellings

if TYPE_CHECKING:
    from collections.abc import Callable

    from core.model.spec import ModelSpec

METHOD: Final = "compressed-tensors"
LINEAR: Final = "Linear"
"""The class of every layer that a scheme makes, as targets call it."""
MIXED: Final = "mixed-precision"
"""A format that leaves the word to the groups."""

NumberType = Literal["int", "float"]
Strategy = Literal["tensor", "channel", "group", "block", "token"]
ActOrder = Literal["group", "weight"]
_ACT_ORDERS: Final[Mapping[Any, ActOrder | None]] = {
    None: None,
    False: None,
    True: "group",
    "group": "group",
    "dynamic": "group",
    "weight": "weight",
    "static": "weight",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Arguments:
    """How numbers are quantized."""

    num_bits: int
    type: NumberType
    symmetric: bool
    """Whether there are no zero points."""
    strategy: Strategy
    """What shares a scale."""
    group_size: int | None = None
    """Inputs that share a scale under the strategy `group`."""
    block_structure: tuple[int, int] | None = None
    """Outputs and inputs that share a scale under the strategy `block`."""
    dynamic: bool = False
    """Whether scales are made anew from what is quantized, and none are stored."""
    actorder: ActOrder | None = None
    """`group`: inputs belong to groups in an order of their own, which is stored.  `weight`: they were
    quantized in another order, of which nothing is left to see."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """What some layers have in common.  Equal groups store layers alike, whichever layers these are."""

    targets: tuple[str, ...] = field(compare=False)
    """Names of modules, `re:` and a regular expression, or names of classes."""
    weights: Arguments
    input_activations: Arguments | None
    """`None`: inputs are multiplied as they are."""
    format: str
    """How its layers are stored, such as `pack-quantized`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressedConfig:
    """What a config says; made by `read_config`."""

    format: str
    """Of all groups, or `mixed-precision`."""
    groups: Mapping[str, Group]
    """By name."""
    ignore: tuple[str, ...]
    """Like targets: layers that are in no group."""
    kv_cache_scheme: Arguments | None
    spellings_of: Callable[[str], tuple[str, ...]]
    """Every name that a module of the decoder may have in the checkpoint."""

    def scheme_of(self, prefix: str) -> Group | None:
        """Find the group of a linear layer.

        As in the library, a target that names the layer goes before a regular expression, and that
        before a class; of several of one kind the first in the alphabet counts.

        :param prefix: of one stored layer, such as `model.layers.0.self_attn.q_proj`.
        :return: `None` if the layer is not quantized.
        :raises CheckpointError: a regular expression is malformed.
        """
        names = self.spellings_of(prefix)
        if any(_is_meant(names, pattern) for pattern in self.ignore):
            return None
        targets = {target: group for group in self.groups.values() for target in group.targets}
        return next((targets[t] for t in sorted(targets, key=_rank) if _is_meant(names, t)), None)


def _is_meant(names: tuple[str, ...], pattern: str) -> bool:
    return pattern == LINEAR or any(matches_exactly(name, pattern) for name in names)


def _rank(target: str) -> tuple[bool, bool, str]:
    return target == LINEAR, target.startswith(REGEX), target


def read_config(config: Mapping[str, Any], model: ModelSpec | None = None) -> CompressedConfig:
    """Read `quantization_config`, or what older checkpoints call `compression_config`.

    :param config: as config.json holds it.
    :param model: tells by which other names the checkpoint may call the decoder's modules; without it
        they are the decoder's.
    :raises CheckpointError: something is malformed or not supported; names every key that is.
    """
    inner = config.get("quantization_config")  # beside it, older ones state their sparsity
    reader = _Reader()
    reader.expect_nothing("sparsity_config", config, is_harmless=_is_dense)
    reader.expect_nothing("transform_config", config, is_harmless=_is_empty)
    compressed = reader.read({**config, **inner} if isinstance(inner, Mapping) else config, model)
    if reader.problems:
        raise CheckpointError("quantization_config: " + "; ".join(reader.problems))
    return compressed


def _is_dense(value: Mapping[str, Any]) -> bool:
    return value.get("format") in (None, "dense")


def _is_empty(value: Mapping[str, Any]) -> bool:
    return not value.get("config_groups")


class _Reader:
    """Reads plain data; what is wrong with it is collected, and replaced by something that is not."""

    def __init__(self) -> None:
        self.problems: list[str] = []

    def expect_nothing(
        self, key: str, config: Mapping[str, Any], is_harmless: Callable[[Mapping[str, Any]], bool]
    ) -> None:
        value = config.get(key)
        if value and not (isinstance(value, Mapping) and is_harmless(value)):
            self.problems.append(f"{key} is {value!r}, but only checkpoints without one are supported")

    def read(self, config: Mapping[str, Any], model: ModelSpec | None) -> CompressedConfig:
        stored_as = config.get("format") or MIXED
        kv_cache = config.get("kv_cache_scheme")
        groups = {
            name: group
            for name, value in self._table("config_groups", config.get("config_groups")).items()
            if (group := self._group(f"config_groups.{name}", value, stored_as)) is not None
        }
        if not groups and not self.problems:
            self.problems.append("config_groups is empty, but the checkpoint is said to be quantized")
        return CompressedConfig(
            format=stored_as,
            groups=groups,
            ignore=self._names("ignore", config.get("ignore")),
            kv_cache_scheme=None if kv_cache is None else self._arguments("kv_cache_scheme", kv_cache),
            spellings_of=lambda name: spellings(name, model),
        )

    def _group(self, key: str, value: Any, default_format: str) -> Group | None:
        if not isinstance(value, Mapping):
            self.problems.append(f"{key} is {value!r}, but a table with targets and weights is needed")
            return None
        if value.get("weights") is None:
            self.problems.append(f"{key}.weights is null, but only groups of weights are supported")
            return None
        if value.get("output_activations") is not None:
            self.problems.append(f"{key}.output_activations is set, but only null is supported")
        stored_as = value.get("format") or default_format
        if stored_as == MIXED:
            self.problems.append(f"{key}.format is {MIXED}, but each group has to have one of its own")
        inputs = value.get("input_activations")
        return Group(
            targets=self._names(f"{key}.targets", value.get("targets")),
            weights=self._arguments(f"{key}.weights", value["weights"]),
            input_activations=(
                None if inputs is None else self._arguments(f"{key}.input_activations", inputs)
            ),
            format=stored_as,
        )

    def _arguments(self, key: str, value: Any) -> Arguments:
        value = self._table(key, value)
        size = value.get("group_size")
        strategy = self._choice(
            f"{key}.strategy", value.get("strategy") or _infer_strategy(size), get_args(Strategy)
        )
        return Arguments(
            num_bits=self._count(f"{key}.num_bits", value.get("num_bits", 8)),
            type=self._choice(f"{key}.type", value.get("type", "int"), get_args(NumberType)),
            symmetric=self._flag(f"{key}.symmetric", value.get("symmetric", True)),
            strategy=cast("Strategy", strategy),
            group_size=self._count(f"{key}.group_size", size) if strategy == "group" else None,
            block_structure=(
                self._block(f"{key}.block_structure", value.get("block_structure"))
                if strategy == "block"
                else None
            ),
            dynamic=self._flag(f"{key}.dynamic", value.get("dynamic", False)),
            actorder=self._act_order(f"{key}.actorder", value.get("actorder")),
        )

    def _table(self, key: str, value: Any) -> Mapping[str, Any]:
        if value is None or isinstance(value, Mapping):
            return value or {}
        self.problems.append(f"{key} is {value!r}, but a table is needed")
        return {}

    def _names(self, key: str, value: Any) -> tuple[str, ...]:
        names = () if value is None else value
        if isinstance(names, list | tuple) and all(isinstance(name, str) for name in names):
            return tuple(names)
        self.problems.append(f"{key} is {value!r}, but a list of names is needed")
        return ()

    def _choice(self, key: str, value: Any, known: tuple[Any, ...]) -> Any:
        wanted = value.lower() if isinstance(value, str) else value
        if wanted in known:
            return wanted
        self.problems.append(f"{key} is {value!r}, but only {', '.join(known)} are supported")
        return known[0]

    def _count(self, key: str, value: Any) -> int:
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
        self.problems.append(f"{key} is {value!r}, but a number above 0 is needed")
        return 1

    def _flag(self, key: str, value: Any) -> bool:
        if isinstance(value, bool):
            return value
        self.problems.append(f"{key} is {value!r}, but only true and false are supported")
        return False

    def _block(self, key: str, value: Any) -> tuple[int, int]:
        sizes = value.split("x") if isinstance(value, str) else value
        try:
            rows, columns = map(int, sizes)
        except (TypeError, ValueError):
            rows = columns = 0
        if min(rows, columns) > 0:
            return rows, columns
        self.problems.append(f"{key} is {value!r}, but two numbers above 0 are needed")
        return 1, 1

    def _act_order(self, key: str, value: Any) -> ActOrder | None:
        wanted = value.lower() if isinstance(value, str) else value
        if isinstance(wanted, str | bool | None) and wanted in _ACT_ORDERS:
            return _ACT_ORDERS[wanted]
        self.problems.append(f"{key} is {value!r}, but only null, weight and group are supported")
        return None


def _infer_strategy(group_size: Any) -> str:
    if group_size is None:
        return "tensor"
    return "channel" if group_size == -1 else "group"

"""Descriptors: what plugins register.  Frozen data, looked up by kind and name.

A descriptor says what a part is called, how to build it and which requirements it cannot meet; it
holds module-level callables only and touches no device, file or global.
"""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Final

from core.errors import PluginConflictError, PluginNotFoundError

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from core.model.spec import ModelSpec
    from core.quant.calibration import LayerQuantizer, QuantizeOptions
    from core.sharding import Share, Span


@dataclass(frozen=True, slots=True, kw_only=True)
class Requirements:
    """What the configuration and the checkpoint ask of a part: the argument of `unsupported`.

    Everything is plain data, so that a plan can be made without a device and without torch.
    """

    device: str
    """`cpu`, `cuda` …"""
    dtype: str
    """`float32`, `bfloat16`, `float16` or `float64`."""
    head_dims: frozenset[int] = frozenset()
    num_heads: int = 0
    num_kv_heads: int = 0
    kv_cache_dtype: str = "auto"
    has_window: bool = False
    has_softcap: bool = False
    block_size: int | None = None
    """The size that the user asked for; `None` leaves it to the attention backend."""
    quantization: str | None = None
    quantization_config: dict[str, Any] = field(default_factory=dict)
    model_type: str = ""
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1

    def beyond(
        self,
        *,
        devices: Collection[str] = (),
        dtypes: Collection[str] = (),
        kv_cache_dtypes: Collection[str] | None = None,
        block_sizes: Collection[int] = (),
        modules: Mapping[str, str] | None = None,
    ) -> list[str]:
        """List what goes beyond a part's means: one sentence each, for its `unsupported`.

        :param devices: that it runs on; empty: any.
        :param dtypes: that it computes in; empty: any.
        :param kv_cache_dtypes: in which it keeps keys and values, besides `auto` and the dtype itself;
            `None`: any.
        :param block_sizes: of its pages; empty: any.
        :param modules: that it imports, each with what installs it; none of them is imported here.
        """
        reasons = []
        if devices and self.device not in devices:
            reasons.append(f"device {self.device!r} {_is_none_of(devices)}")
        if dtypes and self.dtype not in dtypes:
            reasons.append(f"dtype {self.dtype!r} {_is_none_of(dtypes)}")
        if kv_cache_dtypes is not None:
            known = dict.fromkeys(("auto", self.dtype, *kv_cache_dtypes))
            if self.kv_cache_dtype not in known:
                reasons.append(f"kv_cache_dtype {self.kv_cache_dtype!r} {_is_none_of(known)}")
        if block_sizes and self.block_size not in (None, *block_sizes):
            reasons.append(f"block_size {self.block_size} {_is_none_of(sorted(block_sizes))}")
        reasons += [
            f"{module} is not installed; {remedy}"
            for module, remedy in (modules or {}).items()
            if importlib.util.find_spec(module) is None
        ]
        return reasons


def _is_none_of(known: Collection[object]) -> str:
    if len(known) > 1:
        return f"is none of {', '.join(map(str, known))}"
    return f"is not {next(iter(known))!r}"


def supports_everything(_requirements: Requirements) -> list[str]:
    """Serve as the `unsupported` of a part without limits."""
    return []


Unsupported = Callable[[Requirements], list[str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Descriptor:
    """A part that can be chosen by name."""

    name: str
    """Without the kind: `torch`, `awq` …"""
    factory: Callable[..., Any]
    """Builds the part; each kind's subclass says with which arguments."""
    unsupported: Unsupported = supports_everything
    """Every reason, one sentence each, why the part cannot serve the requirements."""
    summary: str = ""
    """One line for `plugins list`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionEntry(Descriptor):
    """An attention backend: `factory(plan) -> AttentionBackend`."""

    block_sizes: tuple[int, ...] = ()
    """The page sizes it can work with, its favourite first; empty means any."""
    default_block_size: int = 16
    priority: int = 0
    """Under `auto` the supporting backend with the highest priority is taken."""


def _no_bits(_requirements: Requirements) -> float | None:
    return None


def _any_step(_requirements: Requirements) -> int:
    return 1


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizerEntry(Descriptor):
    """A quantizer: `factory(plan) -> QuantScheme`.

    Several may read the same method; the first is taken that has nothing against the checkpoint.
    """

    methods: tuple[str, ...] = ()
    """Values of `quantization_config.quant_method` that it reads."""
    serves_plain: bool = False
    """Whether it serves checkpoints that are not quantized, unless another quantizer is asked for."""
    priority: int = 0
    """Among those that serve plain checkpoints the supporting one with the highest priority is taken."""
    can_convert: bool = False
    """Whether `--quantization NAME` may be asked of a checkpoint that is not quantized."""
    weight_bits: Callable[[Requirements], float | None] = _no_bits
    """Bits that an element of a linear layer takes, scales included; `None`: those of the dtype."""
    cut_step: Callable[[Requirements], int] = _any_step
    """Features by multiples of which layers are best cut for several ranks, such as a group's size."""
    make_writer: Callable[[QuantizeOptions], LayerQuantizer] | None = None
    """Makes what `python -m core quantize --method NAME` writes checkpoints with; raises `ConfigError`
    for options that it cannot serve; `None` if it only reads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelEntry(Descriptor):
    """A way to spread a model over ranks; register one of the two kinds below.

    A plugin whose settings have a field `size` is asked for its ranks there too, besides the flags.
    """

    axis: ClassVar[str] = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorParallelEntry(ParallelEntry):
    """Divides each layer: `factory(plan, rank) -> TensorParallel`.

    The factory is called on every rank, once torch.distributed is there, in the same order.
    """

    axis: ClassVar[str] = "tensor"
    divide: Callable[[ModelSpec, int, int], Sequence[Share]]
    """(model, ranks, `QuantizerEntry.cut_step`) -> each rank's part of all layers; raises
    `ConfigError` if there are too many ranks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineParallelEntry(ParallelEntry):
    """Divides the layers among stages: `factory(plan, rank) -> PipelineParallel`.

    The factory is called on every rank, once torch.distributed is there, in the same order.
    """

    axis: ClassVar[str] = "pipeline"
    divide: Callable[[ModelSpec, int, Any], Sequence[Span]]
    """(model, stages, settings of the plugin or `None`) -> the layers of each stage, all in order;
    raises `ConfigError` if they cannot be divided so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerEntry(Descriptor):
    """A scheduler: `factory(plan, kv_cache) -> Scheduler`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KVCacheEntry(Descriptor):
    """A KV cache: `factory(plan, num_blocks) -> KVCache`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutorEntry(Descriptor):
    """An executor: `factory(plan, parts) -> Executor`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LauncherEntry(Descriptor):
    """What starts the processes of several ranks: `factory(plan) -> core.ranks.executor.Launcher`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelEntry(Descriptor):
    """A model family: `factory(config) -> ModelSpec`, from a `transformers` config."""

    model_types: tuple[str, ...] = ()
    """Values of `model_type` in config.json that it reads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontendEntry(Descriptor):
    """A surface for clients, such as an HTTP API: `factory(service) -> Frontend`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerEntry(Descriptor):
    """What carries the front ends to clients: `factory(service, frontends) -> Server`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplerEntry(Descriptor):
    """A sampler: `factory(plan) -> Sampler`."""

    priority: int = 0
    """Under `auto` the supporting sampler with the highest priority is taken."""


KINDS: Final[dict[str, type[Descriptor]]] = {
    "attention": AttentionEntry,
    "quant": QuantizerEntry,
    "parallel": ParallelEntry,
    "scheduler": SchedulerEntry,
    "kv_cache": KVCacheEntry,
    "executor": ExecutorEntry,
    "launcher": LauncherEntry,
    "model": ModelEntry,
    "frontend": FrontendEntry,
    "server": ServerEntry,
    "sampler": SamplerEntry,
}


@dataclass(frozen=True, slots=True)
class Registered:
    """A descriptor and who brought it."""

    descriptor: Descriptor
    plugin: str
    distribution: str
    """Name and version, such as `cythera 0.1.0`."""


class Registry:
    """All descriptors of the active plugins; filled once, then only read."""

    def __init__(self) -> None:
        self._entries: dict[str, dict[str, Registered]] = {kind: {} for kind in KINDS}

    def add(self, kind: str, descriptor: Descriptor, *, plugin: str, distribution: str) -> None:
        """Enter one descriptor.

        :raises PluginConflictError: the name is taken; names both distributions.
        """
        entries = self._entries[kind]
        taken = entries.get(descriptor.name)
        if taken is not None:
            raise PluginConflictError(
                f"{kind} {descriptor.name!r} is provided by both {taken.plugin} ({taken.distribution}) "
                f"and {plugin} ({distribution}); disable one with no:{plugin}",
                plugin=plugin,
            )
        entries[descriptor.name] = Registered(descriptor, plugin, distribution)

    def get(self, kind: str, name: str) -> Registered:
        """Look one up.

        :raises PluginNotFoundError: none has that name; suggests the nearest.
        """
        entries = self._entries[kind]
        if name in entries:
            return entries[name]
        near = difflib.get_close_matches(name, entries, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        known = ", ".join(sorted(entries)) or "none"
        raise PluginNotFoundError(
            f"no active plugin provides {kind} {name!r}{hint} (active: {known})",
            plugin=f"{kind}.{name}",
        )

    def all(self, kind: str) -> list[Registered]:
        """All of one kind, in order of registration."""
        return list(self._entries[kind].values())

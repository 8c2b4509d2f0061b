"""Descriptors: what plugins register.  Frozen data, looked up by kind and name.

A descriptor says what a part is called, how to build it and which requirements it cannot meet; it
holds module-level callables only and touches no device, file or global.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from core.errors import PluginConflictError, PluginNotFoundError


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


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizerEntry(Descriptor):
    """A quantizer: `factory(plan) -> QuantScheme`."""

    methods: tuple[str, ...] = ()
    """Values of `quantization_config.quant_method` that it reads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelEntry(Descriptor):
    """A parallel strategy: `factory(plan, rank) -> ParallelStrategy`."""

    axis: str = "tensor"


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


KINDS: Final[dict[str, type[Descriptor]]] = {
    "attention": AttentionEntry,
    "quant": QuantizerEntry,
    "parallel": ParallelEntry,
    "scheduler": SchedulerEntry,
    "kv_cache": KVCacheEntry,
    "executor": ExecutorEntry,
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

"""Config and descriptors -> plan -> parts.  The only file that knows both sides.

`resolve` decides everything and builds nothing: it needs no device and no weights, and every reason
against the configuration is collected before it raises.  `build_engine` then builds what the plan
names, in the order in which the parts need one another.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pydantic

from core.config import DEFAULT_ORIGIN
from core.demo import find_model
from core.engine import EngineCore
from core.errors import (
    ConfigError,
    CytheraError,
    PlanError,
    PluginCallError,
    PluginNotFoundError,
)
from core.events import EventBus
from core.interfaces import (
    AttentionBackend,
    Executor,
    KVCache,
    PipelineParallel,
    QuantScheme,
    Sampler,
    Scheduler,
    TensorParallel,
    missing_members,
)
from core.offload import NUM_BUFFERS, choose_layers
from core.pluginhost import PluginHost, PluginSelection, Selected, discover
from core.registry import (
    AttentionEntry,
    ModelEntry,
    ParallelEntry,
    PipelineParallelEntry,
    QuantizerEntry,
    Registered,
    Registry,
    Requirements,
    TensorParallelEntry,
)
from core.request import RequestLimits
from core.status import Phase, Report, Status, report_nothing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from core.config import EngineConfig
    from core.link import RelayBus
    from core.messages import OutputBatch
    from core.model.spec import ModelSpec
    from core.sharding import Share, Span

DEFAULT_PLUGINS: Final = (
    "core.builtin",
    "attention.torch",
    "quant.awq",
    "quant.gptq",
    "quant.fp8",
    "observe.log",
)
"""Active unless `--plugins` names their kind or blocks them."""
SERVE_PLUGINS: Final = (
    "server.http",
    "frontend.openai",
    "frontend.playground",
    "observe.prometheus",
)
"""The same, for an engine that serves clients."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A part that was chosen, and why."""

    kind: str
    registered: Registered
    why: str

    @property
    def name(self) -> str:
        """The descriptor's name."""
        return self.registered.descriptor.name


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that was decided, as frozen data.  Every rank rebuilds its parts from it."""

    config: EngineConfig
    model: ModelSpec
    model_path: str
    device: str
    dtype: str
    max_model_len: int
    block_size: int
    weight_bytes: int
    """Bytes of the weights on all ranks together."""
    layer_bytes: int
    """Bytes of the matrices of one decoder layer, on all ranks that share it."""
    kv_bytes_per_token: int
    choices: Mapping[str, Choice]
    """By kind."""
    plugins: tuple[Selected, ...]
    settings: Mapping[str, Any]
    """Bound settings of each plugin that has any, by plugin name."""
    kv_cache_dtype: str
    """Of stored keys and values, as torch names it."""
    shares: tuple[Share, ...]
    """What each rank holds.  Ranks of one stage follow one another: rank = stage · tensor_parallel_size
    + rank within the stage."""
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    quantization: Mapping[str, Any] = field(default_factory=dict)
    """`quantization_config` of the checkpoint; empty if it is not quantized."""
    notes: tuple[str, ...] = ()
    """What was decided for the user, worth a line at start."""

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return len(self.shares)

    @property
    def sampling_rank(self) -> int:
        """The rank that draws tokens: the first one of the last stage."""
        return self.world_size - self.tensor_parallel_size

    def factory(self, kind: str) -> Callable[..., Any]:
        """Return the factory of the part chosen for a kind."""
        return self.choices[kind].registered.descriptor.factory

    def offloaded_layers(self, rank: int) -> tuple[int, ...]:
        """List the layers that a rank keeps in the host's memory."""
        wanted = self.config.cpu_offload_gb * 2**30
        return choose_layers(self.shares[rank].layers, self._layer_bytes_on(rank), wanted)

    def _layer_bytes_on(self, rank: int) -> float:
        """Bytes of one layer on a rank, which holds about as much of the attention as of the MLP."""
        return self.layer_bytes * self.shares[rank].inner.size / self.model.intermediate_size

    def cache_identity(self) -> bytes:
        """State what two KV blocks must have in common before their tokens are compared."""
        identity = [self.model.to_dict(), self.model_path, self.dtype, self.kv_cache_dtype]
        return json.dumps(identity, sort_keys=True).encode()

    def fit_model_len(self, num_blocks: int) -> int:
        """Longest sequence to serve with a device cache of `num_blocks`, the null block included.

        Shorter than the model's limit only if neither that length nor the cache's size was set.
        """
        if self.config.max_model_len is not None or self.config.num_kv_blocks is not None:
            return self.max_model_len
        return min(self.max_model_len, (num_blocks - 1) * self.block_size)

    def limits(self, num_blocks: int) -> RequestLimits:
        """Make the caps on requests, once the KV pool has `num_blocks` usable blocks."""
        return RequestLimits(
            vocab_size=self.model.vocab_size,
            max_model_len=self.fit_model_len(num_blocks + 1),
            max_kv_tokens=num_blocks * self.block_size,
            max_n=self.config.max_n,
            max_logprobs=self.config.max_logprobs,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: the same on every rank."""
        return {
            "config": self.config.to_dict(),
            "model": self.model.to_dict(),
            "model_path": self.model_path,
            "device": self.device,
            "dtype": self.dtype,
            "max_model_len": self.max_model_len,
            "block_size": self.block_size,
            "weight_bytes": self.weight_bytes,
            "layer_bytes": self.layer_bytes,
            "kv_bytes_per_token": self.kv_bytes_per_token,
            "choices": {
                kind: {
                    "name": choice.name,
                    "plugin": choice.registered.plugin,
                    "distribution": choice.registered.distribution,
                    "why": choice.why,
                }
                for kind, choice in self.choices.items()
            },
            "plugins": [{"name": plugin.name, "why": plugin.reason} for plugin in self.plugins],
            "kv_cache_dtype": self.kv_cache_dtype,
            "tensor_parallel_size": self.tensor_parallel_size,
            "pipeline_parallel_size": self.pipeline_parallel_size,
            "quantization": self.quantization,
            "shares": [dataclasses.asdict(share) for share in self.shares],
            "notes": list(self.notes),
        }

    def digest(self) -> str:
        """SHA-256 of the plan, which ranks compare before they start."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()

    def render(self) -> list[tuple[str, list[tuple[str, str, str]]]]:
        """Sections of (what, value, why) for people."""
        model, config = self.model, self.config
        shape = (
            f"{model.num_layers} layers, hidden {model.hidden_size}, "
            f"{model.num_heads} heads over {model.num_kv_heads} KV heads of {model.head_dim}"
        )
        pool = "measured at start" if config.num_kv_blocks is None else f"{config.num_kv_blocks} blocks"
        return [
            (
                "model",
                [
                    ("checkpoint", self.model_path, config.origin_of("model")),
                    ("family", model.model_type, shape),
                    ("dtype", self.dtype, config.origin_of("dtype")),
                    ("device", self.device, config.origin_of("device")),
                    (
                        "context length",
                        f"{self.max_model_len} tokens",
                        config.origin_of("max_model_len"),
                    ),
                ],
            ),
            (
                "memory",
                [
                    ("weights", _format_bytes(self.weight_bytes), "over all ranks"),
                    *self._render_offload(),
                    ("KV cache", f"{_format_bytes(self.kv_bytes_per_token)} per token", pool),
                    ("block size", f"{self.block_size} tokens", config.origin_of("block_size")),
                ],
            ),
            ("ranks", list(self._render_ranks())),
            (
                "parts",
                [
                    (kind, f"{choice.name} ({choice.registered.plugin})", choice.why)
                    for kind, choice in self.choices.items()
                ],
            ),
            ("plugins", [(plugin.name, "active", plugin.reason) for plugin in self.plugins]),
            ("notes", [("", note, "") for note in self.notes]),
        ]

    def _render_offload(self) -> Iterator[tuple[str, str, str]]:
        offloaded = {rank: self.offloaded_layers(rank) for rank in range(self.world_size)}
        count = sum(map(len, offloaded.values()))
        if not count:
            return
        on_host, in_buffers = (
            sum(len(layers[:most]) * self._layer_bytes_on(rank) for rank, layers in offloaded.items())
            for most in (None, NUM_BUFFERS)
        )
        num_layers = sum(share.layers.size for share in self.shares)
        resident = self.weight_bytes - on_host
        yield (
            "resident",
            f"{_format_bytes(resident)}, and {_format_bytes(in_buffers)} for layers that visit",
            "on the device",
        )
        yield (
            "offloaded",
            f"{_format_bytes(on_host)}, {count} of {num_layers} layers",
            self.config.origin_of("cpu_offload_gb"),
        )

    def _render_ranks(self) -> Iterator[tuple[str, str, str]]:
        if self.world_size == 1:
            return
        tensor, pipeline = self.tensor_parallel_size, self.pipeline_parallel_size
        yield "mesh", f"{tensor} tensor x {pipeline} pipeline", f"{self.world_size} ranks"
        for rank, share in enumerate(self.shares):
            held = (
                f"layers {_format_span(share.layers)}, heads {_format_span(share.heads)}, "
                f"KV heads {_format_span(share.kv_heads)}"
            )
            yield f"rank {rank}", held, f"{share.inner.size} MLP features, {share.vocab.size} tokens"


@dataclass(frozen=True, slots=True)
class ActivePlugins:
    """The plugins of a configuration, started: all that is known before the checkpoint is read."""

    host: PluginHost
    registry: Registry
    selected: tuple[Selected, ...]
    settings: Mapping[str, Any]
    defaults: tuple[str, ...]
    """Those that were active unless the configuration said otherwise; other processes start the same."""


@dataclass(frozen=True, slots=True)
class Assembly:
    """A plan and the host of the plugins that it was made with."""

    host: PluginHost
    registry: Registry
    plan: Plan
    defaults: tuple[str, ...]
    """Of `ActivePlugins`, for the processes of ranks."""


@dataclass(frozen=True, slots=True)
class Parts:
    """What an executor is made of, on one rank."""

    attention: AttentionBackend
    scheme: QuantScheme
    sampler: Sampler
    rank: int = 0
    device: str = ""
    """Of this rank, such as `cuda:1`; empty: the plan's."""
    tensor: TensorParallel | None = None
    """`None` if no other rank holds a part of the same layers."""
    pipeline: PipelineParallel | None = None
    """`None` if this rank runs all layers."""


# --- deciding --------------------------------------------------------------------------------------


def make_plan(config: EngineConfig) -> Plan:
    """Decide everything that a configuration leaves open, without a device and without weights.

    :raises CytheraError: see `resolve`.
    """
    return resolve(config, start_plugins(config, (*DEFAULT_PLUGINS, *SERVE_PLUGINS))).plan


def start_plugins(config: EngineConfig, defaults: Sequence[str] = DEFAULT_PLUGINS) -> ActivePlugins:
    """Select and start the plugins; reads no checkpoint.

    :param defaults: plugins that are active unless the configuration says otherwise.
    :raises PluginError: a plugin is unknown, broken or in conflict.
    :raises ConfigError: settings of plugins do not fit.
    """
    entries = discover()
    selected = PluginSelection.parse(config.plugins).resolve(
        entries, defaults=defaults, needed=_needed_plugins(config)
    )
    host = PluginHost.start(selected, entries)
    settings = _bind_settings(host, config)
    return ActivePlugins(host, host.collect(), selected, settings, tuple(defaults))


def resolve(config: EngineConfig, active: ActivePlugins | None = None) -> Assembly:
    """Choose every part.

    :param active: plugins that were started already; by default those of offline use.
    :raises PluginError: a plugin is unknown, broken or in conflict.
    :raises CheckpointError: the checkpoint's config cannot be read or is not supported.
    :raises PlanError: the parts cannot work together; lists every reason.
    """
    active = active or start_plugins(config)
    draft = _Draft(config, active)
    plan = draft.make_plan(active.selected)
    objections = [*draft.objections, *active.host.check_plan(plan)]
    if objections:
        raise PlanError(objections)
    return Assembly(active.host, active.registry, plan, active.defaults)


def _needed_plugins(config: EngineConfig) -> dict[str, str]:
    """Plugins that other settings ask for, and by which setting: sugar over `--plugins`."""
    needed = {}
    if config.attention_backend != "auto":
        needed[f"attention.{config.attention_backend}"] = (
            f"--attention-backend {config.attention_backend}"
        )
    if config.quantization not in (None, "none"):
        needed[f"quant.{config.quantization}"] = f"--quantization {config.quantization}"
    if config.tensor_parallel_size > 1:
        needed["parallel.tp"] = f"--tensor-parallel-size {config.tensor_parallel_size}"
    if config.pipeline_parallel_size > 1:
        needed["parallel.pp"] = f"--pipeline-parallel-size {config.pipeline_parallel_size}"
    if config.distributed_executor_backend != "mp":
        backend = config.distributed_executor_backend
        needed[f"parallel.{backend}"] = f"--distributed-executor-backend {backend}"
    return needed


def _bind_settings(host: PluginHost, config: EngineConfig) -> dict[str, Any]:
    """Make each plugin's settings from its table of the configuration.

    :raises ConfigError: a table belongs to no active plugin, or does not fit; lists everything.
    """
    types = host.register_settings()
    problems = [
        f"[plugins.{name!r}]: no active plugin of that name has settings (those that have: "
        f"{', '.join(sorted(types)) or 'none'})"
        for name in config.plugin_settings
        if name not in types
    ]
    settings: dict[str, Any] = {}
    for name, kind in types.items():
        table = config.plugin_settings.get(name, {})
        known = [item.name for item in dataclasses.fields(kind)]
        problems += [
            f"[plugins.{name!r}] {key}: unknown setting; known are {', '.join(known)}"
            for key in table
            if key not in known
        ]
        try:
            settings[name] = pydantic.TypeAdapter(kind).validate_python(table)
        except pydantic.ValidationError as error:
            problems += [
                f"[plugins.{name!r}] {'.'.join(map(str, e['loc']))}: {e['msg']}, got {e['input']!r}"
                for e in error.errors()
            ]
    if problems:
        raise ConfigError("\n".join(problems))
    return settings


class _Draft:
    """A plan in the making: collects objections instead of stopping at the first."""

    def __init__(self, config: EngineConfig, active: ActivePlugins) -> None:
        from core.model.families import load_hf_config  # noqa: PLC0415  imports transformers

        self.config = config
        self.host = active.host
        self.registry = active.registry
        self.settings = active.settings
        self.objections: list[str] = []
        self.notes: list[str] = []
        self.choices: dict[str, Choice] = {}
        self.model_path = find_model(config.model)
        self.hf_config = load_hf_config(self.model_path, config.revision)
        self.model = self._read_model()
        self.device = _resolve_device(config.device)
        self.dtype = _resolve_dtype(config.dtype, self.hf_config)
        self.sizes = {axis: self._choose_parallel(axis) for axis in ("tensor", "pipeline")}
        self.requirements = self._make_requirements()

    def make_plan(self, plugins: tuple[Selected, ...]) -> Plan:
        self._check_nodes()
        self._choose_quantizer()
        self._choose_attention()
        for kind in ("scheduler", "kv_cache", "executor", "sampler"):
            self._choose_named(kind, getattr(self.config, kind))
        if self.sizes["tensor"] * self.sizes["pipeline"] > 1:
            self._choose_named("launcher", self.config.distributed_executor_backend)
        template = self.config.chat_template
        if template is not None and not Path(template).is_file():
            self.objections.append(f"--chat-template {template}: there is no such file")
        if self.registry.all("server"):
            self._choose_named("server", self.config.server)
        if self.objections:  # the rest of the plan needs every part
            raise PlanError(self.objections)
        shares = self._make_shares()
        return Plan(
            config=self.config,
            model=self.model,
            model_path=self.model_path,
            device=self.device,
            dtype=self.dtype,
            max_model_len=self._resolve_max_model_len(),
            block_size=self._resolve_block_size(),
            weight_bytes=self._weight_bytes(),
            layer_bytes=self._linear_bytes() // self.model.num_layers,
            kv_bytes_per_token=self._kv_bytes_per_token(),
            choices=self.choices,
            plugins=plugins,
            settings=self.settings,
            kv_cache_dtype=self._resolve_kv_cache_dtype(),
            shares=shares,
            tensor_parallel_size=self.sizes["tensor"],
            pipeline_parallel_size=self.sizes["pipeline"],
            quantization=self.requirements.quantization_config,
            notes=tuple(self.notes),
        )

    # --- the model ---

    def _read_model(self) -> ModelSpec:
        model_type = self.hf_config.model_type
        readers = [
            registered
            for registered in self.registry.all("model")
            if isinstance(registered.descriptor, ModelEntry)
            and model_type in registered.descriptor.model_types
        ]
        if not readers:
            raise PlanError([f"{self.config.model}: {self._unread(model_type)}"])
        # A plugin may take over a family that the core reads too.
        chosen = min(readers, key=lambda registered: registered.plugin == "core.builtin")
        self.choices["model"] = Choice("model", chosen, f"reads model_type {model_type!r}")
        spec: ModelSpec = chosen.descriptor.factory(self.hf_config)
        return spec

    def _unread(self, model_type: str) -> str:
        entries = (registered.descriptor for registered in self.registry.all("model"))
        known = sorted(
            {t for entry in entries if isinstance(entry, ModelEntry) for t in entry.model_types}
        )
        return (
            f"model_type {model_type!r} is read by no active plugin; known are {', '.join(known)}; "
            f"a plugin can add it with core_register_models"
        )

    def _make_requirements(self) -> Requirements:
        model, config = self.model, self.config
        keys = ("quantization_config", "compression_config")  # the latter in older checkpoints
        stated = (getattr(self.hf_config, key, None) for key in keys)
        quantization: Any = next(filter(None, stated), {})
        if not isinstance(quantization, dict):
            quantization = quantization.to_dict()
        return Requirements(
            device=self.device.partition(":")[0],
            dtype=self.dtype,
            head_dims=frozenset({model.head_dim}),
            num_heads=model.num_heads,
            num_kv_heads=model.num_kv_heads,
            kv_cache_dtype=config.kv_cache_dtype,
            has_window=any(layer.window is not None for layer in model.layers),
            has_softcap=model.attention_softcap is not None,
            block_size=config.block_size,
            quantization=config.quantization or quantization.get("quant_method"),
            quantization_config=quantization,
            model_type=model.model_type,
            tensor_parallel_size=self.sizes["tensor"],
            pipeline_parallel_size=self.sizes["pipeline"],
        )

    # --- the parts ---

    def _choose_named(self, kind: str, name: str) -> None:
        """Take the part that the configuration names; `auto` takes the first that can serve."""
        if name == "auto":
            self._choose_auto(kind, self.registry.all(kind))
            return
        try:
            registered = self.registry.get(kind, name)
        except PluginNotFoundError as error:
            self.objections.append(str(error))
            return
        reasons = registered.descriptor.unsupported(self.requirements)
        self.objections += [f"{registered.plugin}: {reason}" for reason in reasons]
        self.choices[kind] = Choice(kind, registered, self._origin(kind))

    def _origin(self, kind: str) -> str:
        return self.config.origin_of(_FIELDS.get(kind, kind))

    def _choose_auto(self, kind: str, candidates: list[Registered]) -> None:
        able, reasons = [], []
        for candidate in candidates:
            problems = candidate.descriptor.unsupported(self.requirements)
            reasons += [f"{candidate.plugin}: {problem}" for problem in problems]
            if not problems:
                able.append(candidate)
        if not able:
            self.objections += reasons or [f"no active plugin provides any {kind}"]
            return
        name = self.host.select_backend(kind, able, self.requirements)
        if name is not None:
            chosen = next(c for c in able if c.descriptor.name == name)
            why = "chosen by a plugin (core_select_backend)"
        else:
            chosen = max(able, key=lambda c: getattr(c.descriptor, "priority", 0))
            why = "the only one that can serve" if len(able) == 1 else "highest priority of those able"
        self.choices[kind] = Choice(kind, chosen, why)

    def _choose_attention(self) -> None:
        self._choose_named("attention", self.config.attention_backend)

    def _choose_quantizer(self) -> None:
        method = self.requirements.quantization
        stored = self.requirements.quantization_config.get("quant_method")
        if method in (None, "none") and stored is None:
            self.choices["quant"] = Choice("quant", self.registry.get("quant", "none"), "not quantized")
            return
        able: list[Registered] = []
        reasons = []
        for registered in self._quantizers_of(method):
            problems = registered.descriptor.unsupported(self.requirements)
            reasons += [f"{registered.plugin}: {problem}" for problem in problems]
            able += [] if problems else [registered]
        if not able:
            self.objections += reasons or [self._unread_quantization(method, stored)]
            return
        why = "stated by the checkpoint" if stored else self.config.origin_of("quantization")
        self.choices["quant"] = Choice("quant", able[0], why)

    def _quantizers_of(self, method: str | None) -> list[Registered]:
        """List the quantizers of that name, or that read that method."""
        stored = self.requirements.quantization_config.get("quant_method")
        found = []
        for registered in self.registry.all("quant"):
            entry = registered.descriptor
            if not isinstance(entry, QuantizerEntry) or method not in {entry.name, *entry.methods}:
                continue
            if stored in entry.methods if stored else entry.can_convert:
                found.append(registered)
        return found

    def _unread_quantization(self, method: str | None, stored: str | None) -> str:
        entries = [r.descriptor for r in self.registry.all("quant")]
        quantizers = [entry for entry in entries if isinstance(entry, QuantizerEntry)]
        if stored and method != stored:
            return (
                f"--quantization {method}: the checkpoint is quantized with {stored!r}, which no active "
                f"quantizer of that name reads; leave the flag away"
            )
        if stored:
            known = ", ".join(sorted({name for entry in quantizers for name in entry.methods}))
            return (
                f"the checkpoint is quantized with {stored!r}, which no active plugin reads (those read "
                f"{known or 'none'}); name one that does with --plugins"
            )
        able = ", ".join(entry.name for entry in quantizers if entry.can_convert) or "none"
        return (
            f"--quantization {method}: the checkpoint is not quantized, and no active quantizer of that "
            f"name converts at load (those that do: {able}); python -m core quantize can write one"
        )

    # --- ranks ---

    def _choose_parallel(self, axis: str) -> int:
        """Choose the strategy of an axis, and how many ranks it is for."""
        flag = f"{axis}_parallel_size"
        size: int = getattr(self.config, flag)
        entries = [
            registered
            for registered in self.registry.all("parallel")
            if isinstance(registered.descriptor, ParallelEntry) and registered.descriptor.axis == axis
        ]
        if not entries:
            return size  # an executor may do without a strategy; else it says what it lacks
        chosen = entries[0]
        wanted = getattr(self.settings.get(chosen.plugin), "size", None)
        if wanted is not None and wanted != size:
            if self.config.origin_of(flag) != DEFAULT_ORIGIN:
                self.objections.append(
                    f"[plugins.{chosen.plugin!r}] size is {wanted}, but {self.config.origin_of(flag)} "
                    f"says {size}; give one of them"
                )
            size = wanted
        if size > 1:
            self.choices[axis] = Choice(axis, chosen, self.config.origin_of(flag))
        return size

    def _check_nodes(self) -> None:
        num_nodes, num_ranks = self.config.nnodes, self.sizes["tensor"] * self.sizes["pipeline"]
        if num_nodes > num_ranks:
            self.objections.append(
                f"--nnodes {num_nodes} is more than the {num_ranks} ranks of --tensor-parallel-size x "
                f"--pipeline-parallel-size"
            )

    def _make_shares(self) -> tuple[Share, ...]:
        """Divide the model over the mesh.

        :raises PlanError: there are more ranks than there is to divide.
        """
        whole = self.model.whole_share()
        rows: Sequence[Share] = (whole,)
        stages: Sequence[Span] = (whole.layers,)
        tensor, pipeline = self.choices.get("tensor"), self.choices.get("pipeline")
        try:
            if tensor and isinstance(tensor.registered.descriptor, TensorParallelEntry):
                divide = tensor.registered.descriptor.divide
                rows = divide(self.model, self.sizes["tensor"], self._cut_step())
            if pipeline and isinstance(pipeline.registered.descriptor, PipelineParallelEntry):
                settings = self.settings.get(pipeline.registered.plugin)
                divide_layers = pipeline.registered.descriptor.divide
                stages = divide_layers(self.model, self.sizes["pipeline"], settings)
        except ConfigError as error:
            raise PlanError([str(error)]) from error
        return tuple(dataclasses.replace(row, layers=layers) for layers in stages for row in rows)

    def _cut_step(self) -> int:
        entry = self.choices["quant"].registered.descriptor
        return entry.cut_step(self.requirements) if isinstance(entry, QuantizerEntry) else 1

    # --- sizes ---

    def _resolve_block_size(self) -> int:
        entry = self.choices["attention"].registered.descriptor
        asked = self.config.block_size
        if not isinstance(entry, AttentionEntry):
            return asked or 16
        if asked is not None and entry.block_sizes and asked not in entry.block_sizes:
            sizes = ", ".join(map(str, entry.block_sizes))
            self.objections.append(
                f"attention.{entry.name}: --block-size {asked} is not one of its sizes ({sizes})"
            )
        return asked or entry.default_block_size

    def _resolve_max_model_len(self) -> int:
        asked, limit = self.config.max_model_len, self.model.max_position
        if asked is not None and asked > limit:
            self.objections.append(f"--max-model-len {asked} is beyond the model's {limit} positions")
        return asked or limit

    def _weight_bytes(self) -> int:
        num_others = self.model.num_parameters() - self.model.num_linear_parameters()
        return num_others * _DTYPE_BYTES[self.dtype] + self._linear_bytes()

    def _linear_bytes(self) -> int:
        num_linear = self.model.num_linear_parameters()
        entry = self.choices["quant"].registered.descriptor
        bits = entry.weight_bits(self.requirements) if isinstance(entry, QuantizerEntry) else None
        return math.ceil(num_linear * (8 * _DTYPE_BYTES[self.dtype] if bits is None else bits) / 8)

    def _resolve_kv_cache_dtype(self) -> str:
        name = self.config.kv_cache_dtype
        return self.dtype if name == "auto" else _KV_DTYPES.get(name, name)

    def _kv_bytes_per_token(self) -> int:
        model = self.model
        size = _DTYPE_BYTES.get(self._resolve_kv_cache_dtype(), _DTYPE_BYTES[self.dtype])
        return 2 * model.num_layers * model.num_kv_heads * model.head_dim * size


_FIELDS: Final = {"attention": "attention_backend", "launcher": "distributed_executor_backend"}
"""Settings that are not called as the kind whose part they name."""
_DTYPE_BYTES: Final = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1}
_KV_DTYPES: Final = {"fp8": "float8_e4m3fn", "fp8_e4m3": "float8_e4m3fn"}


def _resolve_device(device: str) -> str:
    if device != "auto":
        return device
    import torch  # noqa: PLC0415  only to ask for a GPU

    return "cuda" if torch.cuda.is_available() else "cpu"


def _resolve_dtype(dtype: str, hf_config: Any) -> str:
    if dtype != "auto":
        return dtype
    stored = getattr(hf_config, "dtype", None) or getattr(hf_config, "torch_dtype", None)
    name = str(stored or "float32").removeprefix("torch.")
    return name if name in _DTYPE_BYTES else "float32"


def _format_span(span: Span) -> str:
    return f"{span.start}-{span.stop - 1}" if span.size != 1 else str(span.start)


def _format_bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} TiB"


# --- building --------------------------------------------------------------------------------------


def make_parts(plan: Plan, rank: int = 0, device: str = "") -> Parts:
    """Build what an executor is made of, on one rank.

    With several ranks torch.distributed has to be there, and all of them call this.
    """
    choices = plan.choices
    return Parts(
        attention=_make(plan, AttentionBackend, "attention"),
        scheme=_make(plan, QuantScheme, "quant"),
        sampler=_make(plan, Sampler, "sampler"),
        rank=rank,
        device=device,
        tensor=_make(plan, TensorParallel, "tensor", rank) if "tensor" in choices else None,
        pipeline=_make(plan, PipelineParallel, "pipeline", rank) if "pipeline" in choices else None,
    )


def build_engine(
    assembly: Assembly,
    outbox: Callable[[OutputBatch], None],
    *,
    bus: EventBus | RelayBus | None = None,
    report: Report = report_nothing,
) -> EngineCore:
    """Build and load everything that a plan names; the engine can step when this returns.

    :param outbox: see `EngineCore`.
    :param bus: where events go; by default to the subscribers of the plugins, in this process.
    :param report: hears of each phase and of the progress in it.
    :raises CytheraError: a part cannot be built, breaks its contract, or does not fit.
    """
    host, plan = assembly.host, assembly.plan
    report(Status(Phase.LOADING))
    executor = _make_executor(assembly)
    try:
        executor.load(lambda done, total: report(Status(Phase.LOADING, done, total)))
        report(Status(Phase.PROFILING))
        num_blocks = executor.kv_capacity()
        report(Status(Phase.WARMING))
        executor.allocate(num_blocks)
        kv_cache = host.make_kv_cache(
            plan, num_blocks, lambda: _make(plan, KVCache, "kv_cache", num_blocks)
        )
        scheduler = host.make_scheduler(
            plan, kv_cache, lambda: _make(plan, Scheduler, "scheduler", kv_cache)
        )
        bus = EventBus(host.subscribe(plan)) if bus is None else bus
    except BaseException:
        executor.close()
        raise
    engine = EngineCore(
        scheduler=scheduler,
        kv_cache=kv_cache,
        executor=executor,
        bus=bus,
        outbox=outbox,
        on_stop=host.engine_stopping,
    )
    host.engine_started(engine)
    return engine


def _make_executor(assembly: Assembly) -> Executor:
    """Build the executor: of this process, or one that starts a process for each rank."""
    plan = assembly.plan
    if plan.world_size > 1:
        from core.ranks.executor import RankExecutor, Recipe  # noqa: PLC0415  not needed by one rank

        launcher = plan.factory("launcher")(plan)
        return RankExecutor(Recipe(plan, assembly.defaults), launcher)
    assembly.host.worker_started(0, plan.device)
    return make_rank_executor(assembly, make_parts(plan))


def make_rank_executor(assembly: Assembly, parts: Parts) -> Executor:
    """Build the executor of one rank, in its process."""
    plan = assembly.plan
    return assembly.host.make_executor(
        plan, parts.rank, lambda: _make(plan, Executor, "executor", parts)
    )


def _make(plan: Plan, protocol: type, kind: str, *arguments: Any) -> Any:
    """Build the part that the plan names, and check it against its Protocol, once.

    :raises PlanError: listing everything that is missing.
    :raises PluginCallError: the factory has raised something that is no error of cythera.
    """
    choice = plan.choices[kind]
    try:
        part = plan.factory(kind)(plan, *arguments)
    except CytheraError:
        raise
    except Exception as error:
        who = f"{choice.registered.plugin} ({choice.registered.distribution})"
        raise PluginCallError(
            f"plugin {who} cannot build its {kind} {choice.name!r}: {type(error).__name__}: {error}",
            plugin=choice.registered.plugin,
        ) from error
    problems = missing_members(part, protocol)
    if problems:
        raise PlanError([f"{kind} {choice.name}: {problem}" for problem in problems])
    return part

"""Config and descriptors -> plan -> parts.  The only file that knows both sides.

`resolve` decides everything and builds nothing: it needs no device and no weights, and every reason
against the configuration is collected before it raises.  `build_engine` then builds what the plan
names, in the order in which the parts need one another.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import pydantic

from core.draft import PlanDraft
from core.engine import EngineCore
from core.errors import ConfigError, CytheraError, PlanError, PluginCallError
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
from core.pluginhost import PluginHost, PluginSelection, Selected, discover
from core.sharding import Span
from core.status import Phase, Report, Status, report_nothing

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from core.config import EngineConfig
    from core.link import RelayBus
    from core.messages import OutputBatch
    from core.model.slots import SlotForm
    from core.plan import Plan
    from core.registry import Registry

DEFAULT_PLUGINS: Final = (
    "core.builtin",
    "attention.torch",
    "attention.triton",
    "quant.dense",
    "quant.awq",
    "quant.gptq",
    "quant.fp8",
    "sampler.triton",
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
    draft = PlanDraft(config, active)
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


def compose_slots(plan: Plan) -> tuple[SlotForm, ...]:
    """Find out how the slots of a layer will be filled, on a layer without memory.

    :raises CytheraError: a part cannot be built here, for example for want of a library.
    """
    import torch  # noqa: PLC0415  slow to import

    from core.model.decoder import make_decoder  # noqa: PLC0415  imports torch

    share = plan.shares[0]
    first = Span(share.layers.start, share.layers.start + 1)
    decoder = make_decoder(
        plan.model,
        scheme=_make(plan, QuantScheme, "quant"),
        attention=_make(plan, AttentionBackend, "attention"),
        dtype=getattr(torch, plan.dtype),
        device=torch.device("meta"),
        max_len=1,
        share=dataclasses.replace(share, layers=first),
        tensor=_SilentRanks(plan.tensor_parallel_size) if plan.tensor_parallel_size > 1 else None,
    )
    return decoder.forms


class _SilentRanks:
    """In place of other ranks, for a decoder that is never run."""

    rank = 0

    def __init__(self, size: int) -> None:
        self.size = size

    def all_reduce(self, tensor: Any, /) -> Any:
        """Return the part."""
        return tensor

    def gather(self, tensor: Any, _sizes: Sequence[int], /) -> Any:
        """Return the part."""
        return tensor

    def broadcast(self, tensor: Any, /) -> Any:
        """Return the part."""
        return tensor


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

"""Every hook of cythera, in the order in which the engine calls them.

Hooks are synchronous and run at start and stop only: no hook is called between the first and the
last step of an engine.  An implementation is a module-level function marked with
`@core.hookimpl`; it may take fewer arguments than the specification, matched by name.

A plugin module also states `core_api = "1.0"`, the version of this contract that it was written for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import pluggy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from core.events import Subscription
    from core.interfaces import Executor, KVCache, Scheduler
    from core.plan import Plan
    from core.registry import (
        AttentionEntry,
        ExecutorEntry,
        FrontendEntry,
        KVCacheEntry,
        LauncherEntry,
        ModelEntry,
        ParallelEntry,
        QuantizerEntry,
        Registered,
        Requirements,
        SamplerEntry,
        SchedulerEntry,
        ServerEntry,
    )

PROJECT_NAME: Final = "cythera"
API_VERSION: Final = (1, 0)

hookspec = pluggy.HookspecMarker(PROJECT_NAME)
hookimpl = pluggy.HookimplMarker(PROJECT_NAME)


# --- declare: pure, in every process, before anything is decided -----------------------------------


@hookspec
def core_register_settings() -> type | None:
    """Contribute the settings of this plugin: the table `[plugins."<name>"]` of the configuration.

    Called once, in every process, before any other hook.

    :return: a frozen dataclass type whose fields all have defaults; `None` for no settings.  The
        bound instance is `plan.settings["<name>"]`.
    :raises Exception: aborts the start and names the plugin.

    Since API 1.0.
    """


@hookspec
def core_register_quantizers() -> Iterable[QuantizerEntry]:  # type: ignore[empty-body]
    """Contribute quantizers: ways of storing and applying the weights of linear layers.

    Called once, in every process.

    :return: descriptors; `None` or nothing for none.
    :raises Exception: aborts the start and names the plugin.

    Since API 1.0.
    """


@hookspec
def core_register_attention() -> Iterable[AttentionEntry]:  # type: ignore[empty-body]
    """Contribute attention backends, which also own the device's KV cache.

    Called once, in every process.

    :return: descriptors; `None` or nothing for none.
    :raises Exception: aborts the start and names the plugin.

    Since API 1.0.
    """


@hookspec
def core_register_parallel() -> Iterable[ParallelEntry]:  # type: ignore[empty-body]
    """Contribute strategies that spread the model over several ranks.

    Called once, in every process.

    :return: `TensorParallelEntry` and `PipelineParallelEntry` records; `None` or nothing for none.
    :raises Exception: aborts the start and names the plugin.

    Since API 1.0.
    """


@hookspec
def core_register_schedulers() -> Iterable[SchedulerEntry]:  # type: ignore[empty-body]
    """Contribute schedulers, chosen with `--scheduler`.

    Called once, in every process.

    :return: descriptors; `None` or nothing for none.
    :raises Exception: aborts the start and names the plugin.

    Since API 1.0.
    """


@hookspec
def core_register_kv_caches() -> Iterable[KVCacheEntry]:  # type: ignore[empty-body]
    """Contribute KV caches: block tables and prefix reuse, chosen with `--kv-cache`.

    Called once, in every process.

    :return: descriptors; `None` or nothing for none.
    :raises Exception: aborts the start and names the plugin.

    Since API 1.0.
    """


@hookspec
def core_register_executors() -> Iterable[ExecutorEntry]:  # type: ignore[empty-body]
    """Contribute executors, chosen with `--executor`.

    Called once, in every process.

    :return: descriptors; `None` or nothing for none.
    :raises Exception: aborts the start and names the plugin.

    Since API 1.0.
    """


@hookspec
def core_register_launchers() -> Iterable[LauncherEntry]:  # type: ignore[empty-body]
    """Contribute launchers, which start the processes of ranks: `--distributed-executor-backend`.

    Called once, in every process.

    :return: descriptors; `None` or nothing for none.
    :raises Exception: aborts the start and names the plugin.

    Since API 1.0.
    """


@hookspec
def core_register_models() -> Iterable[ModelEntry]:  # type: ignore[empty-body]
    """Contribute model families: readers of a `config.json` that describe the decoder.

    Called once, in every process.

    :return: descriptors; a `model_type` that a built-in family also reads is taken over.
    :raises Exception: aborts the start and names the plugin.

    Since API 1.0.
    """


@hookspec
def core_register_frontends() -> Iterable[FrontendEntry]:  # type: ignore[empty-body]
    """Contribute front ends: surfaces that clients talk to, such as the OpenAI routes.

    Every front end of the active plugins is built, once the server's port is open.

    Called once, in every process.

    :return: descriptors; `None` or nothing for none.
    :raises Exception: aborts the start and names the plugin.

    Since API 1.0.
    """


@hookspec
def core_register_servers() -> Iterable[ServerEntry]:  # type: ignore[empty-body]
    """Contribute servers: what carries the front ends to clients, chosen with `--server`.

    Called once, in every process.

    :return: descriptors; `None` or nothing for none.
    :raises Exception: aborts the start and names the plugin.

    Since API 1.0.
    """


@hookspec
def core_register_samplers() -> Iterable[SamplerEntry]:  # type: ignore[empty-body]
    """Contribute samplers, chosen with `--sampler`.

    Called once, in every process.

    :return: descriptors; `None` or nothing for none.
    :raises Exception: aborts the start and names the plugin.

    Since API 1.0.
    """


@hookspec
def core_register_commands(subcommands: Callable[[str, Callable[..., Any]], None]) -> None:
    """Contribute commands to `python -m core`.

    Called once, in the process of the command line only.

    :param subcommands: call it with a name and a function; the function's typed parameters become
        options, its docstring the help.
    :raises Exception: aborts the command and names the plugin.

    Since API 1.0.
    """


# --- decide: in every process that makes the plan, with the same result in each --------------------


@hookspec(firstresult=True)
def core_select_backend(
    kind: str, candidates: Sequence[Registered], requirements: Requirements
) -> str | None:
    """Choose the backend of a kind that the configuration leaves on `auto`.

    Called once for each such kind, in every process that makes the plan: where clients are served,
    the engine's, and each rank's.  Stops at the first result that is not `None`; without one the
    supporting candidate with the highest priority is taken.

    :param kind: `attention` …, a key of `core.registry.KINDS`.
    :param candidates: those that reported no reason against the requirements.
    :param requirements: what the configuration and the checkpoint ask for.
    :return: the name of one candidate; `None` to leave the choice to others.
    :raises Exception: aborts the start and names the plugin.

    Since API 1.0.
    """


@hookspec
def core_check_plan(plan: Plan) -> Iterable[str]:  # type: ignore[empty-body]
    """Object to a plan.  All objections of all plugins are shown together and abort the start.

    Called once, in every process that makes the plan, when everything has been decided and nothing
    built.

    :param plan: frozen.
    :return: one sentence per objection; `None` or nothing to agree.
    :raises Exception: aborts the start and names the plugin.

    Since API 1.0.
    """


@hookspec
def core_report_header(plan: Plan) -> Iterable[str]:  # type: ignore[empty-body]
    """Add lines to the banner that is shown at start.

    Called once, in the process that serves clients, when the engine is ready.

    :param plan: frozen.
    :return: lines of text; `None` or nothing for none.
    :raises Exception: aborts the start and names the plugin.

    Since API 1.0.
    """


# --- build: once, in the process that owns the part ------------------------------------------------


@hookspec(firstresult=True)
def core_make_executor(plan: Plan, rank: int) -> Executor | None:
    """Build the executor of one rank, or wrap the one that others build (`wrapper=True`).

    Called once in the process of each rank.  Stops at the first result that is not `None`; without
    one the executor that the plan names is built.

    :param plan: frozen.
    :param rank: 0 to world size - 1.
    :return: an object that fulfils `core.interfaces.Executor`; `None` to leave it to others.
    :raises Exception: aborts the start and names the plugin.

    Since API 1.0.
    """


@hookspec(firstresult=True)
def core_make_kv_cache(plan: Plan, num_blocks: int) -> KVCache | None:
    """Build the KV cache, or wrap the one that others build (`wrapper=True`).

    Called once, in the engine's process, after the executor has measured what fits.  Stops at the
    first result that is not `None`; without one the KV cache that the plan names is built.

    :param plan: frozen.
    :param num_blocks: blocks of the device's cache, the null block included.
    :return: an object that fulfils `core.interfaces.KVCache`; `None` to leave it to others.
    :raises Exception: aborts the start and names the plugin.

    Since API 1.0.
    """


@hookspec(firstresult=True)
def core_make_scheduler(plan: Plan, kv_cache: KVCache) -> Scheduler | None:
    """Build the scheduler, or wrap the one that others build (`wrapper=True`).

    Called once, in the engine's process, after the KV cache.  Stops at the first result that is
    not `None`; without one the scheduler that the plan names is built.

    :param plan: frozen.
    :param kv_cache: what the scheduler reserves blocks from.
    :return: an object that fulfils `core.interfaces.Scheduler`; `None` to leave it to others.
    :raises Exception: aborts the start and names the plugin.

    Since API 1.0.
    """


# --- live: start and stop --------------------------------------------------------------------------


@hookspec
def core_subscribe(plan: Plan) -> Iterable[Subscription]:  # type: ignore[empty-body]
    """Subscribe to the engine's events.

    Called once, before the first event, in the process that serves clients: events of an engine in
    a process of its own are carried over.

    :param plan: frozen.
    :return: subscriptions; `None` or nothing for none.
    :raises Exception: aborts the start and names the plugin.

    Since API 1.0.
    """


@hookspec
def core_worker_started(rank: int, device: str) -> None:
    """Learn that a rank has its device and is about to load weights.

    Called once in the process of each rank.

    :param rank: 0 to world size - 1.
    :param device: as torch writes it, such as `cuda:0`.
    :raises Exception: aborts the start and names the plugin.

    Since API 1.0.
    """


@hookspec
def core_engine_started(engine: Any) -> None:
    """Learn that the engine is ready to run steps.

    Called once, in the engine's process, before the first step.

    :param engine: the `core.engine.EngineCore`.
    :raises Exception: aborts the start and names the plugin.

    Since API 1.0.
    """


@hookspec
def core_engine_stopping(engine: Any, reason: str) -> None:
    """Learn that no further step will run.

    Called once, in the engine's process, after the last step.  Every implementation is called,
    whatever the others raise.

    :param engine: the `core.engine.EngineCore`.
    :param reason: `shutdown`, or the error that ended the engine.
    :raises Exception: is logged with the plugin's name; stopping goes on.

    Since API 1.0.
    """

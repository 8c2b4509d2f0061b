"""The parts that come with the core, registered through the same door as everybody else's.

They are chosen by name like any others, and an outsider's of another name can stand in for each.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from core.hookspecs import hookimpl
from core.kv_cache import PagedKVCache
from core.registry import (
    ExecutorEntry,
    KVCacheEntry,
    LauncherEntry,
    QuantizerEntry,
    SamplerEntry,
    SchedulerEntry,
)
from core.scheduler import TokenBudgetScheduler

if TYPE_CHECKING:
    from collections.abc import Iterable

    from core.assemble import Parts
    from core.interfaces import Executor, KVCache
    from core.plan import Plan
    from core.ranks.executor import Launcher
    from core.registry import ModelEntry

core_api = "1.0"


# --- factories; those of parts that need torch import it when they are called ----------------------


def make_plain_scheme(_plan: Plan) -> Any:
    """Build the scheme of unquantized weights."""
    from core.model.linear import PlainScheme  # noqa: PLC0415  imports torch

    return PlainScheme()


def make_torch_sampler(_plan: Plan) -> Any:
    """Build the sampler of the core."""
    from core.sampling import TorchSampler  # noqa: PLC0415  imports torch

    return TorchSampler()


def make_single_executor(plan: Plan, parts: Parts) -> Executor:
    """Build the executor of a single rank."""
    from core.executor import TorchExecutor  # noqa: PLC0415  imports torch

    return TorchExecutor(plan, parts)


def make_launcher(plan: Plan) -> Launcher:
    """Build what starts ranks as child processes, here and on the machines that join."""
    if plan.config.nnodes > 1:
        from core.ranks.cluster import make_cluster_launcher  # noqa: PLC0415  not needed by one machine

        return make_cluster_launcher(plan)
    from core.ranks.launch import ProcessLauncher  # noqa: PLC0415  not needed by one rank

    return ProcessLauncher(plan.world_size)


def make_paged_kv_cache(plan: Plan, num_blocks: int) -> PagedKVCache:
    """Build block tables and prefix cache over a block pool of the core."""
    from core.blocks import BlockPool  # noqa: PLC0415  next to its only use

    return PagedKVCache(
        BlockPool(num_blocks),
        plan.block_size,
        plan.cache_identity(),
        enable_prefix_caching=plan.config.enable_prefix_caching,
    )


def make_token_budget_scheduler(plan: Plan, kv_cache: KVCache) -> TokenBudgetScheduler:
    """Build the scheduler of the core."""
    config = plan.config
    return TokenBudgetScheduler(
        kv_cache,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        policy=config.scheduling_policy,
        long_prefill_threshold=config.long_prefill_token_threshold,
        # Not more than steps are in flight, or those that wait for their turn would never get it.
        num_micro_batches=min(plan.pipeline_parallel_size, config.max_in_flight or sys.maxsize),
    )


# --- declare ---------------------------------------------------------------------------------------


@hookimpl
def core_register_quantizers() -> Iterable[QuantizerEntry]:
    """Contribute `none`."""
    summary = "weights as they are, applied by torch"
    return [QuantizerEntry(name="none", factory=make_plain_scheme, serves_plain=True, summary=summary)]


@hookimpl
def core_register_schedulers() -> Iterable[SchedulerEntry]:
    """Contribute `default`."""
    summary = "token budget, chunked prefill, preemption by recompute"
    return [SchedulerEntry(name="default", factory=make_token_budget_scheduler, summary=summary)]


@hookimpl
def core_register_kv_caches() -> Iterable[KVCacheEntry]:
    """Contribute `paged`."""
    summary = "paged blocks, prefix reuse by SHA-256 chain, least recently used goes first"
    return [KVCacheEntry(name="paged", factory=make_paged_kv_cache, summary=summary)]


@hookimpl
def core_register_executors() -> Iterable[ExecutorEntry]:
    """Contribute `single`."""
    summary = "one rank on one device, plain torch"
    return [ExecutorEntry(name="single", factory=make_single_executor, summary=summary)]


@hookimpl
def core_register_launchers() -> Iterable[LauncherEntry]:
    """Contribute `mp`."""
    summary = "ranks as child processes, on this machine and on those that join"
    return [LauncherEntry(name="mp", factory=make_launcher, summary=summary)]


@hookimpl
def core_register_samplers() -> Iterable[SamplerEntry]:
    """Contribute `default`."""
    summary = "all on the device, batched, counter-based random numbers"
    return [SamplerEntry(name="default", factory=make_torch_sampler, summary=summary)]


@hookimpl
def core_register_models() -> Iterable[ModelEntry]:
    """Contribute the model families of the core."""
    from core.model.families import BUILTIN_MODELS  # noqa: PLC0415  imports the readers

    return BUILTIN_MODELS

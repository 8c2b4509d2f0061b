"""What one engine step costs on the host, with an executor that does nothing.

Scheduler, KV bookkeeping, engine loop and output batch are real; only the device is missing.  Runs
with ten idle plugins beside the bare engine: they subscribe to an event that never happens, and
their share of a step is what the plugin framework itself costs.
"""

from __future__ import annotations

import gc
import sys
import time
import types
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from core.bench.null_executor import NullExecutor
from core.blocks import BlockPool
from core.engine import EngineCore
from core.events import EventBatch, EventBus, Subscription, WorkerLost
from core.hookspecs import hookimpl
from core.kv_cache import PagedKVCache
from core.messages import OutputBatch, Submit
from core.pluginhost import PluginHost, PluginSelection
from core.request import SamplingParams
from core.scheduler import TokenBudgetScheduler

if TYPE_CHECKING:
    from collections.abc import Iterable

BLOCK_SIZE: Final = 16
PROMPT_LEN: Final = 64
GOAL_MS: Final = 0.3
GOAL_RATIO: Final = 1.05


@dataclass(frozen=True, slots=True)
class StepCost:
    """Host time of decode steps in steady state."""

    num_running: int
    bare_ms: float
    with_plugins_ms: float

    @property
    def ratio(self) -> float:
        """How much ten idle plugins add."""
        return self.with_plugins_ms / self.bare_ms


def measure(num_running: int, *, num_steps: int = 400, num_rounds: int = 7) -> StepCost:
    """Time decode steps of `num_running` requests, bare and with ten idle plugins in turn.

    Rounds alternate, so that a change of the machine's clock hits both alike, and the best round of
    each counts: what else the machine does can only add to the cost.
    """
    times: dict[bool, list[float]] = {False: [], True: []}
    for round_ in range(num_rounds * 2):
        has_plugins = bool(round_ % 2)
        times[has_plugins].append(_time_steps(num_running, num_steps, has_plugins=has_plugins))
    bare, with_plugins = (min(times[key]) * 1e3 for key in (False, True))
    return StepCost(num_running, bare, with_plugins)


def _time_steps(num_running: int, num_steps: int, *, has_plugins: bool) -> float:
    """Seconds per step."""
    engine = make_engine(num_running, num_steps, ten_idle_plugins() if has_plugins else ())
    for index in range(num_running):
        prompt = [(index * 31 + k) % 1000 for k in range(PROMPT_LEN)]
        params = SamplingParams(max_tokens=num_steps + 8)
        engine.send(Submit(f"r{index}", prompt, params, num_steps + 8, [2], index))
    while engine.scheduler.num_running < num_running or engine.scheduler.num_waiting:
        engine.step()
    engine.step()
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        for _ in range(num_steps):
            engine.step()
        return (time.perf_counter() - start) / num_steps
    finally:
        gc.enable()
        engine.close()


def make_engine(
    num_running: int, num_steps: int, subscriptions: Iterable[Subscription] = ()
) -> EngineCore:
    """Make a real engine around a `NullExecutor`."""
    per_request = -(-(PROMPT_LEN + num_steps + 8) // BLOCK_SIZE) + 1
    kv_cache = PagedKVCache(
        BlockPool(num_running * per_request + 1), BLOCK_SIZE, b"bench", enable_prefix_caching=True
    )
    scheduler = TokenBudgetScheduler(
        kv_cache, max_num_seqs=num_running, max_num_batched_tokens=max(2048, num_running)
    )
    return EngineCore(
        scheduler=scheduler,
        kv_cache=kv_cache,
        executor=NullExecutor(),
        bus=EventBus(subscriptions),
        outbox=_ignore,
    )


def _ignore(_batch: OutputBatch) -> None:
    pass


def ten_idle_plugins() -> list[Subscription]:
    """Start a plugin host with ten plugins that wait for something that never happens."""
    names = []
    for index in range(10):
        module = types.ModuleType(f"cythera_idle_{index}", "An idle plugin.")
        module.core_api = "1.0"  # type: ignore[attr-defined]
        module.core_subscribe = _make_subscribe(index)  # type: ignore[attr-defined]
        sys.modules[module.__name__] = module
        names.append(f"py:{module.__name__}")
    selected = PluginSelection.parse(names).resolve({})
    return PluginHost.start(selected, {}).subscribe(None)  # type: ignore[arg-type]  # reads no plan


def _make_subscribe(index: int) -> object:
    @hookimpl
    def core_subscribe() -> list[Subscription]:
        return [Subscription(f"idle.{index}", _watch, (WorkerLost,))]

    return core_subscribe


def _watch(_batch: EventBatch) -> None:
    pass


def report(costs: Iterable[StepCost]) -> str:
    """Format a table with the goals beside the figures."""
    lines = [f"{'running':>8} {'ms/step':>9} {'+10 plugins':>12} {'ratio':>7}"]
    lines += [
        f"{c.num_running:>8} {c.bare_ms:>9.4f} {c.with_plugins_ms:>12.4f} {c.ratio:>7.3f}"
        for c in costs
    ]
    lines.append(
        f"best round each; goal: at most {GOAL_MS} ms at 256 on one core, ratio at most {GOAL_RATIO}"
    )
    return "\n".join(lines)

"""The conformance kit: what outsiders run against their own parts.

Each class holds the tests of one kind of part: subclass it in a test module, say how to make yours, and
let pytest collect it.  The kit needs the extra `testing` (pytest and hypothesis).  Names are imported
when they are first used, so that a kit without tensors does not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from core.testing.allocator import AllocatorConformance
    from core.testing.attention import AttentionConformance
    from core.testing.events import SubscriberConformance
    from core.testing.executor import ExecutorConformance
    from core.testing.frontend import FrontendConformance, ServerConformance
    from core.testing.kv_cache import KVCacheConformance
    from core.testing.launcher import LauncherConformance
    from core.testing.model import ModelConformance
    from core.testing.parallel import PipelineParallelConformance, TensorParallelConformance
    from core.testing.plugin import PluginConformance
    from core.testing.quantizer import QuantizerConformance
    from core.testing.sampler import SamplerConformance
    from core.testing.scheduler import SchedulerConformance

__all__ = [
    "AllocatorConformance",
    "AttentionConformance",
    "ExecutorConformance",
    "FrontendConformance",
    "KVCacheConformance",
    "LauncherConformance",
    "ModelConformance",
    "PipelineParallelConformance",
    "PluginConformance",
    "QuantizerConformance",
    "SamplerConformance",
    "SchedulerConformance",
    "ServerConformance",
    "SubscriberConformance",
    "TensorParallelConformance",
]

_MODULES = {
    "AllocatorConformance": "allocator",
    "AttentionConformance": "attention",
    "ExecutorConformance": "executor",
    "FrontendConformance": "frontend",
    "KVCacheConformance": "kv_cache",
    "LauncherConformance": "launcher",
    "ModelConformance": "model",
    "PipelineParallelConformance": "parallel",
    "PluginConformance": "plugin",
    "QuantizerConformance": "quantizer",
    "SamplerConformance": "sampler",
    "SchedulerConformance": "scheduler",
    "ServerConformance": "frontend",
    "SubscriberConformance": "events",
    "TensorParallelConformance": "parallel",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""cythera: a small core that plugins assemble into an LLM engine.

The public names; everything else in `core` may change between minor versions.  They are imported
when first used, so that `import core` costs nothing and needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from core.async_engine import Engine
    from core.config import EngineConfig
    from core.hookspecs import API_VERSION, hookimpl
    from core.llm import LLM
    from core.outputs import CompletionOutput, RequestOutput
    from core.request import SamplingParams

__all__ = [
    "API_VERSION",
    "LLM",
    "CompletionOutput",
    "Engine",
    "EngineConfig",
    "RequestOutput",
    "SamplingParams",
    "hookimpl",
]

__version__ = "0.1.0"

_HOMES = {
    "API_VERSION": "core.hookspecs",
    "LLM": "core.llm",
    "CompletionOutput": "core.outputs",
    "Engine": "core.async_engine",
    "EngineConfig": "core.config",
    "RequestOutput": "core.outputs",
    "SamplingParams": "core.request",
    "hookimpl": "core.hookspecs",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'core' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)

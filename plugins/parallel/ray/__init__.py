"""Ranks on the machines of a Ray cluster: Ray finds where, the ranks talk to the engine themselves."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from core.hookspecs import hookimpl
from core.registry import LauncherEntry

if TYPE_CHECKING:
    from collections.abc import Iterable

    from core.plan import Plan
    from core.ranks.executor import Launcher
    from core.registry import Requirements

core_api = "1.0"


@dataclass(frozen=True, slots=True)
class Settings:
    """Settings of ranks on Ray."""

    address: str | None = None
    """Of the cluster, as `ray.init` takes it; unset: the one that RAY_ADDRESS or this machine names, or
    a new one on this machine alone."""
    placement: str = "PACK"
    """How Ray spreads ranks over machines: PACK, SPREAD, STRICT_PACK or STRICT_SPREAD."""
    num_cpus: float = 1.0
    """Processors that Ray sets aside for each rank."""


def make_launcher(plan: Plan) -> Launcher:
    """Build what starts ranks on a Ray cluster."""
    from plugins.parallel.ray.launcher import RayLauncher  # noqa: PLC0415  imports ray

    return RayLauncher(plan, plan.settings["parallel.ray"])


def unsupported(_requirements: Requirements) -> list[str]:
    """Tell whether Ray is there."""
    if importlib.util.find_spec("ray") is None:
        return ["ray is not installed; pip install 'cythera[ray]'"]
    return []


@hookimpl
def core_register_settings() -> type:
    """Take the cluster's address and how ranks are placed."""
    return Settings


@hookimpl
def core_register_launchers() -> Iterable[Any]:
    """Contribute `ray`."""
    summary = "ranks on the machines of a Ray cluster"
    return [LauncherEntry(name="ray", factory=make_launcher, unsupported=unsupported, summary=summary)]

"""Metrics for Prometheus at `/metrics`, made of the engine's events, and a dashboard for Grafana."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from core.hookspecs import hookimpl
from core.registry import FrontendEntry

if TYPE_CHECKING:
    from core.interfaces import Frontend
    from core.service import Service

core_api = "1.0"

NAME: Final = "observe.prometheus"


@dataclass(frozen=True, slots=True)
class PrometheusSettings:
    """The table `[plugins."observe.prometheus"]`."""

    open: bool = True
    """Serve `/metrics` to clients without an API key."""
    vllm_names: bool = False
    """Offer the series that vLLM has too under its names as well: `vllm:` instead of `cythera:`."""


def make_frontend(service: Service) -> Frontend:
    """Build the route; only now are its libraries imported."""
    from plugins.observe.prometheus.frontend import build  # noqa: PLC0415  listing needs no library

    return build(service, NAME, service.settings[NAME])


@hookimpl
def core_register_settings() -> type:
    """Contribute `open` and `vllm_names`."""
    return PrometheusSettings


@hookimpl
def core_register_frontends() -> list[FrontendEntry]:
    """Offer `/metrics` under the name `prometheus`."""
    return [
        FrontendEntry(
            name="prometheus",
            factory=make_frontend,
            summary="metrics for Prometheus at /metrics",
        )
    ]

"""The dashboard for Grafana.  `python -m plugins.observe.prometheus.dashboard` writes `grafana.json`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

PATH: Final = Path(__file__).with_name("grafana.json")
SCHEMA_VERSION: Final = 39
WIDTH: Final = 24
"""Columns of a dashboard."""
HEIGHT: Final = 8
SOURCE: Final = {"type": "prometheus", "uid": "${datasource}"}
FILTER: Final = '{model_name=~"$model_name",instance=~"$instance"}'
RATE: Final = "[$__rate_interval]"
OURS: Final = f" and on (job, instance) cythera:requests_open{FILTER}"
"""Leaves out the processes of other programs that the same Prometheus watches."""
QUANTILES: Final = (0.5, 0.9, 0.99)


@dataclass(frozen=True, slots=True)
class Panel:
    """One graph."""

    title: str
    unit: str
    """As Grafana names it: `s`, `percentunit` …"""
    queries: tuple[tuple[str, str], ...]
    """Legend and PromQL of each line."""
    description: str = ""
    is_stacked: bool = False


def value(name: str, legend: str) -> tuple[str, str]:
    """Query a gauge, added up over all engines."""
    return legend, f"sum(cythera:{name}{FILTER})"


def speed(name: str, by: str = "") -> str:
    """Write how fast a series grows per second, added up over all engines."""
    group = f" by ({by}) " if by else ""
    return f"sum{group}(rate(cythera:{name}{FILTER}{RATE}))"


def rate(name: str, legend: str, by: str = "") -> tuple[str, str]:
    """Query how fast a counter grows, per second."""
    return legend, speed(f"{name}_total", by)


def quantiles(name: str) -> tuple[tuple[str, str], ...]:
    """Query the usual quantiles of a histogram, and its mean."""
    buckets = speed(f"{name}_bucket", by="le")
    return (
        *((f"p{q * 100:.0f}", f"histogram_quantile({q}, {buckets})") for q in QUANTILES),
        ("mean", f"{speed(f'{name}_sum')} / {speed(f'{name}_count')}"),
    )


PANELS: Final = (
    Panel(
        "Throughput",
        "short",
        (rate("generation_tokens", "generated"), rate("prompt_tokens", "prompt")),
        "Tokens per second; a prompt counts when its first token comes.",
    ),
    Panel(
        "Sequences",
        "short",
        (
            value("num_requests_running", "running"),
            value("num_requests_waiting", "waiting"),
            value("requests_open", "open requests"),
        ),
        "Running ones hold a row of the batch. A request with n completions is n sequences.",
    ),
    Panel(
        "KV cache in use",
        "percentunit",
        (("{{instance}}", f"max by (instance) (cythera:kv_cache_usage_perc{FILTER})"),),
        "Near 100 %, sequences wait or are preempted.",
    ),
    Panel("Time to first token", "s", quantiles("time_to_first_token_seconds")),
    Panel("Time between tokens", "s", quantiles("inter_token_latency_seconds")),
    Panel("Time to the end", "s", quantiles("e2e_request_latency_seconds")),
    Panel("Time in the queue", "s", quantiles("request_queue_time_seconds")),
    Panel(
        "Prefix cache hits",
        "percentunit",
        (
            (
                "hit rate",
                f"{speed('prefix_cache_hits_total')} / {speed('prefix_cache_queries_total')}",
            ),
        ),
        "Share of the prompt tokens that need not be computed.",
    ),
    Panel(
        "Preemptions and evictions",
        "short",
        (
            rate("num_preemptions", "preemptions"),
            rate("kv_blocks_evicted", "evicted blocks"),
        ),
        "Per second. A preempted sequence is computed again: the KV cache is too small for the load.",
    ),
    Panel(
        "Ends",
        "short",
        (rate("request_success", "{{finished_reason}}", by="finished_reason"),),
        "Sequences that ended per second, by reason.",
        is_stacked=True,
    ),
    Panel(
        "Refusals and failures",
        "short",
        (
            rate("requests_refused", "refused requests"),
            rate("step_failures", "failed steps"),
            rate("event_batches_dropped", "event batches dropped"),
            rate("subscribers_dropped", "subscribers dropped"),
        ),
        "Per second. With event batches dropped, all other numbers are too low.",
    ),
    Panel("Duration of a step", "s", quantiles("step_duration_seconds")),
    Panel("Tokens of a step", "short", quantiles("iteration_tokens_total")),
    Panel("Length of prompts", "short", quantiles("request_prompt_tokens")),
    Panel("Length of answers", "short", quantiles("request_generation_tokens")),
    Panel(
        "Phase",
        "short",
        (("{{instance}} {{phase}}", f"cythera:phase{FILTER} == 1"),),
        "What each engine is doing.",
    ),
    Panel(
        "Memory of the serving process",
        "bytes",
        (("{{instance}}", f"process_resident_memory_bytes{OURS}"),),
    ),
    Panel(
        "Processor time of the serving process",
        "percentunit",
        (("{{instance}}", f"rate(process_cpu_seconds_total{RATE}){OURS}"),),
        "100 % is one core.",
    ),
)


def make_dashboard() -> dict[str, Any]:
    """Make the dashboard as Grafana imports it."""
    return {
        "title": "cythera",
        "uid": "cythera",
        "tags": ["cythera", "llm"],
        "schemaVersion": SCHEMA_VERSION,
        "editable": True,
        "graphTooltip": 1,  # one cross hair for all panels
        "refresh": "15s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": list(_variables())},
        "panels": [_panel(number, panel) for number, panel in enumerate(PANELS)],
    }


def _variables() -> Iterator[dict[str, Any]]:
    yield {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"}
    for name, label in (("model_name", "Model"), ("instance", "Instance")):
        yield {
            "name": name,
            "label": label,
            "type": "query",
            "datasource": SOURCE,
            "query": f"label_values(cythera:requests_open, {name})",
            "refresh": 2,  # whenever the time range changes
            "includeAll": True,
            "allValue": ".*",
            "multi": True,
            "current": {"text": "All", "value": "$__all"},
        }


def _panel(number: int, panel: Panel) -> dict[str, Any]:
    width = WIDTH // 3
    return {
        "id": number + 1,
        "type": "timeseries",
        "title": panel.title,
        "description": panel.description,
        "datasource": SOURCE,
        "gridPos": {
            "x": number % 3 * width,
            "y": number // 3 * HEIGHT,
            "w": width,
            "h": HEIGHT,
        },
        "targets": [
            {
                "refId": chr(ord("A") + index),
                "datasource": SOURCE,
                "expr": expression,
                "legendFormat": legend,
            }
            for index, (legend, expression) in enumerate(panel.queries)
        ],
        "fieldConfig": {
            "defaults": {
                "unit": panel.unit,
                "min": 0,
                "custom": {
                    "fillOpacity": 10,
                    "showPoints": "never",
                    "stacking": {"mode": "normal" if panel.is_stacked else "none", "group": "A"},
                },
            },
            "overrides": [],
        },
        "options": {
            "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
            "tooltip": {"mode": "multi", "sort": "desc"},
        },
    }


def dump() -> str:
    """Write the dashboard as text."""
    return json.dumps(make_dashboard(), indent=2) + "\n"


if __name__ == "__main__":
    PATH.write_text(dump(), encoding="utf-8")

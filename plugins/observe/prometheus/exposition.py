"""Names the numbers and tells them to Prometheus, in the format that a scraper asks for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from prometheus_client import CollectorRegistry, GCCollector, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.openmetrics.exposition import ALLOWUTF8, CONTENT_TYPE_LATEST
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from core.status import Phase
from plugins.observe.prometheus.catalogue import CATALOGUE, PREFIX, VLLM_PREFIX

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from prometheus_client.core import Metric as Family

    from core.service import Service
    from plugins.observe.prometheus.catalogue import Metric
    from plugins.observe.prometheus.metrics import Histogram, Metrics, Numbers

OPENMETRICS: Final = "application/openmetrics-text"
ENGINE: Final = "0"
"""The label `engine` of the series under vLLM's names: it counts engines that share one front end."""


class Exposition(Collector):
    """Makes families of series out of a snapshot, whenever the registry is scraped.

    :param service: asked for its phase and its open requests at each scrape.
    :param vllm_names: whether to repeat what vLLM has too under its names.
    """

    def __init__(self, metrics: Metrics, service: Service, *, vllm_names: bool) -> None:
        self._metrics = metrics
        self._service = service
        self._namings = [(PREFIX, {"model_name": service.model_names[0]})]
        if vllm_names:
            self._namings.append((VLLM_PREFIX, {**self._namings[0][1], "engine": ENGINE}))

    def collect(self) -> Iterator[Family]:
        """Yield each metric under each of its names."""
        snapshot = self._metrics.snapshot()
        numbers = {**snapshot.numbers, **self._ask_service()}
        for prefix, labels in self._namings:
            for metric in CATALOGUE:
                if prefix == VLLM_PREFIX and not metric.is_vllm:
                    continue
                if metric.kind == "histogram":
                    yield _histogram(prefix, metric, labels, snapshot.histograms[metric.name])
                else:
                    yield _series(prefix, metric, labels, numbers[metric.name])

    def _ask_service(self) -> dict[str, Numbers]:
        now = self._service.status.phase
        return {
            "phase": {(str(phase),): float(phase is now) for phase in Phase},
            "requests_open": {(): float(self._service.num_open)},
        }


def make_registry(metrics: Metrics, service: Service, *, vllm_names: bool) -> CollectorRegistry:
    """Make a registry of the engine's metrics and those of this process."""
    registry = CollectorRegistry()
    registry.register(Exposition(metrics, service, vllm_names=vllm_names))
    ProcessCollector(registry=registry)
    GCCollector(registry=registry)
    return registry


def render(registry: CollectorRegistry, accept: str) -> tuple[bytes, str]:
    """Write everything down.

    :param accept: the header of that name; only whether it wants OpenMetrics is of interest, so
        that no version or escaping that a client makes up can matter.
    :return: body and content type.
    """
    if OPENMETRICS in accept.lower():
        # The default escaping would turn the colons of our names into underscores.
        body: bytes = generate_openmetrics(registry, ALLOWUTF8)  # type: ignore[no-untyped-call]
        return body, CONTENT_TYPE_LATEST
    return generate_latest(registry), CONTENT_TYPE_PLAIN_0_0_4


def _series(prefix: str, metric: Metric, labels: Mapping[str, str], numbers: Numbers) -> Family:
    names = (*labels, *metric.labels)
    make = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
    family = make(prefix + metric.name, metric.help, labels=names)
    for values, number in numbers.items():
        family.add_metric((*labels.values(), *values), number)
    return family


def _histogram(prefix: str, metric: Metric, labels: Mapping[str, str], counted: Histogram) -> Family:
    family = HistogramMetricFamily(prefix + metric.name, metric.help, labels=tuple(labels))
    buckets = []
    running = 0
    for bound, count in zip((*counted.bounds, float("inf")), counted.counts, strict=True):
        running += count
        buckets.append((floatToGoString(bound), running))  # type: ignore[no-untyped-call]
    family.add_metric(tuple(labels.values()), buckets, counted.total)
    return family

"""The route `GET /metrics`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from starlette.responses import Response
from starlette.routing import Route

from core.events import Subscription
from core.interfaces import Frontend
from plugins.observe.prometheus.exposition import OPENMETRICS, make_registry, render
from plugins.observe.prometheus.metrics import Metrics

if TYPE_CHECKING:
    from starlette.requests import Request

    from core.service import Service
    from plugins.observe.prometheus import PrometheusSettings

PATH: Final = "/metrics"
_TEXT: Final[dict[str, Any]] = {"schema": {"type": "string"}}
OPENAPI: Final[dict[str, Any]] = {
    "paths": {
        PATH: {
            "get": {
                "summary": "Metrics for Prometheus",
                "tags": ["Observability"],
                "responses": {
                    "200": {
                        "description": "All series; as OpenMetrics if the header Accept asks for it.",
                        "content": {"text/plain": _TEXT, OPENMETRICS: _TEXT},
                    }
                },
            }
        }
    }
}


def build(service: Service, name: str, settings: PrometheusSettings) -> Frontend:
    """Subscribe to the events of a service and offer what they add up to.

    :param name: of the subscription.
    """
    metrics = Metrics()
    registry = make_registry(metrics, service, vllm_names=settings.vllm_names)
    # All types: only then is a gap in the numbers of the batches a batch that was lost.
    service.subscribe(Subscription(name, metrics))

    def scrape(request: Request) -> Response:  # not async: runs in a worker thread, off the event loop
        body, content_type = render(registry, request.headers.get("accept", ""))
        return Response(body, headers={"content-type": content_type})

    return Frontend(
        routes=[Route(PATH, scrape, methods=["GET"], name="metrics")],
        open_paths=frozenset({PATH} if settings.open else ()),
        openapi=OPENAPI,
    )

"""`GET /v1/models`: the names that the model is served by; answered while it is loading too."""

from __future__ import annotations

from typing import TYPE_CHECKING

from core.errors import NotReadyError
from plugins.frontend.openai.errors import answering
from plugins.frontend.openai.reply import reply
from plugins.frontend.openai.types import ModelCard, ModelList

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from starlette.requests import Request
    from starlette.responses import Response

    from core.service import Service


def make_list_models(service: Service) -> Callable[[Request], Awaitable[Response]]:
    """Make the endpoint of `GET /v1/models`."""

    async def list_models(_request: Request) -> Response:
        return reply(ModelList(data=[_card(service, name) for name in service.model_names]))

    return list_models


def make_show_model(service: Service) -> Callable[[Request], Awaitable[Response]]:
    """Make the endpoint of `GET /v1/models/{id}`."""

    @answering
    async def show_model(request: Request) -> Response:
        name = request.path_params["id"]
        service.check_model(name)
        return reply(_card(service, name))

    return show_model


def _card(service: Service, name: str) -> ModelCard:
    try:
        max_model_len = service.limits.max_model_len
    except NotReadyError:
        max_model_len = None
    return ModelCard(
        id=name, created=service.created, root=service.model_names[0], max_model_len=max_model_len
    )

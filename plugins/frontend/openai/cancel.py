"""`POST /v1/requests/{id}/cancel`: ending a request from elsewhere than its connection."""

from __future__ import annotations

from typing import TYPE_CHECKING

from plugins.frontend.openai.chat import ChatJob
from plugins.frontend.openai.completions import CompletionJob
from plugins.frontend.openai.errors import NoSuchRequestError, answering
from plugins.frontend.openai.reply import reply
from plugins.frontend.openai.types import CancelAnswer

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from starlette.requests import Request
    from starlette.responses import Response

    from core.service import Service


def make_cancel_request(service: Service) -> Callable[[Request], Awaitable[Response]]:
    """Make the endpoint.  It knows a request by its own id, and by that of its answer."""

    @answering
    async def cancel_request(request: Request) -> Response:
        answer_id: str = request.path_params["id"]
        own_ids = {answer_id.removeprefix(job.id_prefix) for job in (ChatJob, CompletionJob)}
        if not any([service.cancel(each) for each in {answer_id} | own_ids]):  # noqa: C419  all of them
            raise NoSuchRequestError(f"there is no open request with the id {answer_id!r}")
        return reply(CancelAnswer(id=answer_id))

    return cancel_request

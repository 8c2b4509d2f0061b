"""All routes of the OpenAI API over one service."""

from __future__ import annotations

from typing import TYPE_CHECKING

from starlette.routing import Route

from core.interfaces import Frontend
from plugins.frontend.openai.cancel import make_cancel_request
from plugins.frontend.openai.chat import ChatJob
from plugins.frontend.openai.completions import CompletionJob
from plugins.frontend.openai.generation import GenerationEndpoint
from plugins.frontend.openai.models import make_list_models, make_show_model
from plugins.frontend.openai.openapi import make_openapi
from plugins.frontend.openai.tokens import make_detokenize, make_tokenize, make_tokenizer_info

if TYPE_CHECKING:
    from core.service import Service
    from plugins.frontend.openai import OpenAISettings


def make_frontend(service: Service, settings: OpenAISettings) -> Frontend:
    """Make the front end; the engine need not be there yet."""
    chat = GenerationEndpoint(service, settings, ChatJob)
    completions = GenerationEndpoint(service, settings, CompletionJob)
    routes = [
        Route("/v1/chat/completions", chat, methods=["POST"], name="chat_completions"),
        Route("/v1/completions", completions, methods=["POST"], name="completions"),
        Route("/v1/models", make_list_models(service)),
        Route("/v1/models/{id:path}", make_show_model(service)),
        Route("/v1/requests/{id:path}/cancel", make_cancel_request(service), methods=["POST"]),
    ]
    for prefix in ("", "/v1"):
        routes += [
            Route(f"{prefix}/tokenize", make_tokenize(service), methods=["POST"]),
            Route(f"{prefix}/detokenize", make_detokenize(service), methods=["POST"]),
            Route(f"{prefix}/tokenizer_info", make_tokenizer_info(service)),
        ]
    return Frontend(routes=routes, openapi=make_openapi())

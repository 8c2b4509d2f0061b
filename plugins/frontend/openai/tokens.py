"""`/tokenize`, `/detokenize` and `/tokenizer_info`: the model's tokenizer, for clients without one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from core.errors import InvalidRequestError
from plugins.frontend.openai.body import decode_body
from plugins.frontend.openai.errors import answering
from plugins.frontend.openai.forgery import special_texts
from plugins.frontend.openai.prompts import encode_conversation, encode_text
from plugins.frontend.openai.reply import reply
from plugins.frontend.openai.types import (
    DetokenizeAnswer,
    DetokenizeRequest,
    TokenizeAnswer,
    TokenizeRequest,
    TokenizerInfo,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from starlette.requests import Request
    from starlette.responses import Response

    from core.service import Service
    from plugins.frontend.openai.prompts import Prompt


def make_tokenize(service: Service) -> Callable[[Request], Awaitable[Response]]:
    """Make the endpoint of `POST /tokenize`."""

    @answering
    async def tokenize(http: Request) -> Response:
        request, _ = decode_body(await http.body(), TokenizeRequest)
        if request.model is not None:
            service.check_model(request.model)
        prompt = await _encode(service, request)
        tokenizer = service.need_tokenizer("prompt")
        texts = (
            [tokenizer.token_text(i) for i in prompt.token_ids] if request.return_token_strs else None
        )
        return reply(
            TokenizeAnswer(
                count=len(prompt.token_ids),
                max_model_len=service.limits.max_model_len,
                tokens=prompt.token_ids,
                token_strs=texts,
            )
        )

    return tokenize


async def _encode(service: Service, request: TokenizeRequest) -> Prompt:
    """Encode as the generating routes do."""
    if (request.prompt is None) == (request.messages is None):
        raise InvalidRequestError("prompt: send either prompt or messages", field="prompt")
    if request.prompt is None:
        return await encode_conversation(service, request)
    return await encode_text(
        service, request.prompt, add_special_tokens=request.add_special_tokens is not False
    )


def make_detokenize(service: Service) -> Callable[[Request], Awaitable[Response]]:
    """Make the endpoint of `POST /detokenize`."""

    @answering
    async def detokenize(http: Request) -> Response:
        request, _ = decode_body(await http.body(), DetokenizeRequest)
        if request.model is not None:
            service.check_model(request.model)
        return reply(DetokenizeAnswer(await service.decode(request.tokens)))

    return detokenize


def make_tokenizer_info(service: Service) -> Callable[[Request], Awaitable[Response]]:
    """Make the endpoint of `GET /tokenizer_info`."""

    @answering
    async def tokenizer_info(_http: Request) -> Response:
        tokenizer = service.need_tokenizer("tokenizer")
        hf = tokenizer.hf
        template = hf.chat_template
        if isinstance(template, dict):  # a tokenizer may have several, by name
            template = template.get("default")
        return reply(
            TokenizerInfo(
                tokenizer_class=type(hf).__name__,
                vocab_size=tokenizer.vocab_size,
                bos_token=hf.bos_token,
                eos_token=hf.eos_token,
                pad_token=hf.pad_token,
                unk_token=hf.unk_token,
                special_tokens=special_texts(tokenizer),
                chat_template=template,
            )
        )

    return tokenizer_info

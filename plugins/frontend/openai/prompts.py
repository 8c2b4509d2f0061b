"""From texts and conversations to token ids."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from core.errors import InvalidRequestError
from plugins.frontend.openai.forgery import check_roles, check_texts

if TYPE_CHECKING:
    from core.service import Service
    from plugins.frontend.openai.types import ChatRequest, TokenizeRequest

CONTINUE: Final = "continue_final_message"
"""A field of the request itself; the tokenizer refuses the other names that are none of a template."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt, as the engine takes it."""

    token_ids: list[int]
    text: str | None = None
    """As the client wrote it; `None` for token ids, and for a text that was cut."""

    def cut(self, limit: int | None, max_model_len: int, max_tokens: int | None) -> Prompt:
        """Keep the end of a prompt.

        :param limit: tokens to keep; -1 for as many as leave room for `max_tokens`, `None` for all.
        :raises InvalidRequestError: the limit is no number of tokens.
        """
        if limit is None:
            return self
        if limit == -1:
            limit = max(1, max_model_len - max(1, max_tokens or 1))
        if limit < 1:
            raise InvalidRequestError(
                f"truncate_prompt_tokens: must be at least 1, or -1 for what fits, got {limit}",
                field="truncate_prompt_tokens",
            )
        return self if len(self.token_ids) <= limit else Prompt(self.token_ids[-limit:])


async def encode_text(service: Service, text: str, *, add_special_tokens: bool) -> Prompt:
    """Encode a text.  What spells a special token becomes one: people write templates by hand.

    :raises InvalidRequestError: it is empty, or there is no tokenizer.
    """
    service.need_tokenizer("prompt")
    if not text:
        raise InvalidRequestError("prompt: text must not be empty", field="prompt")
    token_ids = await service.encode(text, add_special_tokens=add_special_tokens, parse_special=True)
    return Prompt(token_ids, text)


async def decode_prompt(service: Service, token_ids: list[int]) -> str:
    """Write a prompt of token ids as text.

    :raises InvalidRequestError: one is not in the vocabulary, or there is no tokenizer.
    """
    service.need_tokenizer("echo")
    try:
        return await service.decode(token_ids)
    except InvalidRequestError as error:
        raise InvalidRequestError(f"prompt: {error}", field="prompt") from None


async def encode_conversation(service: Service, request: ChatRequest | TokenizeRequest) -> Prompt:
    """Render a conversation with the model's chat template, and encode that.

    A template writes special tokens itself, so none are added unless the request wants them.

    The rendered text is one text in which special tokens are parsed, so nothing that clients
    contribute to it may spell one.

    :raises InvalidRequestError: something does, the template refuses the conversation, or there is
        no tokenizer.
    """
    tokenizer = service.need_tokenizer("messages")
    if CONTINUE in (request.chat_template_kwargs or ()):
        raise InvalidRequestError(
            f"chat_template_kwargs: {CONTINUE!r} is a field of the request itself",
            field="chat_template_kwargs",
        )
    check_roles(request.messages or [])
    for field in ("messages", "tools", "documents", "chat_template_kwargs"):
        await check_texts(tokenizer, field, getattr(request, field))
    generation = request.add_generation_prompt
    text = await service.render_chat(
        request.messages or [],
        add_generation_prompt=True if generation is None else generation,
        continue_final_message=bool(request.continue_final_message),
        tools=request.tools,
        documents=request.documents,
        chat_template_kwargs=request.chat_template_kwargs,
    )
    token_ids = await service.encode(
        text, add_special_tokens=bool(request.add_special_tokens), parse_special=True
    )
    return Prompt(token_ids, text)

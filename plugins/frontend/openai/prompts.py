"""From texts and conversations to token ids."""

from __future__ import annotations

import re
import reprlib
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from operator import itemgetter
from os.path import commonprefix
from typing import TYPE_CHECKING, Any, Final

import anyio.lowlevel

from core.errors import InvalidRequestError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from core.service import Service
    from core.tokenizer import Tokenizer
    from plugins.frontend.openai.types import ChatRequest, TokenizeRequest

RESERVED: Final = frozenset({"add_generation_prompt", "continue_final_message", "messages", "self"})
"""What a template does not get as one of its own variables."""
MAX_VALUES: Final = 2**20
"""Texts, numbers and keys in one of the fields that a template sees."""
SLICE: Final = 2**16
"""Characters that are looked through at a time."""
_ROLE: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")


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


def need_tokenizer(service: Service, field: str) -> Tokenizer:
    """Return the model's tokenizer.

    :param field: what cannot be served without one.
    :raises InvalidRequestError: the model has none.
    """
    if service.tokenizer is None:
        raise InvalidRequestError(
            f"{field}: text needs a tokenizer, but this model has none; send a prompt of token ids",
            field=field,
        )
    return service.tokenizer


async def encode_text(service: Service, text: str, *, add_special_tokens: bool) -> Prompt:
    """Encode a text.  What spells a special token becomes one: people write templates by hand.

    :raises InvalidRequestError: it is empty, or there is no tokenizer.
    """
    need_tokenizer(service, "prompt")
    if not text:
        raise InvalidRequestError("prompt: text must not be empty", field="prompt")
    token_ids = await service.encode(text, add_special_tokens=add_special_tokens, parse_special=True)
    return Prompt(token_ids, text)


async def decode_prompt(service: Service, token_ids: list[int]) -> str:
    """Write a prompt of token ids as text.

    :raises InvalidRequestError: one is not in the vocabulary, or there is no tokenizer.
    """
    need_tokenizer(service, "echo")
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
    tokenizer = need_tokenizer(service, "messages")
    for name in sorted(RESERVED.intersection(request.chat_template_kwargs or ())):
        raise InvalidRequestError(
            f"chat_template_kwargs: {name!r} is a field of the request itself",
            field="chat_template_kwargs",
        )
    _check_roles(request.messages or [])
    for field in ("messages", "tools", "documents", "chat_template_kwargs"):
        await _check_special(tokenizer, field, getattr(request, field))
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


def _check_roles(messages: list[dict[str, Any]]) -> None:
    """Refuse a role that is no word: some templates build control tokens around it."""
    for index, message in enumerate(messages):
        role = message.get("role")
        if isinstance(role, str) and not _ROLE.fullmatch(role):
            place = f"messages[{index}].role"
            raise InvalidRequestError(
                f"{place}: must be a word of letters, digits, _ and -, got {reprlib.repr(role)}",
                field=place,
            )


async def _check_special(tokenizer: Tokenizer, field: str, value: object) -> None:
    """Refuse texts that spell a special token; lets others run while it looks through long ones."""
    pattern, longest = _special_pattern(tokenizer)
    num_looked_at = 0
    for number, (way, text) in enumerate(_texts(value)):
        if number == MAX_VALUES:
            raise InvalidRequestError(f"{field}: may hold at most {MAX_VALUES} values", field=field)
        for start in range(0, max(1, len(text)), SLICE):
            match = pattern.search(text, start, start + SLICE + longest)
            if match is not None:
                raise _refuse_special(field, way, match[0])
            num_looked_at += min(SLICE, len(text) - start) + 1
            if num_looked_at > SLICE:
                num_looked_at = 0
                await anyio.lowlevel.checkpoint()


def _refuse_special(field: str, way: list[str | int], token: str) -> InvalidRequestError:
    place = field + "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in way)
    return InvalidRequestError(
        f"{place}: holds {token!r}, a control token of this model, which no message may contain; change "
        f"the text, or write the whole prompt yourself for /v1/completions",
        field=place,
    )


def _texts(value: object) -> Iterator[tuple[list[str | int], str]]:
    """Walk through a JSON value: its texts and keys, and an empty text for every other leaf.

    No recursion and no copies: it may be as deep and as long as a body lets it be.

    :return: the way to each text, which is only good until the next one, and the text.
    """
    way: list[str | int] = []
    levels: list[Iterator[tuple[str | int, Any]]] = [_items(value)]
    while levels:
        key, item = next(levels[-1], (None, None))
        if key is None:
            levels.pop()
            del way[-1:]
            continue
        way.append(key)
        if isinstance(key, str):
            yield way, key
        if isinstance(item, dict | list):
            levels.append(_items(item))
        else:
            yield way, item if isinstance(item, str) else ""
            way.pop()


def _items(value: object) -> Iterator[tuple[str | int, Any]]:
    if isinstance(value, dict):
        return iter(value.items())
    return enumerate(value if isinstance(value, list) else ())


@lru_cache(maxsize=4)
def _special_pattern(tokenizer: Tokenizer) -> tuple[re.Pattern[str], int]:
    """Make what finds any special token, and return the length of the longest."""
    texts = list(filter(None, special_texts(tokenizer).values()))
    pattern = _any_of(texts) if texts else r"(?!)"
    return re.compile(pattern), max(map(len, texts), default=0)


def _any_of(words: list[str]) -> str:
    """Write a pattern that finds any of the words, or the shortest of those that begin alike.

    Common beginnings are written once, so that no text can make it try hundreds of words in every
    place.
    """
    if "" in words:
        return ""
    parts = []
    for _, group in groupby(sorted(words), key=itemgetter(0)):
        alike = list(group)
        prefix = commonprefix(alike)  # noqa: RUF071  characters are meant, not folders
        parts.append(re.escape(prefix) + _any_of([word[len(prefix) :] for word in alike]))
    return parts[0] if len(parts) == 1 else f"(?:{'|'.join(parts)})"


def special_texts(tokenizer: Tokenizer) -> dict[int, str]:
    """Return the special tokens by id, spelled as the tokenizer finds them in a text."""
    ids = sorted(tokenizer.special_ids)
    return dict(zip(ids, tokenizer.hf.convert_ids_to_tokens(ids), strict=True))

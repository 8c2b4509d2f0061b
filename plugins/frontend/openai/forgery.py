"""What keeps clients from forging the control tokens of a chat template.

A rendered conversation is one text, and whatever spells a special token in it becomes that token.
"""

from __future__ import annotations

import re
import reprlib
from functools import lru_cache
from itertools import groupby
from operator import itemgetter
from os.path import commonprefix
from typing import TYPE_CHECKING, Any, Final

import anyio.lowlevel

from core.errors import InvalidRequestError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from core.tokenizer import Tokenizer

MAX_VALUES: Final = 2**20
"""Texts, numbers and keys in one field."""
SLICE: Final = 2**16
"""Characters that are looked through at a time."""
_ROLE: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")


def check_roles(messages: list[dict[str, Any]]) -> None:
    """Refuse a role that is no word: some templates build special tokens around it.

    :raises InvalidRequestError: one is not.
    """
    for index, message in enumerate(messages):
        role = message.get("role")
        if isinstance(role, str) and not _ROLE.fullmatch(role):
            place = f"messages[{index}].role"
            raise InvalidRequestError(
                f"{place}: must be a word of letters, digits, _ and -, got {reprlib.repr(role)}",
                field=place,
            )


async def check_texts(tokenizer: Tokenizer, field: str, value: object) -> None:
    """Refuse texts that spell a special token; others can run while long ones are looked through.

    :param field: what the value is called; the error says in which part of it the text is.
    :raises InvalidRequestError: one does, or there are too many of them.
    """
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

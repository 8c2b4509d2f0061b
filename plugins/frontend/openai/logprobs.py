"""Log-probabilities in the shapes of the two APIs."""

from __future__ import annotations

import codecs
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from plugins.frontend.openai.types import (
    ChatLogprobs,
    CompletionLogprobs,
    PromptLogprob,
    TokenLogprob,
    TopLogprob,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from core.outputs import Logprob
    from core.tokenizer import Tokenizer
    from plugins.frontend.openai.types import PromptLogprobs

LOWEST: Final = -9999.0
"""Stands for minus infinity, which JSON does not have."""

Entry = dict[int, "Logprob"]
"""One position: the token itself first, then the likeliest ones."""


def finite(logprob: float) -> float:
    """Return the number as JSON can write it."""
    return logprob if math.isfinite(logprob) else LOWEST


@dataclass(frozen=True, slots=True)
class TokenSpelling:
    """How tokens are written.

    :param as_ids: as `token_id:123`; without a tokenizer there is no other way.
    """

    tokenizer: Tokenizer | None
    as_ids: bool = False

    def text(self, token_id: int) -> str:
        """Write one token."""
        if self.as_ids or self.tokenizer is None:
            return f"token_id:{token_id}"
        return self.tokenizer.token_text(token_id)

    def bytes(self, token_id: int) -> bytes | None:
        """Return what it adds to the text, which may be half a character."""
        return None if self.tokenizer is None else self.tokenizer.token_bytes(token_id)


# --- chat -----------------------------------------------------------------------------------------


def chat_logprobs(entries: Iterable[Entry], num_top: int, spelling: TokenSpelling) -> ChatLogprobs:
    """Shape the log-probabilities of a chat completion.

    :param num_top: alternatives to list; the token itself counts if it is among the likeliest.
    """
    return ChatLogprobs([_token_logprob(entry, num_top, spelling) for entry in entries])


def _token_logprob(entry: Entry, num_top: int, spelling: TokenSpelling) -> TokenLogprob:
    token_id, chosen = next(iter(entry.items()))
    likeliest = sorted(entry.items(), key=lambda item: -item[1].logprob)[:num_top]
    data = spelling.bytes(token_id)
    return TokenLogprob(
        spelling.text(token_id),
        finite(chosen.logprob),
        None if data is None else list(data),
        [_top_logprob(i, logprob, spelling) for i, logprob in likeliest],
    )


def _top_logprob(token_id: int, logprob: Logprob, spelling: TokenSpelling) -> TopLogprob:
    data = spelling.bytes(token_id)
    numbers = None if data is None else list(data)
    return TopLogprob(spelling.text(token_id), finite(logprob.logprob), numbers)


# --- plain completions ----------------------------------------------------------------------------


class CompletionLogprobsWriter:
    """Shapes the log-probabilities of one completion, piece by piece.

    :param hidden_ids: tokens that stand for no text here.
    """

    def __init__(self, spelling: TokenSpelling, hidden_ids: frozenset[int] = frozenset()) -> None:
        self._spelling = spelling
        self._hidden_ids = hidden_ids
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    def write_prompt(
        self, token_ids: Sequence[int], entries: Sequence[Entry | None], text: str
    ) -> CompletionLogprobs:
        """Shape those of the prompt, which is the beginning of the text.

        :param text: what is shown of the prompt; may lack tokens that were added around it.
        """
        data = [self._spelling.bytes(token_id) or b"" for token_id in token_ids]
        start = max(0, b"".join(data).decode("utf-8", "replace").find(text))
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        offsets, offset = [], -start
        for piece in data:
            offsets.append(min(max(0, offset), len(text)))
            offset += len(decoder.decode(piece))
        self._offset = len(text)
        return self._shape(token_ids, entries, offsets)

    def write(self, token_ids: Sequence[int], entries: Sequence[Entry]) -> CompletionLogprobs:
        """Shape those of generated tokens."""
        offsets = []
        for token_id in token_ids:
            offsets.append(self._offset)
            if token_id not in self._hidden_ids:
                self._offset += len(self._decoder.decode(self._spelling.bytes(token_id) or b""))
        return self._shape(token_ids, entries, offsets)

    def _shape(
        self, token_ids: Sequence[int], entries: Sequence[Entry | None], offsets: list[int]
    ) -> CompletionLogprobs:
        pairs = list(zip(token_ids, entries, strict=True))
        return CompletionLogprobs(
            [self._spelling.text(token_id) for token_id in token_ids],
            [None if entry is None else finite(entry[i].logprob) for i, entry in pairs],
            [None if entry is None else self._top(entry) for entry in entries],
            offsets,
        )

    def _top(self, entry: Entry) -> dict[str, float]:
        """List one position by the text of its tokens.

        Several tokens can share a text, above all parts of characters.  The first of them, which is
        the token itself if it is among them, has the text as its key, and the others their ids: no
        entry is lost, and the largest value is that of the likeliest token.
        """
        top: dict[str, float] = {}
        for token_id, logprob in entry.items():
            text = self._spelling.text(token_id)
            top[f"token_id:{token_id}" if text in top else text] = finite(logprob.logprob)
        return top


def join_logprobs(first: CompletionLogprobs, second: CompletionLogprobs) -> CompletionLogprobs:
    """Put one after the other."""
    return CompletionLogprobs(
        first.tokens + second.tokens,
        first.token_logprobs + second.token_logprobs,
        first.top_logprobs + second.top_logprobs,
        first.text_offset + second.text_offset,
    )


# --- prompts --------------------------------------------------------------------------------------


def prompt_logprobs(entries: Iterable[Entry | None]) -> PromptLogprobs:
    """Shape the log-probabilities of a prompt as vLLM does."""
    return [None if entry is None else _prompt_entry(entry) for entry in entries]


def _prompt_entry(entry: Entry) -> dict[int, PromptLogprob]:
    return {
        token_id: PromptLogprob(finite(logprob.logprob), logprob.rank, logprob.decoded_token)
        for token_id, logprob in entry.items()
    }

"""Tokens to text as they come, and the stop strings that end it.

Each token costs its own bytes only: nothing that was decoded before is decoded again.  What has been
given out never changes, whatever tokens follow and however they are cut into pushes.
"""

from __future__ import annotations

import functools
from codecs import utf_8_decode
from collections import deque
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

from core.errors import InvalidRequestError
from core.tokenizer import REPLACEMENT, strip_lead

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from core.tokenizer import Pieces, Tokenizer


class Delta(NamedTuple):
    """What a push added."""

    text: str
    stop_reason: str | None
    """The stop string that has ended the text; no more text comes after this."""
    num_tokens_kept: int
    """How many of the pushed tokens belong to the output: all, or up to the one that completed the
    stop string."""


class IncrementalDetokenizer:
    """The text of one completion, piece by piece.

    All text together is `decode(prompt + output)` without its beginning `decode(prompt)`: the first
    token keeps its leading space where the prompt shows any text, and a character whose first bytes
    end the prompt belongs to the output that completes it.

    Text ends at the stop string that is complete first; of several that end at the same character,
    at the longest.  That needs no look-ahead, so it does not depend on how tokens are pushed.

    :param stop: texts that end the output.
    :param include_stop: give out the stop string itself too; what follows it is dropped either way.
    :param skip_special_tokens: special tokens stand for no text.
    :param prompt_token_ids: what came before the output.
    :param min_tokens: a stop string counts only if a later token than this completes it.
    """

    __slots__ = (
        "_held",
        "_include_stop",
        "_min_tokens",
        "_node",
        "_stream",
        "num_tokens",
        "stop_reason",
    )

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        skip_special_tokens: bool = True,
        prompt_token_ids: Sequence[int] = (),
        min_tokens: int = 0,
    ) -> None:
        self._stream = _make_stream(tokenizer, prompt_token_ids, skip_special_tokens)
        self._node = _make_automaton(tuple(stop)) if stop else None
        self._include_stop = include_stop
        self._min_tokens = min_tokens
        self._held = ""  # as long as the depth of the node: what may become a stop string
        self.num_tokens = 0
        """Tokens of the output so far."""
        self.stop_reason: str | None = None
        """The stop string that has ended the text."""

    def push(self, token_ids: Sequence[int]) -> Delta:
        """Add generated tokens; once a stop string has been seen, nothing is added any more.

        :return: the text that is certain now.  Held back are bytes that do not complete a character
            yet, and the longest end of the text that could still become a stop string.
        """
        stop = self.stop_reason
        if stop is not None:
            return Delta("", stop, 0)
        if self._node is None:
            self.num_tokens += len(token_ids)
            return Delta(self._stream.push(token_ids), None, len(token_ids))
        text, num_before = "", self.num_tokens
        for token_id in token_ids:
            self.num_tokens += 1
            text += self._match(self._stream.push((token_id,)), self._node)
            if self.stop_reason is not None:
                break
        return Delta(text, self.stop_reason, self.num_tokens - num_before)

    def finish(self) -> str:
        """Return what is still held back, because no more tokens come; call it last."""
        if self.stop_reason is not None:
            return ""
        text = self._stream.flush()
        if self._node is not None:
            text = self._match(text, self._node)
        text, self._held = text + self._held, ""
        return text

    def _match(self, new: str, node: _Node) -> str:
        """Move on by some text; return what is certain, up to the stop string if one is complete."""
        can_stop = self.num_tokens > self._min_tokens
        text = self._held + new
        for end, char in enumerate(new, len(self._held) + 1):
            node = node.step(char)
            if node.match and can_stop:
                self.stop_reason, self._held = node.match, ""
                return text[: end if self._include_stop else end - len(node.match)]
            while not node.children:  # matched too early, and no longer one begins like it
                node = node.fail
        self._node = node
        num_certain = len(text) - node.depth
        self._held = text[num_certain:]
        return text[:num_certain]


# --- stop strings ---------------------------------------------------------------------------------


class _Node:
    """A prefix of a stop string: the longest one that the text read so far ends with.

    The automaton of Aho and Corasick, "Efficient string matching" (1975).
    """

    __slots__ = ("children", "depth", "fail", "match")

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self.children: dict[str, _Node] = {}
        self.fail: _Node = self  # the next shorter such prefix; only the root is its own
        self.match = ""  # the longest stop string that ends here

    def step(self, char: str) -> _Node:
        """Return the node after one more character."""
        node = self
        while char not in node.children:
            if not node.depth:
                return node
            node = node.fail
        return node.children[char]


@functools.lru_cache(maxsize=16)  # the completions of one request share theirs
def _make_automaton(stops: tuple[str, ...]) -> _Node:
    root = _Node(0)
    for stop in stops:
        if not stop:
            raise InvalidRequestError("stop: a stop string must not be empty", field="stop")
        node = root
        for char in stop:
            node = node.children.setdefault(char, _Node(node.depth + 1))
        node.match = stop
    queue = deque([root])
    while queue:  # shorter prefixes first, so that every `fail` is ready when it is needed
        node = queue.popleft()
        for char, child in node.children.items():
            child.fail = node.fail.step(char) if node.depth else root
            child.match = child.match or child.fail.match
            queue.append(child)
    return root


# --- streams of text ------------------------------------------------------------------------------


class _Stream(Protocol):
    def push(self, token_ids: Sequence[int], /) -> str:
        """Return the whole characters that these tokens complete."""

    def flush(self) -> str:
        """Return what the text would end with if it ended now."""


def _make_stream(tokenizer: Tokenizer, prompt: Sequence[int], skip_special_tokens: bool) -> _Stream:
    pieces = tokenizer.pieces(skip_special_tokens)
    if pieces is None:
        return _WindowStream(tokenizer, prompt, skip_special_tokens)
    return _ByteStream(pieces, prompt)


class _ByteStream:
    """Text from the bytes of tokens."""

    __slots__ = ("_num_cut", "_num_lead_spaces", "_pending", "_pieces")

    def __init__(self, pieces: Pieces, prompt: Sequence[int]) -> None:
        self._pieces = pieces
        self._num_lead_spaces = _count_lead_spaces(pieces, prompt)
        self._pending = _cut_character(_last_bytes(pieces, prompt))
        # What the prompt shows for its cut character: two U+FFFD for half a surrogate, else one.
        self._num_cut = len(self._pending.decode("utf-8", "replace"))

    def push(self, token_ids: Sequence[int]) -> str:
        pieces = self._pieces
        if len(token_ids) == 1:  # the usual push, worth its own line
            data = self._pending + pieces[token_ids[0]]
        else:
            data = b"".join([self._pending, *[pieces[token_id] for token_id in token_ids]])
        if self._num_lead_spaces:
            data, self._num_lead_spaces = strip_lead(data, self._num_lead_spaces)
        text, num_used = utf_8_decode(data, "replace", False)
        self._pending = data[num_used:]
        return self._without_prompt(text) if self._num_cut else text

    def flush(self) -> str:
        text = self._pending.decode("utf-8", "replace")
        self._pending = b""
        return self._without_prompt(text) if self._num_cut else text

    def _without_prompt(self, text: str) -> str:
        """Drop the U+FFFD that the prompt ends with if the output does not complete the character."""
        rest = text.lstrip(REPLACEMENT)
        num_dropped = min(len(text) - len(rest), self._num_cut)
        self._num_cut = 0 if rest else self._num_cut - num_dropped
        return text[num_dropped:]


def _count_lead_spaces(pieces: Pieces, prompt: Iterable[int]) -> int:
    """Leading spaces that are still to be dropped after the prompt: usually it shows some text."""
    num_spaces = pieces.num_lead_spaces
    for token_id in prompt:
        if not num_spaces:
            break
        _, num_spaces = strip_lead(pieces[token_id], num_spaces)
    return num_spaces


def _last_bytes(pieces: Pieces, prompt: Sequence[int]) -> bytes:
    """Return at least the last three bytes of the prompt: as many as a cut character can have."""
    data = b""
    for token_id in reversed(prompt):
        data = pieces[token_id] + data
        if len(data) >= 3:
            break
    return data


def _cut_character(data: bytes) -> bytes:
    _, num_used = utf_8_decode(data, "replace", False)
    return data[num_used:]


class _WindowStream:
    """Text from differences of `decode` over the last few tokens, for tokenizers without a table.

    A token is decoded twice: when it is new, and as the context of the next ones.  Waits while the
    text ends in U+FFFD, but not longer than a character can take.
    """

    MAX_WAIT: Final = 8  # tokens

    __slots__ = ("_context", "_new", "_shown", "_skip_special_tokens", "_tokenizer")

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._context = self._find_context(prompt)
        self._new: list[int] = []
        self._shown = self._decode(self._context)

    def push(self, token_ids: Sequence[int]) -> str:
        return "".join([self._push(token_id) for token_id in token_ids])

    def _push(self, token_id: int) -> str:
        self._new.append(token_id)
        text = self._decode(self._context + self._new)
        if text == self._shown:
            self._new.clear()  # shows nothing here, so it is no context either
            return ""
        if text.endswith(REPLACEMENT) and len(self._new) < self.MAX_WAIT:
            return ""
        return self._advance(text)

    def flush(self) -> str:
        return self._advance(self._decode(self._context + self._new)) if self._new else ""

    def _advance(self, text: str) -> str:
        new = text[len(self._shown) :]
        self._context, self._new = self._new, []
        self._shown = self._decode(self._context)
        return new

    def _find_context(self, prompt: Sequence[int]) -> list[int]:
        """Return the last tokens of the prompt, enough of them to show some text if any does."""
        num_tokens = 4
        while num_tokens < len(prompt) and not self._decode(prompt[-num_tokens:]):
            num_tokens *= 2
        return list(prompt[-num_tokens:])

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(token_ids, self._skip_special_tokens)

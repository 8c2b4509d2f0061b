"""Text files -> samples: sequences of one length, for calibration and for measuring perplexity.

Samples follow one another in the text, so the same file gives the same samples on every machine.
Each begins with what the tokenizer puts before any text, such as `<s>`: models that were trained
with it compute something else without it.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NoReturn

import torch

from core.errors import ConfigError, RequestError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from core.tokenizer import Tokenizer

PIECE_CHARS: Final = 1 << 16
"""Characters that are tokenized at once, so that a file of any size can be read."""
JSON_LINES: Final = ".jsonl"


@dataclass(frozen=True, slots=True)
class Samples:
    """Sequences of token ids, all of the same length."""

    tokens: torch.Tensor
    """[N, L] int64."""
    num_lead: int
    """Tokens at the start of each sample that stand for no text."""

    @property
    def first_target(self) -> int:
        """The first position of a sample that something before it predicts."""
        return max(self.num_lead, 1)

    @property
    def num_targets(self) -> int:
        """Tokens that are predicted, over all samples."""
        count, length = self.tokens.shape
        return count * (length - self.first_target)


class SampleReader:
    """Cuts a text into samples, from its start on.

    :param file: `.jsonl` with an object per line that has `text` or `messages`; else plain text.
    :param length: tokens of a sample.
    :raises ConfigError: `length` leaves no room for text.
    """

    def __init__(self, file: Path, tokenizer: Tokenizer, length: int) -> None:
        self.file = file
        self._lead = _find_lead(tokenizer)
        self._length = length
        if length <= max(len(self._lead), 1):
            raise ConfigError(
                f"samples of {length} tokens hold nothing to predict, since {len(self._lead)} of them "
                f"come before the text; raise --sample-len"
            )
        self._tokens = itertools.chain.from_iterable(_encode(file, tokenizer))
        self._num_read = 0

    @property
    def first_target(self) -> int:
        """As that of the samples."""
        return max(len(self._lead), 1)

    def take(self, count: int) -> Samples:
        """Cut the next samples; fewer if the text ends.

        :raises ConfigError: the file cannot be read, or is not what its name says.
        """
        num_text = self._length - len(self._lead)
        flat = list(itertools.islice(self._tokens, count * num_text))
        self._num_read += len(flat)
        num_full = len(flat) // num_text
        text = torch.tensor(flat[: num_full * num_text], dtype=torch.int64).view(num_full, num_text)
        lead = torch.tensor(self._lead, dtype=torch.int64).expand(num_full, -1)
        return Samples(torch.cat((lead, text), dim=1), len(self._lead))

    def take_some(self, count: int) -> Samples:
        """Cut up to so many samples, but at least one.

        :raises ConfigError: the text is too short, or cannot be read.
        """
        samples = self.take(count)
        return samples if len(samples.tokens) else self._refuse(1)

    def take_all(self, count: int) -> Samples:
        """Cut so many samples.

        :raises ConfigError: the text is too short, or cannot be read.
        """
        samples = self.take(count)
        return samples if len(samples.tokens) == count else self._refuse(count)

    def _refuse(self, count: int) -> NoReturn:
        num_text = self._length - len(self._lead)
        raise ConfigError(
            f"{self.file} holds {self._num_read} tokens, but {count * num_text} are needed ({count} x "
            f"{num_text}); give a longer text, or lower --num-samples or --sample-len"
        )


def _find_lead(tokenizer: Tokenizer) -> list[int]:
    """Find what the tokenizer puts before a text."""
    text = "a"
    whole, plain = tokenizer.encode(text), tokenizer.encode(text, add_special_tokens=False)
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return whole[:start]
    return []


def _encode(file: Path, tokenizer: Tokenizer) -> Iterator[list[int]]:
    """Tokenize a file piece by piece; text that spells a special token stays text."""
    if file.suffix != JSON_LINES:
        for piece in _read_pieces(file):
            yield tokenizer.encode(piece, add_special_tokens=False, parse_special=False)
        return
    ends = list(tokenizer.eos_token_ids[:1])
    for number, document in _read_documents(file):
        try:
            if isinstance(document, str):
                yield tokenizer.encode(document, add_special_tokens=False, parse_special=False) + ends
            else:
                yield tokenizer.apply_chat_template(document, add_generation_prompt=False)
        except RequestError as error:
            raise ConfigError(f"{file}, line {number}: {error}") from error


def _read_pieces(file: Path) -> Iterator[str]:
    try:
        with file.open(encoding="utf-8") as lines:
            piece: list[str] = []
            size = 0
            for line in lines:
                piece.append(line)
                size += len(line)
                if size >= PIECE_CHARS:
                    yield "".join(piece)
                    piece, size = [], 0
            yield "".join(piece)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: cannot be read as text: {error}") from error


def _read_documents(file: Path) -> Iterator[tuple[int, Any]]:
    """Read JSON lines: the number of each, and its text or its messages."""
    try:
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield number, _document_of(json.loads(line), f"{file}, line {number}")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: cannot be read as JSON lines: {error}") from error


def _document_of(value: Any, where: str) -> Any:
    if isinstance(value, dict):
        if isinstance(value.get("text"), str):
            return value["text"]
        if isinstance(value.get("messages"), list):
            return value["messages"]
    raise ConfigError(f"{where}: needs an object with `text` or `messages`")

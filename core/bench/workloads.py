"""Requests and arrival times that are the same wherever they are made.

`uniform`, `seed_mix` and `poisson_arrivals` are fixed for good: figures that were measured with them, by
any engine, can be compared.  They draw from Python's own generator, whose sequences do not change.
"""

from __future__ import annotations

import itertools
import json
import math
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

from core.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    CountTokens = Callable[[str], int]

DatasetName = Literal["random", "seed-mix", "custom"]

VOCAB_SIZE: Final = 32000
"""Token ids are below this, so that nearly every model knows them."""
FIRST_TOKEN: Final = 5
"""The lowest id that is drawn: those below are special tokens of many models."""
ARRIVAL_SEED: Final = 11
OUTPUT_KEYS: Final = ("output_tokens", "output_len", "max_tokens")
"""Where a line of a file may say how many tokens its answer has."""


@dataclass(frozen=True, slots=True)
class BenchRequest:
    """One request: a prompt, and how many tokens to generate for it."""

    prompt: str | list[int]
    """Token ids, or text where a file holds text."""
    output_len: int


def uniform(
    num_prompts: int, input_len: int, output_len: int, *, vocab_size: int = VOCAB_SIZE, seed: int = 0
) -> list[BenchRequest]:
    """Make requests of one size, with random token ids."""
    rng = _uniform_rng(num_prompts, input_len, seed)
    return [BenchRequest(_draw(rng, input_len, vocab_size), output_len) for _ in range(num_prompts)]


def spread(
    num_prompts: int,
    input_len: int,
    output_len: int,
    ratio: float,
    *,
    vocab_size: int = VOCAB_SIZE,
    seed: int = 0,
) -> list[BenchRequest]:
    """Make requests whose lengths are uniform within `ratio` of the given ones.

    :param ratio: 0 gives what `uniform` gives, 0.5 lengths from half to one and a half of the given ones.
    :raises ConfigError: the ratio is not in [0, 1).
    """
    if not 0 <= ratio < 1:
        raise ConfigError(f"--random-range-ratio {ratio:g} must be at least 0 and less than 1")
    if ratio == 0:
        return uniform(num_prompts, input_len, output_len, vocab_size=vocab_size, seed=seed)
    rng = _uniform_rng(num_prompts, input_len, seed)
    requests = []
    for _ in range(num_prompts):
        num_input, num_output = (_vary(rng, length, ratio) for length in (input_len, output_len))
        requests.append(BenchRequest(_draw(rng, num_input, vocab_size), num_output))
    return requests


def seed_mix(num_prompts: int, *, vocab_size: int = VOCAB_SIZE, seed: int = 7) -> list[BenchRequest]:
    """Make requests of 100 to 2048 tokens, uniform, with answers of 50 to 500 tokens, exponential."""
    rng = random.Random(seed)
    requests = []
    for _ in range(num_prompts):
        input_len = rng.randint(100, 2048)
        output_len = min(500, 50 + int(rng.expovariate(1 / 150.0)))
        requests.append(BenchRequest(_draw(rng, input_len, vocab_size), output_len))
    return requests


def shift(requests: Iterable[BenchRequest], step: int, vocab_size: int) -> list[BenchRequest]:
    """Make requests of the same lengths with other token ids, which no cache of prefixes knows yet.

    :param step: how far each id moves within the vocabulary; text stays as it is.
    """
    size = vocab_size - FIRST_TOKEN

    def move(token: int) -> int:
        return FIRST_TOKEN + (token - FIRST_TOKEN + step) % size

    return [
        request
        if isinstance(request.prompt, str)
        else BenchRequest([move(token) for token in request.prompt], request.output_len)
        for request in requests
    ]


def poisson_arrivals(count: int, rate: float, *, seed: int = ARRIVAL_SEED) -> list[float]:
    """Draw arrival times of a Poisson process, in seconds, the first one after 0.

    :param rate: arrivals per second.
    """
    rng = random.Random(seed)
    return list(itertools.accumulate(rng.expovariate(rate) for _ in range(count)))


def arrivals(
    count: int, rate: float, *, burstiness: float = 1.0, seed: int = ARRIVAL_SEED
) -> list[float]:
    """Draw arrival times, in seconds.

    :param rate: arrivals per second; infinite: all at once.
    :param burstiness: shape of the gamma distribution of the time between two: 1 is a Poisson process,
        less comes in bursts, more is even.
    :raises ConfigError: one of them is not positive.
    """
    for name, value in (("request-rate", rate), ("burstiness", burstiness)):
        if not value > 0:
            raise ConfigError(f"--{name} {value:g} must be positive")
    if math.isinf(rate):
        return [0.0] * count
    if burstiness == 1:
        return poisson_arrivals(count, rate, seed=seed)
    rng = random.Random(seed)
    scale = 1 / (rate * burstiness)
    return list(itertools.accumulate(rng.gammavariate(burstiness, scale) for _ in range(count)))


def _uniform_rng(num_prompts: int, input_len: int, seed: int) -> random.Random:
    return random.Random(seed * 1000003 + num_prompts * 131 + input_len)


def _draw(rng: random.Random, count: int, vocab_size: int) -> list[int]:
    return [rng.randrange(FIRST_TOKEN, vocab_size) for _ in range(count)]


def _vary(rng: random.Random, length: int, ratio: float) -> int:
    return max(1, rng.randint(math.ceil(length * (1 - ratio)), math.floor(length * (1 + ratio))))


# --- data sets -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """Where the requests of a measurement come from."""

    name: DatasetName = "random"
    num_prompts: int
    input_len: int = 1024
    """Of `random`."""
    output_len: int | None = None
    """Of `random`, 128 if unset; of `custom` for lines that state none."""
    range_ratio: float = 0.0
    seed: int | None = None
    """Unset: the one that the data set has had from the beginning."""
    path: Path | None = None
    """Of `custom`: a file with one JSON object a line."""
    vocab_size: int = VOCAB_SIZE

    def requests(self, count_tokens: CountTokens | None = None) -> list[BenchRequest]:
        """Make the requests.

        :param count_tokens: measures answers in a file of conversations.
        :raises ConfigError: the settings or the file cannot be used.
        """
        if self.num_prompts < 1:
            raise ConfigError(f"--num-prompts {self.num_prompts} must be at least 1")
        if self.name == "custom":
            return self._read(count_tokens)
        if self.vocab_size <= FIRST_TOKEN:
            raise ConfigError(f"a vocabulary of {self.vocab_size} leaves no token ids to draw")
        if self.name == "seed-mix":
            seed = 7 if self.seed is None else self.seed
            return seed_mix(self.num_prompts, vocab_size=self.vocab_size, seed=seed)
        output_len = 128 if self.output_len is None else self.output_len
        for name, length in (("input-len", self.input_len), ("output-len", output_len)):
            if length < 1:
                raise ConfigError(f"--{name} {length} must be at least 1")
        return spread(
            self.num_prompts,
            self.input_len,
            output_len,
            self.range_ratio,
            vocab_size=self.vocab_size,
            seed=self.seed or 0,
        )

    def _read(self, count_tokens: CountTokens | None) -> list[BenchRequest]:
        """Read as many lines as there are to be prompts, from the beginning again where they end."""
        if self.path is None:
            raise ConfigError("--dataset-name custom needs --dataset-path, a file of JSON lines")
        try:
            lines = self.path.read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise ConfigError(f"--dataset-path {self.path} cannot be read: {error}") from error
        numbered = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
        if not numbered:
            raise ConfigError(f"--dataset-path {self.path} has no lines")
        wanted = numbered[: self.num_prompts]
        requests = [self._parse(number, line, count_tokens) for number, line in wanted]
        return list(itertools.islice(itertools.cycle(requests), self.num_prompts))

    def _parse(self, number: int, line: str, count_tokens: CountTokens | None) -> BenchRequest:
        place = f"--dataset-path {self.path} line {number}"
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{place} is not JSON: {error}") from error
        if not isinstance(record, dict):
            raise ConfigError(f"{place} must be an object, but is {type(record).__name__}")
        prompt, answer = _prompt_and_answer(record)
        if not _is_prompt(prompt):
            raise ConfigError(f"{place} needs a prompt of text or token ids, or conversations")
        stated = next((record[key] for key in OUTPUT_KEYS if key in record), None)
        length = self.output_len if stated is None else stated
        if length is None and answer is not None and count_tokens is not None:
            length = max(1, count_tokens(answer))
        if not isinstance(length, int) or length < 1:
            raise ConfigError(
                f"{place} does not say how long the answer is: it needs output_tokens, or --output-len"
            )
        return BenchRequest(prompt, length)


def _is_prompt(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and all(isinstance(item, int) and item >= 0 for item in value)
    return isinstance(value, str) and bool(value)


def _prompt_and_answer(record: dict[str, Any]) -> tuple[Any, str | None]:
    """Find the prompt, and the text of the answer where the record is a conversation."""
    for key in ("prompt_token_ids", "prompt"):
        if key in record:
            return record[key], None
    texts = list(_texts(record.get("conversations") or record.get("messages") or ()))
    return (texts[0] if texts else None), (texts[1] if len(texts) > 1 else None)


def _texts(turns: Any) -> Iterator[str]:
    for turn in turns if isinstance(turns, list) else ():
        text = turn.get("value", turn.get("content")) if isinstance(turn, dict) else None
        if isinstance(text, str):
            yield text

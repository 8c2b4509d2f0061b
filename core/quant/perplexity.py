"""Perplexity of a text, measured by an engine: exp of the mean of -log p over the tokens it predicts."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from core.errors import ConfigError
from core.quant.samples import SampleReader
from core.request import SamplingParams

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from core.llm import LLM
    from core.outputs import Logprob

SAMPLES_AT_ONCE: Final = 64
"""So that the records of a long text are not all in memory."""


@dataclass(slots=True)
class Score:
    """How well a text was predicted."""

    num_tokens: int = 0
    """That were predicted."""
    loss: float = 0.0
    """Sum of -log p over them, in nats."""
    best: list[int] = field(default_factory=list)
    """The likeliest token at the place of each."""

    @property
    def perplexity(self) -> float:
        """Compute it."""
        return math.exp(self.loss / self.num_tokens)

    def agreement(self, other: Score) -> float:
        """Share of places at which another model holds the same token for the likeliest."""
        pairs = zip(self.best, other.best, strict=True)
        return sum(mine == theirs for mine, theirs in pairs) / self.num_tokens


def measure(llm: LLM, text: Path, *, sample_len: int, num_samples: int | None = None) -> Score:
    """Measure how well an engine predicts a text.

    The text is cut into samples, each predicted on its own: a token is seen by those after it in its
    sample and by no others.  What is left at the end, less than a sample, is not used.

    :param text: as `SampleReader` reads it.
    :param sample_len: tokens of a sample.
    :param num_samples: at most so many; `None` takes the whole text.
    :raises ConfigError: the text is shorter than a sample, or the model has no tokenizer.
    :raises RequestError: the engine refuses samples of that length.
    """
    tokenizer = llm.get_tokenizer()
    if tokenizer is None:
        raise ConfigError(f"{llm.assembly.plan.model_path} has no tokenizer, so no text can be read")
    reader = SampleReader(text, tokenizer, sample_len)
    score = Score()
    for samples in _batches(reader, num_samples):
        params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=1)
        for output in llm.generate(samples, params, use_tqdm=False):
            if output.error:
                raise ConfigError(f"{text}: {output.error}")
            _add(score, output.prompt_token_ids, output.prompt_logprobs or [], reader.first_target)
    return score


def _batches(reader: SampleReader, num_samples: int | None) -> Iterator[list[list[int]]]:
    """Cut the text, some samples at a time.

    :raises ConfigError: there is not one sample in it.
    """
    num_taken = 0
    while num_samples is None or num_taken < num_samples:
        wanted = (
            SAMPLES_AT_ONCE if num_samples is None else min(SAMPLES_AT_ONCE, num_samples - num_taken)
        )
        samples = reader.take(wanted) if num_taken else reader.take_some(wanted)
        if not len(samples.tokens):
            return
        num_taken += len(samples.tokens)
        yield samples.tokens.tolist()


def _add(
    score: Score,
    token_ids: list[int],
    records: list[dict[int, Logprob] | None],
    first: int,
) -> None:
    for token_id, record in zip(token_ids[first:], records[first:], strict=True):
        if record is None:
            raise TypeError("the engine returned no log-probabilities of the prompt")
        score.num_tokens += 1
        score.loss -= record[token_id].logprob
        score.best.append(next(token for token, entry in record.items() if entry.rank == 1))

"""Requests to try a sampler on, and what may be drawn for them, computed slowly in float64."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from hypothesis import strategies as st

from core.request import MAX_SEED, SamplingParams
from core.step import RowEntry

if TYPE_CHECKING:
    from collections.abc import Sequence

MARGIN: Final = 1e-4
"""Relative, of what float32 may round across a threshold."""


@dataclass(frozen=True, slots=True)
class SamplerCase:
    """One request, with the logits that its model would give step by step."""

    params: SamplingParams
    logits: list[list[float]]
    """[steps][vocabulary]."""
    prompt: list[int] = field(default_factory=lambda: [0])
    seed: int = 0
    stop_ids: list[int] = field(default_factory=list)

    @property
    def vocab_size(self) -> int:
        """Of the model."""
        return len(self.logits[0])

    def entry(self, row: int, outputs: Sequence[int] = ()) -> RowEntry:
        """Describe the request as it enters a row.

        :param outputs: what was drawn for it already, before it was preempted.
        """
        tokens = [*self.prompt, *outputs]
        return RowEntry(row, f"r{row}", tokens, len(self.prompt), self.params, self.seed, self.stop_ids)


def shape_logits(case: SamplerCase, outputs: Sequence[int]) -> list[float]:
    """Apply everything that comes before the temperature, as its definition says.

    :param outputs: tokens that were drawn before this step.
    """
    params = case.params
    logits = []
    for token, raw in enumerate(case.logits[len(outputs)]):
        logit = raw + (params.logit_bias or {}).get(token, 0.0)
        if params.allowed_token_ids is not None and token not in params.allowed_token_ids:
            logit = -math.inf
        if token in (params.banned_token_ids or ()):
            logit = -math.inf
        if len(outputs) < params.min_tokens and token in case.stop_ids:
            logit = -math.inf
        if token in case.prompt or token in outputs:
            penalty = params.repetition_penalty
            logit = logit / penalty if logit > 0 else logit * penalty
        logit -= params.frequency_penalty * outputs.count(token)
        logit -= params.presence_penalty * (token in outputs)
        logits.append(logit)
    return logits


def find_weights(logits: Sequence[float], params: SamplingParams) -> dict[int, float]:
    """Find the unnormalized probabilities of what min-p, top-k and top-p leave.

    Equals that a threshold falls between are all left, as is what rounding may bring over it.

    :param logits: as `shape_logits` returns them, at least one of them finite.
    """
    best = max(logits)
    weights = {
        token: math.exp((logit - best) / params.temperature) for token, logit in enumerate(logits)
    }
    weights = {token: w for token, w in weights.items() if w and w >= params.min_p * (1 - MARGIN)}
    if 0 < params.top_k < len(weights):
        last = sorted(weights.values(), reverse=True)[params.top_k - 1]
        weights = {token: w for token, w in weights.items() if w >= last * (1 - MARGIN)}
    if params.top_p < 1.0:
        target = (params.top_p + MARGIN) * sum(weights.values())
        weights = {
            token: w
            for token, w in weights.items()
            if sum(other for other in weights.values() if other > w * (1 + MARGIN)) < target
        }
    return weights


def find_tokens(case: SamplerCase, outputs: Sequence[int]) -> set[int] | None:
    """List the tokens that may be drawn next; `None` where there is nothing to draw from."""
    logits = shape_logits(case, outputs)
    best = max(logits)
    if not math.isfinite(best):
        return None
    if case.params.is_greedy:
        slack = MARGIN * (1 + abs(best))
        return {token for token, logit in enumerate(logits) if logit >= best - slack}
    return set(find_weights(logits, case.params))


# --- generation --------------------------------------------------------------------------------------


def sampler_cases(vocab_size: int, num_steps: int) -> st.SearchStrategy[SamplerCase]:
    """Generate requests, each parameter neutral about half of the time."""
    return st.builds(
        SamplerCase,
        params=_params(vocab_size),
        logits=_logits(vocab_size, num_steps),
        prompt=st.lists(st.integers(0, vocab_size - 1), min_size=1, max_size=6),
        seed=st.integers(0, MAX_SEED) | st.sampled_from([0, MAX_SEED]),
        stop_ids=_ids(vocab_size, max_size=3),
    )


def sampler_batches(max_cases: int = 5, num_steps: int = 3) -> st.SearchStrategy[list[SamplerCase]]:
    """Generate requests that share steps."""
    return st.integers(2, 19).flatmap(
        lambda size: st.lists(sampler_cases(size, num_steps), min_size=1, max_size=max_cases)
    )


@st.composite
def _params(draw: st.DrawFn, vocab_size: int) -> SamplingParams:
    """Draw parameters; biases and penalties are dyadic, so that most logits are exact in float32."""
    quarters = st.integers(-8, 8).map(lambda number: number / 4)
    some = _ids(vocab_size, max_size=vocab_size - 1)
    return SamplingParams(
        temperature=draw(st.sampled_from([0.0, 1.0, 1.0]) | st.floats(0.05, 4.0)),
        top_k=draw(st.sampled_from([0, -1, 1, 10**6]) | st.integers(1, vocab_size)),
        top_p=draw(st.just(1.0) | st.floats(0.01, 1.0)),
        min_p=draw(st.just(0.0) | st.floats(0.0, 1.0)),
        presence_penalty=draw(st.just(0.0) | quarters),
        frequency_penalty=draw(st.just(0.0) | quarters),
        repetition_penalty=draw(st.sampled_from([1.0, 1.0, 0.5, 2.0, 4.0])),
        logit_bias=draw(
            st.none() | st.dictionaries(st.integers(0, vocab_size - 1), quarters, max_size=4)
        ),
        allowed_token_ids=draw(st.none() | _ids(vocab_size, min_size=1)),
        banned_token_ids=draw(st.none() | some),
        min_tokens=draw(st.integers(0, 3)),
        logprobs=draw(st.none() | st.integers(0, vocab_size)),
    )


@st.composite
def _logits(draw: st.DrawFn, vocab_size: int, num_steps: int) -> list[list[float]]:
    """Draw multiples of 1/64 with ties, and some -inf; from bytes, because those are drawn fast.

    They are as close together as penalties are large, so that a penalty that is forgotten shows.
    """
    size = vocab_size * num_steps
    numbers = iter(draw(st.binary(min_size=size, max_size=size)))
    return [
        [(byte - 128) / 64 if byte else -math.inf for byte in itertools.islice(numbers, vocab_size)]
        for _ in range(num_steps)
    ]


def _ids(vocab_size: int, **limits: Any) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, vocab_size - 1), unique=True, **limits)

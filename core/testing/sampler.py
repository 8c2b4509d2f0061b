"""Conformance of samplers: what every `core.interfaces.Sampler` must do.

Subclass `SamplerConformance` in a test module and give it the descriptor::

    class TestAcmeSampler(SamplerConformance):
        entry = acme_sampler.ENTRY

Which token a seed leads to is the sampler's own affair.  That it is one that may be drawn, as often as
its probability says and whatever shares the step, is not: tokens are compared with definitions in
float64, frequencies with a chi-squared test on fixed seeds, and requests alone with requests together.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Final

import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from core.interfaces import Sampler, SupportsSamplerCapture, missing_members
from core.request import SamplingParams
from core.sampling import Sampled, SampleRows
from core.step import BAD_LOGITS
from core.testing.sampling_cases import (
    SamplerCase,
    find_tokens,
    find_weights,
    sampler_batches,
    shape_logits,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from core.registry import SamplerEntry

MAX_LEN: Final = 4096
EVERYTHING: Final[dict[str, Any]] = {
    "temperature": 0.8,
    "top_k": 5,
    "top_p": 0.9,
    "min_p": 0.01,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.25,
    "repetition_penalty": 2.0,
    "logit_bias": {0: 1.5},
    "banned_token_ids": [1],
    "allowed_token_ids": [0, 1, 2, 3, 4, 5, 6],
    "min_tokens": 2,
    "logprobs": 2,
}
"""Parameters that ask for all that a sampler can do."""
DISTRIBUTIONS: Final[dict[str, dict[str, Any]]] = {
    "temperature 1": {},
    "temperature 0.5": {"temperature": 0.5},
    "temperature 2": {"temperature": 2.0},
    "top_k": {"top_k": 3},
    "top_p": {"top_p": 0.6},
    "min_p": {"min_p": 0.2},
    "bias and bans": {"logit_bias": {2: 1.0}, "banned_token_ids": [4]},
    "repetition": {"repetition_penalty": 1.7},
    "presence": {"presence_penalty": 0.8},
    "frequency": {"frequency_penalty": 0.6},
    "everything": EVERYTHING,
}
LOGITS: Final = [0.3, -0.4, 1.1, 0.9, 1.6, -1.2, 0.05, 2.0]
"""One step of a vocabulary of eight; no two are equal."""
PROMPT: Final = [0, 3, 3]
OUTPUTS: Final = [2, 5, 2]
"""What had been drawn already where frequencies are counted; penalties tell it from the prompt."""


class SamplerConformance:
    """The tests; subclass it and set `entry`, or override `make_sampler`."""

    entry: ClassVar[SamplerEntry | None] = None
    plan: ClassVar[Any] = None
    """Passed to the entry's factory."""
    device: ClassVar[str] = "cpu"
    dtypes: ClassVar[tuple[str, ...]] = ("float32", "float64", "bfloat16", "float16")
    """Of logits."""
    num_draws: ClassVar[int] = 4000
    """For each distribution."""
    settings: ClassVar[hypothesis_settings] = hypothesis_settings(
        max_examples=40, deadline=None, suppress_health_check=list(HealthCheck)
    )

    # --- what subclasses may change ----------------------------------------------------------------

    def make_sampler(self) -> Sampler:
        """Build a sampler that has no state yet."""
        if self.entry is None:
            raise NotImplementedError(f"{type(self).__name__} sets no entry and no make_sampler")
        sampler: Sampler = self.entry.factory(self.plan)
        return sampler

    # --- machinery -----------------------------------------------------------------------------------

    def allocate(self, max_rows: int, vocab_size: int, sampler: Sampler | None = None) -> Sampler:
        """Give a sampler, or a new one, its state."""
        sampler = sampler or self.make_sampler()
        sampler.allocate(max_rows, vocab_size, MAX_LEN, torch.device(self.device))
        return sampler

    def sample(
        self,
        sampler: Sampler,
        logits: Sequence[Sequence[float]] | torch.Tensor,
        rows: Sequence[int],
        positions: Sequence[int],
    ) -> Sampled:
        """Draw a token for each of some rows."""
        logits = torch.as_tensor(logits)
        logits = (logits if logits.dtype != torch.float64 else logits.float()).to(self.device)
        numbers = torch.tensor([list(rows), list(positions)], dtype=torch.int64, device=self.device)
        return sampler.sample(logits, SampleRows(numbers[0], numbers[1], list(rows)))

    def generate(
        self,
        cases: Sequence[SamplerCase],
        *,
        sampler: Sampler | None = None,
        rows: Sequence[int] | None = None,
        outputs: Sequence[Sequence[int]] | None = None,
    ) -> list[list[int]]:
        """Let requests share steps until each has a token of every step.

        :param sampler: with state; by default a new one.
        :param rows: of each request.
        :param outputs: what was drawn already, as many for each request.
        :return: what was drawn in all.
        """
        rows = list(range(len(cases))) if rows is None else rows
        sampler = sampler or self.allocate(max(rows) + 1, cases[0].vocab_size)
        drawn = [list(tokens) for tokens in outputs or [[] for _ in cases]]
        for row, case, tokens in zip(rows, cases, drawn, strict=True):
            sampler.add(case.entry(row, tokens))
        for step in range(len(drawn[0]), len(cases[0].logits)):
            logits = [case.logits[step] for case in cases]
            positions = [len(case.prompt) + step for case in cases]
            tokens_of_step = self.sample(sampler, logits, rows, positions).tokens.tolist()
            for tokens, token in zip(drawn, tokens_of_step, strict=True):
                tokens.append(token)
        return drawn

    def check(self, law: Callable[[list[SamplerCase]], None]) -> None:
        """Try a law on generated requests."""

        @self.settings
        @given(cases=sampler_batches())
        def attempt(cases: list[SamplerCase]) -> None:
            law(cases)

        attempt()

    def _draw_often(self, params: SamplingParams) -> list[list[int]]:
        """Draw for many seeds at several positions each, always under `LOGITS`.

        :return: for each seed its tokens.
        """
        num_steps = 8
        num_rows = self.num_draws // num_steps
        cases = [SamplerCase(params, [LOGITS], PROMPT, 7919 * index) for index in range(num_rows)]
        sampler = self.allocate(num_rows, len(LOGITS))
        tokens = []
        for step in range(num_steps):
            for row, case in enumerate(cases):  # anew, so that penalties stay what they are
                sampler.add(case.entry(row, OUTPUTS))
            rows = list(range(num_rows))
            positions = [len(PROMPT) + len(OUTPUTS) + step * 5] * num_rows
            tokens.append(self.sample(sampler, [LOGITS] * num_rows, rows, positions).tokens.tolist())
        return [list(row) for row in zip(*tokens, strict=True)]

    # --- the laws ----------------------------------------------------------------------------------

    def test_fulfils_the_protocol(self) -> None:
        """The executor calls what the Protocol names, as the Protocol says."""
        problems = missing_members(self.make_sampler(), Sampler)
        assert not problems, "; ".join(problems)

    def test_keys_of_captures_need_no_state(self) -> None:
        """They are asked for before `allocate`."""
        sampler = self.make_sampler()
        if isinstance(sampler, SupportsSamplerCapture):
            assert len(set(sampler.capture_keys())) == len(sampler.capture_keys())

    def test_tokens_are_those_that_may_be_drawn(self) -> None:
        """Greedy rows take a likeliest token, others one that is left; penalties count what was drawn.

        If this fails, look at the order of the stages in `core.sampling` first.
        """

        def law(cases: list[SamplerCase]) -> None:
            for case, tokens in zip(cases, self.generate(cases), strict=True):
                for step, token in enumerate(tokens):
                    allowed = find_tokens(case, tokens[:step])
                    wanted = "BAD_LOGITS" if allowed is None else f"one of {sorted(allowed)}"
                    assert token in ({BAD_LOGITS} if allowed is None else allowed), (
                        f"token {token} after {tokens[:step]}, not {wanted}, with {case.params}"
                    )
                    if allowed is None:
                        break

        self.check(law)

    def test_tokens_do_not_depend_on_the_batch(self) -> None:
        """Alone, together, in other rows and in another order: the tokens are the same ones."""

        def law(cases: list[SamplerCase]) -> None:
            together = self.generate(cases)
            rows = [2 * len(cases) - 2 * index for index in range(len(cases))]
            moved = self.generate(cases[::-1], rows=rows)[::-1]
            for case, tokens, others in zip(cases, together, moved, strict=True):
                (alone,) = self.generate([case])
                assert tokens == alone, f"{tokens} among others, {alone} alone, with {case.params}"
                assert tokens == others, f"{others} in another row, not {tokens}, with {case.params}"

        self.check(law)

    def test_preempted_requests_go_on(self) -> None:
        """A request that enters a row with what it has drawn goes on as if it had stayed."""

        def law(cases: list[SamplerCase]) -> None:
            whole = self.generate(cases)
            if any(BAD_LOGITS in tokens for tokens in whole):
                return  # such requests end
            for num_drawn in (1, 2):
                again = self.generate(cases, outputs=[tokens[:num_drawn] for tokens in whole])
                assert again == whole, f"{again} after a preemption at {num_drawn}, not {whole}"

        self.check(law)

    def test_rows_forget_who_was_there_before(self) -> None:
        """A request in a used row, and in state that was allocated anew, draws what it always draws."""

        def law(cases: list[SamplerCase]) -> None:
            size = cases[0].vocab_size
            before = [
                replace(case, params=SamplingParams(**_fitting(size)), stop_ids=[0]) for case in cases
            ]
            expected = self.generate(cases)
            sampler = self.allocate(len(cases), size)
            self.generate(before, sampler=sampler)
            used = self.generate(cases, sampler=sampler)
            assert used == expected, f"{used} in rows that others had used, not {expected}"
            self.allocate(len(cases), size, sampler)
            anew = self.generate(cases, sampler=sampler)
            assert anew == expected, f"{anew} in state that was allocated anew, not {expected}"

        self.check(law)

    @pytest.mark.parametrize("name", DISTRIBUTIONS)
    def test_frequencies_are_the_probabilities(self, name: str) -> None:
        """Over many seeds and positions."""
        params = SamplingParams(**DISTRIBUTIONS[name])
        counts = Counter(token for row in self._draw_often(params) for token in row)
        case = SamplerCase(params, [LOGITS] * (len(OUTPUTS) + 1), PROMPT)
        weights = find_weights(shape_logits(case, OUTPUTS), params)
        problem = compare_frequencies(counts, weights)
        assert problem is None, f"{name}: {problem}"

    def test_draws_do_not_repeat(self) -> None:
        """From position to position, and from seed to seed, draws have nothing to do with each other."""
        rows = self._draw_often(SamplingParams())
        probabilities = torch.tensor(LOGITS).double().softmax(0)
        chance = float(probabilities.pow(2).sum())
        columns = list(zip(*rows, strict=True))
        for what, pairs in (
            ("positions", [pair for row in rows for pair in itertools.pairwise(row)]),
            ("seeds", [pair for column in columns for pair in itertools.pairwise(column)]),
        ):
            share = sum(first == second for first, second in pairs) / len(pairs)
            slack = 6 * math.sqrt(chance / len(pairs))
            assert abs(share - chance) < slack, (
                f"neighbouring {what} draw the same token in {share:.3f} of all cases, by chance it "
                f"would be {chance:.3f}"
            )

    @pytest.mark.parametrize("params", [{}, {"temperature": 0.0}, EVERYTHING])
    @pytest.mark.parametrize("poison", [math.nan, math.inf])
    def test_bad_logits_are_reported(self, poison: float, params: dict[str, Any]) -> None:
        """A NaN or an infinity anywhere spoils its row, and no other."""
        cases = [SamplerCase(SamplingParams(**params), [LOGITS], seed=seed) for seed in range(3)]
        expected = self.generate(cases)
        spoiled = [*LOGITS]
        spoiled[3] = poison
        (first,), (bad,), (last,) = self.generate(
            [cases[0], replace(cases[1], logits=[spoiled]), cases[2]]
        )
        assert bad == BAD_LOGITS, f"{bad} is drawn from logits with {poison}"
        assert [[first], [last]] == [expected[0], expected[2]], "a bad row changes what others draw"

    def test_nothing_to_draw_from_is_reported(self) -> None:
        """All tokens banned, or all logits -inf."""
        banned, nothing = list(range(len(LOGITS))), [[-math.inf] * len(LOGITS)]
        for temperature in (1.0, 0.0):
            params = SamplingParams(temperature=temperature, banned_token_ids=banned)
            (tokens,) = self.generate([SamplerCase(params, [LOGITS])])
            assert tokens == [BAD_LOGITS], f"{tokens} is drawn though every token is banned"
        (tokens,) = self.generate([SamplerCase(SamplingParams(), nothing)])
        assert tokens == [BAD_LOGITS], f"{tokens} is drawn though every logit is -inf"

    @pytest.mark.parametrize("params", [{}, {"temperature": 0.0}, EVERYTHING])
    def test_logits_stay_as_they_are(self, params: dict[str, Any]) -> None:
        """In every dtype that a model may have; tokens are int64."""
        for name in self.dtypes:
            sampler = self.allocate(2, len(LOGITS))
            for row in range(2):
                sampler.add(SamplerCase(SamplingParams(**params), [LOGITS], stop_ids=[2]).entry(row))
            logits = torch.tensor([LOGITS, LOGITS[::-1]], dtype=getattr(torch, name)).to(self.device)
            before = logits.clone()
            numbers = torch.tensor([[0, 1], [1, 1]], device=self.device)
            tokens = sampler.sample(logits, SampleRows(numbers[0], numbers[1], [0, 1])).tokens
            assert torch.equal(logits, before), f"sample writes into logits of {name}"
            assert tokens.dtype == torch.int64, f"tokens are {tokens.dtype}"
            assert tuple(tokens.shape) == (2,), f"tokens are {tuple(tokens.shape)}, not (2,)"

    def test_logprobs_are_those_of_the_raw_logits(self) -> None:
        """Whatever penalties, bans and temperature say; as many as the most demanding row wants."""
        self.check(self._check_logprobs)

    def test_equal_logits_share_the_better_rank(self) -> None:
        """And the lower id comes first among the alternatives."""
        params = SamplingParams(temperature=0.0, logprobs=3)
        self._check_logprobs([SamplerCase(params, [[0.5, 2.0, 1.0, 2.0]])])

    def _check_logprobs(self, cases: list[SamplerCase]) -> None:
        rows = list(range(len(cases)))
        sampler = self.allocate(len(cases), cases[0].vocab_size)
        for row, case in enumerate(cases):
            sampler.add(case.entry(row))
        logits = [case.logits[0] for case in cases]
        sampled = self.sample(sampler, logits, rows, [len(case.prompt) for case in cases])
        wanted = [case.params.logprobs for case in cases if case.params.logprobs is not None]
        if not wanted:
            assert sampled.logprobs is None, "log-probabilities that nobody asked for"
            return
        assert sampled.logprobs is not None, "log-probabilities are missing"
        problem = compare_logprobs(sampled, torch.tensor(logits), max(wanted))
        assert problem is None, problem

    def test_memory_is_stated(self) -> None:
        """More rows and more tokens take no less."""
        device = torch.device(self.device)
        sizes = [
            self.make_sampler().memory_bytes(rows, vocab, device)
            for rows, vocab in ((1, 8), (16, 8), (16, 50_000), (256, 50_000))
        ]
        assert all(isinstance(size, int) and size > 0 for size in sizes), f"{sizes} bytes"
        assert sizes == sorted(sizes), f"{sizes} bytes with ever more rows and tokens"

    def test_seeds_of_any_size_are_fine(self) -> None:
        """From 0 to the greatest that a request may have."""

        @self.settings
        @given(seed=st.sampled_from([0, 1, 2**31, 2**32, 2**53 + 1, 2**63 - 1]))
        def attempt(seed: int) -> None:
            (tokens,) = self.generate([SamplerCase(SamplingParams(), [LOGITS], seed=seed)])
            assert 0 <= tokens[0] < len(LOGITS), f"token {tokens[0]} with seed {seed}"

        attempt()


# --- judging ---------------------------------------------------------------------------------------


def compare_frequencies(counts: Counter[int], weights: dict[int, float]) -> str | None:
    """Say what is wrong with how often tokens were drawn, by Pearson's chi-squared test.

    The limit is passed by chance less than once in a hundred million times.

    :param weights: unnormalized probabilities of all that may be drawn.
    """
    strangers = sorted(counts.keys() - weights.keys())
    if strangers:
        return f"tokens {strangers} are drawn, which may not be"
    num_draws, total = sum(counts.values()), sum(weights.values())
    expected = {token: num_draws * weight / total for token, weight in weights.items()}
    off = sum((counts[token] - n) ** 2 / n for token, n in expected.items())
    freedom = len(weights) - 1
    if off > freedom + 8 * math.sqrt(2 * freedom) + 20:
        told = ", ".join(f"{token}: {counts[token]} of {n:.0f}" for token, n in expected.items())
        return f"chi-squared is {off:.0f} with {freedom} degrees of freedom; drawn and expected: {told}"
    return None


def compare_logprobs(sampled: Sampled, logits: torch.Tensor, num_top: int) -> str | None:
    """Say what is wrong with a report on log-probabilities.

    :param logits: [N, V] raw.
    :param num_top: what the most demanding row wants.
    """
    if sampled.logprobs is None:
        return "there are none"
    told = [part.cpu() for part in sampled.logprobs]
    for row, token in enumerate(sampled.tokens.tolist()):
        if token == BAD_LOGITS:
            continue
        exact = logits[row].double().log_softmax(0)
        order = sorted(range(len(exact)), key=lambda t: (-float(logits[row, t]), t))[:num_top]
        for name, actual, expected in (
            ("log-probability", told[0][row], exact[token]),
            ("rank", told[1][row], 1 + (logits[row] > logits[row, token]).sum()),
            ("top_ids", told[2][row], torch.tensor(order, dtype=torch.int64)),
            ("top_logprobs", told[3][row], exact[order]),
        ):
            if actual.shape != expected.shape or not torch.allclose(
                actual.double(), expected.double(), atol=1e-4, rtol=1e-5
            ):
                return f"row {row}, token {token}: {name} is {actual.tolist()}, not {expected.tolist()}"
    return None


def _fitting(vocab_size: int) -> dict[str, Any]:
    """Ask for everything, of a vocabulary that may be tiny."""
    allowed = list(range(vocab_size))
    return EVERYTHING | {"allowed_token_ids": allowed, "top_k": vocab_size - 1 or 1, "logprobs": 1}

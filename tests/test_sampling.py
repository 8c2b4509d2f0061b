"""Sampling: against a slow reference in float64, and never dependent on what shares a batch."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from core import sampling
from core.interfaces import Sampler, missing_members
from core.request import MAX_SEED, SamplingParams
from core.sampling import SampleRows, Stage, TorchSampler, gather_logprobs
from core.step import BAD_LOGITS, RowEntry

GAMMA = 0x9E3779B97F4A7C15
CPU = torch.device("cpu")
INF = math.inf


@dataclasses.dataclass
class Case:
    """One request with the logits that its model would give, step by step."""

    params: SamplingParams
    logits: list[list[float]]
    prompt: list[int] = dataclasses.field(default_factory=lambda: [0])
    seed: int = 0
    stop_ids: list[int] = dataclasses.field(default_factory=list)

    @property
    def vocab_size(self):
        return len(self.logits[0])

    def entry(self, row, outputs=()):
        tokens = [*self.prompt, *outputs]
        return RowEntry(row, f"r{row}", tokens, len(self.prompt), self.params, self.seed, self.stop_ids)


# --- the reference -----------------------------------------------------------------------------------


def finalise(value):
    value %= 2**64
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB % 2**64
    return value ^ (value >> 31)


def reference_noise(seed, position, token):
    state = finalise(finalise(finalise(seed + GAMMA) + position * GAMMA + GAMMA) + (token + 1) * GAMMA)
    uniform = np.int64(state % 2**63 | 1).astype(np.float32) * np.float32(2.0**-63 * (1 - 2.0**-24))
    return -math.log1p(-float(uniform))


def reference_logits(case, tokens):
    params, num_output = case.params, len(tokens) - len(case.prompt)
    outputs = tokens[len(case.prompt) :]
    result = []
    for token, raw in enumerate(case.logits[num_output]):
        logit = raw + (params.logit_bias or {}).get(token, 0.0)
        if params.allowed_token_ids is not None and token not in params.allowed_token_ids:
            logit = -INF
        if token in (params.banned_token_ids or ()):
            logit = -INF
        if num_output < params.min_tokens and token in case.stop_ids:
            logit = -INF
        if token in tokens:
            penalty = params.repetition_penalty
            logit = logit / penalty if logit > 0 else logit * penalty
        logit -= params.frequency_penalty * outputs.count(token)
        logit -= params.presence_penalty * (token in outputs)
        result.append(logit)
    return result


def reference_weights(logits, params):
    """Unnormalised probabilities, or `None` where rounding decides which tokens are left."""
    best = max(logits)
    weights = [math.exp((logit - best) / params.temperature) for logit in logits]
    if any(abs(weight - params.min_p) < 1e-5 * params.min_p for weight in weights):
        return None
    order = sorted(range(len(weights)), key=lambda token: (-weights[token], token))
    order = [token for token in order if weights[token] >= params.min_p]
    if params.top_k > 0:
        order = order[: params.top_k]
    if params.top_p < 1.0:
        total, mass, kept = sum(weights[token] for token in order), 0.0, []
        for token in order:
            if abs(mass / total - params.top_p) < 1e-5:
                return None
            if mass / total >= params.top_p:
                break
            kept.append(token)
            mass += weights[token]
        order = kept
    return {token: weights[token] for token in order}


def reference_token(case, tokens):
    """The token to draw after `tokens`, or `None` where float32 may rightly decide otherwise."""
    logits = reference_logits(case, tokens)
    if not math.isfinite(max(logits)):
        return BAD_LOGITS
    if case.params.temperature == 0.0:
        return logits.index(max(logits))
    weights = reference_weights(logits, case.params)
    if weights is None:
        return None
    scores = {
        token: weight / reference_noise(case.seed, len(tokens), token)
        for token, weight in weights.items()
    }
    first, *others = sorted(scores, key=scores.get, reverse=True)
    if others and scores[others[0]] > scores[first] * (1 - 1e-4):
        return None
    return first


# --- the machinery around the sampler ----------------------------------------------------------------


def make_sampler(max_rows, vocab_size, device=CPU):
    sampler = TorchSampler()
    sampler.allocate(max_rows, vocab_size, 64, device)
    return sampler


def sample(sampler, logits, rows, positions):
    numbers = torch.tensor([list(rows), list(positions)], dtype=torch.int64)
    batch = SampleRows(*numbers, list(rows))
    return sampler.sample(torch.as_tensor(logits, dtype=torch.float32), batch)


def generate(cases, sampler=None, rows=None, num_steps=None):
    """Let all cases share each step; return the tokens of each."""
    rows = list(range(len(cases))) if rows is None else rows
    sampler = sampler or make_sampler(max(rows) + 1, cases[0].vocab_size)
    for row, case in zip(rows, cases, strict=True):
        sampler.add(case.entry(row))
    outputs = [[] for _ in cases]
    for step in range(num_steps or len(cases[0].logits)):
        positions = [len(case.prompt) + step for case in cases]
        sampled = sample(sampler, [case.logits[step] for case in cases], rows, positions)
        for output, token in zip(outputs, sampled.tokens.tolist(), strict=True):
            output.append(token)
    return outputs


def subset(vocab_size, **kwargs):
    return st.lists(st.integers(0, vocab_size - 1), unique=True, **kwargs)


@st.composite
def all_params(draw, vocab_size):
    """Every parameter, each neutral about half of the time.

    Biases and penalties are dyadic, so that logits up to the temperature are exact in float32.
    """
    ids = st.none() | subset(vocab_size, max_size=vocab_size - 1)
    quarters = st.integers(-8, 8).map(lambda number: number / 4)
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
        allowed_token_ids=draw(st.none() | subset(vocab_size, min_size=1)),
        banned_token_ids=draw(ids),
        min_tokens=draw(st.integers(0, 3)),
        logprobs=draw(st.none() | st.integers(0, vocab_size)),
    )


@st.composite
def all_logits(draw, vocab_size, num_steps):
    """Multiples of 1/16 with many ties, and some -inf; from bytes, because those are drawn fast."""
    numbers = iter(draw(st.binary(min_size=vocab_size * num_steps, max_size=vocab_size * num_steps)))
    return [
        [(byte - 128) / 16 if byte else -INF for byte in itertools.islice(numbers, vocab_size)]
        for _ in range(num_steps)
    ]


def all_cases(vocab_size, num_steps):
    return st.builds(
        Case,
        params=all_params(vocab_size),
        logits=all_logits(vocab_size, num_steps),
        prompt=st.lists(st.integers(0, vocab_size - 1), min_size=1, max_size=6),
        seed=st.integers(0, MAX_SEED) | st.sampled_from([0, MAX_SEED]),
        stop_ids=subset(vocab_size, max_size=3),
    )


def batches(max_cases=5, num_steps=3):
    return st.integers(2, 19).flatmap(
        lambda size: st.lists(all_cases(size, num_steps), min_size=1, max_size=max_cases)
    )


def full_params(vocab_size, **changes):
    """Parameters that ask for every stage at once."""
    values = {
        "temperature": 0.8,
        "top_k": max(2, vocab_size // 2),
        "top_p": 0.9,
        "min_p": 0.01,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.25,
        "repetition_penalty": 2.0,
        "logit_bias": {0: 1.5},
        "banned_token_ids": [1],
        "allowed_token_ids": list(range(vocab_size - 1)),
        "min_tokens": 2,
        "logprobs": 2,
    }
    return SamplingParams(**(values | changes))


SINGLE = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 0.7},
    "top_k": {"top_k": 3},
    "top_p": {"top_p": 0.6},
    "min_p": {"min_p": 0.2},
    "presence": {"presence_penalty": 1.0},
    "frequency": {"frequency_penalty": 1.0},
    "repetition": {"repetition_penalty": 1.3},
    "bias": {"logit_bias": {2: 3.0}},
    "allowed": {"allowed_token_ids": [1, 2, 5]},
    "banned": {"banned_token_ids": [3, 4]},
    "min_tokens": {"min_tokens": 2},
    "logprobs": {"logprobs": 3},
}


def random_case(params, vocab_size, *, seed, num_steps=4, stop_ids=(6,)):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_steps, vocab_size, generator=generator) * 2
    return Case(params, logits.tolist(), [seed % vocab_size, 2], seed * 7919, list(stop_ids))


# --- what is drawn -----------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(batches())
def test_tokens_are_those_of_the_reference(cases):
    for case, output in zip(cases, generate(cases), strict=True):
        tokens = list(case.prompt)
        for token in output:
            wanted = reference_token(case, tokens)
            assert wanted is None or token == wanted
            if token == BAD_LOGITS:
                break
            tokens.append(token)


def test_the_reference_decides_nearly_always():
    undecided = 0
    for seed in range(200):
        case = random_case(SamplingParams(top_p=0.83, min_p=0.01, top_k=9), 17, seed=seed, num_steps=1)
        (output,) = generate([case])
        wanted = reference_token(case, case.prompt)
        undecided += wanted is None
        assert wanted in (None, output[0])
    assert undecided <= 4


@settings(max_examples=60, deadline=None)
@given(batches(max_cases=5), st.randoms(use_true_random=False), st.integers(1, 40))
def test_tokens_do_not_depend_on_the_batch(cases, rng, chunk):
    together = generate(cases)
    alone = [generate([case])[0] for case in cases]
    rows = rng.sample(range(12), len(cases))
    order = rng.sample(range(len(cases)), len(cases))
    permuted = generate([cases[index] for index in order], rows=[rows[index] for index in order])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "_CHUNK_ELEMENTS", {"cpu": chunk})
        chunked = generate(cases)
    assert together == alone == chunked
    assert [together[index] for index in order] == permuted


@pytest.mark.parametrize("first", SINGLE)
def test_pairs_of_parameters_do_not_disturb_each_other(first):
    # Wide enough for every vector length of the CPU's kernels, and odd on purpose.
    case = random_case(SamplingParams(**SINGLE[first]), 1031, seed=1)
    alone = generate([case])[0]
    for second in SINGLE.values():
        other = random_case(SamplingParams(**second), 1031, seed=2)
        assert generate([case, other])[0] == alone
        assert generate([other, case])[1] == alone
    everything = random_case(full_params(1031), 1031, seed=3)
    assert generate([everything, case, everything], rows=[4, 2, 0])[1] == alone


def test_neutral_rows_keep_their_bits_through_every_stage():
    vocab_size = 129
    sampler = make_sampler(2, vocab_size)
    sampler.add(random_case(full_params(vocab_size), vocab_size, seed=1).entry(0))
    sampler.add(random_case(SamplingParams(), vocab_size, seed=2).entry(1))
    logits = torch.randn(2, vocab_size)
    logits[1, :4] = torch.tensor([0.0, -INF, 1e30, -1e30])
    rows = SampleRows(torch.tensor([0, 1]), torch.tensor([2, 2]), [0, 1])
    with torch.inference_mode():
        params, stages = sampler.state.params(rows.rows), sampler.state.stages([0, 1])
        assert stages == Stage(2**8 - 1)
        shaped = sampler._shape(logits, rows, params, stages)
        assert shaped[1].view(torch.int32).tolist() == logits[1].view(torch.int32).tolist()
        assert not shaped[0].equal(logits[0])
        weights = torch.rand(2, vocab_size)
        assert sampling._top_k_mask(weights, params.top_k)[1].all()
        assert sampling._top_p_mask(weights, params.top_p)[1].all()
        assert not sampling._top_k_mask(weights, params.top_k)[0].all()


@settings(max_examples=40, deadline=None)
@given(batches(max_cases=5, num_steps=2), st.randoms(use_true_random=False))
def test_recycled_rows_remember_nothing(cases, rng):
    sampler = make_sampler(3, cases[0].vocab_size)
    for _ in range(4):
        chosen = rng.sample(cases, min(len(cases), rng.randint(1, 3)))
        rows = rng.sample(range(3), len(chosen))
        assert generate(chosen, sampler, rows) == generate(chosen)


@settings(max_examples=40, deadline=None)
@given(batches(max_cases=3), st.integers(0, 2))
def test_preempted_requests_go_on_where_they_were(cases, num_before):
    outputs = generate(cases)
    sampler = make_sampler(len(cases), cases[0].vocab_size)
    generate(cases[::-1], sampler)  # the rows are used already
    for row, (case, output) in enumerate(zip(cases, outputs, strict=True)):
        if BAD_LOGITS in output[:num_before]:
            continue  # such a request has ended
        sampler.add(case.entry(row, output[:num_before]))
        for step in range(num_before, len(output)):
            sampled = sample(sampler, [case.logits[step]], [row], [len(case.prompt) + step])
            assert sampled.tokens.tolist() == [output[step]]


@pytest.mark.parametrize("seed", [0, MAX_SEED])
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=2.5, top_k=4),
        SamplingParams(temperature=0.5, top_p=0.8),
        SamplingParams(min_p=0.15),
        SamplingParams(top_k=6, top_p=0.7, min_p=0.02, logit_bias={3: 1.0}, banned_token_ids=[4]),
    ],
)
def test_frequencies_are_the_probabilities(params, seed):
    num_draws = 8_000
    case = random_case(params, 9, seed=3)
    case.seed = seed
    weights = reference_weights(reference_logits(case, case.prompt), params)
    sampler = make_sampler(1, 9)
    sampler.add(case.entry(0))
    logits = torch.tensor(case.logits[0]).expand(num_draws, -1)
    tokens = sample(sampler, logits, [0] * num_draws, range(num_draws)).tokens
    counts = torch.bincount(tokens, minlength=9).tolist()
    for token, count in enumerate(counts):
        probability = weights.get(token, 0.0) / sum(weights.values())
        spread = math.sqrt(num_draws * probability * (1 - probability))
        assert abs(count - num_draws * probability) <= 5 * spread


def test_draws_of_different_seeds_and_positions_are_independent():
    num_draws = 20_000
    cases = [random_case(SamplingParams(seed=seed), 2, seed=1, num_steps=1) for seed in range(2)]
    drawn = []
    for seed, case in enumerate(cases):
        case.seed, case.logits = seed, [[0.0, 0.0]]
        sampler = make_sampler(1, 2)
        sampler.add(case.entry(0))
        logits = torch.zeros(num_draws, 2)
        drawn.append(sample(sampler, logits, [0] * num_draws, range(num_draws)).tokens)
    for left, right in ((drawn[0], drawn[1]), (drawn[0][:-1], drawn[0][1:])):
        agreement = (left == right).double().mean().item()
        assert abs(agreement - 0.5) < 5 * 0.5 / math.sqrt(num_draws)


# --- truncation --------------------------------------------------------------------------------------


WEIGHTS = st.sampled_from([0.0, 1e-45, 1e-12, 0.25, 0.5, 0.75, 1.0]) | st.floats(0, 1, width=32)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(WEIGHTS, st.integers(0, 2**40)), min_size=1, max_size=40), st.data())
def test_prefix_mask_is_that_of_a_stable_sort(tokens, data):
    weights, measure = (list(column) for column in zip(*tokens, strict=True))
    weights = torch.tensor(weights).tolist()  # 1e-45 is no float32, and its neighbour would differ
    target = data.draw(st.integers(0, sum(measure)) | st.just(sum(measure)))
    kept, reached = set(), 0
    for token in sorted(range(len(weights)), key=lambda token: (-weights[token], token)):
        if reached < target:
            kept.add(token)
        reached += measure[token]
    mask = sampling._prefix_mask(
        torch.tensor([weights]), torch.tensor([measure]), torch.tensor([[target]])
    )
    assert {token for token, keep in enumerate(mask[0].tolist()) if keep} == kept


def kept_tokens(params, logits, num_draws=400):
    case = Case(params, [logits])
    sampler = make_sampler(1, len(logits))
    sampler.add(case.entry(0))
    batch = torch.tensor(logits).expand(num_draws, -1)
    return set(sample(sampler, batch, [0] * num_draws, range(num_draws)).tokens.tolist())


def test_ties_are_broken_by_the_lower_id():
    logits = [0.0, 2.0, 2.0, 2.0, 2.0]
    assert kept_tokens(SamplingParams(top_k=2), logits) == {1, 2}
    assert kept_tokens(SamplingParams(top_p=0.5, top_k=4), logits) == {1, 2}
    assert kept_tokens(SamplingParams(top_k=1), logits) == {1}
    assert kept_tokens(SamplingParams(temperature=0.0), logits) == {1}


def test_nucleus_is_the_smallest_that_reaches_top_p():
    logits = [math.log(p) for p in (0.1, 0.4, 0.3, 0.2)]
    assert kept_tokens(SamplingParams(top_p=0.39), logits) == {1}
    assert kept_tokens(SamplingParams(top_p=0.41), logits) == {1, 2}
    assert kept_tokens(SamplingParams(top_p=0.71), logits) == {1, 2, 3}
    assert kept_tokens(SamplingParams(top_p=0.91), logits) == {0, 1, 2, 3}
    # Equal shares hit the bound exactly: one token in ten has the first tenth.
    assert kept_tokens(SamplingParams(top_p=0.1), [0.0] * 10) == {0}
    assert len(kept_tokens(SamplingParams(top_p=0.9), [0.0] * 10)) == 9


def test_top_p_renormalises_within_top_k():
    logits = [math.log(p) for p in (0.4, 0.3, 0.2, 0.1)]
    # Of the two left, the first has 4/7.
    assert kept_tokens(SamplingParams(top_k=2, top_p=0.56), logits) == {0}
    assert kept_tokens(SamplingParams(top_k=2, top_p=0.58), logits) == {0, 1}


@pytest.mark.parametrize("top_p", [5e-324, 1e-300, 1e-20, 1e-9])
def test_tiny_top_p_is_greedy(top_p):
    assert kept_tokens(SamplingParams(top_p=top_p), [0.0, 1.0, 0.9]) == {1}


@pytest.mark.parametrize("top_p", [1 - 2**-53, 0.9999999999])
def test_top_p_next_to_one_keeps_all_that_weighs_anything(top_p):
    assert kept_tokens(SamplingParams(top_p=top_p), [0.0, 0.5, 0.9]) == {0, 1, 2}


def test_min_p_of_one_keeps_the_likeliest_only():
    assert kept_tokens(SamplingParams(min_p=1.0), [0.0, 1.0, 1.0]) == {1, 2}


# --- bans, penalties, minimum length -----------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(batches(max_cases=4))
def test_logits_before_the_draw_follow_the_definition(cases):
    vocab_size = cases[0].vocab_size
    sampler = make_sampler(len(cases), vocab_size)
    histories = [[*case.prompt, 0, vocab_size - 1] for case in cases]
    for row, case in enumerate(cases):
        sampler.add(case.entry(row, histories[row][len(case.prompt) :]))
    rows = list(range(len(cases)))
    batch = SampleRows(torch.tensor(rows), torch.tensor([len(history) for history in histories]), rows)
    raw = torch.tensor([case.logits[2] for case in cases])
    with torch.inference_mode():
        params = sampler.state.params(batch.rows)
        shaped = sampler._shape(raw, batch, params, sampler.state.stages(rows)).tolist()
    assert shaped == [
        reference_logits(case, history) for case, history in zip(cases, histories, strict=True)
    ]


def test_penalties_count_what_was_drawn():
    # Each token costs 3 per use, so that greedy decoding has to go round.
    case = Case(SamplingParams(temperature=0.0, frequency_penalty=2.0, presence_penalty=1.0), [[]] * 6)
    case.logits = [[0.0, 0.5, 1.0]] * 6
    assert generate([case]) == [[2, 1, 0, 2, 1, 0]]


def test_prompt_counts_for_the_repetition_penalty_only():
    logits = [[1.0, 1.5]]
    repetition = Case(SamplingParams(temperature=0.0, repetition_penalty=2.0), logits, [1])
    presence = Case(SamplingParams(temperature=0.0, presence_penalty=2.0), logits, [1])
    assert generate([repetition, presence]) == [[0], [1]]


def test_stop_ids_are_masked_until_min_tokens():
    logits = [[0.0, 5.0, 4.0, 1.0]] * 5
    params = SamplingParams(temperature=0.0, min_tokens=3)
    cases = [
        Case(params, logits, [0], stop_ids=[1, 2]),
        Case(params, logits, [0], stop_ids=[2]),
        Case(params, logits, [0, 0, 0], stop_ids=[1]),
        Case(params, logits, [0], stop_ids=[]),
        Case(SamplingParams(temperature=0.0), logits, [0], stop_ids=[1]),
    ]
    assert generate(cases) == [[3] * 3 + [1] * 2, [1] * 5, [2] * 3 + [1] * 2, [1] * 5, [1] * 5]


def test_longer_stop_lists_leave_the_rows_already_there_alone():
    vocab_size = 50
    logits = [[float(token) for token in range(vocab_size)]] * 2
    params = SamplingParams(temperature=0.0, min_tokens=1)
    short = Case(params, logits, stop_ids=[49])
    long = Case(params, logits, stop_ids=list(range(20, 50)))
    sampler = make_sampler(3, vocab_size)
    sampler.add(short.entry(2))
    assert generate([long], sampler, [0]) == [[19, 49]]
    assert sample(sampler, logits[:1], [2], [1]).tokens.tolist() == [48]
    sampler.add(short.entry(0))
    assert sample(sampler, logits[:1], [0], [1]).tokens.tolist() == [48]


def test_one_token_that_is_left_is_drawn():
    vocab_size = 40
    logits = [torch.linspace(-3, 3, vocab_size).tolist()]
    others = [token for token in range(vocab_size) if token != 5]
    for temperature in (0.0, 0.7):
        cases = [
            Case(SamplingParams(temperature=temperature, banned_token_ids=others), logits),
            Case(SamplingParams(temperature=temperature, allowed_token_ids=[5]), logits),
            Case(SamplingParams(temperature=temperature, min_tokens=1), logits, stop_ids=others),
        ]
        assert generate(cases) == [[5]] * 3


def test_bias_cannot_lift_a_ban():
    params = SamplingParams(
        temperature=0.0, logit_bias={0: 100.0, 1: 100.0}, banned_token_ids=[0], allowed_token_ids=[0, 2]
    )
    assert generate([Case(params, [[0.0, 0.0, -100.0]])]) == [[2]]


# --- extreme logits ----------------------------------------------------------------------------------


ALL_MIXES = {name: SamplingParams(**values) for name, values in SINGLE.items()} | {
    "all": full_params(16),
    "all greedy": full_params(16, temperature=0.0),
}


@pytest.mark.parametrize("name", ALL_MIXES)
@pytest.mark.parametrize("poison", [math.nan, -math.nan, INF])
def test_poisoned_rows_are_reported_and_harm_nobody(name, poison):
    vocab_size = 16
    healthy = random_case(ALL_MIXES[name], vocab_size, seed=4, num_steps=2)
    wanted = generate([healthy])[0]
    for token in range(vocab_size):  # among them banned tokens, and tokens that are not allowed
        poisoned = random_case(ALL_MIXES[name], vocab_size, seed=5, num_steps=2)
        poisoned.logits[0][token] = poison
        outputs = generate([healthy, poisoned, healthy])
        assert outputs[0] == outputs[2] == wanted
        assert outputs[1][0] == BAD_LOGITS
        assert outputs[1][1] >= 0  # the next step of a row is not poisoned by the last


@pytest.mark.parametrize("name", ALL_MIXES)
def test_rows_without_any_token_are_reported(name):
    for logits in ([-INF] * 16, [INF] * 16, [math.nan] * 16, [-INF] * 15 + [math.nan]):
        assert generate([Case(ALL_MIXES[name], [logits])]) == [[BAD_LOGITS]]


def test_everything_masked_is_reported():
    params = SamplingParams(min_tokens=1, allowed_token_ids=[1])
    assert generate([Case(params, [[0.0, 0.0]] * 2, stop_ids=[1])]) == [[BAD_LOGITS, 1]]


@pytest.mark.parametrize("name", ALL_MIXES)
def test_huge_and_infinite_logits(name):
    logits = [-1e30] * 16
    logits[2] = 1e30
    logits[7:12] = [-INF] * 5
    assert generate([Case(ALL_MIXES[name], [logits])]) == [[2]]


@pytest.mark.parametrize("temperature", [5e-324, 1e-40, 1e-6])
def test_tiny_temperatures_are_greedy(temperature):
    assert kept_tokens(SamplingParams(temperature=temperature), [0.0, 30.0, 29.0]) == {1}


def test_tiny_repetition_penalty_does_not_overflow():
    params = SamplingParams(temperature=0.0, repetition_penalty=5e-324)
    assert generate([Case(params, [[30.0, 29.0]], [1])]) == [[1]]


def test_lowest_token_of_a_long_tail_can_be_drawn():
    # A race in float32 must still tell apart chances of one in 2^20.
    num_draws, vocab_size = 64, 2**14
    sampler = make_sampler(1, vocab_size)
    sampler.add(Case(SamplingParams(), [[0.0] * vocab_size]).entry(0))
    logits = torch.zeros(num_draws, vocab_size)
    tokens = sample(sampler, logits, [0] * num_draws, range(num_draws)).tokens
    assert len(set(tokens.tolist())) > num_draws - 4
    assert abs(tokens.double().mean().item() / vocab_size - 0.5) < 5 * 0.29 / math.sqrt(num_draws)


# --- log-probabilities -------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(batches(max_cases=4, num_steps=2))
def test_logprobs_are_those_of_the_raw_logits(cases):
    sampler = make_sampler(len(cases), cases[0].vocab_size)
    for row, case in enumerate(cases):
        sampler.add(case.entry(row))
    rows = list(range(len(cases)))
    logits = torch.tensor([case.logits[0] for case in cases])
    sampled = sample(sampler, logits, rows, [len(case.prompt) for case in cases])
    asked = [case.params.logprobs for case in cases if case.params.logprobs is not None]
    if not asked:
        assert sampled.logprobs is None
        return
    exact = torch.log_softmax(logits.double(), dim=-1)
    for row, token in enumerate(sampled.tokens.tolist()):
        if token == BAD_LOGITS:
            continue
        logprob, rank, top_ids, top_logprobs = (tensor[row] for tensor in sampled.logprobs)
        order = sorted(range(len(exact[row])), key=lambda token: (-logits[row, token], token))
        assert logprob.item() == pytest.approx(exact[row, token].item(), abs=1e-5)
        assert rank.item() == 1 + (logits[row] > logits[row, token]).sum().item()
        assert top_ids.tolist() == order[: max(asked)]
        assert top_logprobs.tolist() == pytest.approx(exact[row, top_ids].tolist(), abs=1e-5)


def test_only_rows_that_sample_decide_about_logprobs():
    sampler = make_sampler(3, 8)
    for row, logprobs in enumerate((None, 0, 5)):
        sampler.add(random_case(SamplingParams(logprobs=logprobs), 8, seed=1).entry(row))
    logits = torch.zeros(1, 8)
    assert sample(sampler, logits, [0], [2]).logprobs is None
    assert sample(sampler, logits, [1], [2]).logprobs.top_ids.shape == (1, 0)
    assert sample(sampler, logits.expand(3, -1), [2, 0, 1], [2] * 3).logprobs.top_ids.shape == (3, 5)


def test_recycled_rows_want_no_stage_and_no_logprobs_of_the_past():
    sampler = make_sampler(1, 16)
    sampler.add(random_case(full_params(16), 16, seed=1).entry(0))
    sampler.add(random_case(SamplingParams(temperature=0.0), 16, seed=1).entry(0))
    assert sampler.state.stages([0]) == Stage(0)
    assert sample(sampler, torch.zeros(1, 16), [0], [2]).logprobs is None


@pytest.mark.parametrize("num_top", [0, 1, 20])
@pytest.mark.parametrize("num_rows", [0, 1, 70])
@pytest.mark.parametrize("chunk", [1, 1000, 2**17])
def test_gathered_logprobs_of_prompts(num_top, num_rows, chunk, monkeypatch):
    monkeypatch.setattr(sampling, "_CHUNK_ELEMENTS", {"cpu": chunk})
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(num_rows, 101, generator=generator).bfloat16()  # with many ties
    tokens = torch.randint(0, 101, (num_rows,), generator=generator)
    token_logprobs, ranks, top_ids, top_logprobs = gather_logprobs(logits, tokens, num_top)
    exact = torch.log_softmax(logits.double(), dim=-1)
    chosen = exact.gather(1, tokens[:, None])
    assert torch.allclose(token_logprobs.double(), chosen[:, 0], atol=1e-5)
    assert ranks.equal((exact > chosen).sum(dim=-1) + 1)
    assert top_ids.equal(exact.sort(dim=-1, descending=True, stable=True).indices[:, :num_top])
    assert torch.allclose(top_logprobs.double(), exact.gather(1, top_ids), atol=1e-5)


def test_zeros_of_both_signs_are_equal_in_rank_and_order():
    _, ranks, top_ids, _ = gather_logprobs(torch.tensor([[-1.0, -0.0, 0.0]]), torch.tensor([2]), 3)
    assert ranks.tolist() == [1]
    assert top_ids.tolist() == [[1, 2, 0]]


# --- what it costs -----------------------------------------------------------------------------------


class HostSyncError(Exception):
    """A device would have had to be waited for."""


class NoHostSync(TorchDispatchMode):
    """Refuses every operation whose result, or shape of result, needs a value on the host."""

    NAMES = (
        "_local_scalar_dense",
        "nonzero",
        "nonzero_static",
        "masked_select",
        "_unique",
        "_unique2",
        "unique_dim",
        "unique_consecutive",
        "unique_dim_consecutive",
        "is_nonzero",
        "equal",
        "bincount",
    )

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in self.NAMES or (name == "repeat_interleave" and func._overloadname == "Tensor"):
            raise HostSyncError(name)
        if name.startswith(("index", "_index_put")) and isinstance(args[1], list | tuple):
            for index in args[1]:
                if index is not None and index.dtype in (torch.bool, torch.uint8):
                    raise HostSyncError(f"{name} by mask")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "spy",
    [
        lambda x: x[0].item(),
        lambda x: bool((x > 0).any()),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.unique(),
        lambda x: x.masked_select(x > 0),
        lambda x: x.index_put_((x > 0,), torch.tensor(0.0)),
    ],
)
def test_the_watch_for_host_syncs_sees_them(spy):
    with pytest.raises(HostSyncError), NoHostSync():
        spy(torch.ones(3))


@pytest.mark.parametrize("name", ALL_MIXES)
def test_sampling_never_waits_for_the_device(name):
    cases = [random_case(ALL_MIXES[name], 16, seed=seed) for seed in range(3)]
    cases.append(random_case(full_params(16), 16, seed=9))
    sampler = make_sampler(4, 16)
    for row, case in enumerate(cases):
        sampler.add(case.entry(row))
    logits = torch.tensor([case.logits[0] for case in cases])
    batch = SampleRows(torch.arange(4), torch.full((4,), 2), [0, 1, 2, 3])
    with NoHostSync():
        sampled = sampler.sample(logits, batch)
    assert sampled.tokens.tolist() == [output[0] for output in generate(cases)]


@pytest.mark.parametrize("name", ALL_MIXES)
def test_shapes_do_not_depend_on_data(name):
    # On the meta device there are no values at all, so nothing can have looked at one.
    device = torch.device("meta")
    sampler = make_sampler(4, 16, device)
    sampler.add(random_case(ALL_MIXES[name], 16, seed=1).entry(2))
    numbers = torch.empty(1, dtype=torch.int64, device=device)
    sampled = sampler.sample(torch.empty(1, 16, device=device), SampleRows(numbers, numbers, [2]))
    assert (sampled.tokens.shape, sampled.tokens.dtype) == ((1,), torch.int64)


def test_greedy_steps_draw_no_numbers(monkeypatch):
    def refuse(*_):
        raise AssertionError

    monkeypatch.setattr(sampling, "exponentials", refuse)
    greedy = random_case(full_params(16, temperature=0.0), 16, seed=1)
    generate([greedy, greedy])
    with pytest.raises(AssertionError):
        generate([greedy, random_case(SamplingParams(), 16, seed=1)])


@pytest.mark.parametrize(
    ("method", "wants"),
    [
        ("bias", {"logit_bias": {0: 1.0}}),
        ("bias", {"banned_token_ids": [0]}),
        ("bias", {"allowed_token_ids": [0]}),
        ("stop_ids", {"min_tokens": 1}),
        ("num_outputs", {"presence_penalty": 1.0}),
        ("in_prompt", {"repetition_penalty": 1.5}),
        ("count", {"frequency_penalty": 1.0}),
    ],
)
def test_features_cost_only_the_steps_that_use_them(method, wants, monkeypatch):
    calls = []
    original = getattr(sampling.SamplingState, method)
    monkeypatch.setattr(
        sampling.SamplingState, method, lambda *args: calls.append(method) or original(*args)
    )
    sampler = make_sampler(2, 400)
    sampler.add(random_case(SamplingParams(), 400, seed=1).entry(0))
    assert sum(tensor.nbytes for tensor in state_tensors(sampler)) <= 8 * 400 + 200  # only the ids
    sampler.add(random_case(SamplingParams(**wants), 400, seed=1).entry(1))
    sample(sampler, torch.zeros(1, 400), [0], [2])
    assert calls == []
    sample(sampler, torch.zeros(2, 400), [0, 1], [2, 2])
    assert calls == [method]


def state_tensors(sampler):
    return [value for value in vars(sampler.state).values() if isinstance(value, torch.Tensor)]


@pytest.mark.parametrize(("max_rows", "vocab_size"), [(1, 1100), (16, 5000), (64, 1100)])
def test_memory_stays_within_the_promise(max_rows, vocab_size):
    sampler = make_sampler(max_rows, vocab_size)
    promised = sampler.memory_bytes(max_rows, vocab_size, CPU)
    case = random_case(full_params(1100), vocab_size, seed=1, stop_ids=range(1090))
    sampler.add(case.entry(0))
    assert sum(tensor.nbytes for tensor in state_tensors(sampler)) < promised


def test_logits_are_left_alone():
    case = random_case(full_params(16), 16, seed=1)
    sampler = make_sampler(1, 16)
    sampler.add(case.entry(0))
    logits = torch.tensor(case.logits[:1])
    before = logits.clone()
    sample(sampler, logits, [0], [2])
    assert logits.equal(before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_converted(dtype):
    case = random_case(full_params(16), 16, seed=1)
    logits = torch.tensor(case.logits[:1]).to(dtype)
    case.logits = logits.float().tolist()
    sampler = make_sampler(1, 16)
    sampler.add(case.entry(0))
    batch = SampleRows(torch.tensor([0]), torch.tensor([2]), [0])
    assert sampler.sample(logits, batch).tokens.tolist() == generate([case])[0]


def test_no_rows_draw_nothing():
    sampler = make_sampler(1, 16)
    assert sample(sampler, torch.zeros(0, 16), [], []).tokens.shape == (0,)


def test_works_inside_and_outside_of_inference_mode():
    case = random_case(full_params(16), 16, seed=1, num_steps=6)
    sampler, drawn = make_sampler(1, 16), []
    sampler.add(case.entry(0))
    for step in range(6):
        with torch.inference_mode(step % 2 == 0):
            drawn += sample(sampler, case.logits[step : step + 1], [0], [2 + step]).tokens.tolist()
    assert [drawn] == generate([case])


def test_long_run_with_random_arrivals_matches_requests_run_alone():
    rng = random.Random(1)
    vocab_size, num_rows = 33, 4
    mixes = [*({**values} for values in SINGLE.values()), None]
    sampler, running, checked = make_sampler(num_rows, vocab_size), {}, 0
    for turn in range(120):
        for row in range(num_rows):
            if row not in running and rng.random() < 0.5:
                mix = rng.choice(mixes)
                params = full_params(vocab_size) if mix is None else SamplingParams(**mix)
                case = random_case(params, vocab_size, seed=turn * num_rows + row, num_steps=5)
                running[row] = (case, [])
                sampler.add(case.entry(row))
        rows = rng.sample(sorted(running), rng.randint(0, len(running)))
        if not rows:
            continue
        logits = [running[row][0].logits[len(running[row][1])] for row in rows]
        positions = [2 + len(running[row][1]) for row in rows]
        for row, token in zip(
            rows, sample(sampler, logits, rows, positions).tokens.tolist(), strict=True
        ):
            case, output = running[row]
            output.append(token)
            if len(output) == 5 or rng.random() < 0.1:
                assert output == generate([case])[0][: len(output)]
                checked += 1
                del running[row]
    assert checked > 50


def test_the_sampler_fulfils_its_protocol():
    assert missing_members(TorchSampler(), Sampler) == []

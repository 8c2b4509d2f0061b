"""The kit for samplers catches the mistakes that are made in them."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest
import torch
from hypothesis import Phase, settings

from core.registry import SamplerEntry
from core.request import SamplingParams
from core.sampling import LogprobTensors, Sampled
from core.step import BAD_LOGITS
from core.testing.sampler import (
    EVERYTHING,
    LOGITS,
    SamplerConformance,
    compare_frequencies,
)
from core.testing.sampling_cases import SamplerCase, find_tokens, find_weights, shape_logits


class NaiveSampler:
    """Row by row in float64, without any noise that others have; `bug` names one mistake to make."""

    def __init__(self, bug=""):
        self.bug = bug
        self.random = random.Random(0)

    def memory_bytes(self, max_rows, vocab_size, device):
        return 1 if self.bug == "states memory of one row" else max_rows * vocab_size

    def allocate(self, max_rows, vocab_size, max_model_len, device):
        if self.bug == "keeps its state" and hasattr(self, "entries"):
            return
        self.entries, self.outputs = {}, {}

    def add(self, entry):
        if self.bug == "keeps its state" and entry.row in self.entries:
            return
        self.entries[entry.row] = entry
        drawn = entry.token_ids[entry.num_prompt :]
        if self.bug == "forgets what was drawn before":
            drawn = []
        if self.bug == "counts on for the next request":
            drawn = self.outputs.get(entry.row, []) or drawn
        self.outputs[entry.row] = list(drawn)

    def sample(self, logits, rows):
        if self.bug == "works in place":
            logits -= logits.max()
        tokens = []
        for row, position, raw in zip(rows.row_list, rows.positions.tolist(), logits, strict=True):
            token = self.draw(row, position, raw.double().tolist())
            tokens.append(token)
            if token >= 0:
                self.outputs[row].append(token)
        dtype = torch.int32 if self.bug == "returns int32" else torch.int64
        return Sampled(torch.tensor(tokens, dtype=dtype), self.report(rows, logits.double(), tokens))

    def draw(self, row, position, raw):
        entry, outputs = self.entries[row], self.outputs[row]
        if any(math.isnan(logit) or logit == math.inf for logit in raw):
            if self.bug != "lets NaN pass":
                return BAD_LOGITS
            raw = [logit if math.isfinite(logit) else 0.0 for logit in raw]
        params = entry.params
        case = SamplerCase(
            params,
            [raw] * (len(outputs) + 1),
            entry.token_ids[: entry.num_prompt],
            entry.seed,
            [] if self.bug == "lets requests stop early" else entry.stop_ids,
        )
        if self.bug == "counts the prompt":
            case = SamplerCase(
                params, [raw] * (len(outputs) + len(case.prompt) + 1), [], 0, entry.stop_ids
            )
            outputs = entry.token_ids[: entry.num_prompt] + outputs
        logits = shape_logits(case, outputs)
        if not math.isfinite(max(logits)):
            return 0 if self.bug == "draws what is banned" else BAD_LOGITS
        if params.is_greedy:
            return logits.index(max(logits))
        return self.race(self.weigh(logits, params), row, position, entry.seed)

    def weigh(self, logits, params):
        changes = {
            "forgets the temperature": {"temperature": 1.0},
            "forgets top_k": {"top_k": 0},
            "forgets top_p": {"top_p": 1.0},
            "forgets min_p": {"min_p": 0.0},
            "top_k leaves one more": {"top_k": params.top_k + 1 if params.top_k > 0 else 0},
            "temperature is its inverse": {"temperature": 1 / params.temperature},
        }.get(self.bug, {})
        values = {name: getattr(params, name) for name in ("temperature", "top_k", "top_p", "min_p")}
        return find_weights(logits, SamplingParams(**values | changes))

    def race(self, weights, row, position, seed):
        key = {
            "draws by row": f"{row} {seed} {position}",
            "draws the same everywhere": f"{seed}",
            "draws the same for neighbours": f"{seed // 15838} {position}",
        }.get(self.bug, f"{seed} {position}")
        source = self.random if self.bug == "has one source for all" else random.Random(key)
        if self.bug == "draws evenly":
            weights = dict.fromkeys(weights, 1.0)
        return source.choices(list(weights), list(weights.values()))[0]

    def report(self, rows, logits, tokens):
        wanted = [self.entries[row].params.logprobs for row in rows.row_list]
        wanted = [count for count in wanted if count is not None]
        if not wanted:
            return None
        count = min(wanted) if self.bug == "reports the fewest" else max(wanted)
        if self.bug == "reports under the temperature":
            scale = [self.entries[row].params.temperature or 1.0 for row in rows.row_list]
            logits = logits / torch.tensor(scale)[:, None]
        logprobs = logits.log_softmax(-1)
        chosen = torch.tensor(tokens).clamp(min=0)[:, None]
        own = logits.gather(1, chosen)
        order = logits.argsort(dim=-1, descending=True, stable=True)[:, :count]
        ranks = (
            (logits >= own).sum(-1) if self.bug == "ranks equals last" else (logits > own).sum(-1) + 1
        )
        return LogprobTensors(
            logprobs.gather(1, chosen)[:, 0].float(), ranks, order, logprobs.gather(1, order).float()
        )


class TestNaiveSampler(SamplerConformance):
    """A right sampler with other random numbers passes as well."""

    settings = settings(SamplerConformance.settings, max_examples=10)

    def make_sampler(self):
        return NaiveSampler()


class Buggy(SamplerConformance):
    __test__ = False
    num_draws = 1600
    settings = settings(
        SamplerConformance.settings,
        max_examples=25,
        phases=[Phase.generate],
        derandomize=True,
        database=None,
        report_multiple_bugs=False,
    )

    def __init__(self, bug=""):
        self.bug = bug

    def make_sampler(self):
        return NaiveSampler(self.bug)


TOKENS = "test_tokens_are_those_that_may_be_drawn"
BATCH = "test_tokens_do_not_depend_on_the_batch"
PREEMPTED = "test_preempted_requests_go_on"
USED = "test_rows_forget_who_was_there_before"
REPEAT = "test_draws_do_not_repeat"
NOTHING = "test_nothing_to_draw_from_is_reported"
LOGPROBS = "test_logprobs_are_those_of_the_raw_logits"
OFTEN = "test_frequencies_are_the_probabilities"
BAD = "test_bad_logits_are_reported"
TIES = "test_equal_logits_share_the_better_rank"
INTACT = "test_logits_stay_as_they_are"

CAUGHT = [
    ("counts the prompt", TOKENS, (), "not one of"),
    ("lets requests stop early", TOKENS, (), "not one of"),
    ("forgets top_k", TOKENS, (), "not one of"),
    ("forgets top_p", TOKENS, (), "not one of"),
    ("forgets min_p", OFTEN, ("min_p",), "which may not be"),
    ("draws what is banned", TOKENS, (), "not BAD_LOGITS"),
    ("draws what is banned", NOTHING, (), "every token is banned"),
    ("draws by row", BATCH, (), "alone|in another row"),
    ("has one source for all", BATCH, (), "among others"),
    ("forgets what was drawn before", PREEMPTED, (), "after a preemption"),
    ("counts on for the next request", USED, (), "that others had used"),
    ("keeps its state", USED, (), "that others had used|allocated anew"),
    ("forgets the temperature", OFTEN, ("temperature 0.5",), "chi-squared"),
    ("temperature is its inverse", OFTEN, ("temperature 2",), "chi-squared"),
    ("draws evenly", OFTEN, ("temperature 1",), "chi-squared"),
    ("top_k leaves one more", OFTEN, ("top_k",), "which may not be"),
    ("draws the same everywhere", REPEAT, (), "neighbouring positions"),
    ("draws the same for neighbours", REPEAT, (), "neighbouring seeds"),
    ("lets NaN pass", BAD, (math.nan, {}), "drawn from logits with nan"),
    ("lets NaN pass", BAD, (math.inf, {"temperature": 0.0}), "drawn from logits with inf"),
    ("works in place", INTACT, ({},), "writes into logits"),
    ("returns int32", INTACT, ({},), "tokens are torch.int32"),
    ("reports under the temperature", LOGPROBS, (), "log-probability is"),
    ("ranks equals last", TIES, (), "rank is"),
    ("reports the fewest", LOGPROBS, (), "top_ids is"),
]


@pytest.mark.parametrize(("bug", "law", "arguments", "message"), CAUGHT)
def test_planted_bug_is_caught(bug, law, arguments, message):
    with pytest.raises(AssertionError, match=message):
        getattr(Buggy(bug), law)(*arguments)


RIGHT = {(law, repr(arguments)): (law, arguments) for _, law, arguments, _ in CAUGHT}


@pytest.mark.parametrize(("law", "arguments"), RIGHT.values())
def test_without_a_bug_the_same_examples_pass(law, arguments):
    getattr(Buggy(), law)(*arguments)


def test_methods_that_do_not_fit_the_protocol_are_caught():
    class NoRows(NaiveSampler):
        def sample(self, logits):
            return None

    kit = Buggy()
    kit.make_sampler = NoRows
    with pytest.raises(AssertionError, match="sample"):
        kit.test_fulfils_the_protocol()


def test_memory_that_shrinks_is_caught():
    kit = Buggy()
    kit.test_memory_is_stated()
    kit.make_sampler = type("Odd", (NaiveSampler,), {"memory_bytes": lambda *_: 0})
    with pytest.raises(AssertionError, match="bytes"):
        kit.test_memory_is_stated()


def test_entry_is_used_and_missed():
    with pytest.raises(NotImplementedError, match="entry"):
        SamplerConformance().make_sampler()
    kit = Buggy()
    kit.entry, kit.plan = SamplerEntry(name="x", factory=lambda plan: plan), object()
    assert SamplerConformance.make_sampler(kit) is kit.plan


# --- the definitions ---------------------------------------------------------------------------------


def test_weights_are_the_probabilities():
    weights = find_weights(LOGITS, SamplingParams(temperature=0.7))
    total = sum(weights.values())
    expected = (torch.tensor(LOGITS).double() / 0.7).softmax(0)
    torch.testing.assert_close(
        torch.tensor([weights[token] / total for token in range(8)]).double(), expected
    )


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({"top_k": 2}, {7, 4}),
        ({"top_p": 0.1}, {7}),
        ({"top_p": 0.5}, {7, 4}),
        ({"min_p": 0.3}, {7, 4, 2, 3}),
        ({"temperature": 0.0}, {7}),
        ({"banned_token_ids": [7], "top_k": 1}, {4}),
        ({"logit_bias": {0: 5.0}, "temperature": 0.0}, {0}),
    ],
)
def test_tokens_that_may_be_drawn(params, expected):
    assert find_tokens(SamplerCase(SamplingParams(**params), [LOGITS]), []) == expected


def test_what_everything_leaves_is_a_choice():
    weights = find_weights(
        shape_logits(SamplerCase(SamplingParams(**EVERYTHING), [LOGITS]), []),
        SamplingParams(**EVERYTHING),
    )
    assert 2 <= len(weights) <= 5


def test_frequencies_of_a_right_source_pass():
    source, weights = random.Random(1), {0: 1.0, 1: 2.0, 2: 5.0}
    draws = source.choices(list(weights), list(weights.values()), k=10_000)
    assert compare_frequencies(Counter(draws), weights) is None
    assert "chi-squared" in compare_frequencies(Counter(draws), weights | {0: 1.6})
    assert "[2]" in compare_frequencies(Counter(draws), {0: 1.0, 1: 2.0})

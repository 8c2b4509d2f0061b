"""The kit for strategies catches models that are divided wrongly, and ranks that are joined wrongly."""

from __future__ import annotations

from dataclasses import replace

import planted_links
import pytest
from hypothesis import Phase, settings

from core.errors import ConfigError
from core.registry import PipelineParallelEntry, TensorParallelEntry
from core.sharding import Span, divide
from core.testing.collectives import PIPELINE_LAWS, TENSOR_LAWS, merge
from core.testing.divided_model import split_by_kv_heads
from core.testing.parallel import (
    PipelineParallelConformance,
    TensorParallelConformance,
    find_gap,
)
from core.testing.rank_processes import RankFailedError, run_ranks

QUICK = settings(
    TensorParallelConformance.settings,
    max_examples=60,
    phases=[Phase.generate],
    derandomize=True,
    database=None,
    report_multiple_bugs=False,
)


# --- divided layers --------------------------------------------------------------------------------


def right_shares(model, size, step):
    """Divide by key-value head only, which is easier than what the built-in strategy does."""
    if size > 1 and (size > min(model.num_kv_heads, model.intermediate_size, model.vocab_size)):
        raise ConfigError(f"{size} ranks are too many")
    return split_by_kv_heads(model, size, step)


def change_last(**changes):
    """Make a divider that is wrong about the last of several ranks."""

    def wrong(model, size, step):
        shares = right_shares(model, size, step)
        if size == 1:
            return shares
        values = {name: change(shares[-1]) for name, change in changes.items()}
        return (*shares[:-1], replace(shares[-1], **values))

    return wrong


def cut_heads_anyhow(model, size, step):
    """Give each rank its part of all query heads, and the key-value heads that these touch."""
    if size > min(model.num_heads, model.intermediate_size, model.vocab_size):
        raise ConfigError(f"{size} ranks are too many")
    group = model.num_heads // model.num_kv_heads
    small = replace(model, num_kv_heads=size)
    shares = right_shares(replace(small, num_heads=size), size, step)
    heads = divide(model.num_heads, size)
    return tuple(
        replace(share, heads=h, kv_heads=Span(h.start // group, -(-h.stop // group)))
        for share, h in zip(shares, heads, strict=True)
    )


def reverse_vocab(model, size, step):
    shares = right_shares(model, size, step)
    spans = [share.vocab for share in reversed(shares)]
    return tuple(replace(share, vocab=span) for share, span in zip(shares, spans, strict=True))


def never_refuse(model, size, step):
    return right_shares(replace(model, num_kv_heads=max(size, model.num_kv_heads)), size, step)


def refuse_with(error):
    def wrong(model, size, step):
        try:
            return right_shares(model, size, step)
        except ConfigError:
            raise error from None

    return wrong


def refuse_all(model, size, step):
    if size > 1:
        raise ConfigError(f"{size} ranks are too many")
    return right_shares(model, size, step)


def refuse_one(model, size, step):
    raise ConfigError(f"{size} ranks are too many")


def count(model, size, step, calls=[]):  # noqa: B006  meant to be kept
    calls.append(1)
    return right_shares(model, size, 1 + len(calls) % 2)


REFUSED = "test_too_many_ranks_are_refused"
SHARE = "test_every_rank_gets_a_share"
ONCE = "test_everything_is_on_one_rank"
HEADS = "test_heads_are_where_their_key_value_heads_are"
EQUAL = "test_divided_models_equal_the_whole"

WRONG_DIVIDERS = [
    (cut_heads_anyhow, HEADS, "no multiple|attends with key-value head"),
    (reverse_vocab, ONCE, "vocab .* is next"),
    (reverse_vocab, EQUAL, "ranks: logits differ"),
    (never_refuse, REFUSED, "ranks get parts of"),
    (refuse_with(ConfigError("too many")), REFUSED, "does not say that"),
    (refuse_with(ZeroDivisionError()), REFUSED, "ConfigError is expected"),
    (refuse_all, "test_some_model_can_be_divided", "an even model on two ranks is refused"),
    (refuse_one, "test_one_rank_holds_everything", "on a single rank is refused"),
    (count, SHARE, "two answers"),
    (lambda *given: right_shares(*given)[1:], SHARE, "shares for"),
    (change_last(tensor_rank=lambda share: 0), SHARE, "tensor_rank runs"),
    (change_last(layers=lambda share: Span(0, 1)), SHARE, "layers"),
    (change_last(inner=lambda share: Span(share.inner.start, share.inner.stop - 1)), ONCE, "inner"),
    (change_last(heads=lambda share: Span(0, share.heads.stop)), ONCE, "heads"),
    (change_last(vocab=lambda share: Span(share.vocab.stop, share.vocab.stop)), ONCE, "vocab"),
    (change_last(kv_heads=lambda share: share.kv_heads.shifted(-1)), HEADS, "attends with"),
    (change_last(kv_heads=lambda share: share.kv_heads.shifted(-1)), EQUAL, "logits differ"),
    (lambda m, n, step: right_shares(m, n, 3), "test_cuts_fall_on_steps", "no multiple of"),
]


class BuggyTensor(TensorParallelConformance):
    __test__ = False
    settings = QUICK

    def __init__(self, divider=right_shares):
        self.entry = TensorParallelEntry(name="x", factory=planted_links.Wrong.make, divide=divider)


@pytest.mark.parametrize(("divider", "law", "message"), WRONG_DIVIDERS)
def test_a_wrong_divider_is_caught(divider, law, message):
    with pytest.raises(AssertionError, match=message):
        getattr(BuggyTensor(divider), law)()


@pytest.mark.parametrize("law", sorted({law for _, law, _ in WRONG_DIVIDERS}))
def test_a_right_divider_passes(law):
    getattr(BuggyTensor(), law)()


# --- divided into stages ---------------------------------------------------------------------------


def right_stages(model, size, settings):
    if size > model.num_layers:
        raise ConfigError(f"{size} stages are too many")
    return divide(model.num_layers, size)


WRONG_STAGES = [
    (lambda m, n, s: divide(m.num_layers, n), "test_too_many_stages_are_refused", "get parts of"),
    (lambda m, n, s: right_stages(m, n, s)[::-1], "test_every_layer_is_in_one_stage", "is next"),
    (lambda m, n, s: right_stages(m, n, s)[:-1], "test_every_layer_is_in_one_stage", "spans for"),
    (lambda m, n, s: right_stages(m, n, s)[:-1], "test_one_stage_holds_all_layers", "not all layers"),
]


class BuggyPipeline(PipelineParallelConformance):
    __test__ = False
    settings = QUICK

    def __init__(self, divider=right_stages):
        factory = planted_links.WrongPipeline.make
        self.entry = PipelineParallelEntry(name="x", factory=factory, divide=divider)


@pytest.mark.parametrize(("divider", "law", "message"), WRONG_STAGES)
def test_wrong_stages_are_caught(divider, law, message):
    with pytest.raises(AssertionError, match=message):
        getattr(BuggyPipeline(divider), law)()


@pytest.mark.parametrize("law", sorted({law for _, law, _ in WRONG_STAGES} | {EQUAL}))
def test_right_stages_pass(law):
    getattr(BuggyPipeline(), law)()


def test_settings_reach_the_divider():
    seen = set()
    kit = BuggyPipeline(lambda m, n, s: seen.add(s) or right_stages(m, n, s))
    kit.plugin_settings = "the settings"
    kit.test_one_stage_holds_all_layers()
    assert seen == {"the settings"}


def test_kit_without_an_entry_says_what_is_missing():
    with pytest.raises(NotImplementedError, match="entry"):
        TensorParallelConformance().test_one_rank_holds_everything()


@pytest.mark.parametrize(
    ("spans", "problem"),
    [
        ([(0, 2), (2, 5)], None),
        ([(0, 2), (3, 5)], "begins at 3, where 2 is next"),
        ([(0, 2), (1, 5)], "begins at 1, where 2 is next"),
        ([(0, 2), (2, 2), (2, 5)], "is empty"),
        ([(0, 4)], "end at 4 of 5"),
    ],
)
def test_gaps_are_found(spans, problem):
    found = find_gap([Span(*span) for span in spans], 5)
    assert found is None if problem is None else problem in found


# --- what joins ranks ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def verdicts():
    """What the ranks tell of every planted link, by its name."""
    told = run_ranks(4, planted_links.judge_all, list(planted_links.WRONG_LINKS), TENSOR_LAWS, (2, 2))
    told_pipeline = run_ranks(
        4, planted_links.judge_all, list(planted_links.WRONG_PIPELINES), PIPELINE_LAWS, (2, 2)
    )
    return {
        name: merge([verdict[name] for verdict in ranks])
        for ranks in (told, told_pipeline)
        for name in ranks[0]
    }


@pytest.mark.parametrize(
    ("kind", "law"), [*planted_links.WRONG_LINKS.items(), *planted_links.WRONG_PIPELINES.items()]
)
def test_a_wrong_link_is_caught(kind, law, verdicts):
    assert law in verdicts[kind.__name__]
    assert "rank " in verdicts[kind.__name__][law]


@pytest.mark.parametrize(
    "kind", [kind for kind in planted_links.WRONG_LINKS if kind.__name__ != "CountsAllRanks"]
)
def test_what_a_wrong_link_does_right_passes(kind, verdicts):
    assert len(verdicts[kind.__name__]) < len(TENSOR_LAWS) / 2


# --- ranks as such ---------------------------------------------------------------------------------


def test_ranks_return_what_they_find():
    assert run_ranks(2, planted_links.tell, "rank") == ["rank 0 of 2", "rank 1 of 2"]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (planted_links.fail_on, "rank 1 of 2 raised(?s:.*)ValueError: no such thing"),
        (planted_links.die_on, "rank 1 of 2 died"),
    ],
)
def test_the_rank_that_fails_is_named(function, message):
    with pytest.raises(RankFailedError, match=message):
        run_ranks(2, function, 1)


def test_ranks_that_take_too_long_are_named():
    with pytest.raises(RankFailedError, match="rank 0 of 1 gave no answer in time"):
        run_ranks(1, planted_links.tell, "x", timeout=0.0)

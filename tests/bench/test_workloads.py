from __future__ import annotations

import hashlib
import json
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.bench.workloads import (
    BenchRequest,
    Dataset,
    arrivals,
    poisson_arrivals,
    seed_mix,
    shift,
    spread,
    uniform,
)
from core.errors import ConfigError


def digest(value):
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def plain(requests):
    return [(request.prompt, request.output_len) for request in requests]


# --- the same for good -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("requests", "expected"),
    [
        (uniform(8, 32, 128), "a772b1841e4df2e5"),
        (uniform(3, 7, 5, vocab_size=1000, seed=4), "9e6f93c108d2d81c"),
        (seed_mix(40), "e3658043ed1ae5b0"),
        (seed_mix(768), "3ca3aac22b57aa62"),
        (seed_mix(10, vocab_size=500, seed=3), "bfc3e4f7e2d44930"),
    ],
    ids=["uniform", "uniform-seed", "seed-mix", "seed-mix-768", "seed-mix-seed"],
)
def test_requests_are_those_that_other_engines_were_measured_with(requests, expected):
    assert digest(plain(requests)) == expected


def test_arrivals_are_those_that_other_engines_were_measured_with():
    assert digest(poisson_arrivals(100, 2.5)) == "cf8364085dc7ae79"
    assert digest(poisson_arrivals(50, 40, seed=5)) == "5ca3718cbfaaa062"


@pytest.mark.parametrize(
    ("dataset", "expected"),
    [
        (Dataset(num_prompts=8, input_len=32), uniform(8, 32, 128)),
        (Dataset(num_prompts=8, input_len=32, output_len=3, seed=5), uniform(8, 32, 3, seed=5)),
        (Dataset(name="seed-mix", num_prompts=5), seed_mix(5)),
        (
            Dataset(name="seed-mix", num_prompts=5, seed=1, vocab_size=99),
            seed_mix(5, seed=1, vocab_size=99),
        ),
    ],
)
def test_a_data_set_without_a_seed_has_that_of_its_function(dataset, expected):
    assert dataset.requests() == expected


# --- lengths and times -----------------------------------------------------------------------------


@given(st.integers(1, 200), st.integers(1, 50), st.floats(0.01, 0.99), st.integers(0, 9))
def test_spread_lengths_stay_within_the_ratio(input_len, output_len, ratio, seed):
    for request in spread(20, input_len, output_len, ratio, seed=seed, vocab_size=50):
        for length, middle in ((len(request.prompt), input_len), (request.output_len, output_len)):
            assert max(1, middle * (1 - ratio)) <= length <= max(1, middle * (1 + ratio))
        assert all(5 <= token < 50 for token in request.prompt)


def test_spread_lengths_differ():
    requests = spread(50, 100, 100, 0.5)
    assert len({len(request.prompt) for request in requests}) > 20
    assert len({request.output_len for request in requests}) > 20


@given(st.integers(-5, 50), st.integers(6, 100))
def test_shifted_requests_have_the_same_shape_and_other_tokens(step, vocab_size):
    requests = uniform(3, 20, 4, vocab_size=vocab_size)
    moved = shift(requests, step, vocab_size)
    assert [(len(r.prompt), r.output_len) for r in moved] == [(20, 4)] * 3
    for old, new in zip(requests, moved, strict=True):
        assert all(5 <= token < vocab_size for token in new.prompt)
        same = [a == b for a, b in zip(old.prompt, new.prompt, strict=True)]
        assert all(same) if step % (vocab_size - 5) == 0 else not any(same)
    assert shift(moved, -step, vocab_size) == requests


def test_shifting_leaves_text_alone():
    requests = [BenchRequest("text", 3)]
    assert shift(requests, 7, 100) == requests


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_arrivals_have_their_rate_and_burstiness(burstiness):
    times = arrivals(20_000, 50.0, burstiness=burstiness, seed=3)
    gaps = [b - a for a, b in zip([0.0, *times], times, strict=False)]
    assert min(gaps) >= 0
    assert statistics.fmean(gaps) == pytest.approx(1 / 50, rel=0.05)
    # The coefficient of variation of a gamma distribution is one over the root of its shape.
    assert statistics.stdev(gaps) * 50 == pytest.approx(burstiness**-0.5, rel=0.1)


def test_an_infinite_rate_is_all_at_once():
    assert arrivals(3, float("inf")) == [0.0] * 3


# --- files -----------------------------------------------------------------------------------------


@pytest.fixture
def write(tmp_path):
    def write_lines(*records):
        file = tmp_path / "data.jsonl"
        file.write_text("\n\n".join(r if isinstance(r, str) else json.dumps(r) for r in records))
        return file

    return write_lines


def test_a_file_is_read_in_its_order_and_again_from_the_beginning(write):
    conversation = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "a b c"}]
    messages = [{"role": "user", "content": "yo"}, {"role": "assistant", "content": "a b"}]
    file = write(
        {"prompt": "one", "output_tokens": 3},
        {"prompt_token_ids": [1, 2], "output_len": 4},
        {"conversations": conversation},
        {"messages": messages},
    )
    dataset = Dataset(name="custom", num_prompts=5, path=file)
    assert plain(dataset.requests(lambda text: len(text.split()))) == [
        ("one", 3),
        ([1, 2], 4),
        ("hi", 3),
        ("yo", 2),
        ("one", 3),
    ]


def test_lines_beyond_those_that_are_wanted_are_not_read(write):
    file = write({"prompt": "one"}, "no json")
    dataset = Dataset(name="custom", num_prompts=1, path=file, output_len=2)
    assert plain(dataset.requests()) == [("one", 2)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"line 1 is not JSON"),
        ("[1]", r"line 1 must be an object"),
        ({"prompt": "", "output_len": 1}, r"line 1 needs a prompt"),
        ({"prompt": [-1], "output_len": 1}, r"line 1 needs a prompt"),
        ({"other": 1}, r"line 1 needs a prompt"),
        ({"prompt": "a"}, r"line 1 does not say .* --output-len"),
        ({"prompt": "a", "output_len": 0}, r"line 1 does not say"),
        ({"conversations": [{"value": "a"}, {"value": "b"}]}, r"line 1 does not say"),
    ],
)
def test_a_bad_line_is_named(write, line, message):
    with pytest.raises(ConfigError, match=message):
        Dataset(name="custom", num_prompts=1, path=write(line)).requests()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_prompts": 0}, "--num-prompts 0"),
        ({"num_prompts": 1, "input_len": 0}, "--input-len 0"),
        ({"num_prompts": 1, "output_len": 0}, "--output-len 0"),
        ({"num_prompts": 1, "range_ratio": 1.0}, "--random-range-ratio 1"),
        ({"num_prompts": 1, "vocab_size": 5}, "vocabulary of 5"),
        ({"num_prompts": 1, "name": "custom"}, "needs --dataset-path"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(ConfigError, match=message):
        Dataset(**settings).requests()


def test_files_that_cannot_be_used(tmp_path, write):
    with pytest.raises(ConfigError, match="cannot be read"):
        Dataset(name="custom", num_prompts=1, path=tmp_path / "none").requests()
    with pytest.raises(ConfigError, match="has no lines"):
        Dataset(name="custom", num_prompts=1, path=write("")).requests()


@pytest.mark.parametrize(
    ("rate", "burstiness", "name"),
    [(0, 1, "request-rate"), (1, 0, "burstiness"), (float("nan"), 1, "request-rate")],
)
def test_rates_are_positive(rate, burstiness, name):
    with pytest.raises(ConfigError, match=f"--{name}"):
        arrivals(1, rate, burstiness=burstiness)

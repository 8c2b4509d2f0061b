"""Spans, cuts and groups: how a model is divided over ranks."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from core.sharding import Span, covering, divide, local_groups


@given(st.integers(1, 500), st.integers(1, 20), st.integers(1, 64))
def test_parts_are_consecutive_complete_and_even(count, num_parts, step):
    parts = divide(count, num_parts, step)
    assert len(parts) == num_parts
    assert parts[0].start == 0
    assert parts[-1].stop == count
    assert all(a.stop == b.start for a, b in itertools.pairwise(parts))
    has_steps = count % step == 0 and count // step >= num_parts
    unit = step if has_steps else 1
    sizes = [part.size for part in parts]
    assert max(sizes) - min(sizes) <= unit
    assert sizes == sorted(sizes, reverse=True)
    if has_steps:
        assert all(part.start % step == 0 for part in parts)
    if count >= num_parts:
        assert min(sizes) >= 1


@st.composite
def spans_of_features(draw):
    bounds = sorted(draw(st.sets(st.integers(0, 60), min_size=2, max_size=6)))
    return tuple(Span(a, b) for a, b in zip(bounds[::2], bounds[1::2], strict=False))


@given(spans_of_features(), st.integers(1, 16))
def test_each_feature_finds_its_group_among_those_that_were_read(spans, step):
    read = [group for part in covering(spans, step) for group in range(*part)]
    features = [feature for span in spans for feature in range(*span)]
    positions = local_groups(spans, step)
    assert [read[position] for position in positions] == [feature // step for feature in features]


def test_spans_scale_and_move():
    assert Span(2, 5).scaled(4) == (8, 20)
    assert Span(2, 5).shifted(10) == (12, 15)
    assert Span(2, 5).size == 3

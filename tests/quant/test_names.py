"""Which layers patterns mean."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from core.errors import CheckpointError
from core.interfaces import LinearSpec
from core.quant.names import ask_shards, in_decoder, matches, matches_exactly, spellings
from core.testing.lone_linear import TINY_MODEL

NAME = "model.layers.1.self_attn.q_proj"
RENAMED = replace(
    TINY_MODEL, renames=(("language_model.model.", "model."), ("model.language_model.", "model."))
)


@pytest.mark.parametrize(
    "pattern",
    [
        NAME,
        "q_proj",
        "self_attn",
        "layers.1",
        "model",
        "re:model",
        r"re:.*\.q_proj$",
        r"re:model\.layers\.1\.",
    ],
)
def test_means_the_layer(pattern):
    assert matches(NAME, pattern)
    assert not matches("lm_head", pattern)


@pytest.mark.parametrize("pattern", ["layers", "q_pro", "proj", "1.self", "", "re:layers", "re:q_proj"])
def test_parts_of_a_name_are_whole(pattern):
    assert matches("model.layers.10.self_attn.q_proj", pattern) == (pattern == "layers")


parts = st.lists(st.sampled_from("ab"), min_size=1, max_size=4)


@given(name=parts, pattern=parts)
def test_plain_patterns_are_runs_of_parts(name, pattern):
    runs = [name[i : i + len(pattern)] for i in range(len(name))]
    assert matches(".".join(name), ".".join(pattern)) == (pattern in runs)


def test_exact_patterns_mean_whole_names_or_regular_expressions():
    assert matches_exactly(NAME, NAME)
    assert not matches_exactly(NAME, "q_proj")
    assert matches_exactly(NAME, "re:.*q_proj")
    assert not matches_exactly(NAME, "re:q_proj")


@pytest.mark.parametrize("ask", [matches, matches_exactly])
def test_a_malformed_regular_expression_is_the_checkpoints_fault(ask):
    with pytest.raises(CheckpointError, match=re.escape("'re:(' is no regular expression")):
        ask(NAME, "re:(")


def test_names_of_the_checkpoint_become_those_of_the_decoder():
    patterns = ("language_model.model.layers.1", "model.language_model.layers", "lm_head", "re:.*x")
    assert in_decoder(patterns, RENAMED) == ("model.layers.1", "model.layers", "lm_head", "re:.*x")


def test_spellings_are_all_names_that_are_renamed_to_one():
    names = spellings("model.norm", RENAMED)
    assert names == ("model.norm", "language_model.model.norm", "model.language_model.norm")
    assert {in_decoder([name], RENAMED) for name in names} == {("model.norm",)}
    assert spellings("lm_head", RENAMED) == spellings("lm_head", None) == ("lm_head",)


def test_shards_have_to_agree():
    spec = LinearSpec(
        "a.qk", 4, (("a.q", 4), ("a.k", 4)), False, torch.float32, torch.device("cpu"), "qkv"
    )
    assert ask_shards(spec, len, "length") == 3
    with pytest.raises(
        CheckpointError, match=r"parts of a\.qk must agree on it.*a\.q: True, a\.k: False"
    ):
        ask_shards(spec, lambda prefix: prefix == "a.q", "it")

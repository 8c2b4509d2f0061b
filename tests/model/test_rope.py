"""Rotary tables against `transformers`, and the laws that a rotation obeys."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from core.model.families import load_hf_config, read_model
from core.model.rope import RotaryTable, apply_rotary, inverse_frequencies
from core.model.spec import RopeSpec
from core.testing.checkpoints import FAMILIES, ORIGINAL_MAX_POSITION

CPU = torch.device("cpu")
SCALED = [
    variant
    for variant, entry in FAMILIES.items()
    if entry.rope is not None and entry.rope.get("rope_type", "default") != "default"
]
DEFAULT = RopeSpec(kind="default", theta=10_000.0, rotary_dim=16)


@pytest.mark.parametrize("max_len", [ORIGINAL_MAX_POSITION, ORIGINAL_MAX_POSITION + 1, 100])
@pytest.mark.parametrize("variant", SCALED)
def test_frequencies_equal_transformers(variant, max_len, checkpoint):
    config = load_hf_config(checkpoint(variant))
    rope = read_model(config).ropes["default"]
    expected, attention_factor = ROPE_INIT_FUNCTIONS[rope.kind](config, CPU, seq_len=max_len)
    torch.testing.assert_close(inverse_frequencies(rope, max_len, torch.float32), expected)
    assert rope.attention_factor == pytest.approx(attention_factor)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mscale": 0.7, "mscale_all_dim": 1.0},
        {"attention_factor": 1.5},
        {"truncate": False},
        {"beta_fast": 8.0, "beta_slow": 6.0},  # a ramp without width
    ],
)
def test_options_of_yarn_equal_transformers(options):
    entry = FAMILIES["llama-yarn"]
    config = type(entry)(entry.model_type, entry.settings, {**entry.rope, **options}).make_config()
    rope = read_model(config).ropes["default"]
    expected, attention_factor = ROPE_INIT_FUNCTIONS["yarn"](config, CPU)
    torch.testing.assert_close(inverse_frequencies(rope, 64, torch.float32), expected)
    assert rope.attention_factor == pytest.approx(attention_factor)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_the_maximal_length_alone_decides_the_regime(kind):
    rope = RopeSpec(
        kind=kind,
        theta=10_000.0,
        rotary_dim=8,
        factor=4.0,
        original_max_position=32,
        short_factor=(1.0, 1.1, 1.2, 1.3),
        long_factor=(2.0, 3.0, 4.0, 5.0),
    )
    short, limit, beyond = (inverse_frequencies(rope, n, torch.float64) for n in (8, 32, 33))
    torch.testing.assert_close(short, limit)
    assert (beyond < limit).any()


def test_tables_are_cast_to_the_dtype_after_they_were_computed_in_float32():
    wide = RotaryTable(DEFAULT, 4096, CPU, torch.float32)
    narrow = RotaryTable(DEFAULT, 4096, CPU, torch.bfloat16)
    assert narrow.cos.dtype == torch.bfloat16
    torch.testing.assert_close(narrow.cos, wide.cos.bfloat16(), rtol=0, atol=0)
    exact = RotaryTable(DEFAULT, 4096, CPU, torch.float64)
    assert exact.sin.dtype == torch.float64
    torch.testing.assert_close(wide.sin.double(), exact.sin, rtol=0, atol=1e-3)


def test_dimensions_beyond_the_rotated_ones_pass_through():
    table = RotaryTable(DEFAULT, 8, CPU, torch.float32)
    x = torch.randn(3, 2, 24)
    rotated, _ = apply_rotary(x, x, *table.cos_sin(torch.tensor([1, 5, 7])))
    torch.testing.assert_close(rotated[..., 16:], x[..., 16:], rtol=0, atol=0)
    assert (rotated[..., :16] != x[..., :16]).all()


def rotate(vector, position):
    table = RotaryTable(DEFAULT, 10_000, CPU, torch.float64)
    x = vector.view(1, 1, -1)
    return apply_rotary(x, x, *table.cos_sin(torch.tensor([position])))[0].flatten()


vectors = st.integers(0, 2**32).map(
    lambda seed: torch.randn(16, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
)
positions = st.integers(0, 4_999)


@settings(max_examples=50, deadline=None)
@given(vectors, positions)
def test_a_rotation_keeps_the_norm(vector, position):
    torch.testing.assert_close(rotate(vector, position).norm(), vector.norm())


@settings(max_examples=50, deadline=None)
@given(vectors, vectors, positions, positions, st.integers(0, 4_999))
def test_scores_depend_on_the_distance_only(q, k, first, second, shift):
    score = rotate(q, first) @ rotate(k, second)
    shifted = rotate(q, first + shift) @ rotate(k, second + shift)
    torch.testing.assert_close(shifted, score, rtol=1e-9, atol=1e-9)

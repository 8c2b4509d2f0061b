"""Counter-based numbers: against a reference in Python integers, and against statistics."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core.counter_rng import exponentials, random_bits, resolve_seed, splitmix64

GAMMA = 0x9E3779B97F4A7C15
SEEDS = st.integers(0, 2**63 - 1) | st.sampled_from([0, 1, 2**63 - 1])


def finalise(value):
    """SplitMix64's finaliser, from the paper's description."""
    value %= 2**64
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB % 2**64
    return value ^ (value >> 31)


def reference_bits(seed, position, token):
    state = finalise(finalise(finalise(seed + GAMMA) + position * GAMMA + GAMMA) + (token + 1) * GAMMA)
    return state - 2**64 if state >= 2**63 else state


def test_published_sequence_of_splitmix64():
    state, values = 1234567, []
    for _ in range(5):
        values.append(splitmix64(state))
        state += GAMMA
    assert values == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


@settings(deadline=None)
@given(st.lists(st.tuples(SEEDS, st.integers(0, 2**31)), min_size=1, max_size=6), st.integers(1, 40))
def test_bits_are_those_of_the_reference(keys, num_tokens):
    seeds, positions = (torch.tensor(column) for column in zip(*keys, strict=True))
    bits = random_bits(seeds, positions, torch.arange(num_tokens))
    assert bits.tolist() == [
        [reference_bits(seed, position, token) for token in range(num_tokens)]
        for seed, position in keys
    ]


def test_arguments_are_left_alone():
    seeds, positions, tokens = torch.tensor([5, 6]), torch.tensor([7, 8]), torch.arange(9)
    exponentials(seeds, positions, tokens)
    assert (seeds.tolist(), positions.tolist()) == ([5, 6], [7, 8])
    assert tokens.tolist() == list(range(9))


@settings(deadline=None)
@given(SEEDS, st.integers(0, 2**31))
def test_exponentials_follow_from_the_bits(seed, position):
    noise = exponentials(torch.tensor([seed]), torch.tensor([position]), torch.arange(64))[0]
    for token, value in enumerate(noise.tolist()):
        uniform = (reference_bits(seed, position, token) % 2**63 | 1) / 2**63
        exact = -math.log1p(-uniform)
        # Float32's rounding of the uniform number tells for large values only, which lose races.
        assert value == pytest.approx(exact, rel=1e-6 + 2.0**-23 * math.exp(exact) / exact)


@pytest.mark.parametrize("bits", [0, 1, -1, 2**63 - 1, -(2**63), 2**62, 2**63 - 2**38])
def test_exponentials_of_extreme_bits_are_positive_and_finite(bits, monkeypatch):
    monkeypatch.setattr("core.counter_rng.random_bits", lambda *_: torch.tensor([[bits]]))
    value = exponentials(torch.tensor([0]), torch.tensor([0]), torch.tensor([0])).item()
    assert 2.0**-64 < value < 17.0


def uniforms(seeds, positions, num_tokens):
    bits = random_bits(torch.as_tensor(seeds), torch.as_tensor(positions), torch.arange(num_tokens))
    return (bits & (2**63 - 1)).double() / 2.0**63


def assert_uniform(buckets, num_buckets):
    """Chi-square, refusing at about five standard deviations on both sides."""
    counts = torch.bincount(buckets.flatten(), minlength=num_buckets).double()
    expected = buckets.numel() / num_buckets
    statistic = ((counts - expected) ** 2 / expected).sum().item()
    free = num_buckets - 1
    assert abs(statistic - free) < 5 * math.sqrt(2 * free)


# Consecutive numbers along each of the three coordinates, from plain and from extreme starts.
AXES = {
    "tokens": lambda n: uniforms([3], [17], n)[0],
    "positions": lambda n: uniforms([3] * n, range(n), 1)[:, 0],
    "seeds": lambda n: uniforms(range(n), [17] * n, 1)[:, 0],
    "high seeds": lambda n: uniforms(range(2**63 - n, 2**63), [17] * n, 1)[:, 0],
}


@pytest.mark.parametrize("axis", AXES)
def test_numbers_are_uniform_and_neighbours_independent(axis):
    values = AXES[axis](2**17)
    assert_uniform((values * 256).long(), 256)
    cells = (values * 16).long()
    for lag in (1, 2, 64):
        assert_uniform(cells[:-lag:lag] * 16 + cells[lag::lag], 256)
    # The lowest of the 63 bits as well: they decide the smallest numbers.
    assert_uniform((values * 2.0**12).frac().mul(256).long(), 256)


def test_each_coordinate_alone_changes_half_of_the_bits():
    base = random_bits(torch.arange(64), torch.arange(64), torch.arange(64))
    for seeds, positions in ((1, 0), (0, 1), (2**40, 0)):
        other = random_bits(torch.arange(64) + seeds, torch.arange(64) + positions, torch.arange(64))
        flips = sum((value % 2**64).bit_count() for value in (base ^ other).flatten().tolist())
        assert abs(flips / base.numel() / 64 - 0.5) < 0.005


def test_exponentials_have_the_moments_of_the_unit_exponential():
    noise = exponentials(torch.arange(64), torch.zeros(64, dtype=torch.int64), torch.arange(4096))
    noise = noise.double()
    assert noise.mean().item() == pytest.approx(1.0, abs=0.01)
    assert noise.var().item() == pytest.approx(1.0, abs=0.02)
    assert_uniform((torch.exp(-noise) * 256).long().clamp(max=255), 256)


@settings(deadline=None)
@given(st.integers(-(2**70), 2**70), st.integers(0, 2**40))
def test_resolved_seeds_are_legal_and_reproducible(engine_seed, index):
    seed = resolve_seed(engine_seed, index)
    assert 0 <= seed < 2**63
    assert seed == resolve_seed(engine_seed, index)


def test_resolved_seeds_do_not_repeat():
    seeds = {resolve_seed(engine, index) for engine in range(100) for index in range(1000)}
    assert len(seeds) == 100_000


def test_host_helpers_do_not_import_torch():
    # Loaded by path: `import core` may bring whatever its public names need.
    program = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('rng', {sys.modules['core.counter_rng'].__file__!r})\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "assert module.resolve_seed(0, 0) >= 0\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)  # noqa: S603  own code

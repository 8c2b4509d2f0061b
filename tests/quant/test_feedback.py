"""Error feedback against its definition in float64, for rounding of any kind."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import CheckpointError
from core.quant import feedback
from core.quant.feedback import find_hessian, invert, round_inputs

F64 = torch.float64


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def correlated(num_tokens, num_inputs, seed=0):
    """Inputs that depend on one another, some of them much larger than others."""
    mixing = draw(num_inputs, num_inputs, seed=seed + 1) / math.sqrt(num_inputs)
    sizes = torch.exp(draw(num_inputs, seed=seed + 2))
    return draw(num_tokens, num_inputs, seed=seed + 3) @ mixing * sizes


def identity(size):
    return torch.eye(size, dtype=F64)


# --- the decomposition -----------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_the_hessian_is_that_of_all_tokens(chunk, monkeypatch):
    monkeypatch.setattr(feedback, "TOKENS_AT_ONCE", chunk)
    x = correlated(50, 9)
    torch.testing.assert_close(find_hessian(x), 2 * x.T @ x / 50)
    assert find_hessian(x.half()).dtype == torch.float32
    assert not find_hessian(x[:0]).any()


@settings(max_examples=30, deadline=None)
@given(size=st.integers(1, 40), num_tokens=st.integers(0, 60), damping=st.sampled_from([0.001, 0.1]))
def test_the_inverse_is_decomposed(size, num_tokens, damping):
    hessian = find_hessian(correlated(num_tokens, size))
    upper = invert(hessian, damping, "a")
    damped = hessian + damping * hessian.diagonal().mean() * identity(size)
    if not num_tokens:
        damped = identity(size)
    assert torch.equal(upper, upper.triu())
    torch.testing.assert_close(upper.T @ upper @ damped, identity(size), rtol=1e-6, atol=1e-6)


def test_inputs_that_are_always_zero_touch_nothing():
    x = correlated(80, 12)
    x[:, [3, 7]] = 0
    upper = invert(find_hessian(x), 0.01, "a")
    others = [i for i in range(12) if i not in (3, 7)]
    assert not upper[3, 4:].any()
    assert not upper[:3, 3].any()
    torch.testing.assert_close(
        upper[others][:, others], invert(find_hessian(x[:, others]), 0.01, "a"), rtol=1e-9, atol=1e-12
    )


def test_damping_is_raised_where_it_does_not_suffice():
    x = draw(1, 16).repeat(64, 1)
    hessian = find_hessian(x).float()  # of rank one
    assert invert(hessian, 1e-9, "a").isfinite().all()


def test_what_cannot_be_damped_is_refused():
    hessian = find_hessian(correlated(20, 4))
    hessian[1, 2] = hessian[2, 1] = math.nan
    with pytest.raises(
        CheckpointError, match=r"Hessian of a\.b is not positive definite.*--damp-percent"
    ):
        invert(hessian, 0.01, "a.b")


# --- rounding --------------------------------------------------------------------------------------


def round_to_steps(weight, hessian, step, damping=0.01):
    """Round to multiples of a step: what was rounded, and the rounded weights."""
    found = torch.empty_like(weight)

    def round_input(index, later):
        found[:, index] = (later[0] / step).round() * step
        return found[:, index]

    round_inputs(weight.clone(), invert(hessian, damping, "a"), round_input)
    return found


def rest_as_defined(weight, hessian, step, damping=0.01):
    """Solve for the best change of all later inputs, one input at a time: no Cholesky, no blocks."""
    num_inputs = weight.shape[1]
    hessian = hessian + damping * hessian.diagonal().mean() * identity(num_inputs)
    weight, found = weight.clone(), torch.empty_like(weight)
    for index in range(num_inputs):
        found[:, index] = (weight[:, index] / step).round() * step
        later = slice(index + 1, num_inputs)
        change = torch.linalg.solve(hessian[later, later], hessian[later, index])
        weight[:, later] += torch.outer(weight[:, index] - found[:, index], change)
    return found


@pytest.mark.parametrize("block_size", [1, 16, 25, 128])
def test_what_is_rounded_is_as_defined(block_size, monkeypatch):
    monkeypatch.setattr(feedback, "BLOCK_SIZE", block_size)
    weight, hessian = draw(6, 96), find_hessian(correlated(300, 96))
    found, expected = (f(weight, hessian, 0.3) for f in (round_to_steps, rest_as_defined))
    # A weight in the middle between two steps may fall to either side, and later ones with it.
    assert ((found - expected).abs() < 1e-9).double().mean() > 0.98


def test_without_correlation_nothing_is_passed_on():
    weight = draw(6, 200)
    hessian = torch.diag(torch.rand(200, dtype=F64) + 0.1)
    assert torch.equal(round_to_steps(weight, hessian, 0.3), (weight / 0.3).round() * 0.3)


def test_rounding_that_loses_nothing_changes_nothing():
    weight = draw(6, 200).round(decimals=1)
    found = round_to_steps(weight, find_hessian(correlated(400, 200)), 0.1)
    torch.testing.assert_close(found, weight, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("num_inputs", "group_size"), [(300, None), (512, 128), (480, 96), (1024, 512)]
)
def test_inputs_come_in_order_with_those_that_follow_in_the_block(num_inputs, group_size):
    seen = []

    def round_input(index, later):
        seen.append((index, later.shape))
        return later[0]

    weight = draw(3, num_inputs)
    round_inputs(weight.clone(), identity(num_inputs), round_input, group_size)
    assert [index for index, _ in seen] == list(range(num_inputs))
    assert all(1 <= rows <= 128 and columns == 3 for _, (rows, columns) in seen)


def test_blocks_hold_whole_groups_or_whole_parts_of_one():
    for num_inputs, group_size in [(64, 64), (96, 32), (512, 128), (480, 96), (1024, 512), (300, 300)]:
        blocks = list(feedback._blocks(num_inputs, group_size))
        assert [i for block in blocks for i in range(block.start, block.stop)] == list(
            range(num_inputs)
        )
        assert all(block.stop - block.start <= 128 for block in blocks)
        for block in blocks:
            size = block.stop - block.start
            assert size % group_size == 0 or block.start // group_size == (block.stop - 1) // group_size

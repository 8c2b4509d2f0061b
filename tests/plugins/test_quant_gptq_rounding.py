"""GPTQ itself, against its definition in float64, rounding to nearest, and what it is for."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import CheckpointError
from core.quant import feedback
from core.quant.feedback import find_hessian, find_order
from plugins.quant.gptq.grid import Grid
from plugins.quant.gptq.rounding import quantize

F64 = torch.float64
grids = st.builds(Grid, bits=st.sampled_from([2, 3, 4, 8]), symmetric=st.booleans())


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def correlated(num_tokens, num_inputs, seed=0):
    """Inputs that depend on one another, some of them much larger than others."""
    mixing = draw(num_inputs, num_inputs, seed=seed + 1) / math.sqrt(num_inputs)
    sizes = torch.exp(draw(num_inputs, seed=seed + 2))
    return draw(num_tokens, num_inputs, seed=seed + 3) @ mixing * sizes


def output_error(x, weight, quantized):
    difference = x @ (quantized.dequantize() - weight).T
    return (difference.norm() / (x @ weight.T).norm()).item()


def identity(size):
    return torch.eye(size, dtype=F64)


# --- the grid --------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(
    grid=grids,
    seed=st.integers(0, 1000),
    shift=st.sampled_from([0.0, -0.5, -1, 1, 8]),
    size=st.sampled_from([1e-6, 0.02, 1, 300]),
)
def test_errors_within_a_range_are_at_most_half_a_step(grid, seed, shift, size):
    weights = (draw(7, 20, seed=seed) + shift) * size
    scale, zero = grid.span(weights.amin(-1).clamp(max=0), weights.amax(-1).clamp(min=0))
    codes = grid.encode(weights.T, scale, zero).T
    assert 0 <= codes.min() <= codes.max() <= grid.max_code
    assert torch.equal(codes, codes.round())
    errors = (weights - (codes - zero[:, None]) * scale[:, None]).abs() / scale[:, None]
    # A scale may have been rounded down by one part in 2048, or more where float16 is denormal.
    slack = grid.max_code * (2.0**-11 + 2.0**-25 / scale.min())
    assert errors.max() <= 0.5 + slack


@settings(max_examples=50, deadline=None)
@given(grid=grids, seed=st.integers(0, 1000), share=st.sampled_from([1.0, 0.98, 0.8, 0.6]))
def test_no_share_of_the_range_rounds_with_less_squares(grid, seed, share):
    weights = draw(7, 20, seed=seed)

    def squares(scale, zero):
        codes = grid.encode(weights.T, scale, zero).T
        return ((codes - zero[:, None]) * scale[:, None] - weights).square().sum(-1)

    low, high = weights.amin(-1).clamp(max=0), weights.amax(-1).clamp(min=0)
    found, other = squares(*grid.fit(weights)), squares(*grid.span(share * low, share * high))
    assert (found <= other * (1 + 1e-12)).all()


def test_one_large_weight_does_not_coarsen_all_others():
    grid = Grid(bits=4, symmetric=True)
    weights = torch.cat((draw(1, 127, seed=0), torch.full((1, 1), 5.0, dtype=F64)), dim=1)
    scale, _ = grid.fit(weights)
    assert scale < 0.9 * 2 * 5.0 / 15


@settings(max_examples=100, deadline=None)
@given(grid=grids, seed=st.integers(0, 1000), shift=st.sampled_from([0, -3, 3]))
def test_scales_and_zero_points_are_what_can_be_stored(grid, seed, shift):
    scale, zero = grid.fit(draw(7, 20, seed=seed) + shift)
    assert torch.equal(scale, scale.half().double())
    assert (scale > 0).all()
    assert torch.equal(zero, zero.round())
    assert 1 <= zero.min() <= zero.max() <= grid.max_code  # less one, it is stored unsigned
    if grid.symmetric:
        assert (zero == 2 ** (grid.bits - 1)).all()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("value", [0.0, 1.0, -1.0, 1e-12])
def test_constant_groups(value, symmetric):
    grid = Grid(bits=4, symmetric=symmetric)
    weights = torch.full((3, 8), value, dtype=F64)
    scale, zero = grid.fit(weights)
    found = (grid.encode(weights[:, 0], scale, zero) - zero) * scale
    assert (found - value).abs().max() <= 0.51 * scale.max()
    assert scale.isfinite().all()


# --- rounding --------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(grid=grids, group_size=st.sampled_from([None, 4, 32, 64]), seed=st.integers(0, 99))
def test_inputs_that_do_not_depend_on_one_another_are_rounded_to_nearest(grid, group_size, seed):
    weight = draw(5, 64, seed=seed) + 0.3
    found = quantize(weight, identity(64), grid, group_size, damp_percent=0.01)
    groups = torch.arange(64) // (group_size or 64)
    assert torch.equal(found.groups.long(), groups)
    for group in range(int(groups.max()) + 1):
        part = weight[:, groups == group]
        scale, zero = grid.fit(part)
        assert torch.equal(found.scales[:, group], scale)
        assert torch.equal(found.zeros[:, group].double(), zero)
        codes = grid.encode(part.T, scale, zero).T
        assert torch.equal(found.codes[:, groups == group].double(), codes)


def rest_as_defined(weight, hessian, grid, group_size, damping):
    """Quantize one input at a time, solving for the best change of all later ones: no Cholesky."""
    num_inputs = weight.shape[1]
    hessian = hessian + damping * hessian.diagonal().mean() * identity(num_inputs)
    weight, codes = weight.clone(), torch.empty_like(weight)
    for column in range(num_inputs):
        if column % group_size == 0:
            scale, zero = grid.fit(weight[:, column : column + group_size])
        codes[:, column] = grid.encode(weight[:, column], scale, zero)
        error = weight[:, column] - (codes[:, column] - zero) * scale
        later = slice(column + 1, num_inputs)
        change = torch.linalg.solve(hessian[later, later], hessian[later, column])
        weight[:, later] += torch.outer(error, change)
    return codes


@pytest.mark.parametrize("group_size", [8, 24, 48, 96])
@pytest.mark.parametrize("block_size", [1, 16, 24, 128])
def test_codes_are_those_of_the_definition(group_size, block_size, monkeypatch):
    monkeypatch.setattr(feedback, "BLOCK_SIZE", block_size)
    grid = Grid(bits=3, symmetric=False)
    weight, hessian = draw(6, 96), find_hessian(correlated(300, 96))
    found = quantize(weight, hessian, grid, group_size, damp_percent=0.05)
    expected = rest_as_defined(weight, hessian, grid, group_size, 0.05)
    # A weight in the middle between two codes may fall to either side, and later ones with it.
    assert (found.codes.double() == expected).double().mean() > 0.98


@settings(max_examples=20, deadline=None)
@given(grid=grids, group_size=st.sampled_from([None, 16, 32]), seed=st.integers(0, 99))
def test_rows_do_not_touch_each_other(grid, group_size, seed):
    weight, hessian = draw(6, 32, seed=seed), find_hessian(correlated(100, 32, seed))
    settings_ = {"damp_percent": 0.01, "act_order": bool(seed % 2)}
    together = quantize(weight, hessian, grid, group_size, **settings_)
    alone = quantize(weight[2:4], hessian, grid, group_size, **settings_)
    torch.testing.assert_close(together.dequantize()[2:4], alone.dequantize())


@settings(max_examples=30, deadline=None)
@given(grid=grids, group_size=st.sampled_from([None, 8, 16]), seed=st.integers(0, 99))
def test_act_order_is_the_same_on_inputs_in_that_order(grid, group_size, seed):
    weight, x = draw(6, 32, seed=seed), correlated(100, 32, seed)
    hessian = find_hessian(x)
    order = find_order(hessian)
    assert (hessian.diagonal()[order].diff() <= 0).all()
    found = quantize(weight, hessian, grid, group_size, damp_percent=0.01, act_order=True)
    moved = quantize(weight[:, order], find_hessian(x[:, order]), grid, group_size, damp_percent=0.01)
    assert torch.equal(found.codes[:, order], moved.codes)
    assert torch.equal(found.groups[order], moved.groups)
    assert torch.equal(found.dequantize()[:, order], moved.dequantize())


def test_inputs_that_are_always_zero_are_rounded_to_nearest():
    grid = Grid(bits=4, symmetric=True)
    weight, x = draw(5, 32), correlated(100, 32)
    x[:, 9] = 0
    found = quantize(weight, find_hessian(x), grid, None, damp_percent=0.01)
    nearest = quantize(weight, identity(32), grid, None, damp_percent=0.01)
    assert torch.equal(found.codes[:, 9], nearest.codes[:, 9])


def test_without_calibration_all_is_rounded_to_nearest():
    grid = Grid(bits=4, symmetric=True)
    weight = draw(5, 32)
    found = quantize(weight, find_hessian(torch.empty(0, 32)).double(), grid, 16, damp_percent=0.01)
    assert torch.equal(found.codes, quantize(weight, identity(32), grid, 16, damp_percent=0.01).codes)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e6])
def test_weights_that_no_scale_fits_are_refused(value):
    weight = draw(4, 16)
    weight[2, 5] = value
    with pytest.raises(CheckpointError, match=r"a\.b holds a weight that is not finite, or too large"):
        quantize(weight, identity(16), Grid(bits=3, symmetric=True), 8, damp_percent=0.01, name="a.b")


def test_arguments_stay_as_they_are():
    weight, hessian = draw(5, 32), find_hessian(correlated(100, 32))
    before = weight.clone(), hessian.clone()
    quantize(weight, hessian, Grid(bits=4, symmetric=True), 16, damp_percent=0.01)
    assert torch.equal(weight, before[0])
    assert torch.equal(hessian, before[1])


# --- what it is for --------------------------------------------------------------------------------


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("group_size", [None, 32, 128])
def test_outputs_are_clearly_nearer_than_with_rounding_to_nearest(bits, group_size, symmetric):
    grid = Grid(bits=bits, symmetric=symmetric)
    errors = []
    for seed in range(4):
        weight, x = draw(48, 128, seed=seed), correlated(600, 128, seed=10 * seed)
        hessian = find_hessian(x)
        errors.append(
            [
                output_error(x, weight, quantize(weight, h, grid, group_size, **changes))
                for h, changes in [
                    (identity(128), {"damp_percent": 0.01}),
                    (hessian, {"damp_percent": 0.01}),
                    (hessian, {"damp_percent": 0.01, "act_order": True}),
                ]
            ]
        )
    nearest, in_order, by_importance = torch.tensor(errors).mean(0).tolist()
    assert in_order < 0.9 * nearest
    assert by_importance < in_order


def test_more_bits_and_smaller_groups_are_nearer():
    weight, x = draw(48, 128), correlated(600, 128)

    def error(bits, group_size):
        grid = Grid(bits=bits, symmetric=False)
        result = quantize(weight, find_hessian(x), grid, group_size, damp_percent=0.01, act_order=True)
        return output_error(x, weight, result)

    assert error(2, 32) > error(3, 32) > error(4, 32) > error(8, 32)
    assert error(4, None) > error(4, 32)


def test_float32_is_good_enough():
    weight, x = draw(48, 128), correlated(600, 128)
    grid = Grid(bits=4, symmetric=True)
    exact = quantize(weight, find_hessian(x), grid, 32, damp_percent=0.01)
    single = quantize(weight.float(), find_hessian(x.float()), grid, 32, damp_percent=0.01)
    found = output_error(x, weight, replace(single, scales=single.scales.double()))
    assert found == pytest.approx(output_error(x, weight, exact), rel=0.02)

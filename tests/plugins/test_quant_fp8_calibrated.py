"""FP8 weights rounded with error feedback, against rounding to nearest."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import CheckpointError
from core.quant.feedback import find_hessian
from plugins.quant.fp8 import blocks, calibrated
from plugins.quant.fp8.blocks import block_of, block_scales, spread
from plugins.quant.fp8.calibrated import FACTORS, find_scales, quantize
from plugins.quant.fp8.rounding import DTYPE, MAX, decode, encode

STRATEGIES = ("channel", "tensor", "block")
strategies = st.sampled_from(STRATEGIES)


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def correlated(num_tokens, num_inputs, seed=0):
    """Inputs that depend on one another, some of them much larger than others."""
    mixing = draw(num_inputs, num_inputs, seed=seed + 1) / math.sqrt(num_inputs)
    sizes = torch.exp(draw(num_inputs, seed=seed + 2))
    return draw(num_tokens, num_inputs, seed=seed + 3) @ mixing * sizes


def run(weight, hessian, strategy, **changes):
    """Quantize one shard: codes and scales."""
    options = {"damp_percent": 0.01, "name": "a"} | changes
    return quantize({"a": weight}, hessian, strategy, **options)["a"]


def spread_scales(scales, weight, strategy):
    """Repeat scales for all weights: [R, C]."""
    block = block_of(strategy, weight.shape)
    by_row = scales[torch.arange(len(weight)) // block.rows]
    return spread(by_row, block.columns, 0, weight.shape[1])


def decoded(codes, scales, strategy):
    return decode(codes, spread_scales(scales, codes, strategy))


def nearest(weight, scales, strategy):
    return encode(weight, spread_scales(scales, weight, strategy))


def relative_error(x, weight, found):
    return ((x @ (found - weight).T).norm() / (x @ weight.T).norm()).item()


# --- rounding --------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(strategy=strategies, seed=st.integers(0, 99), size=st.sampled_from([1e-8, 0.02, 300]))
def test_inputs_that_do_not_depend_on_one_another_are_rounded_to_nearest(strategy, seed, size):
    weight = draw(150, 140, seed=seed) * size
    codes, scales = run(weight, torch.eye(140), strategy)
    assert torch.equal(codes.float(), nearest(weight, scales, strategy).float())


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_without_calibration_all_is_rounded_to_nearest(strategy):
    weight = draw(150, 140)
    codes, scales = run(weight, find_hessian(torch.empty(0, 140)), strategy)
    assert torch.equal(codes.float(), nearest(weight, scales, strategy).float())


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_outputs_are_clearly_nearer_than_with_rounding_to_nearest(strategy):
    for seed in range(3):
        weight, x = draw(150, 200, seed=seed), correlated(900, 200, seed=10 * seed)
        block = block_of(strategy, weight.shape)
        plain = blocks.quantize(weight, block, "a")
        found = run(weight, find_hessian(x), strategy)
        errors = [relative_error(x, weight, decoded(*pair, strategy)) for pair in (found, plain)]
        assert errors[0] < 0.8 * errors[1]
        # Not the scales alone: the same ones with rounding to nearest are worse.
        same = decode(nearest(weight, found[1], strategy), spread_scales(found[1], weight, strategy))
        assert errors[0] < 0.85 * relative_error(x, weight, same)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_other_text_of_that_kind_gains_too(strategy):
    x = correlated(6000, 200)
    weight, seen, unseen = draw(150, 200), x[:3000], x[3000:]
    plain = blocks.quantize(weight, block_of(strategy, weight.shape), "a")
    found = run(weight, find_hessian(seen), strategy)
    errors = [relative_error(unseen, weight, decoded(*pair, strategy)) for pair in (found, plain)]
    assert errors[0] < 0.8 * errors[1]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_inputs_that_are_always_zero_are_rounded_to_nearest(strategy):
    weight, x = draw(150, 140), correlated(400, 140)
    dead = [0, 9, 130]
    x[:, dead] = 0
    codes, scales = run(weight, find_hessian(x), strategy)
    assert torch.equal(codes.float()[:, dead], nearest(weight, scales, strategy).float()[:, dead])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_errors_that_push_weights_out_of_range_stop_at_its_end(strategy, monkeypatch):
    monkeypatch.setattr(calibrated, "FACTORS", (1.0,))  # the largest weights have the last code
    pushed = []

    def see(weights, scale):
        pushed.append((weights.abs() > 1.001 * MAX * scale).any().item())
        return encode(weights, scale)

    weight = 0.8 + 0.2 * torch.rand(150, 140, generator=torch.Generator().manual_seed(0))
    x = draw(900, 1) + 0.05 * draw(900, 140, seed=2)  # almost one input: errors reach all others
    plain = blocks.quantize(weight, block_of(strategy, weight.shape), "a")
    monkeypatch.setattr(calibrated, "encode", see)
    codes, scales = run(weight, find_hessian(x), strategy)
    assert any(pushed)
    assert codes.dtype == DTYPE
    assert codes.float().abs().max() == MAX  # and none is NaN
    errors = [relative_error(x, weight, decoded(*pair, strategy)) for pair in ((codes, scales), plain)]
    assert errors[0] < 0.8 * errors[1]


def test_all_zeros_stay_zeros():
    codes, scales = run(torch.zeros(5, 40), find_hessian(correlated(90, 40)), "channel")
    assert not codes.float().any()
    assert (scales == 1).all()


def test_shards_have_their_own_scales_and_arguments_stay_as_they_are():
    weights = {"a": draw(150, 140), "b": draw(30, 140, seed=1) * 100}
    hessian = find_hessian(correlated(400, 140))
    before = {name: weight.clone() for name, weight in weights.items()}, hessian.clone()
    for strategy in STRATEGIES:
        found = quantize(weights, hessian, strategy, damp_percent=0.01, name="ab")
        for prefix, weight in weights.items():
            codes, scales = run(weight, hessian, strategy)
            assert torch.equal(found[prefix][1], scales)
            # A weight in the middle between two codes may fall to either side, and later ones with it.
            assert (found[prefix][0].float() == codes.float()).float().mean() > 0.95
    assert all(torch.equal(before[0][name], weights[name]) for name in weights)
    assert torch.equal(before[1], hessian)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused_by_name(value):
    weight = draw(4, 16)
    weight[2, 5] = value
    with pytest.raises(CheckpointError, match=r"a\.weight holds a number"):
        run(weight, torch.eye(16), "channel")


# --- scales ----------------------------------------------------------------------------------------


def weighted_squares(weight, costs, scales, strategy):
    """Sum over blocks in float64, one block at a time."""
    rows, columns = block_of(strategy, weight.shape)
    wrong = decode(nearest(weight, scales, strategy), spread_scales(scales, weight, strategy)) - weight
    squares = wrong.double().square() * costs.double()
    return torch.stack(
        [
            torch.stack([part.sum() for part in band.split(columns, dim=1)])
            for band in squares.split(rows)
        ]
    )


@settings(max_examples=30, deadline=None)
@given(strategy=strategies, seed=st.integers(0, 99), factor=st.sampled_from(FACTORS))
def test_no_factor_rounds_with_less_squares(strategy, seed, factor):
    weight, costs = draw(150, 140, seed=seed), draw(140, seed=seed + 1).exp()
    block = block_of(strategy, weight.shape)
    scales = find_scales(weight, block, costs, "a")
    widest = block_scales(weight, block, "a")
    found, other = (weighted_squares(weight, costs, s, strategy) for s in (scales, widest * factor))
    assert scales.shape == widest.shape
    assert (found <= other * (1 + 1e-5)).all()
    assert ((widest <= scales) & (scales < 2 * widest)).all()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_errors_cost_what_no_other_input_can_make_up_for(strategy):
    weight, hessian = draw(150, 140), find_hessian(correlated(900, 140))
    damped = hessian + 0.02 * hessian.diagonal().mean() * torch.eye(140)
    order = torch.argsort(hessian.diagonal(), descending=True)
    costs = torch.empty(140)
    for index, place in enumerate(order):  # of the error, after the best change of all later inputs
        later = order[index + 1 :]
        change = torch.linalg.solve(damped[later][:, later], damped[later, place])
        costs[place] = damped[place, place] - damped[place, later] @ change
    expected = find_scales(weight, block_of(strategy, weight.shape), costs, "a")
    _, scales = run(weight, hessian, strategy, damp_percent=0.02)
    assert (scales == expected).float().mean() > 0.98


def test_scales_do_not_depend_on_how_many_rows_are_looked_at_at_once(monkeypatch):
    weight, costs = draw(300, 140), draw(140, seed=1).exp()
    expected = find_scales(weight, block_of("block", weight.shape), costs, "a")
    monkeypatch.setattr(calibrated, "ROWS_AT_ONCE", 50)
    assert torch.equal(find_scales(weight, block_of("block", weight.shape), costs, "a"), expected)


def test_tiny_weights_have_a_scale_above_zero():
    weight = draw(4, 16) * 1e-44
    codes, scales = run(weight, torch.eye(16), "channel")
    assert (scales > 0).all()
    assert codes.float().isfinite().all()

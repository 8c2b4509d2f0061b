"""Codes, scales and blocks of FP8 against a table in float64, and against compressed-tensors."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import CheckpointError
from plugins.quant.fp8.blocks import Block, block_of, block_scales, in_groups, quantize, spread
from plugins.quant.fp8.rounding import DTYPE, MAX, decode, encode, fake_quantize, scale_of, widen

ONE = torch.ones(())


def value_of(code):
    """Read a code as the paper defines it: bias 7, subnormal at exponent 0, no infinity."""
    sign, exponent, mantissa = code >> 7, (code >> 3) & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    size = (1 + mantissa / 8) * 2.0 ** (exponent - 7) if exponent else mantissa / 8 * 2.0**-6
    return -size if sign else size


TABLE = np.array([value_of(code) for code in range(256)])
MAGNITUDES = TABLE[:127]  # those above 0 in order, without NaN


def round_to_table(x):
    """Round numbers in float64: to the nearest magnitude, the even code of two, at most the last."""
    distance = np.abs(np.abs(np.asarray(x, np.float64))[..., None] - MAGNITUDES)
    nearest = distance.argmin(-1)
    after = np.minimum(nearest + 1, len(MAGNITUDES) - 1)
    is_tie = np.take_along_axis(distance, after[..., None], -1)[..., 0] == distance.min(-1)
    nearest = np.where(is_tie & (nearest % 2 == 1), after, nearest)
    return np.copysign(MAGNITUDES[nearest], x)


def test_all_codes_stand_for_what_the_paper_says():
    codes = torch.arange(256, dtype=torch.uint8).view(DTYPE)
    np.testing.assert_array_equal(decode(codes, ONE).double().numpy(), TABLE)


def test_widening_is_exact_for_all_but_nan():
    codes = torch.tensor([code for code in range(256) if code % 128 != 127], dtype=torch.uint8)
    expected = TABLE[codes.numpy()]
    np.testing.assert_array_equal(widen(codes.view(DTYPE)).double().numpy(), expected)


def test_what_a_code_stands_for_becomes_that_code():
    codes = torch.arange(256, dtype=torch.uint8)
    back = encode(torch.from_numpy(TABLE).float(), ONE).view(torch.uint8)
    is_nan = codes % 128 == 127
    torch.testing.assert_close(back[~is_nan], codes[~is_nan], rtol=0, atol=0)
    assert decode(back[is_nan].view(DTYPE), ONE).isnan().all()


middles = (MAGNITUDES[:-1] + MAGNITUDES[1:]) / 2
sizes = st.sampled_from([*MAGNITUDES.tolist(), *middles.tolist()]) | st.floats(0, 1000, width=32)


@settings(max_examples=300, deadline=None)
@given(
    size=sizes,
    towards=st.sampled_from([0.0, None, math.inf]),
    sign=st.sampled_from([1, -1]),
    exponent=st.integers(-20, 20),
)
def test_rounding_is_to_the_nearest_or_else_the_even_code(size, towards, sign, exponent):
    near = np.nextafter(np.float32(size), np.float32(size if towards is None else towards))
    x = sign * near
    scale = 2.0**exponent  # by which division is exact
    expected = round_to_table(np.array([x])) * scale
    found = decode(encode(torch.tensor([x * scale]), ONE * scale), ONE * scale)
    np.testing.assert_array_equal(found.double().numpy(), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_random_numbers_round_as_in_the_table(dtype):
    x = (torch.randn(4000, generator=torch.Generator().manual_seed(0)) * 100).to(dtype)
    scale = torch.tensor(0.37)
    expected = round_to_table((x.float() / scale).numpy())
    np.testing.assert_array_equal(decode(encode(x, scale), ONE).double().numpy(), expected)
    rounded = fake_quantize(x, scale)
    assert rounded.dtype == dtype
    product = torch.from_numpy(expected).float() * scale
    torch.testing.assert_close(rounded, product.to(dtype), rtol=0, atol=0)


def test_what_is_too_large_becomes_the_largest_and_nan_stays():
    x = torch.tensor([448.0, 463.9, 464.1, 1e30, math.inf, -math.inf, -449.0, math.nan])
    found = decode(encode(x, ONE), ONE)
    expected = torch.tensor([448.0, 448.0, 448.0, 448.0, 448.0, -448.0, -448.0, math.nan])
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


magnitudes = (
    st.floats(0, 2.0**126, width=32)
    | st.floats(0, 2.0**-120, width=32)
    | st.integers(-100, 100).map(lambda exponent: 448 * 2.0**exponent)
)


@settings(max_examples=200, deadline=None)
@given(amax=magnitudes, power_of_two=st.booleans())
def test_scales_bring_the_largest_magnitude_to_the_last_code(amax, power_of_two):
    scale = scale_of(torch.tensor([amax]), power_of_two=power_of_two).double().item()
    ideal = float(np.float32(amax) / np.float32(MAX))
    if ideal == 0:
        assert scale == 1
    elif power_of_two:
        assert math.frexp(scale)[0] == 0.5
        assert ideal <= scale < 2 * ideal
    else:
        assert scale == ideal


def test_a_scale_tells_of_what_is_not_finite():
    scale = scale_of(torch.tensor([math.inf, math.nan]), power_of_two=True)
    assert not scale.isfinite().any()


# --- blocks ----------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(count=st.integers(1, 20), size=st.integers(1, 9), lead=st.integers(0, 8))
def test_each_element_is_in_its_group(count, size, lead):
    lead %= size
    x = torch.arange(1.0, count + 1).expand(3, count)
    groups = in_groups(x, size, lead)
    expected = torch.zeros(groups.shape[1:])
    for index in range(count):
        expected[(lead + index) // size, (lead + index) % size] = index + 1
    torch.testing.assert_close(groups, expected.expand(3, -1, -1))
    scale = torch.arange(groups.shape[1]).expand(3, -1)
    wanted = [(lead + index) // size for index in range(count)]
    assert spread(scale, size, lead, count).tolist() == [wanted] * 3


shapes = st.tuples(st.integers(1, 40), st.integers(1, 40))
blocks = st.sampled_from([Block(1, 1000), Block(1000, 1000), Block(8, 8), Block(1, 8), Block(16, 5)])


@settings(max_examples=60, deadline=None)
@given(shape=shapes, block=blocks, seed=st.integers(0, 99), dtype=st.sampled_from(["32", "64", "16"]))
def test_a_matrix_is_quantized_block_by_block(shape, block, seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator).to(getattr(torch, f"float{dtype}"))
    weight[: shape[0] // 3] = 0
    codes, scales = quantize(weight, block, "layer")
    assert (codes.dtype, scales.dtype) == (DTYPE, torch.float32)
    for i, j in np.ndindex(*scales.shape):
        rows = slice(i * block.rows, (i + 1) * block.rows)
        columns = slice(j * block.columns, (j + 1) * block.columns)
        part = weight[rows, columns].float().numpy()
        amax = np.abs(part).max()
        scale = np.float32(amax / np.float32(MAX)) if amax else np.float32(1)
        assert scales[i, j].item() == scale
        found = decode(codes[rows, columns], ONE).double().numpy()
        np.testing.assert_array_equal(found, round_to_table(part / scale))
        # Four significant bits, and below the normal numbers a fixed step.
        error = np.abs(found * float(scale) - part.astype(np.float64))
        bound = np.maximum(2.0**-4 * np.abs(part), 2.0**-10 * scale)
        assert (error <= bound * (1 + 1e-6)).all()


def test_blocks_of_each_strategy():
    shape = torch.Size((300, 200))
    assert block_of("channel", shape) == (1, 200)
    assert block_of("tensor", shape) == (300, 200)
    assert block_of("block", shape) == (128, 128)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_weights_without_a_code_are_refused_by_name(bad):
    weight = torch.zeros(5, 7)
    weight[3, 2] = bad
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.down_proj\.weight"):
        block_scales(weight, Block(2, 3), "model.layers.1.down_proj")


# --- the library that others write with ------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["tensor", "channel", "block"])
def test_codes_are_those_of_compressed_tensors(strategy):
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.quantization import QuantizationArgs  # noqa: PLC0415  may be missing
    from compressed_tensors.quantization.lifecycle import forward  # noqa: PLC0415

    weight = torch.randn(256, 384, generator=torch.Generator().manual_seed(1))
    codes, scales = quantize(weight, block_of(strategy, weight.shape), "layer")
    blocks = {"block_structure": [128, 128]} if strategy == "block" else {}
    args = QuantizationArgs(num_bits=8, type="float", strategy=strategy, **blocks)
    zero = torch.zeros_like(scales)
    theirs = forward.quantize(weight, scales, zero, args, dtype=DTYPE)
    assert torch.equal(theirs.view(torch.uint8), codes.view(torch.uint8))
    back = forward.dequantize(codes, scales, zero, args)
    per_element = spread(scales, block_of(strategy, weight.shape).columns, 0, 384)
    rows = torch.arange(256) // block_of(strategy, weight.shape).rows
    torch.testing.assert_close(decode(codes, per_element[rows]), back, rtol=0, atol=0)


def test_dynamic_scales_are_those_of_compressed_tensors():
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.quantization import QuantizationArgs  # noqa: PLC0415  may be missing
    from compressed_tensors.quantization.utils import (  # noqa: PLC0415
        compute_dynamic_scales_and_zp,
    )

    x = torch.randn(9, 64, generator=torch.Generator().manual_seed(1))
    args = QuantizationArgs(num_bits=8, type="float", strategy="token", dynamic=True)
    theirs, _ = compute_dynamic_scales_and_zp(x[None], args, torch.nn.Identity())
    torch.testing.assert_close(scale_of(x.abs().amax(-1, keepdim=True)), theirs[0], rtol=0, atol=0)

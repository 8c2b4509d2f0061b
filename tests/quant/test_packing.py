"""Packed integers, against written-out words, big integers and compressed-tensors."""

from __future__ import annotations

import pytest
import torch
from gptq_oracle import pack_columns, pack_rows
from hypothesis import given, settings
from hypothesis import strategies as st

from core.quant.packing import codes_per_period, pack, unpack

BITS = range(1, 9)


def draw_codes(bits, shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**bits, shape, generator=generator, dtype=torch.int32)


@pytest.mark.parametrize(
    ("bits", "codes", "words"),
    [
        (8, [0x11, 0x22, 0x33, 0x44], [0x44332211]),
        (4, [1, 2, 3, 4, 5, 6, 7, 0xF], [0xF7654321 - 2**32]),
        (4, [0] * 7 + [7], [0x70000000]),
        (2, [0, 1, 2, 3] * 4, [0b11100100_11100100_11100100_11100100 - 2**32]),
        (1, [1] + [0] * 30 + [1], [0x80000001 - 2**32]),
    ],
)
def test_written_out(bits, codes, words):
    assert pack(torch.tensor(codes), bits).tolist() == words
    assert unpack(torch.tensor(words, dtype=torch.int32), bits).tolist() == codes


def pack_three_bits(codes):
    """Fill three words as AutoGPTQ does: ten codes, and two more that are split between the words."""
    words = [0, 0, 0]
    for k in range(10):
        words[0] |= codes[k] << 3 * k
        words[1] |= codes[11 + k] << 3 * k + 1
        words[2] |= codes[22 + k] << 3 * k + 2
    words[0] |= (codes[10] & 3) << 30
    words[1] |= codes[10] >> 2
    words[1] |= (codes[21] & 1) << 31
    words[2] |= codes[21] >> 1
    return [word - (word >> 31 << 32) for word in words]


@pytest.mark.parametrize("seed", range(5))
def test_three_bits_lie_as_in_gptq(seed):
    codes = draw_codes(3, (32,), seed)
    words = pack_three_bits(codes.tolist())
    assert pack(codes, 3).tolist() == words
    assert unpack(torch.tensor(words, dtype=torch.int32), 3).tolist() == codes.tolist()


def test_each_code_in_each_place():
    for bits in BITS:
        period = codes_per_period(bits)
        all_codes = torch.arange(2**bits).repeat_interleave(period)
        rows = torch.zeros(len(all_codes), period, dtype=torch.int64)
        rows[torch.arange(len(rows)), torch.arange(period).repeat(2**bits)] = all_codes
        assert torch.equal(unpack(pack(rows, bits), bits).long(), rows)


@settings(max_examples=60, deadline=None)
@given(bits=st.sampled_from(BITS), count=st.integers(0, 3), dim=st.sampled_from([0, 1, -1, -2]))
def test_unpack_undoes_pack(bits, count, dim):
    shape = [3, 3]
    shape[dim] = count * codes_per_period(bits)
    codes = draw_codes(bits, shape)
    words = pack(codes, bits, dim)
    assert (words.dtype, words.shape[dim] * 32) == (torch.int32, shape[dim] * bits)
    assert torch.equal(unpack(words, bits, dim), codes)
    if count:
        expected = (pack_columns if dim % 2 == 0 else pack_rows)(codes.numpy(), bits)
        assert torch.equal(words, expected)


@settings(max_examples=60, deadline=None)
@given(bits=st.sampled_from(BITS), seed=st.integers(0, 1000), dim=st.sampled_from([0, 1]))
def test_words_are_those_of_compressed_tensors(bits, seed, dim):
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    codes = draw_codes(bits, (2 * codes_per_period(bits),) * 2, seed)
    theirs = helpers.pack_to_int32((codes - (1 << bits - 1)).to(torch.int8), bits, dim)
    assert torch.equal(pack(codes, bits, dim), theirs)
    back = helpers.unpack_from_int32(theirs, bits, codes.shape, dim).int() + (1 << bits - 1)
    assert torch.equal(unpack(theirs, bits, dim), back)


@pytest.mark.parametrize(("bits", "count"), [(4, 12), (3, 31), (8, 2)])
def test_half_a_word_is_refused(bits, count):
    with pytest.raises(ValueError, match=f"{count} codes of {bits} bits"):
        pack(torch.zeros(count, dtype=torch.int64), bits)

"""Layers of packed codes, against a format that is written one code at a time, and the library."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from gptq_oracle import round_weight, store_gptq, store_packed
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import CheckpointError
from core.interfaces import LinearSpec
from core.sharding import Cut, Span
from core.testing.lone_linear import LoneLinear
from plugins.quant.gptq.formats import LayerFormat
from plugins.quant.gptq.scheme import GptqScheme

CPU = torch.device("cpu")


# --- the library -----------------------------------------------------------------------------------


def make_spec(num_inputs, *sizes, dtype=torch.float64, **changes):
    shards = tuple((f"a.{index}", size) for index, size in enumerate(sizes))
    return LinearSpec("a", num_inputs, shards, False, dtype, CPU, "qkv", **changes)


def load(layout, spec, *shards):
    layer = LoneLinear(GptqScheme(lambda _prefix: layout), spec)
    layer.load({f"a.{i}.{k}": x for i, shard in enumerate(shards) for k, x in shard.items()})
    return layer.linear.dequantize()


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("group_size", [None, 16])
@pytest.mark.parametrize("symmetric", [True, False])
def test_packed_weights_are_those_of_the_library(bits, group_size, symmetric):
    pack = pytest.importorskip("compressed_tensors.compressors.pack_quantized")
    library = pytest.importorskip("compressed_tensors.quantization")
    scheme = library.QuantizationScheme(
        targets=["Linear"],
        weights={
            "num_bits": bits,
            "symmetric": symmetric,
            "strategy": "group" if group_size else "channel",
            "group_size": group_size,
        },
    )
    generator = torch.Generator().manual_seed(bits)
    weight = torch.randn(24, 48, generator=generator)
    shape = (24, 48 // (group_size or 48))
    half = 1 << bits - 1
    state = {
        "weight": weight,
        "weight_scale": torch.rand(shape, generator=generator) * 2 / half + 1e-3,
        "weight_zero_point": torch.zeros(shape, dtype=torch.int8),
    }
    if not symmetric:
        state["weight_zero_point"].random_(-half, half, generator=generator)
    compressor = pack.PackedQuantizationCompressor
    stored = compressor.compress(state, scheme)
    expected = compressor.decompress(stored, scheme)["weight"]
    layout = LayerFormat(layout="pack-quantized", bits=bits, group_size=group_size, symmetric=symmetric)
    found = load(layout, make_spec(48, 24, dtype=torch.float32), stored)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


# --- what is in GPTQ files -------------------------------------------------------------------------

WEIGHT = torch.randn(32, 64, generator=torch.Generator().manual_seed(7))
LAYOUT = LayerFormat(layout="gptq", bits=4, group_size=16, symmetric=False)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("layout", ["gptq", "gptq_v2"])
def test_every_zero_point(bits, layout):
    count = 1 << bits
    zeros = (np.arange(32 * 32) % count).reshape(32, -1)
    codes = np.full((32, 32 * 32), count - 1)
    groups = np.repeat(np.arange(32), 32)
    rounded = type(round_weight(WEIGHT, 4))(codes, np.ones((32, 32), np.float16), zeros, groups)
    stored = store_gptq(rounded, bits, version=1 if layout == "gptq" else 2)
    form = LayerFormat(layout=layout, bits=bits, group_size=32, symmetric=False)
    found = load(form, make_spec(32 * 32, 32), stored)
    expected = count - 1 - torch.from_numpy(zeros).double().repeat_interleave(32, 1)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_layer_written_out():
    """Two groups of eight inputs, eight outputs of which the first two are not zero."""
    stored = {
        "qweight": torch.tensor([[0x76543210, 0x0FEDCBA9, *[0] * 6], [0x11111111] * 2 + [0] * 6]).int(),
        "qzeros": torch.tensor([[0x77777707], [0x77777761]], dtype=torch.int32),
        "scales": torch.tensor([[0.5, 2.0], [1.0, 0.25]]).half().repeat(1, 4),
        "g_idx": torch.tensor([0] * 8 + [1] * 8, dtype=torch.int32),
    }
    form = LayerFormat(layout="gptq", bits=4, group_size=8, symmetric=False)
    weight = load(form, make_spec(16, 8), stored)
    first = [(code - 8) * 0.5 for code in range(8)] + [(1 - 2) * 1.0] * 8
    second = [(code - 1) * 2.0 for code in (9, 10, 11, 12, 13, 14, 15, 0)] + [(1 - 7) * 0.25] * 8
    assert weight[:2].tolist() == [first, second]


def test_scales_keep_their_dtype_and_weights_are_rounded_once():
    rounded = round_weight(WEIGHT, 4, 16)
    layout = LayerFormat(layout="gptq", bits=4, group_size=16, symmetric=True)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        stored = store_gptq(rounded, 4)
        stored["scales"] = (stored["scales"].float() * 1.1).to(dtype)
        exact = (rounded.codes - 8) * stored["scales"].T.double().numpy()[:, rounded.groups]
        for out in (torch.bfloat16, torch.float16, torch.float32):
            found = load(layout, make_spec(64, 32, dtype=out), stored)
            expected = torch.from_numpy(exact).float().to(out)
            torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("g_idx", ["missing", "zeros"])
@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("inputs", [Span(0, 64), Span(24, 64), Span(4, 20)])
def test_without_an_order_groups_follow_one_another(g_idx, ordered, inputs):
    rounded = round_weight(WEIGHT, 4, 16, symmetric=False)
    stored = store_gptq(rounded, 4)
    if g_idx == "zeros":
        stored["g_idx"].zero_()
    else:
        del stored["g_idx"]
    layout = LayerFormat(layout="gptq", bits=4, group_size=16, symmetric=False, ordered=ordered)
    whole = make_spec(64, 32)
    local = make_spec(inputs.size, 32, cut=Cut(inputs, ((Span(0, 32),),)))
    layer = LoneLinear(GptqScheme(lambda _prefix: layout), whole, local)
    layer.load({f"a.0.{k}": x for k, x in stored.items()})
    found = layer.linear.dequantize()
    expected = rounded.weight()[:, inputs.start : inputs.stop]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


layouts = st.builds(
    LayerFormat,
    layout=st.sampled_from(["gptq", "gptq_v2", "pack-quantized"]),
    bits=st.sampled_from([2, 3, 4, 8]),
    group_size=st.sampled_from([32, 64]),
    symmetric=st.booleans(),
    ordered=st.booleans(),
)


def draw_shard(layout, size, random):
    """Draw a weight, and store it so: the tensors, and the weight that they stand for."""
    weight = torch.from_numpy(random.standard_normal((size, 64)))
    if layout is None:
        return {"weight": weight.float()}, weight
    order = random.permutation(64) if layout.ordered else None
    rounded = round_weight(
        weight, layout.bits, layout.group_size, symmetric=layout.symmetric, order=order
    )
    if layout.layout == "pack-quantized":
        store = partial(store_packed, symmetric=layout.symmetric, with_order=layout.ordered)
    else:
        store = partial(store_gptq, version=1 if layout.layout == "gptq" else 2)
    return store(rounded, layout.bits), rounded.weight()


@settings(max_examples=30, deadline=None)
@given(of_shards=st.lists(layouts | st.none(), min_size=3, max_size=3), seed=st.integers(0, 99))
def test_shards_need_not_agree(of_shards, seed):
    random = np.random.default_rng(seed)
    spec = make_spec(64, 32, 64, 32, dtype=torch.float32)
    stored, expected, by_prefix = {}, [], {}
    for (prefix, size), layout in zip(spec.shards, of_shards, strict=True):
        tensors, weight = draw_shard(layout, size, random)
        stored |= {f"{prefix}.{suffix}": tensor for suffix, tensor in tensors.items()}
        expected.append(weight.float())
        by_prefix[prefix] = layout
    layer = LoneLinear(GptqScheme(by_prefix.get), spec)
    layer.load(stored)
    x = torch.randn(5, 64)
    torch.testing.assert_close(layer.run(x), x @ torch.cat(expected).T, rtol=1e-5, atol=1e-5)


# --- impossible values -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "changes", "message"),
    [
        (lambda t: t["scales"][0, 3].fill_(float("nan")), {}, r"a\.0\.scales holds nan"),
        (lambda t: t["scales"][0, 3].fill_(float("inf")), {}, r"a\.0\.scales holds inf"),
        (lambda t: t["g_idx"][3].fill_(4), {"ordered": True}, r"a\.0\.g_idx .*0 to 4, but there are 4"),
        (lambda t: t["g_idx"][3].fill_(-1), {"ordered": True}, r"a\.0\.g_idx holds groups from -1"),
        (lambda t: t["g_idx"][3].fill_(1), {}, "set desc_act to true"),
        (
            lambda _: None,
            {"symmetric": True},
            r"a\.0\.qzeros holds the zero point .* makes it 8.*gptq_v2",
        ),
        (lambda t: t.update(bias=torch.ones(32)), {}, r"a\.0\.bias is not zero"),
        (lambda t: t.pop("qzeros"), {}, r"a\.0\.qzeros"),
        (lambda t: t.update(qweight=t["qweight"][1:]), {}, r"a\.0\.qweight has shape \[7, 32\]"),
    ],
)
def test_impossible_values_are_refused(damage, changes, message):
    stored = store_gptq(round_weight(WEIGHT, 4, 16, symmetric=False), 4)
    damage(stored)
    layout = replace(LAYOUT, **changes)
    with pytest.raises(CheckpointError, match=message):
        load(layout, make_spec(64, 32, dtype=torch.float32), stored)


def test_packed_shape_is_checked():
    rounded = round_weight(WEIGHT, 4, 16)
    layout = LayerFormat(layout="pack-quantized", bits=4, group_size=16, symmetric=True)
    stored = store_packed(rounded, 4) | {"weight_shape": torch.tensor([32, 63])}
    with pytest.raises(CheckpointError, match=r"a\.0\.weight_shape is \[32, 63\].*\[32, 64\]"):
        load(layout, make_spec(64, 32, dtype=torch.float32), stored)


def test_a_bias_of_zeros_is_passed_over():
    rounded = round_weight(WEIGHT, 4, 16, symmetric=False)
    stored = store_gptq(rounded, 4) | {"bias": torch.zeros(32, dtype=torch.float16)}
    found = load(LAYOUT, make_spec(64, 32), stored)
    torch.testing.assert_close(found, rounded.weight(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
def test_dummy_weights_have_the_variance_of_random_ones(bits, ordered, symmetric):
    layout = LayerFormat(layout="gptq", bits=bits, group_size=32, symmetric=symmetric, ordered=ordered)
    layer = LoneLinear(GptqScheme(lambda _prefix: layout), make_spec(256, 256, dtype=torch.float16))
    layer.fill(3)
    weight = layer.linear.dequantize().float()
    assert 0.7 < weight.std() * 16 < 1.3
    assert abs(weight.mean()) * 16 < 0.1

"""FP8 layers against float64, and parts of layers against whole ones."""

from __future__ import annotations

import gc
import itertools
import math
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from fp8_oracle import dequantize_weight, quantize_weight, round_inputs
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import CheckpointError
from core.interfaces import LinearSpec, QuantScheme, missing_members
from core.model import weights as loader
from core.model.linear import PlainLinear
from core.sharding import Cut, Span
from plugins.quant.fp8.convert import ConvertingScheme
from plugins.quant.fp8.formats import LayerFormat
from plugins.quant.fp8.scheme import Fp8Scheme

CPU = torch.device("cpu")
E4M3 = torch.float8_e4m3fn


# --- one layer -------------------------------------------------------------------------------------


def make_spec(in_features=20, sizes=(7, 3), *, bias=True, dtype=torch.float64, **changes):
    shards = tuple((f"a.p{index}", size) for index, size in enumerate(sizes))
    spec = LinearSpec("a.fused", in_features, shards, bias, dtype, CPU, "qkv")
    return replace(spec, **changes)


def random_weights(spec, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(size, spec.in_features, generator=generator) * 3.0**index
        for index, (_, size) in enumerate(spec.shards)
    ]


def store(spec, layout, seed=0, *, input_scale=0.01, per_tensor=False):
    """Make the tensors of all shards, and the weight that they stand for, in float64."""
    stored, dense = [], []
    for index, weight in enumerate(random_weights(spec, seed)):
        block = layout.block or (len(weight) if per_tensor else 1, spec.in_features)
        codes, scales = quantize_weight(weight, block)
        dense.append(dequantize_weight(codes, scales, block))
        tensors = {
            "weight": torch.from_numpy(codes).to(E4M3),
            "weight_scale": torch.from_numpy(scales),
        }
        if layout.block is None:
            tensors["weight_scale"] = tensors["weight_scale"].reshape(-1)
        if layout.inputs == "static":
            tensors["input_scale"] = torch.tensor([input_scale * (index + 1)])
        if spec.bias:
            tensors["bias"] = torch.randn(len(weight), dtype=torch.float64)
        stored.append(tensors)
    return stored, dense


def fill(scheme, spec, stored):
    module = scheme.make_linear(spec)
    for shard, tensors in reversed(list(enumerate(stored))):
        scheme.load(module, spec, shard, tensors)
    scheme.finalize(module, spec)
    return module


def read_scheme(layout):
    return Fp8Scheme(lambda _spec: layout)


LAYOUTS = {
    "rows, kept": LayerFormat(),
    "rows, static": LayerFormat(inputs="static"),
    "rows, dynamic": LayerFormat(inputs="dynamic"),
    "blocks, kept": LayerFormat(block=(4, 8)),
    "blocks, dynamic": LayerFormat(block=(4, 8), inputs="dynamic", group_size=8),
    "rows, dynamic by groups": LayerFormat(inputs="dynamic", group_size=8),
    "groups, dynamic": LayerFormat(block=(1, 6), inputs="dynamic"),
}
SCHEMES = [Fp8Scheme(lambda _spec: None), ConvertingScheme("channel", keep_inputs=True)]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_schemes_fulfil_the_protocol(scheme):
    assert missing_members(scheme, QuantScheme) == []


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@settings(max_examples=15, deadline=None)
@given(
    spec=st.builds(
        make_spec,
        st.integers(1, 30),
        st.lists(st.integers(1, 12), min_size=1, max_size=3),
        bias=st.booleans(),
    ),
    per_tensor=st.booleans(),
    num_tokens=st.integers(0, 4),
    seed=st.integers(0, 99),
)
def test_layer_is_rounded_inputs_times_stored_weight(layout, spec, per_tensor, num_tokens, seed):
    stored, dense = store(spec, layout, seed, per_tensor=per_tensor)
    module = fill(read_scheme(layout), spec, stored)
    torch.testing.assert_close(
        module.dequantize(), torch.from_numpy(np.concatenate(dense)), rtol=0, atol=0
    )
    x = torch.randn(num_tokens, spec.in_features, dtype=torch.float64).numpy()
    expected = []
    for index, weight in enumerate(dense):
        rounded = x
        if layout.inputs == "static":
            rounded = round_inputs(x, scale=0.01 * (index + 1))
        elif layout.inputs == "dynamic":
            rounded = round_inputs(x, group=layout.group_size)
        expected.append(rounded @ weight.T + (stored[index]["bias"].numpy() if spec.bias else 0))
    expected = torch.from_numpy(np.concatenate(expected, 1))
    torch.testing.assert_close(module(torch.from_numpy(x)), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products_are_rounded_once_to_the_dtype_of_the_model(dtype):
    spec = make_spec(dtype=dtype)
    stored, dense = store(spec, LAYOUTS["blocks, kept"])
    module = fill(read_scheme(LAYOUTS["blocks, kept"]), spec, stored)
    expected = torch.from_numpy(np.concatenate(dense)).float().to(dtype)
    torch.testing.assert_close(module.dequantize(), expected, rtol=0, atol=0)
    assert module(torch.randn(3, 20, dtype=dtype)).dtype == dtype


def test_shards_with_equal_input_scales_are_multiplied_together():
    layout = LayerFormat(inputs="static")
    spec = make_spec(sizes=(4, 3, 2))
    stored, _ = store(spec, layout)
    for tensors, scale in zip(stored, (0.5, 0.5, 0.25), strict=True):
        tensors["input_scale"] = torch.tensor(scale)
    module = fill(read_scheme(layout), spec, stored)
    assert module.static_parts == [(slice(0, 7), 0), (slice(7, 9), 2)]


def test_rows_do_not_depend_on_those_beside_them():
    layout = LAYOUTS["blocks, dynamic"]
    spec = make_spec(bias=False)
    module = fill(read_scheme(layout), spec, store(spec, layout)[0])
    x = torch.randn(6, 20, dtype=torch.float64) * torch.logspace(-6, 6, 6)[:, None]
    alone = torch.cat([module(row[None]) for row in x])
    torch.testing.assert_close(
        module(x) / x.norm(dim=1, keepdim=True), alone / x.norm(dim=1, keepdim=True)
    )


def test_a_token_of_zeros_and_one_of_nan_keep_to_themselves():
    layout = LAYOUTS["rows, dynamic"]
    spec = make_spec(bias=False)
    module = fill(read_scheme(layout), spec, store(spec, layout)[0])
    x = torch.ones(3, 20, dtype=torch.float64)
    x[0], x[1, 4] = 0, math.nan
    y = module(x)
    assert (y[0] == 0).all()
    assert y[1].isnan().all()
    assert y[2].isfinite().all()


@pytest.mark.parametrize("group_size", [8, None])
def test_powers_of_two_for_dynamic_scales(group_size):
    layout = LayerFormat(inputs="dynamic", group_size=group_size, power_of_two=True)
    spec = make_spec(8, (4,), bias=False)
    module = fill(read_scheme(layout), spec, store(spec, layout)[0])
    x = torch.zeros(1, 8, dtype=torch.float64)
    x[0, 0], x[0, 1] = 500.0, 17.5  # 500 / 448 becomes 2, under which 17.5 is 9 and not 8.75
    rounded = torch.zeros_like(x)
    rounded[0, 0], rounded[0, 1] = 512.0, 18.0
    expected = rounded @ module.dequantize().T
    torch.testing.assert_close(module(x), expected)


# --- what a layer may hold -------------------------------------------------------------------------


def test_names_and_shapes():
    spec = make_spec()
    rows = read_scheme(LAYOUTS["rows, static"]).tensors(spec, 0)
    blocks = read_scheme(LAYOUTS["blocks, kept"]).tensors(spec, 1)
    assert {name: (t.shape, t.optional, t.can_broadcast) for name, t in rows.items()} == {
        "weight": ((7, 20), False, False),
        "bias": ((7,), False, False),
        "weight_scale": ((7,), True, True),
        "weight_scale_inv": ((7,), True, True),
        "input_scale": ((1,), True, True),
        "activation_scale": ((1,), True, True),
    }
    assert (blocks["weight_scale_inv"].shape, blocks["weight_scale"].can_broadcast) == ((1, 3), False)
    assert rows["weight"].dtype == E4M3


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
def test_one_scale_for_all_outputs_has_any_shape(shape):
    spec = make_spec(sizes=(5,))
    (tensors,), (dense,) = store(spec, LayerFormat(), per_tensor=True)
    tensors["weight_scale_inv"] = tensors.pop("weight_scale").reshape(shape)
    module = fill(read_scheme(LayerFormat()), spec, [tensors])
    torch.testing.assert_close(module.dequantize(), torch.from_numpy(dense), rtol=0, atol=0)


def test_scales_in_eight_bits():
    layout = LAYOUTS["blocks, kept"]
    spec = make_spec(sizes=(5,), bias=False)
    codes = torch.randn(5, 20).to(E4M3)
    scales = torch.tensor([[0.5, 1.0, 2.0], [4.0, 0.25, 2.0**-20]])
    stored = {"weight": codes, "weight_scale_inv": scales.to(torch.float8_e8m0fnu)}
    module = fill(read_scheme(layout), spec, [stored])
    expected = dequantize_weight(codes.double().numpy(), scales.numpy(), layout.block)
    torch.testing.assert_close(module.dequantize(), torch.from_numpy(expected), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight_scale": None}, "exactly one of a.p0.weight_scale and a.p0.weight_scale_inv"),
        ({"weight_scale_inv": torch.ones(7)}, "but the checkpoint holds 2"),
        ({"weight_scale": torch.full((7,), math.nan)}, "a.p0.weight_scale holds nan"),
        ({"weight_scale": -torch.ones(7)}, "a.p0.weight_scale holds -1, but .* not below 0"),
        ({"input_scale": None}, "exactly one of a.p0.input_scale and a.p0.activation_scale"),
        ({"input_scale": torch.zeros(1)}, "a.p0.input_scale holds 0, but .* above 0"),
        ({"weight": torch.full((7, 20), math.nan).to(E4M3)}, "a.p0.weight holds NaN"),
    ],
)
def test_impossible_values_are_refused_by_name(changes, message):
    layout = LayerFormat(inputs="static")
    spec = make_spec(sizes=(7,))
    (tensors,), _ = store(spec, layout)
    tensors = {name: t for name, t in (tensors | changes).items() if t is not None}
    with pytest.raises(CheckpointError, match=message):
        fill(read_scheme(layout), spec, [tensors])


# --- parts of a layer ------------------------------------------------------------------------------


def cut_spec(spec, inputs, outputs):
    """Describe the part of a layer that a rank holds."""
    sizes = [sum(span.size for span in spans) for spans in outputs]
    shards = tuple((name, size) for (name, _), size in zip(spec.shards, sizes, strict=True))
    return replace(
        spec, in_features=inputs.size, shards=shards, cut=Cut(inputs, tuple(map(tuple, outputs)))
    )


def cut_tensors(scheme, whole, local, shard, tensors):
    """Take a rank's part of stored tensors, as the loader reads it."""
    described = scheme.tensors(whole, shard)
    parts = loader._parts(described, local, shard)
    cut = {}
    for name, tensor in tensors.items():
        part = parts[name]
        if described[name].can_broadcast:
            part = loader._broadcast(part, tuple(tensor.shape))
        cut[name] = tensor if all(s is None for s in part) else loader._read_part(tensor, part)
    return cut


def load_part(scheme, whole, stored, inputs, outputs):
    local = cut_spec(whole, inputs, outputs)
    parts = [cut_tensors(scheme, whole, local, i, tensors) for i, tensors in enumerate(stored)]
    return fill(scheme, local, parts)


@st.composite
def spans(draw, size, max_count=1):
    bounds = st.integers(0, size)
    ends = draw(st.lists(bounds, min_size=2, max_size=2 * max_count, unique=True))
    ends = sorted(ends)[: len(ends) // 2 * 2]
    return [Span(*pair) for pair in zip(ends[::2], ends[1::2], strict=True)]


def make_source(name):
    """Give a scheme and what fits it, by name of a layout or as `convert STRATEGY`."""
    spec = make_spec(20, (11, 6))
    if name in LAYOUTS:
        return read_scheme(LAYOUTS[name]), spec, store(spec, LAYOUTS[name])[0]
    if name == "tensor":
        layout = LayerFormat(inputs="dynamic")
        return read_scheme(layout), spec, store(spec, layout, per_tensor=True)[0]
    scheme = ConvertingScheme(name.split()[1], keep_inputs=True)
    stored = [
        {"weight": weight, "bias": torch.randn(len(weight)).double()} for weight in random_weights(spec)
    ]
    return scheme, spec, stored


CONVERTED = ("convert channel", "convert tensor", "convert block")


@pytest.mark.parametrize("name", [*LAYOUTS, "tensor", *CONVERTED])
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_a_part_of_a_layer_holds_that_part_of_the_weight(name, data):
    scheme, spec, stored = make_source(name)
    (inputs,) = data.draw(spans(20))
    outputs = [data.draw(spans(size, 3)) for _, size in spec.shards]
    whole = fill(scheme, spec, stored)
    part = load_part(scheme, spec, stored, inputs, outputs)
    rows = [
        spec.rows(shard).start + feature
        for shard, held in enumerate(outputs)
        for span in held
        for feature in range(*span)
    ]
    expected = whole.dequantize()[rows][:, slice(*inputs)]
    torch.testing.assert_close(part.dequantize(), expected, rtol=0, atol=0)
    torch.testing.assert_close(part.bias, whole.bias[rows], rtol=0, atol=0)


@pytest.mark.parametrize("inputs", [Span(72, 300), Span(130, 200), Span(0, 128)])
def test_blocks_of_a_large_layer_are_cut_inside(inputs, monkeypatch):
    """Blocks of 128, of more rows than are converted at a time."""
    monkeypatch.setattr("plugins.quant.fp8.convert.ROWS_AT_ONCE", 50)
    monkeypatch.setattr("plugins.quant.fp8.blocks.ROWS_AT_ONCE", 60)
    monkeypatch.setattr("plugins.quant.fp8.linear.ROWS_AT_ONCE", 70)
    spec = make_spec(300, (260,), bias=False, dtype=torch.float32)
    (weight,) = random_weights(spec)
    codes, scales = quantize_weight(weight, (128, 128))
    expected = torch.from_numpy(dequantize_weight(codes, scales, (128, 128)))
    scheme = ConvertingScheme("block", keep_inputs=True)
    part = load_part(scheme, spec, [{"weight": weight}], inputs, [[Span(0, 7), Span(200, 260)]])
    expected = torch.cat((expected[:7], expected[200:]))[:, slice(*inputs)].float()
    torch.testing.assert_close(part.dequantize(), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "bounds"),
    [
        ("rows, kept", [0, 7, 20]),
        ("rows, static", [0, 7, 20]),
        ("blocks, kept", [0, 3, 13, 20]),
        ("blocks, dynamic", [0, 8, 16, 20]),
        *((name, [0, 7, 20]) for name in CONVERTED),
    ],
)
def test_parts_of_the_inputs_add_up(name, bounds):
    scheme, spec, stored = make_source(name)
    x = torch.randn(5, 20, dtype=torch.float64)
    whole = fill(scheme, spec, stored)
    total = whole.bias.expand(5, -1).clone()
    everything = [[Span(0, size)] for _, size in spec.shards]
    for start, stop in itertools.pairwise(bounds):
        part = load_part(scheme, spec, stored, Span(start, stop), everything)
        total += part(x[:, start:stop]) - part.bias
    torch.testing.assert_close(total, whole(x), rtol=1e-12, atol=1e-12)


def test_groups_of_inputs_stay_those_of_the_whole_layer():
    scheme, spec, stored = make_source("blocks, dynamic")
    x = torch.randn(5, 15, dtype=torch.float64)
    part = load_part(scheme, spec, stored, Span(5, 20), [[Span(0, 11)], [Span(0, 6)]])
    rounded = torch.from_numpy(round_inputs(x.numpy(), group=8, lead=5))
    expected = rounded @ part.dequantize().T + part.bias
    torch.testing.assert_close(part(x), expected, rtol=1e-12, atol=1e-12)


# --- converted at load -----------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["channel", "tensor", "block"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_converted_is_what_a_checkpoint_with_those_scales_holds(strategy, dtype):
    spec = make_spec(200, (150, 130), bias=False)
    weights = [weight.to(dtype) for weight in random_weights(spec)]
    found = fill(
        ConvertingScheme(strategy, keep_inputs=False), spec, [{"weight": weight} for weight in weights]
    )
    stored = []
    for weight in weights:
        sizes = {"channel": (1, 200), "tensor": (len(weight), 200), "block": (128, 128)}
        codes, scales = quantize_weight(weight.float(), sizes[strategy])
        scales = torch.from_numpy(scales)
        stored.append(
            {
                "weight": torch.from_numpy(codes).to(E4M3),
                "weight_scale": scales if strategy == "block" else scales.reshape(-1),
            }
        )
    is_block = strategy == "block"
    layout = LayerFormat(
        block=(128, 128) if is_block else None, inputs="dynamic", group_size=128 if is_block else None
    )
    assert found.layout == layout
    expected = fill(read_scheme(layout), spec, stored)
    assert found.state_dict().keys() == expected.state_dict().keys()
    for name, ours in found.state_dict().items():
        assert torch.equal(ours.float(), expected.state_dict()[name].float()), name


def test_nothing_of_the_source_stays():
    spec = make_spec(64, (32,), bias=False)
    scheme = ConvertingScheme("channel", keep_inputs=True)
    module = scheme.make_linear(spec)
    weight = torch.randn(32, 64)
    source = weakref.ref(weight)
    scheme.load(module, spec, 0, {"weight": weight})
    del weight
    gc.collect()
    assert source() is None
    held = [*module.parameters(), *module.buffers()]
    assert sum(tensor.untyped_storage().nbytes() for tensor in held) == 32 * 64 + 32 * 4


def test_the_head_is_not_converted():
    spec = make_spec(8, (5,), bias=False, role="lm_head")
    scheme = ConvertingScheme("channel", keep_inputs=False)
    assert isinstance(scheme.make_linear(spec), PlainLinear)
    assert scheme.tensors(spec, 0)["weight"].axes


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_not_converted(bad):
    spec = make_spec(8, (5,), bias=False)
    weight = torch.ones(5, 8)
    weight[2, 2] = bad
    with pytest.raises(CheckpointError, match=r"a\.p0\.weight holds"):
        fill(ConvertingScheme("channel", keep_inputs=True), spec, [{"weight": weight}])

"""AWQ checkpoints that are written: rounding, folded scales, the search for them, and clipping."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from core.errors import CheckpointError, ConfigError
from core.interfaces import LinearSpec
from core.quant.calibration import CalibratedLayer, CalibratedLinear, LayerQuantizer, QuantizeOptions
from core.testing.lone_linear import TINY_MODEL, LoneLinear
from plugins.quant import awq as plugin
from plugins.quant.awq import rounding
from plugins.quant.awq.config import read_config
from plugins.quant.awq.fold import NormSource, RowsSource
from plugins.quant.awq.rounding import round_to_nearest
from plugins.quant.awq.scheme import AwqLinear, AwqScheme
from plugins.quant.awq.search import SHRINKAGES, clip, find_limits, find_scale, gather_stats

CPU = torch.device("cpu")
(ENTRY,) = plugin.core_register_quantizers()
SIZE = 16
PREFIX = "model.layers.0"
KINDS = {
    "heads": {"num_kv_heads": 4},
    "grouped": {},
    "one_plus": {"norm_style": "one_plus"},
    "bias": {"qkv_bias": True, "out_bias": True, "mlp_bias": True},
    "fused": {"fused_qkv": True, "fused_gate_up": True, "mlp_bias": True, "num_kv_heads": 4},
}


def make_writer(**changes):
    return ENTRY.make_writer(QuantizeOptions(method="awq", **({"group_size": SIZE} | changes)))


# --- a layer, and what it computes -----------------------------------------------------------------


def make_layer(
    kind="grouped", *, ignored=(), outliers=True, num_tokens=200, seed=0, dtype=torch.float32
):
    """A layer with what flows through it; a few channels of the stream are strong."""
    model = replace(TINY_MODEL, **KINDS[kind])
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, std=1.0):
        return torch.randn(shape, generator=generator) * std

    q, kv, hidden, inner = model.q_size, model.kv_size, model.hidden_size, model.intermediate_size
    qkv = {"qkv_proj": q + 2 * kv} if model.fused_qkv else {"q_proj": q, "k_proj": kv, "v_proj": kv}
    gate_up = {"gate_proj": inner, "up_proj": inner}
    gate_up = {"gate_up_proj": 2 * inner} if model.fused_gate_up else gate_up
    described = {
        "qkv_proj": ("self_attn", qkv, hidden, "qkv", model.qkv_bias),
        "out_proj": ("self_attn", {"o_proj": hidden}, q, "out", model.out_bias),
        "gate_up_proj": ("mlp", gate_up, hidden, "gate_up", model.mlp_bias),
        "down_proj": ("mlp", {"down_proj": hidden}, inner, "down", model.mlp_bias),
    }
    linears = {}
    for name, (parent, shards, num_inputs, role, bias) in described.items():
        named = tuple((f"{PREFIX}.{parent}.{shard}", size) for shard, size in shards.items())
        spec = LinearSpec(f"{PREFIX}.{parent}.{name}", num_inputs, named, bias, dtype, CPU, role)
        linears[name] = CalibratedLinear(
            spec=spec,
            weights=[draw(size, num_inputs, std=num_inputs**-0.5) for size in shards.values()],
            biases=[draw(size) if bias else None for size in shards.values()],
            inputs=torch.empty(0, num_inputs),
        )
    strength = 0.3 * draw(hidden).abs() + 0.05
    if outliers:
        strength[::13] *= 40
    offset = 1.0 if model.norm_style == "one_plus" else 0.0
    norms = {name: strength * (1 + 0.2 * draw(hidden)) - offset for name in ("input_norm", "mlp_norm")}
    layer = CalibratedLayer(0, model, linears, norms, frozenset(ignored))
    stream = draw(num_tokens, hidden)
    for name, (x, _) in compute(layer, stream).items():
        linears[name].inputs = x.float()
    return layer, stream


def compute(layer, stream):
    """Input and output of each linear layer, in float64; every token attends to itself only."""
    model, seen = layer.model, {}

    def apply(name, x):
        linear = layer.linears[name]
        parts = zip(linear.weights, linear.biases, strict=True)
        outputs = [x @ w.double().T + (0.0 if b is None else b.double()) for w, b in parts]
        seen[name] = x, torch.cat(outputs, -1)
        return seen[name][1]

    def norm(name, x):
        offset = 1.0 if model.norm_style == "one_plus" else 0.0
        return x / x.square().mean(-1, keepdim=True).sqrt() * (layer.norms[name].double() + offset)

    stream = stream.double()
    values = apply("qkv_proj", norm("input_norm", stream))[:, -model.kv_size :]
    by_head = values.unflatten(-1, (model.num_kv_heads, -1))
    heads = by_head.repeat_interleave(model.num_heads // model.num_kv_heads, 1)
    apply("out_proj", heads.flatten(1))
    gate, up = apply("gate_up_proj", norm("mlp_norm", stream)).chunk(2, -1)
    apply("down_proj", functional.silu(gate) * up)
    return seen


def results(layer, stream):
    """What leaves the layer, or is multiplied with something that others cannot divide."""
    seen = compute(layer, stream)
    queries = seen["qkv_proj"][1][:, : -layer.model.kv_size]
    gates = seen["gate_up_proj"][1].chunk(2, -1)[0]
    return [queries, gates, seen["out_proj"][1], seen["down_proj"][1]]


def copy_of(layer):
    linears = {
        name: replace(
            linear,
            weights=[w.clone() for w in linear.weights],
            biases=[None if b is None else b.clone() for b in linear.biases],
            inputs=linear.inputs.clone(),
        )
        for name, linear in layer.linears.items()
    }
    return replace(layer, linears=linears, norms={n: w.clone() for n, w in layer.norms.items()})


def read_back(writer, layer, returned):
    """Load what was written as the engine does; the weight of each quantized layer."""
    scheme = AwqScheme(read_config(writer.config()), layer.model)
    weights = {}
    for name, linear in layer.linears.items():
        lone = LoneLinear(scheme, linear.spec)
        if name in layer.ignored:
            assert not isinstance(lone.linear, AwqLinear)
            continue
        prefixes = [prefix for prefix, _ in linear.spec.shards]
        lone.load({f"{p}.{s}": t for p in prefixes for s, t in returned[p].items()})
        weights[name] = lone.linear.dequantize()
        if linear.spec.bias:
            assert torch.equal(lone.linear.bias, torch.cat(linear.biases).to(linear.spec.dtype))
    return weights


def plainly_rounded(weight, size=SIZE):
    return round_to_nearest(weight.unflatten(-1, (-1, size))).dequantize().flatten(1)


def output_errors(layer, weights):
    """‖y - ŷ‖ / ‖y‖ of each linear layer on its inputs."""
    errors = {}
    for name, weight in weights.items():
        linear = layer.linears[name]
        x, exact = linear.inputs.double(), torch.cat(linear.weights).double()
        errors[name] = ((x @ (weight.double() - exact).T).norm() / (x @ exact.T).norm()).item()
    return errors


# --- rounding --------------------------------------------------------------------------------------

weights_of_groups = st.lists(
    st.lists(st.floats(-1000, 1000, width=32), min_size=4, max_size=4), min_size=1, max_size=5
)


@settings(max_examples=150, deadline=None)
@given(
    values=weights_of_groups, shift=st.sampled_from([0.0, 5.0, -5.0]), scale=st.sampled_from([1e-4, 1])
)
def test_rounding_errs_by_half_a_step(values, shift, scale):
    groups = ((torch.tensor(values) + shift) * scale).unsqueeze(1)
    codes, zeros, scales = rounded = round_to_nearest(groups)
    for whole in (codes, zeros):
        assert torch.equal(whole, whole.round().clamp(0, 15))
    assert scales.dtype == torch.float16
    assert (scales > 0).all()
    # A scale is rounded to float16, which may leave the last code that much too short.
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    short = ((high - low) - 15 * scales[..., 0].float()).clamp(min=0)
    bound = (scales[..., 0].float() / 2 + short) * (1 + 1e-5)
    assert ((rounded.dequantize() - groups).abs().amax(-1) <= bound).all()


@pytest.mark.parametrize("magnitude", [1e-5, 1e-2, 1e3])
def test_no_code_is_nearer(magnitude):
    """For the scale that is stored; and small weights have as many steps as others."""
    groups = torch.randn(2000, 1, 16, generator=torch.Generator().manual_seed(0)) * magnitude
    codes, zeros, scales = (part.double() for part in round_to_nearest(groups))
    off = ((torch.arange(16) - zeros).unsqueeze(-2) * scales.unsqueeze(-1) - groups.unsqueeze(-1)).abs()
    chosen = off.gather(-1, codes.long().unsqueeze(-1)).squeeze(-1)
    assert ((chosen - off.amin(-1)) / scales).max() < 1e-4
    assert (codes.amax(-1) - codes.amin(-1)).min() >= 13


def test_zero_stays_zero():
    groups = torch.tensor([[[0.0, 0.0]], [[0.0, 3.0]], [[-1.0, 0.0]], [[1e-12, 0.0]]])
    assert (round_to_nearest(groups).dequantize()[groups == 0] == 0).all()


def test_groups_on_one_side_of_zero_are_not_cut_off():
    groups = torch.tensor([[[3.0, 3.5, 4.0]], [[-4.0, -3.5, -3.0]]])
    off = round_to_nearest(groups).dequantize() - groups
    assert off.abs().max() <= 4 / 15 / 2 * 1.01


# --- scales ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_folding_leaves_what_the_layer_computes(kind):
    layer, stream = make_layer(kind)
    before = copy_of(layer)
    expected = results(layer, stream)
    make_writer().quantize_layer(layer)
    for found, wanted in zip(results(layer, stream), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5 * wanted.std().item(), rtol=1e-5)
    for name, (x, _) in compute(layer, stream).items():
        linear = layer.linears[name]
        torch.testing.assert_close(linear.inputs.double(), x, atol=1e-5 * x.std().item(), rtol=1e-5)
        assert not torch.equal(linear.weights[0], before.linears[name].weights[0])


@pytest.mark.parametrize("style", ["plain", "one_plus"])
def test_norms_are_numbers_of_16_bits(style):
    """Or rounding them, when they are stored, would change the model after the fact."""
    weight = torch.randn(64, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    original, scale = weight.clone(), torch.logspace(-1, 1, 64)
    source = NormSource(weight, style)
    exact = source.nearest(scale)
    source.divide(exact)
    assert torch.equal(weight, weight.bfloat16().float())
    offset = 1.0 if style == "one_plus" else 0.0
    torch.testing.assert_close((weight + offset) * exact, original + offset, atol=0, rtol=1e-6)
    if style == "plain":
        torch.testing.assert_close(exact, scale, atol=0, rtol=2**-8)


@pytest.mark.parametrize("style", ["plain", "one_plus"])
def test_norms_that_pass_nothing_stay_as_they_are(style):
    weight = torch.tensor([0.0, 1.0]) if style == "plain" else torch.tensor([-1.0, 0.0])
    original, source = weight.clone(), NormSource(weight, style)
    exact = source.nearest(torch.tensor([3.0, 2.0]))
    assert exact[0] == 1
    source.divide(exact)
    assert weight[0] == original[0]
    assert weight[1] != original[1]


def test_uses_of_a_value_share_their_scale():
    weight, bias = torch.ones(4, 3), torch.full((4,), 6.0)
    source = RowsSource(weight, bias, head_dim=2, num_uses=2)
    exact = source.nearest(torch.tensor([1.0, 8.0, 4.0, 2.0, 3.0, 1.0, 3.0, 1.0]))
    torch.testing.assert_close(exact, torch.tensor([2.0, 4.0, 2.0, 4.0, 3.0, 1.0, 3.0, 1.0]))
    source.divide(exact)
    torch.testing.assert_close(weight[:, 0], torch.tensor([1 / 2, 1 / 4, 1 / 3, 1]))
    torch.testing.assert_close(bias, torch.tensor([3.0, 1.5, 2.0, 6.0]))


def squared_error(x, weights, scale):
    """Of the outputs, token by token in float64."""
    total = 0.0
    for weight in weights:
        rounded = plainly_rounded(weight * scale).double() / scale.double()
        total += (x.double() @ (rounded - weight.double()).T).square().sum().item()
    return total / len(x)


class Anything:
    """A source that can be divided by anything."""

    def nearest(self, scale):
        return scale


@pytest.mark.parametrize("seed", range(4))
def test_no_candidate_is_better_than_the_scale_that_was_found(seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(50, 48, generator=generator) * torch.rand(48, generator=generator).exp() ** 2
    weights = [torch.randn(n, 48, generator=generator) for n in (24, 8)]
    tried = []

    class Recording:
        def nearest(self, scale):
            tried.append(scale)
            return scale

    scale = find_scale(weights, gather_stats(x), Recording(), SIZE)
    least = squared_error(x, weights, scale)
    assert len(tried) == 40
    for candidate in [torch.ones(48), *tried]:
        assert least <= squared_error(x, weights, candidate) * (1 + 1e-4)


def test_strong_inputs_get_larger_weights():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(100, 48, generator=generator)
    x[:, 5] *= 100
    weights = [torch.randn(64, 48, generator=generator)]
    scale = find_scale(weights, gather_stats(x), Anything(), SIZE)
    assert scale.argmax() == 5
    assert squared_error(x, weights, scale) < 0.3 * squared_error(x, weights, torch.ones(48))


def test_statistics_are_those_of_all_tokens():
    x = torch.randn(5000, 6, generator=torch.Generator().manual_seed(0)) + 1
    mean_abs, moments = gather_stats(x)
    torch.testing.assert_close(mean_abs.double(), x.double().abs().mean(0), atol=0, rtol=1e-5)
    torch.testing.assert_close(moments.double(), x.double().T @ x.double() / 5000, atol=0, rtol=1e-5)
    scale = torch.rand(6, generator=torch.Generator().manual_seed(1)) + 0.5
    for found, expected in zip(gather_stats(x).divided(scale), gather_stats(x / scale), strict=True):
        torch.testing.assert_close(found, expected)


# --- clipping --------------------------------------------------------------------------------------


def test_each_group_has_the_best_of_the_limits():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 32, generator=generator) * torch.rand(32, generator=generator)
    weight = torch.randn(6, 32, generator=generator) ** 3
    limits = find_limits(weight, gather_stats(x), SIZE)
    for row in range(6):
        for group in range(2):
            inputs = slice(SIZE * group, SIZE * (group + 1))
            part = weight[row, inputs].view(1, 1, -1)
            errors = {}
            for share in SHRINKAGES:
                limit = share * part.abs().amax(-1)
                off = round_to_nearest(clip(part, limit)).dequantize() - part
                errors[share] = (x[:, inputs].double() @ off[0, 0].double()).square().mean().item()
            share = (limits[row, group] / part.abs().max()).item()
            nearest = min(errors, key=lambda known: abs(known - share))
            assert share == pytest.approx(nearest)
            assert errors[nearest] == pytest.approx(min(errors.values()), rel=1e-3)
    assert (limits < weight.unflatten(-1, (-1, SIZE)).abs().amax(-1)).any()


@pytest.mark.parametrize("kind", ["grouped", "fused"])
def test_queries_and_keys_are_not_clipped(kind):
    layer, _ = make_layer(kind)
    writer = make_writer()
    weights = read_back(writer, layer, writer.quantize_layer(layer))
    exact = torch.cat(layer.linears["qkv_proj"].weights)
    plain, num_exact = plainly_rounded(exact), layer.model.q_size + layer.model.kv_size
    assert torch.equal(weights["qkv_proj"][:num_exact], plain[:num_exact])
    assert not torch.equal(weights["qkv_proj"][num_exact:], plain[num_exact:])


def test_clipping_goes_by_the_inputs_after_scaling():
    layer, _ = make_layer("heads")
    writer = make_writer()
    weights = read_back(writer, layer, writer.quantize_layer(layer))
    for name in ("out_proj", "gate_up_proj", "down_proj"):
        exact, stats = torch.cat(layer.linears[name].weights), gather_stats(layer.linears[name].inputs)
        limits = find_limits(exact, stats, SIZE)
        clipped = clip(exact.unflatten(-1, (-1, SIZE)), limits).flatten(1)
        # Sums in another order may move a limit.
        is_same = (weights[name] == plainly_rounded(clipped)).float().mean()
        assert is_same > 0.99, name


# --- layers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_are_nearer_than_after_plain_rounding(kind):
    layer, _ = make_layer(kind)
    before, writer = copy_of(layer), make_writer()
    weights = read_back(writer, layer, writer.quantize_layer(layer))
    errors = output_errors(layer, weights)
    plain = output_errors(
        before, {n: plainly_rounded(torch.cat(x.weights)) for n, x in before.linears.items()}
    )
    for name, error in errors.items():
        assert error < plain[name]
    for name in ("qkv_proj", "gate_up_proj"):
        assert errors[name] < 0.5 * plain[name]


@pytest.mark.parametrize("group_size", [32, -1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_written_is_what_is_read(group_size, dtype):
    layer, _ = make_layer("bias", dtype=dtype)
    writer = make_writer(group_size=group_size)
    returned = writer.quantize_layer(layer)
    for prefix, tensors in returned.items():
        assert set(tensors) == {"qweight", "qzeros", "scales", "bias"}, prefix
        assert tensors["scales"].dtype == torch.float16
        assert tensors["bias"].dtype == dtype
        assert all(tensor.is_contiguous() for tensor in tensors.values())
    for name, error in output_errors(layer, read_back(writer, layer, returned)).items():
        assert error < 0.2, name


@pytest.mark.parametrize(
    ("ignored", "unchanged"),
    [
        (("qkv_proj",), {"input_norm", "qkv_proj", "out_proj"}),
        (("out_proj",), {"out_proj"}),
        (("gate_up_proj",), {"mlp_norm", "gate_up_proj", "down_proj"}),
        (("down_proj",), {"down_proj"}),
        (("qkv_proj", "out_proj", "gate_up_proj", "down_proj"), None),
    ],
)
def test_ignored_layers_stay_as_they_are(ignored, unchanged):
    layer, stream = make_layer("bias", ignored=ignored)
    before, writer = copy_of(layer), make_writer()
    returned = writer.quantize_layer(layer)
    kept = {prefix for name in ignored for prefix, _ in layer.linears[name].spec.shards}
    named = {prefix for linear in layer.linears.values() for prefix, _ in linear.spec.shards}
    assert set(returned) == named - kept
    assert set(writer.config()["modules_to_not_convert"]) == kept | {"lm_head"}
    read_back(writer, layer, returned)
    for name, weight in layer.norms.items():
        is_kept = unchanged is None or name in unchanged
        assert torch.equal(weight, before.norms[name]) == is_kept
    for name, linear in layer.linears.items():
        is_kept = unchanged is None or name in unchanged
        assert torch.equal(linear.inputs, before.linears[name].inputs) == is_kept
        if name in ignored:
            pairs = zip(linear.weights, before.linears[name].weights, strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)
    for found, wanted in zip(results(layer, stream), results(before, stream), strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5 * wanted.std().item(), rtol=1e-5)


def test_rows_are_worked_on_in_parts(monkeypatch):
    layer, _ = make_layer("fused")
    other, writer = copy_of(layer), make_writer()
    expected = read_back(writer, layer, writer.quantize_layer(layer))
    monkeypatch.setattr(rounding, "_ELEMENTS_AT_ONCE", 24 * 64)
    found = read_back(writer, other, writer.quantize_layer(other))
    for name, weight in expected.items():
        # Sums in another order may move a weight across the middle between two codes.
        assert (found[name] - weight).norm() < 1e-2 * weight.norm()


def test_inputs_and_weights_that_are_zero():
    layer, stream = make_layer("heads")
    layer.norms["input_norm"][3] = 0
    layer.linears["qkv_proj"].inputs[:, 3] = 0
    layer.linears["down_proj"].weights[0].zero_()
    layer.linears["gate_up_proj"].weights[1][5] = 0
    expected, writer = results(layer, stream), make_writer()
    weights = read_back(writer, layer, writer.quantize_layer(layer))
    assert all(weight.isfinite().all() for weight in weights.values())
    assert (weights["down_proj"] == 0).all()
    for found, wanted in zip(results(layer, stream), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_without_tokens_it_is_plain_rounding():
    layer, _ = make_layer(num_tokens=0)
    before, writer = copy_of(layer), make_writer()
    weights = read_back(writer, layer, writer.quantize_layer(layer))
    for name, linear in before.linears.items():
        assert torch.equal(weights[name], plainly_rounded(torch.cat(linear.weights)))


# --- what is refused, and what is said -------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 8}, "--bits 8"),
        ({"group_size": 100}, "--group-size 100"),
        ({"symmetric": True}, "--symmetric"),
        ({"bits": 3, "symmetric": True}, "--bits 3.*; --symmetric"),
    ],
)
def test_options_that_the_layout_does_not_have(change, message):
    with pytest.raises(ConfigError, match=message):
        make_writer(**change)


def test_layers_that_do_not_fit_are_refused():
    layer, _ = make_layer()
    with pytest.raises(
        CheckpointError, match=r"64 input features, which group_size 128 .* --group-size"
    ):
        make_writer(group_size=128).quantize_layer(layer)


@pytest.mark.parametrize("what", ["weight", "inputs"])
def test_numbers_that_are_not_finite_are_refused(what):
    layer, _ = make_layer()
    linear = layer.linears["down_proj"]
    (linear.weights[0] if what == "weight" else linear.inputs)[0, 0] = torch.nan
    with pytest.raises(CheckpointError, match=f"down_proj.*{what}|{what}.*down_proj"):
        make_writer().quantize_layer(layer)


def test_weights_too_large_for_scales_are_refused():
    layer, _ = make_layer(ignored=("qkv_proj", "out_proj", "gate_up_proj"))
    layer.linears["down_proj"].weights[0][0, 0] = 1e7
    with pytest.raises(CheckpointError, match="down_proj has weights too large"):
        make_writer().quantize_layer(layer)


def test_the_config_is_read_by_the_plugin_and_by_transformers():
    layer, _ = make_layer(ignored=("out_proj",))
    layer = replace(layer, model=replace(layer.model, ignored_prefixes=("model.vision_tower.",)))
    writer = make_writer(group_size=-1)
    writer.quantize_layer(layer)
    assert isinstance(writer, LayerQuantizer)
    assert writer.config() == {
        "quant_method": "awq",
        "bits": 4,
        "group_size": -1,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": [
            "model.vision_tower",
            f"{PREFIX}.self_attn.o_proj",
            "lm_head",
        ],
    }
    transformers = pytest.importorskip("transformers")
    parsed = transformers.AwqConfig(**writer.config())
    assert read_config(parsed.to_dict()) == read_config(writer.config())

"""FP8 checkpoints that are written, and what reads them: the plugin itself and compressed-tensors."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from core.errors import CheckpointError, ConfigError
from core.interfaces import LinearSpec
from core.model.families import load_hf_config, read_model
from core.quant.calibration import CalibratedLayer, CalibratedLinear, LayerQuantizer, QuantizeOptions
from core.registry import Requirements
from core.testing.checkpoints import make_checkpoint
from plugins.quant import fp8 as plugin
from plugins.quant.fp8.convert import ConvertingScheme
from plugins.quant.fp8.linear import Fp8Linear

CPU = torch.device("cpu")
(ENTRY,) = plugin.core_register_quantizers()
WAYS = [
    ("channel", "dynamic"),
    ("channel", "static"),
    ("tensor", "dynamic"),
    ("tensor", "static"),
    ("block", "dynamic"),
]
PREFIX = "model.layers.0"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = make_checkpoint("llama3", tmp_path_factory.mktemp("model"))
    return read_model(load_hf_config(folder))


def make_linear(name, shards, in_features, role, *, bias=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    named = tuple((f"{PREFIX}.{shard}", size) for shard, size in shards.items())
    spec = LinearSpec(f"{PREFIX}.{name}", in_features, named, bias, torch.float32, CPU, role)
    sizes = shards.values()
    return CalibratedLinear(
        spec=spec,
        weights=[torch.randn(size, in_features, generator=generator) for size in sizes],
        biases=[torch.randn(size, generator=generator) if bias else None for size in sizes],
        inputs=torch.randn(30, in_features, generator=generator) * 5,
    )


def make_layer(model, *, ignored=()):
    qkv = {"self_attn.q_proj": 160, "self_attn.k_proj": 48, "self_attn.v_proj": 48}
    linears = {
        "qkv_proj": make_linear("self_attn.qkv_proj", qkv, 130, "qkv", bias=True, seed=1),
        "out_proj": make_linear("self_attn.o_proj", {"self_attn.o_proj": 130}, 160, "out", seed=2),
        "down_proj": make_linear("mlp.down_proj", {"mlp.down_proj": 130}, 300, "down", seed=3),
    }
    return CalibratedLayer(0, model, linears, {}, frozenset(ignored))


def make_writer(strategy="channel", scheme="dynamic"):
    return ENTRY.make_writer(QuantizeOptions(method="fp8", strategy=strategy, activation_scheme=scheme))


def make_reader(config, model):
    """Make the scheme that reads a checkpoint with this config, after asking whether it can."""
    requirements = Requirements(device="cpu", dtype="float32", quantization_config=config)
    assert ENTRY.unsupported(requirements) == []
    settings = {plugin.NAME: plugin.Settings()}
    return ENTRY.factory(SimpleNamespace(quantization=config, settings=settings, model=model))


def read(reader, linear, written):
    """Load what was written for a layer as the loader does: names and shapes must be those asked for."""
    spec, module = linear.spec, reader.make_linear(linear.spec)
    for shard, (prefix, _) in enumerate(spec.shards):
        wanted, tensors = reader.tensors(spec, shard), written[prefix]
        required = {name for name, tensor in wanted.items() if not tensor.optional}
        assert required <= set(tensors) <= set(wanted)
        reader.load(module, spec, shard, tensors)
    reader.finalize(module, spec)
    return module


def test_writers_fulfil_the_protocol():
    assert isinstance(make_writer(), LayerQuantizer)


@pytest.mark.parametrize(("strategy", "scheme"), WAYS)
def test_what_is_written_is_read_back(strategy, scheme, model):
    writer, layer = make_writer(strategy, scheme), make_layer(model)
    written = writer.quantize_layer(layer)
    reader = make_reader(writer.config(), model)
    for linear in layer.linears.values():
        module = read(reader, linear, written)
        assert isinstance(module, Fp8Linear)
        assert module.layout.inputs == scheme
        weight = torch.cat(linear.weights).double()
        bias = None if linear.biases[0] is None else torch.cat(linear.biases).double()
        exact = torch.nn.functional.linear(linear.inputs.double(), weight, bias)
        error = (module(linear.inputs) - exact).norm() / exact.norm()
        assert 1e-3 < error < 0.05


def relative_error(found, exact):
    return ((found - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize(("strategy", "scheme"), WAYS)
def test_outputs_are_nearer_than_with_weights_converted_at_load(strategy, scheme, model):
    writer, layer = make_writer(strategy, scheme), make_layer(model)
    for linear in layer.linears.values():
        mixing = torch.randn(2 * [linear.spec.in_features], generator=torch.Generator().manual_seed(4))
        linear.inputs = (
            torch.randn(700, len(mixing), generator=torch.Generator().manual_seed(5)) @ mixing
        )
    written = writer.quantize_layer(layer)
    reader = make_reader(writer.config(), model)
    converter = ConvertingScheme(strategy, keep_inputs=False)
    for linear in layer.linears.values():
        converted = converter.make_linear(linear.spec)
        for shard, weight in enumerate(linear.weights):
            bias = linear.biases[shard]
            tensors = {"weight": weight} | ({} if bias is None else {"bias": bias})
            converter.load(converted, linear.spec, shard, tensors)
        exact = linear.inputs @ torch.cat(linear.weights).T
        errors = [
            relative_error(linear.inputs @ module.dequantize().T, exact)
            for module in (read(reader, linear, written), converted)
        ]
        assert errors[0] < 0.8 * errors[1]


def test_shards_are_what_they_would_be_alone(model):
    whole = make_layer(model).linears["qkv_proj"]
    together = make_writer().quantize_layer(CalibratedLayer(0, model, {"qkv_proj": whole}, {}))
    for shard, (prefix, size) in enumerate(whole.spec.shards):
        alone = CalibratedLinear(
            replace(whole.spec, shards=((prefix, size),)),
            [whole.weights[shard]],
            [whole.biases[shard]],
            whole.inputs,
        )
        tensors = make_writer().quantize_layer(CalibratedLayer(0, model, {"qkv_proj": alone}, {}))
        torch.testing.assert_close(
            tensors[prefix]["weight_scale"], together[prefix]["weight_scale"], rtol=0, atol=0
        )
        # Sums of other lengths round otherwise, and a weight between two codes may fall to either side.
        is_same = tensors[prefix]["weight"].float() == together[prefix]["weight"].float()
        assert is_same.float().mean() > 0.98


def test_weights_handed_in_stay_as_they_are(model):
    layer, untouched = make_layer(model), make_layer(model)
    make_writer().quantize_layer(layer)
    for name, linear in layer.linears.items():
        for weight, before in zip(linear.weights, untouched.linears[name].weights, strict=True):
            assert torch.equal(weight, before)


def test_shapes_of_what_is_written(model):
    shapes = {}
    for strategy, scheme in WAYS:
        written = make_writer(strategy, scheme).quantize_layer(make_layer(model))
        tensors = written[f"{PREFIX}.self_attn.q_proj"]
        shapes[strategy, scheme] = {name: tuple(t.shape) for name, t in tensors.items()}
    usual = {"weight": (160, 130), "bias": (160,)}
    assert shapes == {
        ("channel", "dynamic"): usual | {"weight_scale": (160, 1)},
        ("channel", "static"): usual | {"weight_scale": (160, 1), "input_scale": (1,)},
        ("tensor", "dynamic"): usual | {"weight_scale": (1,)},
        ("tensor", "static"): usual | {"weight_scale": (1,), "input_scale": (1,)},
        ("block", "dynamic"): usual | {"weight_scale_inv": (2, 2)},
    }


def test_static_scales_hold_the_largest_input(model):
    layer = make_layer(model)
    written = make_writer("tensor", "static").quantize_layer(layer)
    for linear in layer.linears.values():
        for prefix, _ in linear.spec.shards:
            scale = written[prefix]["input_scale"]
            torch.testing.assert_close(scale * 448, linear.inputs.abs().max().reshape(1))


def test_tensors_share_no_memory(model):
    """Files of safetensors cannot hold such tensors."""
    written = make_writer("channel", "static").quantize_layer(make_layer(model))
    tensors = [tensor for shard in written.values() for tensor in shard.values()]
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == len(tensors)


@pytest.mark.parametrize("strategy", ["channel", "block"])
def test_ignored_layers_are_named_in_full(strategy, model):
    writer = make_writer(strategy)
    layer = make_layer(model, ignored={"qkv_proj", "down_proj"})
    assert set(writer.quantize_layer(layer)) == {f"{PREFIX}.self_attn.o_proj"}
    config = writer.config()
    assert config.get("ignore", config.get("ignored_layers")) == [
        *(f"{PREFIX}.self_attn.{name}_proj" for name in "qkv"),
        f"{PREFIX}.mlp.down_proj",
        "lm_head",
    ]
    reader = make_reader(config, model)
    kinds = {
        name: isinstance(reader.make_linear(linear.spec), Fp8Linear)
        for name, linear in layer.linears.items()
    }
    assert kinds == {"qkv_proj": False, "out_proj": True, "down_proj": False}
    assert not isinstance(reader.make_linear(make_head()), Fp8Linear)


def make_head():
    return LinearSpec("lm_head", 130, (("lm_head", 10),), False, torch.float32, CPU, "lm_head")


def test_native_configs():
    assert make_writer("tensor", "static").config() == {
        "quant_method": "fp8",
        "activation_scheme": "static",
        "ignored_layers": ["lm_head"],
    }
    assert make_writer("block").config() == {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "ignored_layers": ["lm_head"],
    }


@pytest.mark.parametrize("scheme", ["dynamic", "static"])
def test_configs_are_what_compressed_tensors_reads(scheme):
    library = pytest.importorskip("compressed_tensors.quantization")
    config = library.QuantizationConfig.model_validate(make_writer("channel", scheme).config())
    group = config.config_groups["group_0"]
    assert config.format == "float-quantized"
    assert config.ignore == ["lm_head"]
    assert (group.weights.strategy, group.weights.type) == ("channel", "float")
    assert group.input_activations.dynamic == (scheme == "dynamic")
    assert group.input_activations.strategy == {"dynamic": "token", "static": "tensor"}[scheme]


@pytest.mark.parametrize(
    ("strategy", "scheme", "message"),
    [
        ("row", "dynamic", "--strategy row is none of channel, tensor, block"),
        ("tensor", "always", "--activation-scheme always is none of dynamic, static"),
        ("block", "static", "--strategy block needs --activation-scheme dynamic"),
        ("row", "always", "--strategy row .*; --activation-scheme always"),
    ],
)
def test_options_that_it_cannot_serve(strategy, scheme, message):
    with pytest.raises(ConfigError, match=message):
        make_writer(strategy, scheme)


def test_damping_is_what_was_asked_for(model):
    written = []
    for damping in (0.01, 0.01, 0.9):
        writer = ENTRY.make_writer(QuantizeOptions(method="fp8", damp_percent=damping))
        written.append(writer.quantize_layer(make_layer(model))[f"{PREFIX}.mlp.down_proj"]["weight"])
    first, again, other = (codes.float() for codes in written)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("damping", [0.0, 1.0])
def test_damping_out_of_range(damping):
    with pytest.raises(ConfigError, match=rf"--damp-percent {damping} is not between 0 and 1"):
        ENTRY.make_writer(QuantizeOptions(method="fp8", damp_percent=damping))


def test_inputs_that_are_not_finite_are_refused(model):
    layer = make_layer(model)
    layer.linears["down_proj"].inputs[3, 4] = math.nan
    with pytest.raises(CheckpointError, match=rf"Hessian of {PREFIX}\.mlp\.down_proj"):
        make_writer().quantize_layer(layer)


def test_numbers_without_a_code_are_refused_by_name(model):
    layer = make_layer(model)
    layer.linears["down_proj"].inputs[3, 4] = math.inf
    with pytest.raises(CheckpointError, match=rf"inputs of {PREFIX}\.mlp\.down_proj"):
        make_writer("tensor", "static").quantize_layer(layer)
    layer.linears["out_proj"].weights[0][1, 1] = math.nan
    with pytest.raises(CheckpointError, match=rf"{PREFIX}\.self_attn\.o_proj\.weight"):
        make_writer().quantize_layer(layer)

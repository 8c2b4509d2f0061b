"""The plugin as a whole: models against `transformers`, and what it says of configs."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from fp8_oracle import dequantize_weight, quantize_weight, round_inputs
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from core.assemble import make_plan
from core.config import load_config
from core.errors import CheckpointError, ConfigError, PlanError
from core.interfaces import KVCacheSpec, LinearSpec
from core.model.decoder import make_decoder
from core.model.families import read_model
from core.model.weights import load_dummy, load_weights
from core.registry import Requirements
from core.testing import PluginConformance
from core.testing.attention import make_batch
from core.testing.checkpoints import FAMILIES, make_checkpoint
from plugins.attention.torch.backend import TorchAttention
from plugins.quant import fp8 as plugin
from plugins.quant.fp8.config import read_formats
from plugins.quant.fp8.formats import LayerFormat

CPU = torch.device("cpu")
E4M3 = torch.float8_e4m3fn
(ENTRY,) = plugin.core_register_quantizers()


class TestPlugin(PluginConformance):
    module = "plugins.quant.fp8"


# --- whole models ----------------------------------------------------------------------------------

LINEAR = re.compile(r".*\.(q|k|v|o|qkv|gate|up|down|gate_up)_proj\.weight")
TOKENS = [3, 17, 5, 99, 42, 8, 8, 120, 64, 31, 77, 4]
USUAL = {"num_bits": 8, "type": "float", "symmetric": True}


def compressed_config(weights, inputs, **changes):
    group = {
        "targets": ["Linear"],
        "weights": {**USUAL, **weights},
        "input_activations": None if inputs is None else {**USUAL, **inputs},
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        **changes,
    }


CONFIGS = {
    "native tensor static": {"quant_method": "fp8", "activation_scheme": "static"},
    "native tensor dynamic": {"quant_method": "fp8", "activation_scheme": "dynamic"},
    "native block": {"quant_method": "fp8", "weight_block_size": [16, 40], "fmt": "e4m3"},
    "compressed channel dynamic": compressed_config(
        {"strategy": "channel"}, {"strategy": "token", "dynamic": True}
    ),
    "compressed channel static": compressed_config({"strategy": "channel"}, {"strategy": "tensor"}),
    "compressed tensor kept": compressed_config({"strategy": "tensor"}, None, format="naive-quantized"),
    "compressed block": compressed_config(
        {"strategy": "block", "block_structure": [16, 40]},
        {"strategy": "group", "group_size": 40, "dynamic": True},
    ),
}


def block_in(config, shape):
    """Say what shares a scale under a config of these tests."""
    if "config_groups" in config:
        weights = config["config_groups"]["group_0"]["weights"]
        known = {"tensor": shape, "channel": (1, shape[1]), "block": weights.get("block_structure")}
        return tuple(known[weights["strategy"]])
    return tuple(config.get("weight_block_size") or shape)


def group_in(config):
    if "config_groups" in config:
        inputs = config["config_groups"]["group_0"]["input_activations"]
        return inputs and inputs.get("group_size")
    return (config.get("weight_block_size") or [None, None])[1]


def inputs_in(config):
    if "config_groups" in config:
        inputs = config["config_groups"]["group_0"]["input_activations"]
        return "keep" if inputs is None else "dynamic" if inputs.get("dynamic") else "static"
    return config.get("activation_scheme", "dynamic")


def is_skipped(name, config):
    skipped = [*config.get("ignored_layers", ()), *config.get("modules_to_not_convert", ())]
    skipped += config.get("ignore", ())
    return any(f".{pattern}." in f".{name}." for pattern in skipped)


def write_pair(config, variant, folder):
    """Write a quantized checkpoint, and an unquantized one of the weights that it stands for.

    :return: input scales by name of the layer.
    """
    plain, quantized = folder / "plain", folder / "quantized"
    make_checkpoint(variant, plain)
    make_checkpoint(variant, quantized)
    dense, stored, input_scales = load_file(plain / "model.safetensors"), {}, {}
    for index, (name, tensor) in enumerate(list(dense.items())):
        stored[name] = tensor
        if not LINEAR.fullmatch(name) or is_skipped(name.removesuffix(".weight"), config):
            continue
        block = block_in(config, tensor.shape)
        codes, scales = quantize_weight(tensor, block)
        dense[name] = torch.from_numpy(dequantize_weight(codes, scales, block)).float()
        stored[name] = torch.from_numpy(codes).to(E4M3)
        is_inverse = "weight_block_size" in config
        suffix = "weight_scale_inv" if is_inverse else "weight_scale"
        stored[name.replace("weight", suffix)] = torch.from_numpy(scales)
        if inputs_in(config) == "static":
            scale = input_scales[name.removesuffix(".weight")] = 0.02 + 0.001 * index
            stored[name.replace("weight", "input_scale")] = torch.tensor(scale)
    save_file(dense, plain / "model.safetensors", {"format": "pt"})
    save_file(stored, quantized / "model.safetensors", {"format": "pt"})
    content = json.loads((quantized / "config.json").read_text())
    content["quantization_config"] = config
    (quantized / "config.json").write_text(json.dumps(content))
    return input_scales


@torch.inference_mode()
def reference(path, round_of=lambda _name: None):
    """Compute logits with `transformers`; `round_of` tells what happens to a layer's inputs."""
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").double()
    for name, module in model.named_modules():
        rounding = round_of(name)
        if isinstance(module, torch.nn.Linear) and rounding is not None:
            module.register_forward_pre_hook(lambda _module, args, r=rounding: (r(args[0]),))
    return model(torch.tensor([TOKENS]), use_cache=False).logits[0]


def rounding_in(config, input_scales):
    def round_of(name):
        is_linear = LINEAR.fullmatch(f"{name}.weight")
        if not is_linear or is_skipped(name, config) or inputs_in(config) == "keep":
            return None
        scale, group = input_scales.get(name), group_in(config)

        def rounded(x):
            return torch.from_numpy(round_inputs(x[0].numpy(), scale=scale, group=group))[None]

        return rounded

    return round_of


def make_decoder_of(path, dtype="float64", **table):
    """Assemble what a plan of the checkpoint says."""
    quantization = table.pop("quantization", None)
    plan = make_plan(
        load_config(
            {
                "model": str(path),
                "dtype": dtype,
                "device": "cpu",
                "quantization": quantization,
                "plugin_settings": {"quant.fp8": table} if table else None,
            }
        )
    )
    attention, dtype = TorchAttention(), getattr(torch, dtype)
    decoder = make_decoder(
        plan.model,
        scheme=plan.factory("quant")(plan),
        attention=attention,
        dtype=dtype,
        device=CPU,
        max_len=64,
    )
    size = (plan.model.num_layers, 5, 16, plan.model.num_kv_heads, plan.model.head_dim)
    attention.allocate_cache(KVCacheSpec(*size, dtype=dtype, device=CPU))
    return decoder, attention


@torch.inference_mode()
def logits_of(decoder, attention):
    count = len(TOKENS)
    meta = attention.prepare(make_batch([0], [count], [[1]], 16))
    return decoder.logits(decoder(torch.tensor(TOKENS), torch.arange(count), meta))


def run(path, **table):
    decoder, attention = make_decoder_of(path, **table)
    load_weights(decoder, path, device=CPU)
    return logits_of(decoder, attention)


def norm(x):
    return x.norm().item()


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_the_weights_and_inputs_that_are_meant(name, tmp_path):
    config = CONFIGS[name]
    input_scales = write_pair(config, "llama-bias", tmp_path)
    plain = reference(tmp_path / "plain")
    kept = run(tmp_path / "quantized", activations="keep")
    torch.testing.assert_close(kept, plain, rtol=1e-5, atol=1e-5)
    rounded = reference(tmp_path / "plain", rounding_in(config, input_scales))
    ours = run(tmp_path / "quantized")
    if inputs_in(config) == "keep":
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
        return
    # Where the two differ by rounding of float32, single inputs may fall to another code.
    assert norm(ours - rounded) < 0.1 * norm(plain - rounded)


@pytest.mark.parametrize("variant", ["phi3", "gemma3-multimodal", "qwen3", "llama3.2"])
@pytest.mark.parametrize("name", ["native block", "compressed channel static"])
def test_families(name, variant, tmp_path):
    config = CONFIGS[name]
    if "config_groups" not in config:
        config = config | {"modules_to_not_convert": ["model.vision_tower", "layers.1.mlp", "lm_head"]}
    write_pair(config, variant, tmp_path)
    kept = run(tmp_path / "quantized", dtype="float32", activations="keep")
    expected = run(tmp_path / "plain", dtype="float32")
    torch.testing.assert_close(kept, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("key", ["ignored_layers", "modules_to_not_convert", "ignore"])
def test_skipped_layers_stay_as_they_are(key, tmp_path):
    skipped = ["model.layers.0.self_attn.o_proj", "lm_head"]
    if key == "ignore":
        base = CONFIGS["compressed channel dynamic"]
    else:
        skipped.append("model.layers.1.mlp")
        base = CONFIGS["native tensor dynamic"]
    write_pair({**base, key: skipped}, "llama3", tmp_path)
    decoder, attention = make_decoder_of(tmp_path / "quantized")
    kinds = [
        [type(module).__name__ == "Fp8Linear" for _, module in layer.linears()]
        for layer in decoder.layers
    ]
    assert kinds == [[True, False, True, True], [True, True, key == "ignore", key == "ignore"]]
    load_weights(decoder, tmp_path / "quantized", device=CPU)
    assert logits_of(decoder, attention).isfinite().all()


def test_scales_of_another_shape_are_found_before_anything_is_read(tmp_path):
    write_pair(CONFIGS["compressed channel dynamic"], "llama3", tmp_path)
    file = tmp_path / "quantized" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.mlp.down_proj.weight_scale"] = torch.ones(1, 64)
    save_file(tensors, file, {"format": "pt"})
    decoder, _ = make_decoder_of(tmp_path / "quantized")
    with pytest.raises(
        CheckpointError, match=r"down_proj\.weight_scale has shape \[1, 64\], .* \[64\]"
    ):
        load_weights(decoder, tmp_path / "quantized", device=CPU)


def test_shards_must_agree_on_being_skipped(tmp_path):
    config = {**CONFIGS["native tensor dynamic"], "ignored_layers": ["model.layers.0.self_attn.k_proj"]}
    write_pair(config, "llama3", tmp_path)
    with pytest.raises(CheckpointError, match=r"layers\.0\.self_attn\.qkv_proj must agree"):
        make_decoder_of(tmp_path / "quantized")


@pytest.mark.parametrize("strategy", ["channel", "tensor", "block"])
@pytest.mark.parametrize("activations", ["quantize", "keep"])
def test_conversion_at_load(strategy, activations, tmp_path):
    make_checkpoint("qwen2", tmp_path)
    exact = run(tmp_path)
    settings = {"strategy": strategy, "activations": activations}
    found = run(tmp_path, quantization="fp8", **settings)
    assert 0 < norm(found - exact) < 0.25 * norm(exact)


def test_the_plan_takes_settings_and_refuses_others(tmp_path):
    make_checkpoint("llama3", tmp_path)
    with pytest.raises(ConfigError, match="activations"):
        make_decoder_of(tmp_path, quantization="fp8", activations="round")


@pytest.mark.parametrize("name", [*CONFIGS, "convert"])
def test_dummy_weights_keep_activations_sane(name, tmp_path):
    make_checkpoint("llama3", tmp_path)
    quantization = "fp8" if name == "convert" else None
    if name != "convert":
        content = json.loads((tmp_path / "config.json").read_text())
        content["quantization_config"] = CONFIGS[name]
        (tmp_path / "config.json").write_text(json.dumps(content))
    decoder, attention = make_decoder_of(tmp_path, "bfloat16", quantization=quantization)
    load_dummy(decoder, 0)
    for layer in decoder.layers:
        for linear, module in layer.linears():
            y = module(torch.randn(4, linear.local.in_features, dtype=torch.bfloat16))
            assert y.isfinite().all()
            assert (y != 0).any(dim=0).all()
    logits = logits_of(decoder, attention)
    assert logits.isfinite().all()
    assert len(set(logits.argmax(-1).tolist())) > 3


# --- what is said of it before anything is built ------------------------------------------------------


def make_requirements(config):
    return Requirements(
        device="cpu",
        dtype="float32",
        quantization=config.get("quant_method", "fp8"),
        quantization_config=config,
    )


@pytest.mark.parametrize("config", [{}, *CONFIGS.values()], ids=["none", *CONFIGS])
def test_serves(config):
    assert ENTRY.unsupported(make_requirements(config)) == []


NATIVE = {"quant_method": "fp8"}
TOKEN = {"strategy": "token", "dynamic": True}


@pytest.mark.parametrize(
    ("config", "reasons"),
    [
        (NATIVE | {"activation_scheme": "magic"}, ["activation_scheme 'magic'.*'dynamic', 'static'"]),
        (NATIVE | {"fmt": "e5m2"}, ["fmt 'e5m2'.*'e4m3'"]),
        (NATIVE | {"scale_fmt": "ue5m3", "fmt": "e3m4"}, ["fmt 'e3m4'", "scale_fmt 'ue5m3'.*'ue8m0'"]),
        (
            NATIVE | {"weight_block_size": [128, 128], "activation_scheme": "static"},
            ["weight_block_size .* with activation_scheme 'static'"],
        ),
        (NATIVE | {"weight_block_size": [128]}, [r"weight_block_size is \[128\]"]),
        (NATIVE | {"weight_block_size": [0, 128]}, [r"weight_block_size is \[0, 128\]"]),
        (NATIVE | {"modules_to_convert": ["embed"]}, ["modules_to_convert is"]),
        (NATIVE | {"ignored_layers": "lm_head"}, ["ignored_layers is 'lm_head'"]),
        ({"quant_method": "fp9"}, ["quant_method 'fp9'"]),
        (
            compressed_config({"strategy": "channel"}, TOKEN, format="pack-quantized"),
            ["config_groups.group_0.format is 'pack-quantized'"],
        ),
        (
            compressed_config({"strategy": "channel", "num_bits": 4, "symmetric": False}, TOKEN),
            ["config_groups.group_0.weights is 4-bit float, asymmetric"],
        ),
        (
            compressed_config({"strategy": "token"}, {"strategy": "tensor", "dynamic": True}),
            ["weights.strategy is 'token'", "input_activations.*requests that share a step"],
        ),
        (
            compressed_config({"strategy": "channel"}, {"strategy": "channel"}),
            ["input_activations.strategy is 'channel'; known is tensor"],
        ),
        (
            compressed_config({"strategy": "channel"}, {"strategy": "channel", "dynamic": True}),
            ["input_activations.strategy is 'channel'; known are token and group"],
        ),
        (
            compressed_config({"strategy": "group", "group_size": 8, "actorder": "group"}, TOKEN),
            ["weights.actorder is 'group'"],
        ),
        ({"quant_method": "compressed-tensors", "format": "float-quantized"}, ["config_groups"]),
    ],
)
def test_names_everything_that_it_cannot_serve(config, reasons):
    found = ENTRY.unsupported(make_requirements(config))
    assert len(found) == len(reasons)
    for reason, pattern in zip(found, reasons, strict=True):
        assert re.search(pattern, reason)


@pytest.mark.parametrize(
    ("config", "bits", "step"),
    [
        ({}, 8, 1),
        (CONFIGS["native tensor static"], 8, 1),
        (NATIVE | {"weight_block_size": [128, 128]}, 8.25, 128),
        (CONFIGS["compressed channel dynamic"], 8, 1),
        (CONFIGS["compressed block"], 8.8, 80),
    ],
)
def test_sizes_that_the_plan_reckons_with(config, bits, step):
    requirements = make_requirements(config)
    assert ENTRY.weight_bits(requirements) == bits
    assert ENTRY.cut_step(requirements) == step


@pytest.fixture(scope="module")
def renamed_model():
    """Give a family whose checkpoints call layers otherwise than the decoder."""
    return read_model(FAMILIES["gemma3-multimodal"].make_config())


def make_spec(layer, name):
    prefix = f"model.layers.{layer}.{name}"
    return LinearSpec(prefix, 8, ((prefix, 8),), False, torch.float32, CPU, "down")


BLOCK = {"weight_block_size": [64, 32]}


@pytest.mark.parametrize(
    ("config", "layout"),
    [
        (NATIVE, LayerFormat(inputs="dynamic")),
        (NATIVE | {"activation_scheme": None, "fmt": None}, LayerFormat(inputs="dynamic")),
        (NATIVE | {"activation_scheme": "static"}, LayerFormat(inputs="static")),
        (NATIVE | BLOCK, LayerFormat(block=(64, 32), inputs="dynamic", group_size=32)),
        (
            NATIVE | BLOCK | {"scale_fmt": "ue8m0"},
            LayerFormat(block=(64, 32), inputs="dynamic", group_size=32, power_of_two=True),
        ),
        (
            compressed_config({"strategy": "group", "group_size": 8, "actorder": "weight"}, TOKEN),
            LayerFormat(block=(1, 8), inputs="dynamic"),
        ),
        (compressed_config({"strategy": "tensor"}, None), LayerFormat()),
    ],
)
def test_what_configs_mean(config, layout, renamed_model):
    spec = make_spec(0, "mlp.down_proj")
    assert read_formats(config, renamed_model)(spec) == layout
    kept = read_formats(config, renamed_model, keep_inputs=True)(spec)
    assert kept == replace(layout, inputs="keep")


@pytest.mark.parametrize(
    "pattern",
    ["model.layers.1.mlp.down_proj", "{}.layers.1.mlp.down_proj", r"re:.*language_model.*1\.mlp\..*"],
)
@pytest.mark.parametrize("key", ["ignored_layers", "modules_to_not_convert", "ignore"])
def test_skipped_layers_go_by_either_name(key, pattern, renamed_model):
    base = compressed_config({"strategy": "tensor"}, None) if key == "ignore" else NATIVE
    old = next(old for old, new in renamed_model.renames if new == "model.").removesuffix(".")
    format_of = read_formats(base | {key: ["lm_head", pattern.format(old)]}, renamed_model)
    assert format_of(make_spec(1, "mlp.down_proj")) is None
    assert format_of(make_spec(0, "mlp.down_proj")) is not None
    assert format_of(make_spec(1, "self_attn.o_proj")) is not None


def test_a_config_that_cannot_be_served_is_refused_by_the_plan(tmp_path):
    write_pair({"quant_method": "fp8", "activation_scheme": "magic"}, "llama3", tmp_path)
    with pytest.raises(PlanError, match=r"quant\.fp8: activation_scheme 'magic'"):
        make_decoder_of(tmp_path / "quantized")


def test_the_factory_refuses_what_nobody_asked_about():
    plan = SimpleNamespace(
        quantization={"quant_method": "fp8", "fmt": "e5m2"},
        settings={plugin.NAME: plugin.Settings()},
        model=None,
    )
    with pytest.raises(CheckpointError, match="e5m2"):
        plugin.make_scheme(plan)
